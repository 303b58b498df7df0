"""Language models that answer in words, with a LoRA adapter: loading, and folders that describe themselves.

A folder holds `mmembed.json` (kind, base model, what is asked, lengths), the adapter as peft saves it, and the
processor's files. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmembed.backbones import Family
from mmembed.backbones.adapters import lora_targets
from mmembed.backbones.loading import load_language_model, outline_backbone
from mmembed.backbones.output_embedding import check_output_embedding
from mmembed.config.blocks import LengthsConfig
from mmembed.config.generative import AnswerConfig, GenerativeConfig
from mmembed.errors import CheckpointError, ConfigError
from mmembed.generation.prompts import Writer
from mmembed.models.folder import ADAPTER, FORMAT, GENERATIVE, SETTINGS, check_fit, read_tensors
from mmembed.packaged import FOLDERS
from mmembed.preprocess import check_generation
from mmembed.version import __version__

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

FROZEN = ("vision", "projector")


@dataclass(frozen=True)
class GeneratorSettings:
    """What defines a trained reranker that answers in words, beside its weights: plain JSON data."""

    name_or_path: str
    revision: str | None
    dtype: str
    attn_implementation: str
    answer: dict[str, Any]
    lengths: dict[str, Any]

    @property
    def asked(self) -> AnswerConfig:
        of_type = {"listwise": ("documents",), "rationale": ("words",)}[self.answer["type"]]
        return AnswerConfig(**{key: self.answer[key] for key in ("type", *of_type)})


@dataclass
class Generator:
    """A language model, the processor of its family, and what writes its prompts."""

    model: Any
    processor: Any
    family: Family
    writer: Writer
    settings: GeneratorSettings

    @property
    def tokenizer(self) -> Any:
        return self.family.tokenizer


def settings_of(config: GenerativeConfig) -> GeneratorSettings:
    """Of a run that starts from a language model; one that goes on from a trained folder keeps that folder's base."""
    model = config.model
    name, revision = model.name_or_path, model.revision
    if is_generative(name):
        saved = read_generator(name)
        name, revision = saved.name_or_path, saved.revision
    elif name not in FOLDERS and os.path.isdir(name):
        name = os.path.abspath(name)  # checkpoints load from anywhere
    answer, lengths = config.answer.model_dump(mode="json"), config.lengths.model_dump(mode="json")
    return GeneratorSettings(name, revision, model.dtype, model.attn_implementation, answer, lengths)


def is_generative(folder: str | Path) -> bool:
    """Whether `mmembed.json` in this folder is that of a reranker that answers in words."""
    file = Path(folder) / SETTINGS
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("kind") == GENERATIVE)
    except (OSError, ValueError, AttributeError):
        return False


def read_generator(folder: str | Path) -> GeneratorSettings:
    """Raises CheckpointError where the folder is none of a reranker that answers in words."""
    file = Path(folder) / SETTINGS
    if not is_generative(folder):
        raise CheckpointError(
            f"{folder}: is no reranker that answers in words; train one with recipes/train_generative_reranker.py, or "
            "load an embedder or a reranker that scores with Embedder or Reranker"
        )
    described = json.loads(file.read_text(encoding="utf-8"))
    try:
        if described["format"] > FORMAT:
            raise CheckpointError(f"{file}: format {described['format']} is newer than this mmembed; upgrade mmembed")
        settings = GeneratorSettings(**described["settings"])
        LengthsConfig(**settings.lengths), settings.asked
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: cannot be read ({error}); restore it from another copy") from error
    return settings


def describe(folder: str | Path, config: GenerativeConfig, adapter: dict[str, Any], trained_with: str) -> None:
    """Writes `mmembed.json` beside a saved adapter, as the last file: without it the folder is not complete.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    described = {
        "format": FORMAT,
        "kind": GENERATIVE,
        "mmembed_version": __version__,
        "settings": asdict(settings_of(config)),
        "adapter": adapter,
        "trained_with": trained_with,
        "training_config_hash": config.hash(),
    }
    file = Path(folder) / SETTINGS
    try:
        new = file.with_name(f".{SETTINGS}.new")
        new.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(new, file)
    except OSError as error:
        raise CheckpointError(f"{file}: could not be written ({error}); free disk space, and start again") from error


def check_generator(config: GenerativeConfig) -> None:
    """What can be refused before data is read and weights are loaded.

    Raises:
        ConfigError: the backbone cannot be reached, has no output embedding, no chat template or one that leaves no
            place for an answer, or no such layers to adapt; or an adapter is asked for beside a trained one.
    """
    settings, given = settings_of(config), config.adapter.model_fields_set
    trained = is_generative(config.model.name_or_path)
    if trained and given:
        raise ConfigError(
            f"adapter.{sorted(given)[0]}: '{config.model.name_or_path}' brings a trained adapter, which goes on; "
            "remove the block, or start from its base model"
        )
    outlined = _outline(settings, config.model.trust_remote_code)
    check_generation(outlined.processor, outlined.config.model_type)
    if not outlined.config.tie_word_embeddings:
        check_output_embedding(settings.name_or_path, settings.revision, "a reranker that answers in words")
    outlined.family.set_pixel_limits(config.lengths.min_pixels, config.lengths.max_pixels)
    lora_targets(outlined, config.adapter.model_dump(mode="json")["target_modules"], FROZEN)


def lora_config(config: GenerativeConfig) -> LoraConfig:
    """peft's config of the adapter: linear layers of the language tower, as an embedder has them."""
    from peft import LoraConfig

    adapter = config.adapter.model_dump(mode="json")
    outlined = _outline(settings_of(config), config.model.trust_remote_code)
    targets, excluded = lora_targets(outlined, adapter["target_modules"], FROZEN)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter["r"],
        lora_alpha=adapter["alpha"],
        lora_dropout=adapter["dropout"],
        target_modules=targets,
        exclude_modules=excluded,
        use_dora=adapter["type"] == "dora",
        use_rslora=adapter["type"] == "rslora",
        init_lora_weights="gaussian" if adapter["init"] == "gaussian" else True,
    )


def load_generator(
    settings: GeneratorSettings,
    *,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    folder: str | Path | None = None,
    trainable: bool = False,
) -> Generator:
    """The base model of settings; with `folder` the trained adapter in it on top.

    Raises:
        ConfigError: the base cannot be loaded.
        CheckpointError: the adapter is missing, broken, or of another architecture.
    """
    loaded = load_language_model(
        settings.name_or_path,
        revision=settings.revision,
        dtype=settings.dtype if dtype is None else dtype,
        attn_implementation=settings.attn_implementation,
        trust_remote_code=trust_remote_code,
        processor_path=None if folder is None else str(folder),
    )
    model: Any = loaded.model
    if folder is not None:
        model = _with_adapter(model, Path(folder), trainable)
    writer = Writer(loaded.family, LengthsConfig(**settings.lengths), settings.asked.words)
    return Generator(model, loaded.processor, loaded.family, writer, settings)


def _with_adapter(model: Any, folder: Path, trainable: bool) -> PeftModel:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    file = folder / ADAPTER
    tensors = read_tensors(file)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json is missing or broken ({error}); restore it") from error
    config.inference_mode = not trainable
    adapted = get_peft_model(model, config)
    check_fit(file, get_peft_model_state_dict(adapted), tensors)
    set_peft_model_state_dict(adapted, tensors)
    return adapted


def _outline(settings: GeneratorSettings, trust_remote_code: bool) -> Any:
    return outline_backbone(settings.name_or_path, revision=settings.revision, trust_remote_code=trust_remote_code)
