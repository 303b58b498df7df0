"""A reranker teaches an embedder, through the real commands on a tiny model: score, stop, go on, train."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from data_tools.mining import judging
from data_tools.mining.settings import load_scoring
from data_tools.score import main as score
from mmembed import Embedder, Reranker
from mmembed.config import load_config
from mmembed.shards import Shards
from recipes.train_embedder import main as train_embedder
from recipes.train_reranker import main as train_reranker
from tests.runs import losses

ROOT = Path(__file__).parents[2]
DISTIL = ROOT / "recipes" / "configs" / "distil"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, backbone, data):
    """Folder of a reranker after four steps."""
    folder = tmp_path_factory.mktemp("teacher")
    tree = {
        "model": {"name_or_path": str(backbone), "dtype": "float32"},
        "head": {"type": "yes_no", "words": ["a", "b"]},
        "prompt": {"type": "judge", "words": ["a", "b"]},
        "adapter": {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0},
        "lengths": {"query_max_length": 200, "document_max_length": 100},
        "objective": "sft",
        "data": {"root": str(data), "train_group_size": 2, "train": [{"path": "text.jsonl"}]},
        "training": {
            "output_dir": str(folder / "reranker"), "per_device_train_batch_size": 8, "max_steps": 4,
            "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True,
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    assert train_reranker(["--config", str(folder / "run.yaml")]) == 0
    return folder / "reranker"


@pytest.fixture
def scoring(tmp_path, teacher, data):
    """scoring(output, key=value, ...) -> arguments of the command; two sources, one with pictures."""

    def arguments(output, *overrides):
        tree = {
            "output": str(tmp_path / output), "root": str(data),
            "sources": [{"path": "text.jsonl"}, {"path": "mixed.jsonl"}],
            "teacher": {"type": "reranker", "model": str(teacher), "dtype": "float32", "device": "cpu"},
        }  # fmt: skip
        (tmp_path / f"{output}.yaml").write_text(yaml.safe_dump(tree))
        return ["--config", str(tmp_path / f"{output}.yaml"), *overrides]

    return arguments


def records(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_document_has_the_rerankers_score(scoring, teacher, tmp_path, data, capsys):
    assert score(scoring("out")) == 0
    reranker = Reranker.from_pretrained(teacher, dtype="float32", device="cpu")
    said = capsys.readouterr().out
    assert "text.jsonl: 40 records, 80 scores\n" in said and "train on them with: data.root=" in said
    first = 0
    for name in ("text", "mixed"):
        ours, given = records(tmp_path / "out" / f"{name}.jsonl"), records(data / f"{name}.jsonl")
        assert [one["query"] for one in ours] == [one["query"] for one in given]
        for record in ours[:6] if name == "mixed" else ours:
            pairs = [(record["query"], document["content"]) for document in record["documents"]]
            expected = reranker.score(pairs, scale="logit")
            np.testing.assert_allclose([one["score"] for one in record["documents"]], expected, atol=2e-4)
            first += name == "text" and expected[0] > expected[1]
    (share,) = re.findall(
        r"text\.jsonl.*\n    the teacher has a relevant document first in ([\d.]+)% of 40 choices", said
    )
    assert float(share) == pytest.approx(100 * first / 40, abs=0.1)


def test_a_stopped_scoring_goes_on_and_scores_no_pair_twice(scoring, teacher, tmp_path, monkeypatch, capsys):
    from data_tools.mining.teachers.reranker import RerankerTeacher

    monkeypatch.setattr(judging, "PAIRS", 16)
    assert score(scoring("whole")) == 0
    asked, judge, write = [], RerankerTeacher.score, Shards.write

    def counted(self, queries, documents):
        asked.append(len(queries))
        return judge(self, queries, documents)

    def stopped(self, number, values):
        write(self, number, values)
        if sum(asked) >= 48:
            raise KeyboardInterrupt

    monkeypatch.setattr(RerankerTeacher, "score", counted)
    monkeypatch.setattr(Shards, "write", stopped)
    assert score(scoring("out")) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert sum(asked) == 48 and not list((tmp_path / "out").glob("*.jsonl"))
    monkeypatch.setattr(Shards, "write", write)
    assert score(scoring("out")) == 0
    assert sum(asked) == 160, "each pair once"
    for name in ("text.jsonl", "mixed.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert score(scoring("out")) == 0 and sum(asked) == 160


def test_an_embedder_teaches_by_its_cosines(scoring, backbone, tmp_path):
    block = f"teacher={{type: embedder, retriever: {{type: mmembed, model: {backbone}, dtype: float32, device: cpu}}}}"
    assert score(scoring("out", block, "sources=[{path: text.jsonl}]")) == 0
    given = records(tmp_path / "out" / "text.jsonl")
    embedder = Embedder.from_pretrained(backbone, dtype="float32", device="cpu")
    queries = embedder.encode([one["query"] for one in given], role="query")
    for place in (0, 1):
        documents = embedder.encode([one["documents"][place]["content"] for one in given], role="document")
        found = [one["documents"][place]["score"] for one in given]
        np.testing.assert_allclose(found, (queries * documents).sum(1), atol=1e-4)


def test_what_cannot_be_scored_is_refused(scoring, backbone, capsys, tmp_path):
    for overrides, message in (
        ([f"teacher={{type: reranker, model: {backbone}}}"], "is no folder of a reranker; train one"),
        (["teacher={type: rerankr, model: x}"], "did you mean 'reranker'"),
        (["teacher={type: cross_encoder, model: x}"], "x is no folder of a model"),
        (["sources=[{path: text.jsonl, corpus: [text.jsonl]}]"], "corpus has no effect, the records' own documents"),
        (["sources=[{path: text.jsonl}, {path: text.jsonl}]"], "two sources would be written to 'text.jsonl'"),
        (["rules=[top_k]"], "rules"),
    ):
        assert score(scoring("no", *overrides)) == 2
        assert message in capsys.readouterr().err, message


@pytest.fixture(scope="module")
def scored(tmp_path_factory, data):
    """Records whose teacher prefers the second document of every third query."""
    folder = tmp_path_factory.mktemp("scored")
    given = records(data / "text.jsonl")
    for number, record in enumerate(given):
        right = -1.0 if number % 3 == 0 else 3.0
        record["documents"][0]["score"], record["documents"][1]["score"] = right, 1.0
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, given)) + "\n")
    return folder


def objectives():
    """The losses of the page, as it writes them: name -> block."""
    page = (ROOT / "docs" / "reranking.md").read_text()
    (block,) = re.findall(r"```yaml\n(objective: \[\{type: infonce.*?)```", page, flags=re.S)
    lines = [yaml.safe_load(line.split("  #")[0])["objective"] for line in block.splitlines()]
    return {parts[-1]["type"]: parts for parts in lines}


def test_the_page_shows_the_four_losses():
    assert set(objectives()) == {"distil_kl", "margin_mse", "dse", "dcd"}


@pytest.mark.parametrize("loss", ["distil_kl", "margin_mse", "dse", "dcd"])
def test_an_embedder_follows_its_teacher(loss, scored, tmp_path, backbone):
    """Also where the teacher says that the labelled positive is the worse document."""
    block = objectives()[loss]
    tree = {
        "model": {"name_or_path": str(backbone), "dtype": "float32"},
        "adapter": {"type": "lora", "r": 8, "alpha": 16, "dropout": 0.0},
        "objective": block if loss == "dcd" else [{**block[1], "weight": 1.0}],
        "data": {"root": str(scored), "train_group_size": 2, "train": [{"path": "text.jsonl"}]},
        "training": {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "max_steps": 30,
            "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "warmup_steps": 0,
        },
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert train_embedder(["--config", str(tmp_path / "run.yaml")]) == 0
    found = losses(tmp_path / "out")
    assert np.mean(found[-5:]) < np.mean(found[:3])
    if loss == "dcd":
        return  # its labels pull against such a teacher
    embedder = Embedder.from_pretrained(tmp_path / "out", dtype="float32", device="cpu")
    given = records(scored / "text.jsonl")
    queries = embedder.encode([one["query"] for one in given], role="query")
    sides = [embedder.encode([one["documents"][place]["content"] for one in given]) for place in (0, 1)]
    margins = (queries * (sides[0] - sides[1])).sum(1)
    assert np.mean(margins[0::3]) < np.mean(np.delete(margins, np.s_[0::3])), "follows the teacher, not the labels"


def test_the_shipped_configs_are_a_chain():
    mined, reranker = (ROOT / "recipes/configs" / name for name in ("mining/demo.yaml", "reranker/sft.yaml"))
    tree = yaml.safe_load(mined.read_text())
    scoring, training = load_scoring(DISTIL / "score.yaml"), load_config(DISTIL / "embedder.yaml")
    assert scoring.root == tree["output"] and scoring.output == training.data.root
    assert scoring.teacher["model"] == yaml.safe_load(reranker.read_text())["training"]["output_dir"]
    assert [source.path for source in scoring.sources] == [source.path for source in training.data.train]
    assert scoring.sources[0].path.removesuffix(".jsonl") in [source["path"] for source in tree["sources"]]
    assert training.data.train_group_size == tree["negatives"] + 1
    for file, command in (("score", "python -m data_tools.score"), ("embedder", "recipes/train_embedder.py")):
        first = (DISTIL / f"{file}.yaml").read_text().splitlines()[0]
        assert command in first and first.endswith(f"--config recipes/configs/distil/{file}.yaml")
