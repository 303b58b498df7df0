"""`mmembed plan` of rerankers: the numbers of the run, of pairs and logits, from a folder without weights."""

import json
import shutil
from pathlib import Path

import pytest

from mmembed.cli import main
from mmembed.config import load_config
from mmembed.config.blocks import RerankerConfig
from mmembed.plan import load_run
from tests.recipes.test_train_reranker import config_file  # noqa: F401  the fixture
from tests.runs import build_trainer


@pytest.fixture
def bare(backbone, tmp_path):
    shutil.copytree(backbone, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    return f"model.name_or_path={tmp_path / 'bare'}"


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("head, logits", [("{type: yes_no, words: [a, b]}", 2), ("linear", 1)])
def test_the_numbers_are_those_of_the_run(config_file, bare, capsys, head, logits):  # noqa: F811
    """Pairs, tokens, what is shared of them and parameters, against the trainer that loads the weights."""
    options = [f"head={head}", "data.dev=[]"]
    plan = planned(capsys, "--config", config_file, "--sample", 99, bare, *options)
    trainer = build_trainer(load_config(config_file, options, RerankerConfig))
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in trainer.plan]
    mean = lambda values: sum(values) / len(batches)  # noqa: E731
    assert plan["batches_sampled"] == len(batches)
    assert plan["pairs"] == mean([batch.n_documents for batch in batches]) == 8
    assert plan["logits"] == logits and plan["queries_a_batch"] == 4
    assert plan["tokens"] == mean([batch.tokens for batch in batches])
    assert plan["padded_tokens"] == mean([batch.padded_tokens for batch in batches])
    assert plan["saved_tokens"] == mean([batch.saved_tokens for batch in batches]) > 0
    assert plan["negatives"] == {"own": 1.0, "in_batch": 0.0, "other_processes": 0.0}
    assert plan["longest_allowed"] == 300
    parameters = list(trainer.model.parameters())
    assert sum(mine for mine, _ in plan["parameters"].values()) == sum(p.numel() for p in parameters if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in parameters)
    assert plan["stages"][0]["weights"] == weights


def test_the_text_speaks_of_pairs(config_file, bare, capsys):  # noqa: F811
    options = ["lengths.document_max_length=10", "lengths.query_max_length=150", "data.train=[{path: text.jsonl}]"]
    assert main(["plan", "--config", str(config_file), bare, *options]) == 0
    said = capsys.readouterr().out
    assert "pairs a step and device: 8, 2 logits each; 2.0 documents a query, 1.0 of them negatives" in said
    assert "of the pairs (" in said and "are cut to fit `lengths`: the last " in said
    assert "of these tokens (" in said and "are not computed again" in said


def test_measured_throughput_is_of_pairs(config_file, capsys):  # noqa: F811
    plan = planned(capsys, "--config", config_file, "--measure", 1, "data.dev=[]")
    assert plan["tokens_per_second"] > 0


def test_a_reranker_is_known_by_what_it_names(config_file, tmp_path):  # noqa: F811
    """By its head, its prompt or its objective; an embedder's config stays one."""
    text = Path(config_file).read_text()
    without_head = tmp_path / "objective.yaml"
    without_head.write_text("\n".join(line for line in text.splitlines() if not line.startswith(("head", "prompt"))))
    for path, options in (
        (config_file, []),
        (without_head, []),
        (without_head, ["objective=[{type: sft}, {type: ranknet, weight: 0.5}]"]),
        (without_head, ["objective=contrastive", "prompt.type=judge"]),
        (without_head, ["objective=contrastive", "head=linear"]),
    ):
        assert isinstance(load_run(path, options), RerankerConfig), options
    assert not isinstance(load_run(without_head, ["objective=contrastive"]), RerankerConfig)


@pytest.mark.parametrize("path", sorted(Path("recipes/configs/reranker").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_planned(path, bare, data, capsys):
    """On a tiny backbone and other data, which the tests have."""
    words = ["head.words=[a, b]", "prompt={type: judge, words: [a, b]}"]
    block = ["head.layer=1", "head.offset=512"] if path.stem == "in_context" else words
    options = [bare, *block, f"data.root={data}", "data.train=[{path: text.jsonl}]", "model.dtype=float32"]
    plan = planned(capsys, "--config", path, "--devices", 2, *options, "--memory", "80GB")
    assert plan["pairs"] > 0 and all(stage["fits"] for stage in plan["stages"])
