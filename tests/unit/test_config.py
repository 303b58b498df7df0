"""The config: names users know, overrides, and what is refused before anything heavy is loaded."""

import subprocess
import sys

import pytest

from mmembed.config import build_config, load_config
from mmembed.errors import ConfigError


def test_importing_and_loading_needs_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training: {learning_rate: 1e-4}\n")
    code = (
        "import sys; from mmembed.config import load_config; "
        f"assert load_config({str(path)!r}).training.arguments['learning_rate'] == 1e-4; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("known", "ours"),
    [
        ({"model_name_or_path": "x"}, {"model": {"name_or_path": "x"}}),
        ({"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}, {"adapter": {"r": 4, "alpha": 8, "dropout": 0.0}}),
        ({"lora_target_modules": ["q_proj"]}, {"adapter": {"target_modules": ["q_proj"]}}),
        ({"temperature": 0.02}, {"objective": {"type": "contrastive", "temperature": 0.02}}),
        (
            {"temperature": 0.02, "objective": "contrastive"},
            {"objective": {"type": "contrastive", "temperature": 0.02}},
        ),
        (
            {"negatives_cross_device": False, "mrl_dims": [64]},
            {"objective": {"type": "contrastive", "cross_device_negatives": False, "matryoshka": {"dims": [64]}}},
        ),
        ({"train_group_size": 4}, {"data": {"train_group_size": 4}}),
        (
            {"query_max_len": 32, "passage_max_len": 64},
            {"lengths": {"query_max_length": 32, "document_max_length": 64}},
        ),
        ({"max_pixels": 50176}, {"lengths": {"max_pixels": 50176}}),
        ({"query_prefix": "query: "}, {"prompt": {"type": "plain", "query_prefix": "query: "}}),
        ({"grad_cache": True, "gc_chunk_size": 8}, {"training": {"grad_cache": True, "chunk_rows": 8}}),
        ({"learning_rate": 1e-5, "bf16": True}, {"training": {"learning_rate": 1e-5, "bf16": True}}),
        ({"training": {"gradient_checkpointing": True}}, {"model": {"gradient_checkpointing": True}}),
        ({"same_dataset_within_batch": True}, {}),
    ],
    ids=str,
)
def test_names_of_other_toolkits(known, ours):
    assert build_config(known) == build_config(ours)


def test_overrides_win_and_reach_into_lists():
    tree = {"lora_r": 8, "training": {"learning_rate": 1e-3}, "data": {"train": [{"path": "a"}, {"path": "b"}]}}
    overrides = ["lora_r=4", "learning_rate=2e-5", "data.train.1.weight=2", "objective.temperature=0.1"]
    config = build_config(tree, overrides)
    assert config.adapter.r == 4
    assert config.training.arguments["learning_rate"] == 2e-5
    assert [source.weight for source in config.data.train] == [None, 2]
    assert config.objective == {"type": "contrastive", "temperature": 0.1}
    assert tree["data"]["train"][1] == {"path": "b"}  # the caller's tree is not touched


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train.path=x", r"'data.train' is a list of 2; name a place from 0 on, as in data\.train\.0\.path$"),
        ("data.train.5.weight=2", r"'data.train' is a list of 2; .* as in data\.train\.0\.weight$"),
        ("training.learning_rate=[1", r"override 'training.learning_rate=\[1': not valid YAML.*; correct the value"),
        ("training.output_dir=2024-13-45", "not valid YAML: month must be in 1..12; correct the value, or quote it"),
        ("training.output_dir=" + "[" * 3000, "not valid YAML"),
    ],
)
def test_overrides_that_cannot_be_read(override, message):
    with pytest.raises(ConfigError, match=message):
        build_config({"data": {"train": [{"path": "a"}, {"path": "b"}]}}, [override])


@pytest.mark.parametrize(
    ("objective", "meant"),
    [
        (["contrastive", {"type": "supcon", "weight": 0.5}], "objective.0"),
        ({"by_task": {"sts": "cosent"}}, "objective.by_task.sts"),
        ({"by_source": {"a": "contrastive"}}, "objective.by_source.a"),
    ],
    ids=["list", "by_task", "by_source"],
)
def test_short_names_of_one_objective_beside_several(objective, meant):
    with pytest.raises(ConfigError, match=f"'temperature' belongs to one objective.*; write {meant}.temperature for"):
        build_config({"objective": objective}, ["temperature=0.05"])
    for tree in ({"mrl_dims": [64], "objective": objective}, {"objective": objective, "mrl_dims": [64]}):
        with pytest.raises(ConfigError, match=f"write {meant}.matryoshka.dims for"):
            build_config(tree)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (b"1: 2", "the key 1 is no name; known: adapter"),
        ("model: {name_or_path: caf\xe9}".encode("latin-1"), r"not UTF-8 \(byte 25\); convert the file"),
        (b"[" * 3000, "not valid YAML"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, written, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(written)
    with pytest.raises(ConfigError, match=f"run.yaml: {message}"):
        load_config(path)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"objective": {"by_task": {"sts": "cosent"}, "scale": 2}},
            "objective: beside 'by_task' stands 'scale'; remove",
        ),
        ({"adaptor": {}}, "did you mean 'adapter'"),
        ({"adapter": {"rank": 4}}, "unknown key 'adapter.rank'"),
        ({"adapter": {"r": "four"}}, "adapter.r: found 'four'"),
        ({"adapter": {"type": "none", "r": 4}}, "'r' has no effect with type 'none'"),
        ({"adapter": {"type": "loara"}}, "'lora'"),
        ({"lora_r": 4, "adapter": {"r": 8}}, "given twice"),
        ({"model": "qwen"}, "model: found 'qwen'"),
        ({"pooling": {"num_latents": 4}}, "no 'type'"),
        ({"same_dataset_within_batch": False}, "one source"),
        ({"lengths": {"min_pixels": 9, "max_pixels": 4}}, "swap"),
        ({"data": {"train_group_size": 2, "positives_per_query": 3}}, "above train_group_size"),
        ({"data": {"train": [{"path": "a"}, {"path": "a"}]}}, "two sources are called 'a'"),
        ({"training": {"optimizer": "lion", "optim": "adamw_torch"}}, "keep one"),
        ({"training": {"optimizer": "adafactor", "adam_beta1": 0.8}}, "no effect with optimizer 'adafactor'"),
        ({"training": {"early_stopping_threshold": 0.1}}, "without 'early_stopping_patience'"),
        ({"training": {"early_stopping_patience": 2}}, "no data.dev"),
        ({"training": {"eval_strategy": "steps"}}, "no data.dev"),
        (
            {"training": {"early_stopping_patience": 2}, "data": {"dev": [{"path": "a"}]}},
            "training.early_stopping_patience.*training.eval_strategy",
        ),
        (
            {"training": {"early_stopping_patience": 2, "eval_strategy": False}, "data": {"dev": [{"path": "a"}]}},
            "training.eval_strategy",
        ),
        ({"training": {"optimizer": "lion", "optim_args": "weight_decay=1"}}, "'optim_args' has no effect"),
        ({"training": {"optim_args": "foreach=true"}}, "'optim_args' has no effect"),
        ({"training": {"optim": "adamw_torch", "optim_args": "foreach=true"}}, "'optim_args' has no effect"),
        ({"training": {"metric_for_best_model": "ndcg_at_10"}}, "training.metric_for_best_model: nothing is evaluated"),
        ({"training": {"eval_steps": 5}}, "training.eval_steps: nothing is evaluated.*give data.dev, and set"),
        (
            {"training": {"eval_steps": 5, "eval_strategy": "epoch"}, "data": {"dev": [{"path": "a"}]}},
            "training.eval_steps has no effect with training.eval_strategy 'epoch'",
        ),
        (
            {"training": {"eval_delay": 5}, "data": {"dev": [{"path": "a"}]}},
            "training.eval_delay: nothing is evaluated while training; set training.eval_strategy",
        ),
        ({"training": {"eval_on_start": True}}, "training.eval_on_start: there is no data.dev"),
        ({"evaluation": {"tasks": ["mbpp"]}}, "evaluation: nothing is evaluated while training; set training.eval_str"),
        ({"evaluation": {"task": "mbpp"}}, "unknown key 'evaluation.task'; did you mean 'tasks'"),
        ({"training": {"save_steps": 5, "save_strategy": False}}, "training.save_steps.*save_strategy 'no'"),
        ({"training": {"save_steps": 5, "save_strategy": "epoch"}}, "training.save_steps.*save_strategy 'epoch'"),
        ({"training": {"save_strategy": "best"}}, "training.save_strategy 'best': nothing is ev.*give data.dev"),
        ({"training": {"load_best_model_at_end": True, "save_strategy": "no"}}, "load_best_model_at_end: nothing is"),
        ({"training": {"lr_scheduler_type": "greedy"}}, "lr_scheduler_type 'greedy': nothing is evaluated"),
        ({"training": {"fp16": True, "bf16": True}}, "training.fp16 . training.bf16: both are true"),
        ({"training": {"learning_rate": "abc"}}, "training.learning_rate: found 'abc'; give a number"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: found -1; give a number above 0"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate: found nan; give a number"),
        ({"training": {"max_steps": 1.5}}, "training.max_steps: found 1.5; give a whole number"),
        ({"training": {"max_steps": 0}}, "training.max_steps: found 0; give 1 or more, or -1"),
        ({"training": {"per_device_train_batch_size": 0}}, "training.per_device_train_batch_size: found 0; give"),
        ({"training": {"bf16": "false"}}, "training.bf16: found 'false'; give true or false"),
        ({"training": {"weight_decay": -0.1}}, "training.weight_decay: found -0.1; give 0 or more"),
        ({"training": {"adam_beta2": 1}}, "training.adam_beta2: found 1; give a number below 1"),
        ({"training": {"logging_strategy": True}}, "training.logging_strategy: found True; give a string"),
        ({"training": {"hub_model_id": "me/mine"}}, "without mmembed.json"),
        ({"training": {"hub_token": "x"}}, "without mmembed.json"),
        ({"training": {"hub_strategy": "end"}}, "without mmembed.json"),
        ({"training": {"gradient_checkpointing_kwargs": {"use_reentrant": True}}}, "model.gradient_checkpointing"),
        ({"training": {"grad_cache": True}}, "token_budget"),
        ({"adapter": {"type": "prefix"}, "model": {"attention": "bidirectional"}}, "causal"),
        ({"adapter": {"type": "prompt"}, "model": {"gradient_checkpointing": True}}, "cache"),
        ({"adapter": {"type": "qlora"}, "model": {"dtype": "float32"}}, "bfloat16"),
        ({"model": {"freeze": ["language"]}}, "language"),
        ({"model": {"freeze": ["ears"]}}, "model.freeze"),
        (
            {"model": {"freeze": ["vision", "projector"]}, "training": {"learning_rates": {"vision": 1e-5}}},
            r"training.learning_rates.vision: .*set model.freeze: \[projector\]",
        ),
        ({"training": {"learning_rates": {"language": -1}}}, "training.learning_rates.language: found -1"),
        ({"training": {"learning_rates": {"visoin": 1e-5}}}, "training.learning_rates.visoin"),
        ({"pooling": "multi_vector", "objective": {"type": "contrastive", "similarity": "cosine"}}, "maxsim"),
        ({"pooling": "mean", "objective": {"type": "contrastive", "similarity": "maxsim"}}, "multi_vector"),
        ({"projection": 64, "mrl_dims": [128]}, "above projection 64"),
        ({"objective": {"type": "contrastive", "similarity": "dot"}, "mrl_dims": [8]}, "unit vector"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(tree, message):
    with pytest.raises(ConfigError, match=message):
        build_config(tree)


def test_options_of_evaluations_and_checkpoints_are_taken_where_they_act():
    dev = {"dev": [{"path": "a"}]}
    for training in (
        {"eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 5, "eval_delay": 2},
        {"eval_strategy": "epoch", "save_strategy": "best"},
        {"save_steps": 5},
        {"save_strategy": False, "eval_on_start": False, "eval_delay": 0},
    ):
        build_config({"training": training, "data": dev})


def test_every_training_argument_is_checked():
    """No argument takes a list of a mapping; each takes its own default, and the values that YAML has for it."""
    from mmembed.config.arguments import UNUSABLE_ARGUMENTS, training_argument_names, wrong_values

    names = training_argument_names()
    assert {key for key in names if wrong_values({key: [{1: 2}]})} == names
    usual = {"resume_from_checkpoint": True, "eval_strategy": False, "max_steps": -1, "save_steps": 0.1, "tf32": None}
    usual |= {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"a": 1}, "report_to": ["tensorboard"]}
    assert wrong_values({**usual, "learning_rate": 1, "deepspeed": "zero1.json"}) == []
    assert UNUSABLE_ARGUMENTS.keys() < names, "a name that transformers does not have is refused as unknown"


def test_a_key_given_twice_in_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("normalize: true\nnormalize: false\n")
    with pytest.raises(ConfigError, match="'normalize' is given twice"):
        load_config(path)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "other.yaml")


def test_hash_follows_the_content():
    assert build_config({"lora_r": 4}).hash() == build_config({"adapter": {"r": 4}}).hash()
    assert build_config({"lora_r": 4}).hash() != build_config({"lora_r": 8}).hash()
