"""The demo on a tiny real backbone and two real sets: every step a real process, the report from its real results."""

import base64
import hashlib
import html.parser
import io
import itertools
import json
from pathlib import Path

import PIL.Image
import pytest

from eval import report as reporting
from eval.run import BASELINES
from mmembed.charts import nice_ticks
from mmembed.thumbnails import THUMBNAIL
from recipes import demo

DATA = Path(__file__).resolve().parents[2] / "data"
TEXT, PICTURES = TASKS = ("noto-emoji/keywords-to-name", "vega-charts")
VOID_TAGS = {"meta", "img", "line", "polyline"}

pytestmark = pytest.mark.slow  # three processes import torch and mteb


@pytest.fixture(scope="module")
def run(family_folder, tmp_path_factory):
    """The folder of a demo that failed in training, was started again, and finished."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "tiny.yaml"
    config.write_text(
        """
model: {name_or_path: set-by-the-demo}
adapter: {type: lora, r: 4, alpha: 8}
lengths: {query_max_length: 32, document_max_length: 64}
data: {train_group_size: 1, train: [{path: vega-charts, format: beir}]}
objective: {type: contrastive, temperature: 0.05}
training: {per_device_train_batch_size: 8, max_steps: 3, learning_rate: 1e-2, logging_steps: 1, save_strategy: "no"}
"""
    )
    (folder / "mining.yaml").write_text(
        """
sources: [{path: noto-emoji, format: beir, options: {lang: en}, max_examples: 40, corpus: [noto-emoji/corpus.jsonl]}]
retriever: {type: mmembed, model: set-by-the-demo}
search: {depth: 10}
rules: [random]
negatives: 2
"""
    )
    (folder / "reranker.yaml").write_text(
        """
head: linear
prompt: {type: judge, words: [a, b]}
adapter: {type: lora, r: 4, alpha: 8}
lengths: {query_max_length: 120, document_max_length: 64}
data: {train_group_size: 3, train: [{path: noto-emoji.jsonl}]}
objective: {type: ranking, loss: infonce}
training: {per_device_train_batch_size: 4, max_steps: 2, learning_rate: 1e-2, logging_steps: 1, save_strategy: "no"}
"""
    )
    common = ["--output", str(folder / "run"), "--config", str(config), "--model", str(family_folder("qwen3_vl"))]
    common += ["--rerank", "--reranked", PICTURES, "--mining-config", str(folder / "mining.yaml")]
    common += ["--reranker-config", str(folder / "reranker.yaml")]
    assert demo.main([*common, "data.train.0.path=nowhere", "--tasks", *TASKS]) == 2
    steps = json.loads((folder / "run/steps.json").read_text())
    assert list(steps) == ["before"]
    measured = (folder / "run/before.json").stat().st_mtime_ns
    assert demo.main([*common, "--tasks", *TASKS]) == 0
    assert (folder / "run/before.json").stat().st_mtime_ns == measured  # what was done is not done again
    assert not (folder / "run/steps.json").exists()  # a finished demo starts anew
    return folder / "run"


@pytest.fixture(scope="module")
def report(run):
    return json.loads((run / "report.json").read_text())


def test_report_has_the_scores_of_before_after_and_the_baselines(run, report):
    before, after = (json.loads((run / f"{name}.json").read_text())["tasks"] for name in ("before", "after"))
    for task in TASKS:
        (ours,) = [score for name, score in before[task]["scores"].items() if name not in BASELINES]
        (trained,) = after[task]["scores"].values()
        assert report["before"][task] == ours["main"] and report["after"][task] == trained["main"]
        assert report["tasks"][task]["after"] == report["after"][task]
    assert report["before"] != report["after"]
    assert report["bm25"][TEXT] == pytest.approx(0.713, abs=0.01)  # numbers that came with the data
    assert report["minilm"][TEXT] == pytest.approx(0.762, abs=0.01)
    assert report["bm25"][PICTURES] is None and report["minilm"][PICTURES] is None
    assert report["averages"]["image retrieval"]["after"] == report["after"][PICTURES]


def test_report_has_the_cost_and_the_course_of_the_training(run, report):
    assert set(report["steps"]) == {"before", "training", "after", "mining", "reranker", "reranked"}
    assert report["seconds"] == pytest.approx(sum(step["seconds"] for step in report["steps"].values()), abs=0.2)
    own = demo.resident_megabytes()  # of the process that runs the demo: here that of many tests
    assert 100 < report["peak_rss_mb"] < 4096 + own and report["pairs_per_second"] > 0
    assert [step for step, _ in report["loss"]] == [1, 2, 3]
    assert (run / "embedder/mmembed.json").exists()


def test_report_has_what_the_reranker_did(run, report):
    found = json.loads((run / "reranked/results.json").read_text())["tasks"][PICTURES]
    row = report["reranked"][PICTURES]
    assert row["retrieved"] == found["first_stage"]["ndcg_at_10"] and row["ceiling"] == found["ceiling"]
    assert row["reranked"] == next(iter(found["scores"].values()))["ndcg_at_10"] <= row["ceiling"]
    assert row["gain"] == pytest.approx(row["reranked"] - row["retrieved"], abs=1e-4)
    page = (run / "report.html").read_text()
    assert "Retrieve, then rerank" in page and "ordered by the reranker" in page
    assert reporting.reranking(run / "nothing.json") == {"reranked": {}}
    assert "rerank" not in " ".join(demo.steps(demo.parse([])))


class Page(html.parser.HTMLParser):
    """Collects what a page fetches, its pictures, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched, self.pictures, self.framed = [], [], 0, 0

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in VOID_TAGS:
            self.open.append(tag)
        self.pictures += tag == "img"
        self.framed += values.get("class") == "thumb right"
        self.fetched += [
            values[key] for key in ("src", "href") if key in values and not values[key].startswith("data:")
        ]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_frames_the_right_pictures(run):
    text = (run / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.fetched == [] and "url(" not in text and "<script" not in text
    assert 'name="viewport"' in text and len(text) < 2_000_000
    queries, shown = reporting.QUERIES_A_TASK, reporting.SHOWN
    reranked = sum(
        document["image"] is not None
        for query in json.loads((run / "reranked/examples.json").read_text())[: reporting.EXAMPLES]
        for side in query["sides"]
        for document in side["documents"]
    )
    assert page.pictures == queries * (1 + 2 * shown) + reranked > reranked
    right = 0
    for side in ("before", "after"):
        ranking = reporting.rankings_of(run / side)[PICTURES]
        for query in reporting_queries(ranking):
            right += sum(key in ranking[query]["relevant"] for key, _ in ranking[query]["top"][:shown])
    assert page.framed == right


def reporting_queries(ranking):
    """The queries on the page: by a hash of their id, whatever the model did."""
    return sorted(ranking, key=lambda key: hashlib.sha256(key.encode()).hexdigest())[: reporting.QUERIES_A_TASK]


def test_texts_of_the_data_cannot_become_markup(report):
    picture = {"task": "t", "text": "<script>alert(1)</script>", "wanted": "data:,", "sides": []}
    assert "<script>" not in reporting.render(report, [picture])


def test_relative_paths_are_of_the_folder_it_was_started_in(tmp_path, monkeypatch):
    """Its steps run in the repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    options = demo.parse(["--data-root", "sets", "--config", "my.yaml", "--model", "base", "--output", "out"])
    commands = {name: command for name, (_, command) in demo.steps(options).items()}
    training = [f"model.name_or_path={tmp_path}/base", f"data.root={tmp_path}/sets"]
    assert {*training, f"{tmp_path}/my.yaml", f"training.output_dir={tmp_path}/out/embedder"} < set(
        commands["training"]
    )
    assert {f"{tmp_path}/base", f"{tmp_path}/sets", f"{tmp_path}/out/before.json"} < set(commands["before"])
    assert demo.parse([]).model == "mmembed-nano"


def test_a_run_without_results_is_named(tmp_path, capsys):
    assert reporting.main(["--run", str(tmp_path)]) == 2
    assert "before.json" in capsys.readouterr().err


def test_thumbnails_put_transparency_on_white(tmp_path):
    path = tmp_path / "x.png"
    PIL.Image.new("RGBA", (400, 200), (255, 0, 0, 0)).save(path)
    encoded = reporting.thumbnail(path.read_bytes()).split(",")[1]
    picture = PIL.Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert picture.size == (THUMBNAIL, THUMBNAIL // 2) and picture.getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(("low", "high"), [(0, 4.7), (0, 0.03), (0, 250), (-0.4, 1.1)])
def test_ticks_are_round_and_cover_the_values(low, high):
    ticks = nice_ticks(low, high)
    steps = {round(b - a, 9) for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1 and ticks[0] <= low and ticks[-1] <= high < ticks[-1] + steps.pop() and 3 <= len(ticks) <= 8
