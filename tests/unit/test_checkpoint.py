"""Checkpoints: nothing is lost, nothing foreign is loaded, nothing is unpickled."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, build_family, items, vectors
from safetensors.torch import load_file, save_file

from mmembed import Embedder
from mmembed.config import build_config
from mmembed.config.blocks import AdapterConfig
from mmembed.content import to_content
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.continuing import build_for_training, check_trainable, inherit_settings, restore_weights
from mmembed.models.folder import read_settings
from mmembed.models.probes import check_recorded, vectors_of
from mmembed.models.verification import verify_checkpoint
from mmembed.preprocess import Item

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}


def trained(folder: Path, **settings: object):
    torch.manual_seed(0)
    model, preprocessor = build(folder, **{"adapter": LORA, **settings})
    move(model)
    return model, preprocessor


def move(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "settings",
    [
        {"pooling": "last_token", "prompt": "chat", "attention": "bidirectional"},
        {"pooling": {"type": "latent_attention", "num_latents": 7, "variant": "printed"}, "projection": 24},
        {"pooling": {"type": "multi_vector", "dim": 12}, "normalize": True, "adapter": None},
        {"pooling": "weighted_mean", "normalize": False, "prompt": {"type": "plain", "query_prefix": "query: "}},
        {"lengths": {"query_max_length": 9, "document_max_length": 30, "max_pixels": 128 * 128}, "adapter": None},
    ],
)
def test_a_folder_describes_itself(settings, family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3_vl"), **settings)
    save_checkpoint(tmp_path / "saved", model, preprocessor, training_config_hash="abc")
    reloaded, loaded_preprocessor = load_checkpoint(tmp_path / "saved")
    assert reloaded.settings == model.settings
    assert not reloaded.training
    assert torch.equal(
        vectors(model, preprocessor, items("qwen3_vl")), vectors(reloaded, loaded_preprocessor, items("qwen3_vl"))
    )
    assert reloaded.embedding_size == model.embedding_size
    described = json.loads((tmp_path / "saved" / "mmembed.json").read_text())
    assert described["training_config_hash"] == "abc"
    assert described["embedding_size"] == model.embedding_size


def test_bare_backbone_loads_with_defaults(family_folder) -> None:
    model, preprocessor = load_checkpoint(family_folder("qwen3"))
    assert model.settings.pooling == "mean"
    assert preprocessor.prompt.name == "plain"
    assert vectors(model, preprocessor, items("qwen3")).shape == (3, 64)


FULL_DISK = """
import resource, signal, sys
sys.path[:0] = {path!r}
import torch
from pathlib import Path
from mmembed.errors import CheckpointError, ConfigError
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
model, preprocessor = load_checkpoint(Path({folder!r}))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(1.0)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (200_000, 100):  # first the weights do not fit, then not even mmembed.json
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(Path({folder!r}), model, preprocessor)
    except CheckpointError as error:
        print("refused:", error)
"""


def test_previous_checkpoint_survives_a_full_disk(family_folder, tmp_path) -> None:
    """The operating system refuses to write past a number of bytes a file."""
    model, preprocessor = trained(family_folder("qwen3"), adapter=None)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    before = contents(tmp_path / "saved")
    here = Path(__file__).parent
    script = FULL_DISK.format(path=[str(here.parent)], folder=str(tmp_path / "saved"))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=here.parents[1], check=False)
    assert done.stdout.count("refused:") == done.stdout.count("previous checkpoint is untouched") == 2, done.stderr
    assert contents(tmp_path / "saved") == before
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    assert torch.equal(
        vectors(model, preprocessor, items("qwen3")), vectors(*load_checkpoint(tmp_path / "saved"), items("qwen3"))
    )


def test_saving_over_another_kind_leaves_no_stale_weights(family_folder, tmp_path) -> None:
    """An adapter left in a folder of full weights would be loaded on top of them; other people's files stay."""
    adapted, preprocessor = trained(family_folder("qwen3"))
    save_checkpoint(tmp_path / "saved", adapted, preprocessor)
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    (tmp_path / "saved" / "checkpoint-5").mkdir()
    full, preprocessor = trained(family_folder("qwen3"), adapter=None)
    save_checkpoint(tmp_path / "saved", full, preprocessor)
    names = {file.name for file in (tmp_path / "saved").iterdir()}
    assert {"notes.txt", "checkpoint-5", "model.safetensors"} <= names
    assert not {"adapter_model.safetensors", "adapter_config.json"} & names
    assert verify_checkpoint(tmp_path / "saved", full, preprocessor) == 0


def test_another_architecture_is_refused(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    _edit_settings(tmp_path / "saved", name_or_path=str(family_folder("llama")))
    with pytest.raises(CheckpointError, match="was trained on .*qwen3.*is now .*llama"):
        load_checkpoint(tmp_path / "saved")
    _edit_settings(tmp_path / "saved", name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="backbone cannot be loaded"):
        load_checkpoint(tmp_path / "saved")


def test_weights_that_do_not_fit_are_refused(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"), projection=8)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    for file, change in (("adapter_model.safetensors", "names differ"), ("pooling.safetensors", "the model has")):
        tensors = load_file(tmp_path / "saved" / file)
        name, tensor = next(iter(tensors.items()))
        broken = (
            {key: value for key, value in tensors.items() if key != name}
            if change == "names differ"
            else {name: tensor[:-1]}
        )
        save_file(broken, tmp_path / "saved" / file)
        with pytest.raises(CheckpointError, match=change):
            load_checkpoint(tmp_path / "saved")
        save_file(tensors, tmp_path / "saved" / file)
    load_checkpoint(tmp_path / "saved")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "pooling.safetensors", "mmembed.json"])
def test_broken_or_missing_files_are_named(file: str, family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"), projection=8)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    path = tmp_path / "saved" / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=file):
        load_checkpoint(tmp_path / "saved")
    path.unlink()
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "saved")


class _Trap:
    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_unpickled(family_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, preprocessor = trained(family_folder("qwen3"), adapter=None)
    save_checkpoint("saved", model, preprocessor)
    (tmp_path / "saved" / "model.safetensors").unlink()
    (tmp_path / "saved" / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError):
        load_checkpoint("saved")
    assert not (tmp_path / "unpickled").exists()


def test_remote_code_is_not_run_unless_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").mkdir()
    configuration = {"model_type": "foreign", "auto_map": {"AutoConfig": "code.Foreign", "AutoModel": "code.Foreign"}}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(configuration))
    (tmp_path / "foreign" / "code.py").write_text("open('executed', 'w')\nclass Foreign: ...\n")
    with pytest.raises(ConfigError, match="code of its own"):
        load_checkpoint("foreign")
    assert not (tmp_path / "executed").exists()


CODE = """
import torch
from transformers import PretrainedConfig, Qwen3Config, Qwen3Model

open('executed', 'a').write('x')


class Config(Qwen3Config):
    model_type = "foreign"


class Model(Qwen3Model):
    config_class = Config
"""


def _bring_code(folder: Path) -> None:
    """Makes a backbone folder one that needs its own code."""
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_foreign.Config", "AutoModel": "modeling_foreign.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "foreign", "auto_map": classes}))
    (folder / "modeling_foreign.py").write_text(CODE)


@pytest.mark.parametrize("adapter", [LORA, None])
def test_a_checkpoint_cannot_ask_for_remote_code(adapter, tmp_path, monkeypatch) -> None:
    """Not even with the flag in its own mmembed.json; the user's word is needed, and is not written down."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)
    base = build_family("qwen3", tmp_path)
    model, preprocessor = trained(base, adapter=adapter)
    save_checkpoint("saved", model, preprocessor)
    _bring_code(base if adapter else tmp_path / "saved")
    _edit_settings(tmp_path / "saved", trust_remote_code=True)
    described = json.loads((tmp_path / "saved" / "mmembed.json").read_text())
    (tmp_path / "saved" / "mmembed.json").write_text(
        json.dumps({**described, "architecture": {**described["architecture"], "model_type": "foreign"}})
    )
    with pytest.raises(CheckpointError, match="code of its own.*trust_remote_code"):
        load_checkpoint("saved")
    assert not (tmp_path / "executed").exists()
    model, preprocessor = load_checkpoint("saved", trust_remote_code=True)
    assert (tmp_path / "executed").exists()
    save_checkpoint("again", model, preprocessor)
    assert "trust_remote_code" not in json.loads((tmp_path / "again" / "mmembed.json").read_text())["settings"]


@pytest.mark.parametrize(
    ("empty", "adapter"), [("lora_A", True), ("projection.", True), ("projection.", False), ("q_proj", False)]
)
def test_empty_tensors_are_refused(family_folder, tmp_path, empty, adapter) -> None:
    """What ZeRO-3 leaves behind when parameters are saved without being gathered."""
    settings = {} if adapter else {"adapter": None}
    model, preprocessor = trained(family_folder("qwen3"), projection=24, **settings)
    state = {name: tensor.new_empty(0) if empty in name else tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="is empty"):
        save_checkpoint(tmp_path / "saved", model, preprocessor, state_dict=state)
    assert not list(tmp_path.iterdir())


def test_verification_notices_untrained_and_changed_weights(family_folder, tmp_path) -> None:
    for settings in ({"adapter": LORA}, {"adapter": None}):
        model, preprocessor = build(family_folder("qwen3"), **settings)
        save_checkpoint(tmp_path / "saved", model, preprocessor)
        with pytest.raises(CheckpointError, match="before training"):
            verify_checkpoint(tmp_path / "saved", model, preprocessor)
        move(model)
        with pytest.raises(CheckpointError, match="differ by"):
            verify_checkpoint(tmp_path / "saved", model, preprocessor)


@pytest.mark.parametrize(
    "settings",
    [
        {"projection": 8, "freeze": ("vision", "projector", "language")},
        {"freeze": ("language", "projector")},  # texts have the vectors of the backbone; a picture has not
    ],
    ids=["head", "vision"],
)
def test_training_of_one_part_alone_is_noticed(settings, family_folder, tmp_path) -> None:
    model, preprocessor = build(family_folder("qwen3_vl"), **settings)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    with pytest.raises(CheckpointError, match="before training"):
        verify_checkpoint(tmp_path / "saved", model, preprocessor)
    move(model)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) == 0


@pytest.mark.parametrize("settings", [{}, {"adapter": None}, {"pooling": {"type": "multi_vector", "dim": 8}}])
def test_recorded_vectors_notice_what_two_loads_cannot(settings, tmp_path) -> None:
    """Another backbone of the same shape, or changed weights: every load gives the same wrong vectors."""
    base = build_family("qwen3", tmp_path)
    model, preprocessor = trained(base, **settings)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert check_recorded(tmp_path / "saved", *load_checkpoint(tmp_path / "saved")) < 1e-5
    changed = (tmp_path / "saved" if settings.get("adapter", 0) is None else base) / "model.safetensors"
    weights = load_file(changed)
    save_file({name: tensor * 1.3 for name, tensor in weights.items()}, changed, {"format": "pt"})
    reloaded = load_checkpoint(tmp_path / "saved")
    if changed.parent == base:
        verify_checkpoint(tmp_path / "saved", *reloaded)
    with pytest.raises(CheckpointError, match="away from those recorded"):
        check_recorded(tmp_path / "saved", *reloaded)


def test_vectors_are_recorded_by_verification_where_saving_could_not(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    save_checkpoint(tmp_path / "saved", model, preprocessor, state_dict=model.state_dict())  # as from sharded weights
    assert check_recorded(tmp_path / "saved", model, preprocessor) is None
    verify_checkpoint(tmp_path / "saved", model, preprocessor)
    assert check_recorded(tmp_path / "saved", model, preprocessor) == 0


@pytest.mark.parametrize("projection", [None, 16])
def test_vectors_of_an_engine_in_half_precision_are_held_to_that(family_folder, tmp_path, projection) -> None:
    """As FSDP2 in bf16 gives them of 32-bit weights: further from these than 1e-3, and no damage."""
    model, preprocessor = trained(family_folder("qwen3"), projection=projection)
    model.float()
    save_checkpoint(tmp_path / "saved", model, preprocessor, state_dict=model.state_dict())
    ours = vectors_of(copy.deepcopy(model).bfloat16(), preprocessor).float()
    verify_checkpoint(tmp_path / "saved", model, preprocessor, 0.03, vectors=ours, dtype=torch.bfloat16)
    assert 1e-3 < check_recorded(tmp_path / "saved", *load_checkpoint(tmp_path / "saved")) < 0.03


@pytest.mark.parametrize("kinds", [(LORA, None), (None, LORA), (LORA, LORA)])
def test_a_kill_while_saving_leaves_the_old_or_the_new_checkpoint(kinds, family_folder, tmp_path, monkeypatch) -> None:
    """Killed before each operation that changes the destination, once after the other."""
    old, preprocessor = trained(family_folder("qwen3"), adapter=kinds[0], projection=8)
    new, _ = trained(family_folder("qwen3"), adapter=kinds[1])
    move(new)
    batch = items("qwen3")
    of = {"old": vectors(old, preprocessor, batch), "new": vectors(new, preprocessor, batch)}
    seen = []
    for survived in range(99):
        folder = tmp_path / f"{survived}" / "saved"
        save_checkpoint(folder, old, preprocessor)
        (folder / "checkpoint-5").mkdir()
        left = iter(range(survived))
        with monkeypatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir"), (shutil, "rmtree")):
                patch.setattr(owner, name, _dying(getattr(owner, name), folder, left))
            try:
                save_checkpoint(folder, new, preprocessor)
                break
            except Killed:
                pass
        found = vectors(*load_checkpoint(folder), batch)
        seen += [name for name, expected in of.items() if torch.equal(found, expected)]
        assert len(seen) == survived + 1, "neither the old nor the new one"
        assert (folder / "checkpoint-5").is_dir()
    assert seen[0] == "old" and seen[-1] == "new" and len(seen) > 5


class Killed(BaseException):
    """Nobody catches it, like a signal."""


def _dying(function, folder: Path, left):
    def call(*arguments, **options):
        touched = [str(argument) for argument in arguments if str(argument).startswith(str(folder))]
        if touched and next(left, None) is None:
            raise Killed
        return function(*arguments, **options)

    return call


def test_newer_formats_are_refused(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    described = json.loads((tmp_path / "saved" / "mmembed.json").read_text())
    (tmp_path / "saved" / "mmembed.json").write_text(json.dumps({**described, "format": 99}))
    with pytest.raises(CheckpointError, match="upgrade mmembed"):
        read_settings(tmp_path / "saved")


def test_folder_without_anything_is_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"mmembed\.json"):
        load_checkpoint(tmp_path)


RICH = {
    "attention": "bidirectional",
    "pooling": {"type": "latent_attention", "num_latents": 5},
    "projection": 12,
    "normalize": False,
    "prompt": "instruct",
    "lengths": {"query_max_length": 40, "document_max_length": 50, "min_pixels": None, "max_pixels": None},
}


@pytest.mark.parametrize("kind", ["rslora", "none"])
def test_a_second_stage_keeps_what_the_first_one_was(kind: str, family_folder, tmp_path) -> None:
    """A config that names the folder and nothing else goes on with the same function."""
    block = AdapterConfig.model_validate({"type": kind, **({} if kind == "none" else {"r": 4, "alpha": 8})})
    model, preprocessor = trained(family_folder("qwen3"), adapter=block.model_dump(mode="json"), **RICH)
    folder = tmp_path / "first"
    save_checkpoint(folder, model, preprocessor)
    tree = {"model": {"name_or_path": str(folder)}, "objective": {"type": "contrastive", "temperature": 0.1}}
    again, its_preprocessor = build_for_training(build_config(tree))
    expected = vectors(model, preprocessor, items("qwen3"))
    assert torch.equal(expected, vectors(again.eval(), its_preprocessor, items("qwen3")))
    assert its_preprocessor.limits == preprocessor.limits
    merged = inherit_settings(build_config(tree))
    assert inherit_settings(merged) == merged
    assert (merged.projection, merged.adapter.type, merged.objective) == (12, kind, tree["objective"])
    build_for_training(build_config({**tree, "prompt": "plain", "pooling": {**RICH["pooling"], "num_heads": 8}}))
    wrong = {
        "model.attention=causal": "model.attention",
        "pooling=mean": "pooling",
        "projection=8": "projection",
        "normalize=true": "normalize",
    }
    if kind == "rslora":
        wrong |= {"adapter.alpha=64": "adapter.alpha", "adapter.type=lora": "adapter.type", "adapter.r=2": "adapter.r"}
        wrong |= {"adapter.target_modules=[q_proj]": "adapter.target_modules"}
    for override, key in wrong.items():
        with pytest.raises(ConfigError, match=f"{key}.*was saved with"):
            build_for_training(build_config(tree, [override]))


def test_resuming_under_other_settings_is_refused(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    other, _ = trained(family_folder("qwen3"), adapter={**LORA, "alpha": 64})
    with pytest.raises(CheckpointError, match="adapter.alpha 8, but the run has 64"):
        restore_weights(tmp_path / "saved", other)


def test_tensors_that_nobody_expects_are_refused(family_folder, tmp_path) -> None:
    model, preprocessor = trained(family_folder("qwen3"), projection=8)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    _edit_settings(tmp_path / "saved", projection=None)
    with pytest.raises(CheckpointError, match=r"pooling\.safetensors: holds trained tensors"):
        load_checkpoint(tmp_path / "saved")


def test_an_adapter_finds_its_relative_backbone_from_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    build_family("qwen3", tmp_path)
    model, preprocessor = trained(Path("qwen3"))
    save_checkpoint("saved", model, preprocessor)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    reloaded = load_checkpoint("../saved")
    assert torch.equal(vectors(model, preprocessor, items("qwen3")), vectors(*reloaded, items("qwen3")))


def test_training_nothing_is_refused_before_it_starts(family_folder) -> None:
    frozen = {"name_or_path": str(family_folder("qwen3_vl")), "freeze": ["vision", "projector", "language"]}
    tree = {"model": frozen, "adapter": {"type": "none"}}
    with pytest.raises(ConfigError, match="nothing is trained"):
        build_for_training(build_config(tree))
    build_for_training(build_config({**tree, "projection": 8}))
    frozen["freeze"] = ["language"]
    model, _ = build_for_training(build_config(tree))
    with pytest.raises(ConfigError, match="no record of data.train has an image"):
        check_trainable(model, pictures=False)


def _edit_settings(folder: Path, **changes: object) -> None:
    described = json.loads((folder / "mmembed.json").read_text())
    described["settings"].update(changes)
    (folder / "mmembed.json").write_text(json.dumps(described))


def test_trained_layers_are_remembered_and_a_shorter_backbone_is_a_checkpoint(family_folder, tmp_path, caplog) -> None:
    """Vectors of the full pass, of `layers`, of the shorter backbone saved and loaded again: the same."""
    folder = family_folder("qwen3_vl")
    model, preprocessor = trained(folder, dtype="float32", adapter=None, pooling="last_token", projection=8)
    model.give_layers([1])
    texts = ["a red bus", "a train"]
    with torch.no_grad():
        expected = model.eval()(preprocessor([Item(to_content(text)) for text in texts])).layers[1].numpy()
    save_checkpoint(tmp_path / "whole", model, preprocessor)
    assert json.loads((tmp_path / "whole" / "mmembed.json").read_text())["settings"]["layers"] == [1]
    short = Embedder.from_pretrained(tmp_path / "whole", dtype="float32", layers=1)
    assert "was not trained" not in caplog.text
    np.testing.assert_allclose(short.encode(texts), expected, atol=1e-5)
    short.save(tmp_path / "short")
    described = json.loads((tmp_path / "short" / "mmembed.json").read_text())
    assert described["architecture"]["num_hidden_layers"] == 1 and described["settings"]["layers"] == []
    again = Embedder.from_pretrained(tmp_path / "short", dtype="float32")
    np.testing.assert_allclose(again.encode(texts), expected, atol=1e-5)
    assert again.model.depth == 1
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("whole", "short")]
    assert sizes[1] < sizes[0]
    whole = Embedder.from_pretrained(tmp_path / "whole", dtype="float32", layers=2)
    assert whole.model.settings.layers == (1,) and whole.model.depth == 2


@pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
def test_an_adapter_is_cut_when_it_is_loaded_not_when_it_is_saved(kind, family_folder, tmp_path, caplog) -> None:
    adapter = LORA if kind == "lora" else {"type": kind, "num_virtual_tokens": 4}
    model, preprocessor = trained(family_folder("qwen3"), dtype="float32", adapter=adapter)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    model.give_layers([1])
    with torch.no_grad():
        expected = model.eval()(preprocessor([Item(to_content("a red bus"))])).layers[1].numpy()
    short = Embedder.from_pretrained(tmp_path / "saved", dtype="float32", layers=1)
    assert "layer 1 was not trained to embed, only 2; its vectors may be poor" in caplog.text
    np.testing.assert_allclose(short.encode(["a red bus"]), expected, atol=1e-5)
    with pytest.raises(CheckpointError, match="an adapter of the first 1 layers would be put on all layers of"):
        short.save(tmp_path / "short")
    assert not (tmp_path / "short").exists()
    with pytest.raises(ConfigError, match="layers: found 3; the backbone has 2, give 1 to 2"):
        Embedder.from_pretrained(tmp_path / "saved", layers=3)
