"""The page of an evaluation: the results that it was given, the right queries, nothing fetched."""

import html.parser
import json
import re

import PIL.Image
import pytest

from eval import run, run_page
from eval.examples import CUT, Examples, recognisable

DATA = {
    "corpus": [{"id": f"d{number}", "text": f"document <b>{number}</b>"} for number in range(8)],
    "queries": [{"id": f"q{number}", "text": f"query {number}"} for number in range(6)],
    "relevant_docs": {f"q{number}": {f"d{number}": 1} for number in range(6)},
}


class Table(list):
    """Rows that give a column by its name, as a table of mteb's data does."""

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


@pytest.fixture
def data():
    return DATA | {name: Table(DATA[name]) for name in ("corpus", "queries")}


def found(first):
    """Rankings of a model that finds the documents from `first` on for every query."""
    top = [(f"d{number}", 1.0 - number / 10) for number in range(first, 8)]
    return {f"q{number}": {"text": "", "top": top, "relevant": [f"d{number}"], "rank": 1} for number in range(6)}


def test_the_worst_queries_and_one_that_is_drawn(data):
    scores = {"q0": 0.9, "q1": 0.1, "q2": 1.0, "q3": 0.5, "q4": 1.0, "q5": 1.0}
    shown = run_page.examples("task", data, {"ours": found(1), "bm25": found(2), "other": found(3)}, scores)
    assert [one["text"] for one in shown[:2]] == ["query 1", "query 3"]
    assert [one["task"] for one in shown[:2]] == ["task, went worst, 0.100", "task, went worst, 0.500"]
    order = [query for query in Examples(data).drawn() if query not in ("q1", "q3")]
    assert shown[2]["text"] == f"query {order[0][1]}" and ", drawn, " in shown[2]["task"] and len(shown) == 3
    sides = {side["name"]: side["documents"] for side in shown[1]["sides"]}
    assert list(sides) == ["ours", "bm25", "judged relevant"]
    assert [document["right"] for document in sides["ours"]] == [False, False, True, False, False]
    assert [document["text"] for document in sides["judged relevant"]] == ["document <b>3</b>"]


def test_without_scores_of_queries_none_went_bad(data):
    shown = run_page.examples("task", data, {"ours": found(1)}, {})
    assert [", drawn" in one["task"] for one in shown] == [True]
    assert run_page.examples("task", data, {}, {}) == []


def test_long_texts_are_cut_and_pictures_are_small():
    shown = recognisable({"title": "A title", "text": "word " * 100, "image": PIL.Image.new("RGB", (900, 300))})
    assert shown["text"].startswith("A title word") and len(shown["text"]) == CUT + 1 and shown["text"].endswith("…")
    assert shown["image"].startswith("data:image/jpeg;base64,") and len(shown["image"]) < 4000


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A real run of two baselines on three small tasks: results and page."""
    folder = tmp_path_factory.mktemp("page")
    arguments = ["--model", "bm25", "minilm", "--tasks", "mbpp", "vega-charts", "stsb-en", "--limit", "12"]
    assert run.main([*arguments, "--html", str(folder / "p/run.html"), "--output", str(folder / "run.json")]) == 0
    return json.loads((folder / "run.json").read_text()), (folder / "p/run.html").read_text()


@pytest.mark.slow
def test_the_page_has_the_numbers_of_the_results(page):
    results, text = page
    (entry,) = [entry for name, entry in results["tasks"].items() if name == "mbpp"]
    for model, score in entry["scores"].items():
        low, high = score["interval"]
        assert f"{score['main']:.3f} ±{(high - low) / 2:.3f}" in text, model
        assert f'width: {score["main"] * 100:.1f}%"' in text
    assert "At most 12 queries of a task" in text and "bm25 leaves out" in text
    assert "no model here does it" in text, "pictures, which neither reads"
    assert text.count("mbpp, went worst") == 2 and text.count("mbpp, drawn") == 1
    assert results["tasks"]["mbpp"]["fingerprint"] in text


@pytest.mark.slow
def test_the_page_is_whole_html_and_fetches_nothing(page):
    _, text = page
    open_tags = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in {"meta", "img", "br"}:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert open_tags == []
    assert not re.search(r"(?:src|href)=[\"'](?!data:)", text) and "url(" not in text and "@import" not in text


def test_texts_of_data_are_no_html(data):
    models = {"ours": {"kind": "mmembed"}}
    entry = {"group": "text retrieval", "main_score": "ndcg_at_10", "fingerprint": "0", "scores": {"ours": None}}
    results = {
        "benchmark": "local", "limit": None, "models": models, "tasks": {"task": entry}, "missing": {}, "left_out": {},
        "averages": {"text retrieval": {"ours": None}}, "created": "now", "versions": {},
        "machine": {"cores": 1, "threads": 1, "platform": "x", "accelerator": None},
    }  # fmt: skip
    text = run_page.render(results, run_page.examples("task", data, {"ours": found(1)}, {}))
    assert "document &lt;b&gt;1&lt;/b&gt;" in text and "<b>1</b>" not in text
