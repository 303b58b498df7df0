"""What a run will cost: work counted and declared, rates measured, parts that tasks share, proxies."""

import json
from pathlib import Path
from types import SimpleNamespace

import mteb
import pytest

from eval import cost, run
from eval.cost import Estimate, Load, Rate, Work, declared_work, duration, rate_of, work_of
from eval.mteb_tasks import build_task
from eval.sets import PROXY, Cut, cut
from eval.tasks.local import ROWS, select
from mmembed.content import Image, Text

DATA = Path(__file__).resolve().parents[2] / "data"


def opened(name):
    task = build_task(select(ROWS, [name])[0], DATA, "dev")
    task.load_data()
    return task


@pytest.fixture
def clock(monkeypatch):
    """The time, which models of a known speed move on."""
    found = SimpleNamespace(now=0.0)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: found.now)
    return found


def rows_of(name):
    return [json.loads(line) for line in (DATA / name).open(encoding="utf-8")]


def test_a_ranking_is_counted_as_loops_count_it():
    task = opened("mbpp")
    data = task.dataset["default"]["dev"]
    work = work_of(task, depth=7)
    documents = {" ".join(filter(None, (row.get("title"), row["text"]))) for row in rows_of("mbpp/corpus.jsonl")}
    asked = set(data["relevant_docs"])
    queries = {row["text"] for row in rows_of("mbpp/queries.jsonl") if row["_id"] in asked}
    assert work.total.items == len(documents) + len(queries)
    assert work.total.characters == sum(map(len, documents)) + sum(map(len, queries))
    assert work.total.pictures == 0 and work.judged.items == 7 * len(asked)
    mean = sum(map(len, documents)) / len(data["corpus"]) + sum(map(len, queries)) / len(asked)
    assert work.judged.characters == pytest.approx(mean * work.judged.items)


def test_pictures_and_examples_of_a_classifier_are_counted():
    charts = work_of(opened("vega-charts"), depth=5).total
    data = opened("vega-charts").dataset["default"]["dev"]
    assert charts.pictures == len(data["corpus"])
    banking = opened("banking77")
    texts = {row["text"] for split in ("train", "dev") for row in rows_of(f"banking77/{split}.jsonl")}
    assert work_of(banking, depth=5).total.items == pytest.approx(len(texts), abs=3)  # a text may be in both parts


def test_tasks_with_one_corpus_have_it_in_common(clock):
    english, german = (work_of(opened(f"noto-emoji/{code}"), depth=5).encoded for code in ("en", "de"))
    (shared,) = english.keys() & german.keys()
    assert english[shared].pictures > 500
    work = {"en": Work(english), "de": Work(german)}

    class Model:
        name, reranks, sees = "model", False, True

        @staticmethod
        def probe(contents):
            clock.now += 1e-4 * len(contents)

    alone, kept, again = (Estimate(work, [(Model, set(work), encoded)]) for encoded in (None, (), set(english)))
    assert alone.loads["model"]["de"].pictures == english[shared].pictures
    assert kept.loads["model"]["de"].pictures == 0 and kept.loads["model"]["en"] == alone.loads["model"]["en"]
    assert again.loads["model"]["en"] == Load()
    assert alone.total > kept.total > again.total > 0


def test_mteb_declares_what_its_data_would_be_counted_as():
    """A set of mteb with its data replaced by ones of the declared size."""
    task = mteb.get_task("NFCorpus")
    stats = task.metadata.descriptive_stats["test"]
    declared = declared_work(task, 100, None)
    assert declared.total.items == 3593 + 323 and declared.total.characters == stats["number_of_characters"]
    assert declared.judged.items == 323 * 100
    cut_down = declared_work(task, 100, 10)
    assert cut_down.judged.items == 1000 and cut_down.total.items == pytest.approx(3593 + 10)
    assert declared_work(mteb.get_task("VidoreArxivQARetrieval"), 100, None).total.pictures == 500
    assert declared_work(mteb.get_task("STS17"), 100, None).total.items > 5000


def test_a_rate_is_what_a_model_takes(clock):
    """A model of a known speed: .4 ms a content, 2 us a character, 5 ms a picture."""

    def run_model(contents):
        parts = [part for content in contents for part in content]
        characters = sum(len(part.text) for part in parts if isinstance(part, Text))
        pictures = sum(isinstance(part, Image) for part in parts)
        clock.now += 4e-4 * len(contents) + 2e-6 * characters + 5e-3 * pictures

    rate = rate_of(run_model, pairs=False, sees=True)
    assert rate.character == pytest.approx(2e-6, rel=1e-6) and rate.picture == pytest.approx(5e-3, rel=1e-6)
    assert rate.seconds(Load(1000, 100_000, 100)) == pytest.approx(0.4 + 0.2 + 0.5, rel=1e-6)
    assert rate_of(lambda _: None, pairs=False, sees=False).picture == 0


def test_what_is_left_follows_what_the_tasks_so_far_took():
    estimate = Estimate({"a": Work({"x": Load(100)}), "b": Work({"y": Load(300)}), "c": None}, [])
    estimate.seconds = {"a": 10.0, "b": 30.0, "c": 0.0}
    assert estimate.left(["a"], 20.0) == pytest.approx(60.0)
    assert estimate.left([], 1.0) is None and estimate.unknown == ["c"]
    assert Rate(1, 2, 3).seconds(Load(1, 1, 1)) == 6 and duration(5999) == "100 min"


def test_a_proxy_keeps_right_documents_and_is_the_same_for_every_model():
    task = opened("medquad")
    whole = {key: list(value) for key, value in task.dataset["default"]["dev"]["relevant_docs"].items()}
    cut(task, PROXY)
    data = task.dataset["default"]["dev"]
    kept = set(data["corpus"]["id"])
    queries = data["queries"]["id"]
    assert len(queries) == PROXY.queries and set(data["relevant_docs"]) == set(queries)
    assert all(document in kept for query in queries for document in whole[query])
    assert len(kept) == PROXY.documents + len({document for query in queries for document in whole[query]})
    again = opened("medquad")
    cut(again, PROXY)
    assert again.dataset["default"]["dev"]["corpus"]["id"] == data["corpus"]["id"]


def test_a_proxy_of_a_classifier_has_fewer_examples():
    task = opened("banking77")
    cut(task, Cut(rows=50, training=200))
    assert (len(task.dataset["dev"]), len(task.dataset["train"])) == (50, 200)


def test_an_estimate_evaluates_nothing_and_says_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "out.json"
    flags = ["--tasks", "mbpp", "vega-charts", "story-pages/zu", "--output", str(output), "--estimate"]
    assert run.main(["--model", "mmembed-nano", "--no-baselines", *flags]) == 0
    said = capsys.readouterr().out
    table = {line.split()[0]: line.split()[-1] for line in said.splitlines() if line.startswith(("mbpp", "vega"))}
    assert int(table["mbpp"]) == work_of(opened("mbpp"), 100).total.items
    assert "to compute with mmembed-nano: " in said and " contents of 3 tasks, " in said and ": about " in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--limit", "5", "--proxy"], "--limit and --proxy: both say which part is evaluated"),
        (["--limit", "0"], "--limit: found 0"),
    ],
)
def test_parts_that_contradict_are_refused(flags, message, capsys):
    assert run.main(["--model", "bm25", "--tasks", "mbpp", *flags]) == 2
    assert message in capsys.readouterr().err
