"""Strategies: what a launcher or a config asks for, what contradicts it, and the shipped files."""

import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType

from mmembed.config import build_config, load_config
from mmembed.errors import ConfigError
from mmembed.training.arguments import training_arguments
from mmembed.training.engines import DeepSpeed, engine_of
from mmembed.training.launch import divides_weights, launched_with

ROOT = Path(__file__).parents[2]
BEST = {"load_best_model_at_end": True, "save_only_model": True, "eval_strategy": "steps", "save_strategy": "steps"}
LAUNCHERS = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # the launcher's default; put back afterwards


def arguments(tmp_path, adapter="lora", objective="contrastive", **training):
    data = {"dev": [{"path": "dev.jsonl"}]} if "eval_strategy" in training else {}
    config = build_config(
        {
            "adapter": {"type": adapter},
            "data": data,
            "objective": objective,
            "training": {"output_dir": str(tmp_path), **training},
        }
    )
    return training_arguments(config)


def deepspeed(tmp_path, **keys):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | keys))
    return str(path)


@pytest.mark.parametrize(
    ("keys", "training", "message"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4},
            {"per_device_train_batch_size": 8},
            "train_micro_batch_size_per_gpu=4 contradicts training.per_device_train_batch_size=8",
        ),
        ({"train_batch_size": 7}, {"per_device_train_batch_size": 8}, "train_batch_size=7 contradicts"),
        (
            {"gradient_accumulation_steps": 4},
            {"gradient_accumulation_steps": 2},
            "gradient_accumulation_steps=4 contradicts training.gradient_accumulation_steps=2",
        ),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping=0.5 contradicts training.max_grad_norm=1.0"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled=True contradicts training.bf16"),
        ({"fp16": {"enabled": True}}, {}, "fp16.enabled=True contradicts training.fp16"),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {"learning_rate": 1e-4},
            "'optimizer' would replace training.optimizer",
        ),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}},
            {},
            "'optimizer' would replace training.optimizer",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, {}, "'scheduler' would replace training.lr_scheduler_type"),
        ({"zero_optimization": {"stage": 3}}, {"adapter": "qlora"}, "adapter.type 'qlora' \\+ ZeRO-3"),
        ({"zero_optimization": {"stage": 3}}, {"objective": ["rafa", "hycd"]}, "a teacher \\(momentum 1\\)"),
        ({}, {"grad_cache": False}, "training.grad_cache: false"),
        ({}, {"optimizer": "adafactor"}, "training.optimizer 'adafactor'"),
        ({}, BEST, "training.save_only_model with load_best_model_at_end"),
        ({"zero_optimization": None}, {}, "zero_optimization"),
    ],
    ids=str,
)
def test_a_deepspeed_file_that_contradicts_the_config(tmp_path, keys, training, message):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, deepspeed=deepspeed(tmp_path, **keys), **training)


def test_what_a_deepspeed_file_leaves_out_is_the_configs(tmp_path):
    """DeepSpeed's own default clips nothing, whatever max_grad_norm says."""
    args = arguments(tmp_path, deepspeed=deepspeed(tmp_path), max_grad_norm=0.5, gradient_accumulation_steps=3)
    found = args.deepspeed_plugin.hf_ds_config.config
    assert (found["gradient_clipping"], found["gradient_accumulation_steps"]) == (0.5, 3)


def test_a_deepspeed_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="training.deepspeed: there is no file 'zero9.json'"):
        arguments(tmp_path, deepspeed="zero9.json")


@pytest.mark.parametrize(("key", "others"), [("deepspeed", {}), ("fsdp_config", {"fsdp": True})])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{\n  "zero_optimization": {"stage": 2},\n}', r":3: no JSON from column 1 .*; correct that line"),
        (b'{"stage": 2', r":1: no JSON from column 12 .*delimiter"),
        (b"[1]", "holds a list; give an object"),
        (b'{"a": "\xe4"}', "not written in UTF-8"),
    ],
    ids=["comma", "cut", "list", "latin-1"],
)
def test_a_file_of_settings_that_is_broken(tmp_path, key, others, content, message):
    file = tmp_path / "settings.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^training.{key}: {file}.*{message}"):
        arguments(tmp_path, **{key: str(file)}, **others)


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"fsdp": True}, "training.fsdp: there is one process"),
        ({"fsdp_config": {"fsdp_version": 2}}, "no effect without training.fsdp"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "FSDP1 is not offered"),
        ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "model.gradient_checkpointing"),
        ({"fsdp": True, "fsdp_config": {"reshard_after_forwrad": True}}, "did you mean 'reshard_after_forward'"),
        ({"fsdp": True, "fsdp_config": "no.json"}, "training.fsdp_config: there is no file 'no.json'"),
        ({"fsdp": True, "objective": "degla"}, "objective: learns from a teacher \\(momentum 0.9996\\).*zero2.yaml"),
        ({"fsdp": "hybrid_shard"}, "training.fsdp: found 'hybrid_shard'"),
        ({"fsdp": True, "deepspeed": "recipes/deepspeed/zero2.json"}, "keep one"),
        ({"fsdp": True, "optim": "sgd"}, "training.optim 'sgd'"),
        ({"fsdp": True, **BEST}, "training.save_only_model with load_best_model_at_end"),
        (
            {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}, "save_only_model": True},
            "training.save_only_model with fsdp_config.state_dict_type 'SHARDED_STATE_DICT'",
        ),
        ({"fsdp": True, "fsdp_config": {"state_dict_type": "LOCAL_STATE_DICT"}}, "state_dict_type: found 'LOCAL"),
    ],
    ids=str,
)
def test_what_fsdp_cannot_do_here(tmp_path, training, message):
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, **training)


@pytest.mark.parametrize(
    ("environment", "training", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {"deepspeed": "recipes/deepspeed/zero2.json"}, "keep one"),
        (
            {"ACCELERATE_USE_DEEPSPEED": "true"},
            {"deepspeed": "recipes/deepspeed/zero2.json"},
            "accelerate's YAML sets it",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            {},
            "training.bf16: false, but accelerate's mixed_precision is 'bf16'",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, {}, "FSDP1 is not offered"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, {}, "offload_params"),
    ],
    ids=str,
)
def test_what_a_launcher_asks_for(tmp_path, monkeypatch, environment, training, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        arguments(tmp_path, **training)


@pytest.mark.parametrize(("deepspeed_plugin", "fsdp"), [(object(), None), (None, True)])
def test_training_with_another_strategy_than_asked_for(deepspeed_plugin, fsdp):
    """What accelerate did with ACCELERATE_USE_CPU=true, and no test noticed."""
    accelerator = SimpleNamespace(distributed_type=DistributedType.MULTI_CPU)
    with pytest.raises(ConfigError, match="was asked for, but accelerate would train with MULTI_CPU"):
        engine_of(accelerator, SimpleNamespace(deepspeed_plugin=deepspeed_plugin, fsdp=fsdp))


@pytest.mark.parametrize(
    ("stage", "added_in", "offload", "learns", "refused"),
    [
        (1, torch.float32, False, True, True),
        (1, torch.float32, False, False, False),
        (1, torch.float32, True, True, False),
        (1, torch.bfloat16, False, True, False),
        (2, torch.float32, False, True, False),
    ],
)
def test_zero1_that_loses_the_objectives_gradient(stage, added_in, offload, learns, refused):
    inner = SimpleNamespace(get_data_types=lambda: (torch.bfloat16, added_in), zero_cpu_offload=lambda: offload)
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
    engine = DeepSpeed(SimpleNamespace(state=state, deepspeed_engine_wrapped=SimpleNamespace(engine=inner)))
    objective = torch.nn.Linear(1, 1).requires_grad_(learns)
    if refused:
        with pytest.raises(ConfigError, match=r"grad_accum_dtype 'fp32' under ZeRO-1 .* zero_optimization.stage: 2"):
            engine.prepared(objective)
    else:
        engine.prepared(objective)


def test_warnings_of_deepspeed_are_hushed_while_it_runs_alone():
    """And those of others are told."""
    plugin = SimpleNamespace(zero_stage=2)
    before = list(warnings.filters)
    engine = DeepSpeed(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert warnings.filters == before
    text = "`torch.distributed.reduce_op` is deprecated"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with engine.quiet():
            warnings.warn(text, FutureWarning, stacklevel=1)
            warnings.warn("another", FutureWarning, stacklevel=1)
        warnings.warn(text, FutureWarning, stacklevel=1)
    assert [str(one.message) for one in told] == ["another", text]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_launch_files(file):
    """Which distributed type starts several processes is a trap (MULTI_CPU starts one); the runs are in
    tests/distributed."""
    settings = yaml.safe_load(file.read_text())
    assert settings["distributed_type"] in ("MULTI_GPU", "DEEPSPEED", "FSDP")
    assert settings["num_processes"] == 2 and settings["main_process_port"] == 0
    assert f"--config_file recipes/accelerate/{file.name}" in file.read_text()
    if settings["distributed_type"] == "DEEPSPEED":
        assert (ROOT / settings["deepspeed_config"]["deepspeed_config_file"]).exists()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_deepspeed_files_leave_everything_to_the_config(tmp_path, stage):
    args = arguments(tmp_path, deepspeed=str(ROOT / "recipes" / "deepspeed" / f"zero{stage}.json"), max_grad_norm=0.3)
    found = args.deepspeed_plugin.hf_ds_config
    assert found.config["zero_optimization"]["stage"] == stage
    assert found.config["gradient_clipping"] == 0.3
    assert not found.mismatches


@pytest.mark.parametrize(("given", "divided"), [(1, False), (2, False), (3, True), ("fsdp", True), (None, False)])
def test_whether_weights_are_divided_is_known_before_a_launch(given, divided):
    """`mmembed plan` asks, for what becomes of the features of images."""
    file = str(ROOT / "recipes" / "deepspeed" / f"zero{given}.json")
    arguments = {None: {}, "fsdp": {"fsdp": True}}.get(given, {"deepspeed": file})
    assert divides_weights(arguments) == divided


def commands():
    """Every command of a shell block of the documents that starts the training recipe through a launcher."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.S)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line, comments=True) for line in lines if "recipes/train_embedder.py" in line]
    return [one for one in words if one[0] in LAUNCH]


def by_accelerate(words):
    given = launch_command_parser().parse_args(words[1:])
    file = {} if given.config_file is None else yaml.safe_load((ROOT / given.config_file).read_text())
    precision = given.mixed_precision or file.get("mixed_precision", "no")
    return given.training_script_args, {"ACCELERATE_MIXED_PRECISION": precision}


def by_torchrun(words):
    return torch.distributed.run.get_args_parser().parse_args(words).training_script_args, {}


def by_deepspeed(words):
    from deepspeed.launcher.runner import parse_args

    return parse_args(words).user_args, {}


LAUNCH = {"accelerate": by_accelerate, "torchrun": by_torchrun, "deepspeed": by_deepspeed}


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_documented_launches(words, monkeypatch):
    """The launcher knows the options, and no run refuses what it is launched with. FILE is any config."""
    monkeypatch.chdir(ROOT)
    (_, file, *overrides), environment = LAUNCH[words[0]](words[1:])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    overrides = [one for one in overrides if not one.startswith("--")]
    config = build_config({}, overrides) if file == "FILE" else load_config(file, overrides)
    launched_with(config, config.training.arguments)


def test_launches_are_documented():
    assert {words[0] for words in commands()} == set(LAUNCH)


@pytest.mark.parametrize("status", [0, 3])
def test_a_process_of_a_group_ends_after_what_is_to_be_done_at_exit(status, tmp_path):
    """And without destructors of its libraries, which have aborted one after everything was saved."""
    script = f"""
import atexit, sys
import torch.distributed as dist
from recipes.train_embedder import leave
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=0, world_size=1)
atexit.register(lambda: print("at exit"))
print("trained")
leave({status})
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == status and done.stdout.split("\n")[:2] == ["trained", "at exit"], done.stderr
