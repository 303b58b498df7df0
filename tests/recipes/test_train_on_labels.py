"""Objectives of labels and of clusters through the training command, on the packaged nano and the shipped banking77."""

import json
import math

import pytest

from data_tools.cluster import main as cluster
from mmembed.cli import main as mmembed
from recipes.train_embedder import main
from tests.recipes.test_configs import ROOT
from tests.runs import losses

BANKING = ROOT / "data" / "banking77"
TREES = "data.train=[{path: banking77, format: labelled, options: {levels: _}, max_examples: 8}]"
WORDS = "data.train=[{path: banking77, format: labelled, max_examples: 8}]"


@pytest.fixture
def config_file(tmp_path):
    """Four steps of 8 queries."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {{name_or_path: mmembed-nano, dtype: float32}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.0}}
pooling: mean
prompt: plain
lengths: {{query_max_length: 32, document_max_length: 32}}
data:
  root: {ROOT / "data"}
  train_group_size: 1
  train: [{{path: banking77, format: labelled}}]
training:
  output_dir: {tmp_path / "out"}
  per_device_train_batch_size: 8
  max_steps: 4
  learning_rate: 5e-3
  logging_steps: 1
  save_strategy: "no"
  token_budget: 2048
  disable_tqdm: true
"""
    )
    return path


def run(config_file, *overrides, expected=0):
    assert main(["--config", str(config_file), *overrides]) == expected


def log_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.fixture(scope="module")
def label_vectors(tmp_path_factory):
    """The words of banking77's labels, encoded by the nano: a fixed embedder."""
    folder = tmp_path_factory.mktemp("labels")
    labels = json.loads((BANKING / "labels.json").read_text())
    lines = [json.dumps({"id": label, "text": label.replace("_", " ")}) for label in labels]
    (folder / "labels.jsonl").write_text("\n".join(lines) + "\n")
    encode = ["encode", str(folder / "labels.jsonl"), "--model", "mmembed-nano", "--output", str(folder / "labels.enc")]
    assert mmembed(encode) == 0
    return folder / "labels.enc"


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """banking77's dev part with its clusters as labels."""
    file = tmp_path_factory.mktemp("clusters") / "clustered.jsonl"
    source = ["--source", str(BANKING), "--format", "labelled", "--options", '{"split": "dev"}']
    assert cluster([*source, "--clusters", "40", "--labels", "3", "--output", str(file)]) == 0
    return file


def test_trees_of_labels(config_file, tmp_path, capsys):
    """The same eight records in each step."""
    run(config_file, TREES, "objective={type: tree_supcon, levels: 12}")
    assert "false negatives" not in capsys.readouterr().out  # which labels tell
    log = log_of(tmp_path / "out")
    assert all(0 < entry["label_agreement"] < 0.5 for entry in log)
    assert log[-1]["loss"] < log[0]["loss"]


def test_trees_in_subspaces(config_file, tmp_path):
    run(config_file, TREES, "objective={type: tree_supcon, levels: 12, subspace_size: 8}", "training.max_steps=2")
    assert all(math.isfinite(loss) for loss in losses(tmp_path / "out"))


def test_labels_in_words(config_file, tmp_path, label_vectors):
    run(config_file, WORDS, f"objective={{type: soft_labels, vectors: {label_vectors}}}")
    log = log_of(tmp_path / "out")
    assert all(0 < entry["target_entropy"] <= 1 for entry in log)
    assert log[-1]["loss"] < log[0]["loss"]


def test_gates_of_classes(config_file, tmp_path):
    run(config_file, f"objective={{type: hydra, classes: {BANKING / 'labels.json'}}}")
    log = log_of(tmp_path / "out")
    assert all(0.3 < entry["open_gates"] < 0.7 and entry["positives"] >= 1 for entry in log)


@pytest.mark.parametrize("name", ["hydra", "mlcd", "proto_clip", "soft_labels", "tree_supcon"])
def test_a_plan_knows_them(config_file, clustered, label_vectors, capsys, name):
    overrides = {
        "hydra": [f"objective={{type: hydra, classes: {BANKING / 'labels.json'}}}"],
        "mlcd": [f"data.train=[{{path: {clustered}}}]", "objective={type: mlcd, clusters: 40}"],
        "proto_clip": ["objective={type: proto_clip, prototypes: 4, episode: 16}"],
        "soft_labels": [f"objective={{type: soft_labels, vectors: {label_vectors}}}"],
        "tree_supcon": [TREES, "objective={type: tree_supcon, levels: 8, subspace_size: 8}"],
    }[name]
    assert mmembed(["plan", "--config", str(config_file), *overrides]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlcd", "proto_clip", "hydra"])
def test_a_stop_changes_nothing(config_file, tmp_path, clustered, stop_in_step, name):
    """Draws, clusters and labels come back: losses of the steps after a stop are those of a run without one."""
    overrides = {
        "mlcd": [f"data.train=[{{path: {clustered}}}]", "objective={type: mlcd, clusters: 40, sampled: 0.5}"],
        "proto_clip": ["objective=[{type: infonce}, {type: proto_clip, prototypes: 4, episode: 16}]"],
        "hydra": [f"objective={{type: hydra, classes: {BANKING / 'labels.json'}}}"],
    }[name]
    overrides += ["training.save_strategy=steps", "training.save_steps=100"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(config_file, *overrides, f"training.output_dir={once}")
    stop_in_step(3)
    run(config_file, *overrides, f"training.output_dir={twice}", expected=75)
    run(config_file, *overrides, f"training.output_dir={twice}")
    assert losses(twice) == losses(once)
    if name == "proto_clip":
        of_prototypes = [entry["loss_proto_clip"] for entry in log_of(once)]
        assert of_prototypes[:2] == [0, 0] and min(of_prototypes[2:]) > 0
    if name == "mlcd":
        assert all(entry["labels"] == 3 and entry["classes"] >= 20 for entry in log_of(once))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.train=[{path: squad-en, format: beir}]", "objective=mlcd"],
            "'mlcd' compares labels, source 'squad-en'",
        ),
        (["objective=mlcd"], "'mlcd': a label of source 'banking77' is no cluster"),
        ([TREES], "'banking77' carries 'labels', which the objective's loss does not read"),
        ([TREES, "objective=tree_supcon"], "'tree_supcon': a label of source 'banking77' has"),
        (["objective=soft_labels"], "soft_labels.vectors: missing"),
    ],
)
def test_what_cannot_be_is_refused(config_file, overrides, message, capsys):
    run(config_file, *overrides, expected=2)
    assert message in capsys.readouterr().err
