"""Loads a backbone by name or path: the model without its language-model head, its processor, and its family.

Bidirectional attention is `is_causal = False` on the text config, the one way that acts in every family and is honoured
by vLLM too (NV-Embed removes the mask, arXiv 2405.17428); the cache is off, an embedder never generates.
Nothing is downloaded unless `name_or_path` is a hub name and the hub is reachable; remote code is off unless asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmembed.backbones.family import Family, family_class, family_of
from mmembed.backbones.patch_conv import multiply_patches
from mmembed.errors import ConfigError, nearest
from mmembed.packaged import FOLDERS, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that are their tokenizer.json


@dataclass
class Backbone:
    """`model` maps token ids to hidden states (B, T, H); `processor` is a tokenizer for text families."""

    model: PreTrainedModel
    processor: Any
    family: Family
    config: Any


def load_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    attention: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    quantization: dict[str, Any] | None = None,
    processor_path: str | None = None,
) -> Backbone:
    """Loads model, processor and family.

    Args:
        attention: `causal` or `bidirectional`; None keeps the backbone's own.
        dtype: `auto` keeps the dtype of the saved weights.
        quantization: arguments of `transformers.BitsAndBytesConfig`, for QLoRA.
        processor_path: where the processor lies, if not beside the model.

    Raises:
        ConfigError: the name is neither a folder nor a reachable model, or a value is unknown.
    """
    from transformers import AutoModel, BitsAndBytesConfig

    path = resolve_backbone(name_or_path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    arguments: dict[str, Any] = {"dtype": _dtype(dtype), "attn_implementation": attn_implementation}
    if quantization is not None:
        arguments["quantization_config"] = BitsAndBytesConfig(**quantization)
    with _explained(name_or_path, trust_remote_code, attn_implementation):
        config = _config(path, **common)
        model = AutoModel.from_pretrained(
            path, config=config, use_safetensors=True, **arguments, **common
        )  # no pickles
        multimodal = "vision_config" in config.to_dict()
        processor = load_processor(processor_path or path, multimodal=multimodal, **common)
    set_attention(model, attention)
    multiply_patches(model)
    return Backbone(model, processor, family_of(model.config, processor), model.config)


def load_language_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    processor_path: str | None = None,
) -> Backbone:
    """As `load_backbone`, but whole: with the output embedding, and a cache, to generate.

    Raises:
        ConfigError: as `load_backbone`; or weights are missing, as the output embedding is where an embedder was saved.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    path = resolve_backbone(name_or_path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(name_or_path, trust_remote_code, attn_implementation):
        config = _config(path, **common)
        multimodal = "vision_config" in config.to_dict()
        kind: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model, loaded = kind.from_pretrained(
            path, config=config, dtype=_dtype(dtype), attn_implementation=attn_implementation, use_safetensors=True,
            output_loading_info=True, **common,
        )  # fmt: skip
        processor = load_processor(processor_path or path, multimodal=multimodal, **common)
    missing = sorted(loaded["missing_keys"])
    if missing:
        raise ConfigError(
            f"model.name_or_path: '{name_or_path}' holds no '{missing[0]}' ({len(missing)} tensors are missing): it is "
            "no whole language model. An embedder is saved without its output embedding: start from the language model "
            "that it was made of"
        )
    return Backbone(model, processor, family_of(model.config, processor), model.config)


def outline_backbone(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attention: str | None = None,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "sdpa",
    vision_layers: int | None = None,
) -> Backbone:
    """As `load_backbone`, but without weights: what its layers are called and its processor writes, for checks.

    The layers are on torch's meta device: no memory, a fraction of a second. Raises ConfigError as `load_backbone`.

    Args:
        vision_layers: cut the vision tower to so many.
    """
    from transformers import AutoModel

    path = resolve_backbone(name_or_path)
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(name_or_path, trust_remote_code, attn_implementation):
        config = _config(path, **common)
        if vision_layers is not None:
            setattr(config.vision_config, family_class(config).vision_depth, vision_layers)
        wanted = _dtype(dtype)
        kept = config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModel.from_config(
                config,
                trust_remote_code=trust_remote_code,
                dtype=kept if wanted == "auto" else wanted,
                attn_implementation=attn_implementation,
            )
        processor = load_processor(path, multimodal="vision_config" in config.to_dict(), **common)
    set_attention(model, attention)
    return Backbone(model, processor, family_of(model.config, processor), model.config)


def media_read(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> frozenset[str]:
    """Which media a backbone reads (`image`, `video`, `audio`), from its `config.json`. Raises ConfigError as
    `load_backbone`."""

    with _explained(name_or_path, trust_remote_code):
        config = _config(resolve_backbone(name_or_path), revision=revision, trust_remote_code=trust_remote_code)
    return family_class(config).media_of(config)


def _config(path: str, **common: Any) -> Any:
    """The configuration of a backbone; of a whole omni model, which speaks too, that of the part that reads."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, **common)
    return vars(config).get("thinker_config") or config


@contextmanager
def _explained(name_or_path: str, trust_remote_code: bool, attention: str = "sdpa") -> Iterator[None]:
    """What transformers raises while it loads, as a ConfigError with the remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if attention not in ("sdpa", "eager") and re.search("attention|kernel", str(error), flags=re.IGNORECASE):
            raise ConfigError(
                f"model.attn_implementation: cannot load '{name_or_path}' with '{attention}' ({reason}); install what "
                "it needs, or set sdpa"
            ) from error
        if not trust_remote_code and "trust_remote_code" in str(error):
            raise ConfigError(
                f"model.name_or_path: '{name_or_path}' brings python code of its own, which is not run unless asked "
                "for; read that code, then give trust_remote_code (model.trust_remote_code: true in a config, "
                "--trust-remote-code on the command line)"
            ) from error
        raise ConfigError(
            f"model.name_or_path: cannot load '{name_or_path}' ({reason}); give a folder "
            "with config.json and safetensors weights, a model name that can be reached, or 'mmembed-nano'"
        ) from error


def set_attention(model: PreTrainedModel, attention: str | None) -> None:
    """Makes the decoder's attention `causal` or `bidirectional` (None: as it is), in place; turns the cache off."""
    text_config = model.config.get_text_config()
    model.config.use_cache = text_config.use_cache = False
    if attention is None:
        return
    if attention not in ("causal", "bidirectional"):
        raise ConfigError(
            f"model.attention: '{attention}' is unknown; {nearest(attention, ('causal', 'bidirectional'))}"
        )
    text_config.is_causal = attention == "causal"


def resolve_backbone(name_or_path: str) -> str:
    """The folder of a packaged model (`mmembed.packaged`); any other name as it is.

    Raises:
        ConfigError: the installation lacks the model.
    """
    folder = resolve(name_or_path)
    if name_or_path in FOLDERS and not Path(folder).is_dir():
        raise ConfigError(
            f"model.name_or_path: '{name_or_path}' is not in this installation; build it with "
            f"recipes/build_{FOLDERS[name_or_path]}.py or reinstall mmembed"
        )
    return folder


def load_processor(path: str, multimodal: bool, **common: Any) -> Any:
    """The processor of a vision-language model, or the tokenizer of a text model. A fast tokenizer is required."""
    from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    cls: Any = AutoProcessor if multimodal else AutoTokenizer
    if not multimodal and get_tokenizer_config(path, **common).get("tokenizer_class") in _PLAIN_TOKENIZERS:
        cls = PreTrainedTokenizerFast  # AutoTokenizer would choose by model type (Qwen2) and encode with other rules
    processor = cls.from_pretrained(path, **common)
    tokenizer = processor.tokenizer if multimodal else processor
    if not tokenizer.is_fast:
        raise ConfigError(
            f"model.name_or_path: '{path}' has a slow tokenizer, but exact instruction masks need offsets; "
            "convert it to tokenizer.json (transformers.convert_slow_tokenizer)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ConfigError(
            f"model.name_or_path: the tokenizer of '{path}' has no padding and no end token; set pad_token"
        )
    return processor


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"model.dtype: '{dtype}' is unknown; {nearest(dtype, [*DTYPES, 'auto'])}")
    return DTYPES[dtype]
