"""What a config alone tells of a run, asked before its data is read and its weights are loaded.

Options of the named components, learning rates that would act on nothing, and what the backbone's config and processor
show: target modules, dims above the embedding, a chat prompt without a template, prefix tuning, frozen towers and pixel
limits that it cannot have, a library or an attention kernel that is not installed, options of a learning rate schedule.
Reading ten million records to find a misspelt option takes seven minutes; this takes about a second.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmembed.backbones import Family, resolve_backbone
from mmembed.backbones.adapters import check_adapter, lora_targets
from mmembed.backbones.experts import check_experts
from mmembed.backbones.layers import check_layers
from mmembed.backbones.loading import outline_backbone
from mmembed.backbones.output_embedding import check_predictable
from mmembed.config.blocks import LORA_TYPES, EmbedderConfig, TypedBlock, block_type
from mmembed.data.format_base import FORMATS
from mmembed.data.pair_base import PAIR_MAKERS, maker_of
from mmembed.errors import ConfigError, nearest
from mmembed.heads import HEADS
from mmembed.heads.attention import Attention
from mmembed.models.continuing import backbone_of
from mmembed.models.embedding_model import WORDS, check_lists, settings_of, word_ids
from mmembed.models.folder import SETTINGS
from mmembed.models.randomness import draws
from mmembed.objectives import Objective, build_objective
from mmembed.pooling import POOLINGS
from mmembed.preprocess import check_template
from mmembed.prompts import PROMPTS
from mmembed.training.batch_order import check_order
from mmembed.training.benchmark import check_evaluation
from mmembed.training.guide_vectors import check_guide
from mmembed.training.optimizers import refuse_idle_rates
from mmembed.training.refresh import check_mining
from mmembed.training.supply import named_parts

_OF_BITSANDBYTES = ("adamw_8bit", "adamw_bnb", "paged_", "lion_", "ademamix", "rmsprop_bnb")  # how its names begin


def preflight(config: EmbedderConfig) -> Objective:
    """Checks a config (of `inherit_settings`); the objective that it describes.

    Raises:
        ConfigError: an unknown name or option, a value of another type, a library that is not installed, or what this
            backbone cannot have.
    """
    check_libraries(config)
    _check_attention(config.model.attn_implementation)
    check_scheduler(config.training.arguments)
    POOLINGS.check(config.pooling)
    if config.head is not None:
        HEADS.check(config.head)
    if PROMPTS.build(config.prompt).reads_pairs != (config.head is not None):
        raise ConfigError(
            f"prompt '{block_type(config.prompt)}': "
            + ("a reranker reads pairs; take judge" if config.head is not None else "reads pairs, as a reranker does")
        )
    _check_lists(config)
    objective = build_objective(config.objective)
    _check_objective(config, objective)
    for source in (*config.data.train, *config.data.dev):
        try:
            FORMATS.build({"type": source.format, **source.options})
        except ConfigError as error:
            raise ConfigError(f"data source '{source.name}': {error}") from None
    _check_pairs(config)
    check_order(config)
    check_mining(config, objective)
    check_guide(config, objective)
    check_evaluation(config)
    towers = {"vision", "audio", "projector", "router", "language", "pooling"} | (
        {"objective"} if list(objective.parameters()) else set()
    )
    refuse_idle_rates(config.training.learning_rates, towers, config.model.freeze)
    if not Path(resolve_backbone(config.model.name_or_path), SETTINGS).exists():  # a saved embedder was checked so once
        _check_backbone(config)
    elif objective.predicts:
        name, revision = backbone_of(settings_of(config))
        trusted, attention = config.model.trust_remote_code, config.model.attention
        outlined = outline_backbone(name, revision=revision, trust_remote_code=trusted, attention=attention)
        check_predictable(outlined.family, name, revision)
    _check_words(config)
    return objective


def _check_lists(config: EmbedderConfig) -> None:
    """Raises ConfigError unless prompt and head both read lists, or neither does."""
    listing = PROMPTS.build(config.prompt).reads_lists
    head = None if config.head is None else HEADS.get(block_type(config.head))
    if head is not None and head.lists != listing:
        raise ConfigError(
            f"head '{head.name}' + prompt '{block_type(config.prompt)}': "
            + (
                "the prompt writes a list of documents, and the head judges one; take head attention, or prompt judge"
                if listing
                else "the head reads a list of documents, and the prompt writes one; take prompt in_context"
            )
        )


def _check_words(config: EmbedderConfig) -> None:
    """Raises ConfigError where the prompt asks for other words than the head reads: it would read logits of answers
    that nobody asked for."""
    if config.head is None:
        return
    with torch.device("meta"):  # nothing is drawn, so that the run's weights begin as they would
        read = HEADS.build(config.head, hidden_size=8).words
    asked = PROMPTS.build(config.prompt).words
    if read and asked and read != asked:
        raise ConfigError(
            f"prompt.words {list(asked)}: the head reads {list(read)}; give both the same words in the same order, the "
            "one of relevant documents first"
        )


def check_dropout(config: EmbedderConfig, modules: Iterable[tuple[str, nn.Module]], family: Family) -> None:
    """Raises ConfigError where pairs of a source differ by dropout alone and no part that reads text has any.

    Args:
        modules: of the model, by name.
    """
    names = [source.name for source in config.data.train if source.pairs is not None and _by_dropout(source.pairs)]
    if not names:
        return
    seeing = [pattern for tower, pattern in family.towers().items() if tower in ("vision", "audio", "projector")]
    reading = [(name, one) for name, one in modules if not any(re.search(pattern, f"{name}.") for pattern in seeing)]
    if draws(reading) is None:
        raise ConfigError(
            f"data source '{names[0]}': pairs 'dropout' are a text and itself, and nothing in this model drops values: "
            "both have one vector, and nothing is learned of them. Set adapter.dropout above 0 (with lora, dora, "
            "rslora or qlora; SimCSE has 0.1), or take pairs: word_repetition"
        )


def _by_dropout(block: TypedBlock) -> bool:
    return PAIR_MAKERS.get(block_type(block)).by_dropout


def _check_pairs(config: EmbedderConfig) -> None:
    """Raises ConfigError for makers of pairs that are unknown, wrongly set, or of a source that has queries; and where
    features would be kept of pictures that never come again."""
    for source in config.data.train:
        maker = maker_of(source, config.data.ignore_fields)
        if maker is not None and "image" in maker.gives and config.training.vision_cache != "off":
            raise ConfigError(
                f"data source '{source.name}': pairs '{maker.name}' + training.vision_cache: its pictures are drawn "
                "anew each time, so features that are kept of them would fill the disk and never be read; set "
                "training.vision_cache: off"
            )


def _check_objective(config: EmbedderConfig, objective: Objective) -> None:
    """Raises ConfigError where a part of the objective compares what this config does not give it."""
    pooling = config.pooling if isinstance(config.pooling, str) else str(config.pooling["type"])
    several = POOLINGS.get(pooling).multi_vector
    for part in named_parts(objective):
        if part.answers and not (config.head is not None and HEADS.get(block_type(config.head)).lists):
            raise ConfigError(
                f"objective '{part.title}' predicts what stands behind a list of documents; it goes with head attention"
            )
        if part.judges != (config.head is not None):
            raise ConfigError(
                f"objective '{part.title}' compares vectors, and a reranker gives logits of pairs: write {{type: "
                f"ranking, loss: {part.title}}}, or another of the losses"
                if config.head is not None
                else f"objective '{part.title}' reads the logits of a reranker; train it with recipes/train_reranker.py"
            )
        if part.many_vectors not in (None, several):
            wanted = (
                "several vectors an input: use pooling 'multi_vector'" if part.many_vectors else "one vector an input"
            )
            raise ConfigError(f"objective '{part.title}' + pooling '{pooling}': it compares {wanted}")
        if part.wants_lengths and config.normalize:
            raise ConfigError(
                f"objective '{part.title}' + normalize: true: it compares dot products with a teacher's scores, and "
                "those of unit vectors stay within -1 and 1. Set normalize: false, as its paper has it, or where the "
                "teacher's scores are cosines {similarity: cosine, temperature: 1.0}"
            )
        if part.positives_needed > config.data.positives_per_query:
            raise ConfigError(
                f"objective '{part.title}' compares a query with {part.positives_needed} positives: set "
                f"data.positives_per_query to {part.positives_needed} (it is {config.data.positives_per_query}) and "
                "data.train_group_size to that or more"
            )


def check_libraries(config: EmbedderConfig) -> None:
    """Raises ConfigError where an option needs a library that is not installed."""
    optimizer = str(config.training.arguments.get("optim", config.training.optimizer or "adamw"))
    wanted = {
        "adapter.type 'qlora'": config.adapter.type == "qlora",
        f"optimizer '{optimizer}'": optimizer.startswith(_OF_BITSANDBYTES),
    }
    for what, is_wanted in wanted.items():
        if is_wanted and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(f"{what}: needs bitsandbytes, which is not installed: pip install 'mmembed[quant]'")
    trackers = config.training.arguments.get("report_to", "none")
    for name in [trackers] if isinstance(trackers, str) else trackers or []:
        check_tracker(name)


def check_tracker(name: str) -> None:
    """transformers would look for a tracker once the weights are loaded."""
    if name in ("none", "all"):  # all: those that are installed
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    if name not in INTEGRATION_TO_CALLBACK:
        raise ConfigError(
            f"training.report_to: there is no '{name}'; {nearest(name, (*INTEGRATION_TO_CALLBACK, 'none', 'all'))}"
        )
    found = (*get_available_reporting_integrations(), "flyte")  # transformers does not say whether that one is there
    if name not in found:
        raise ConfigError(
            f"training.report_to: '{name}' is not installed, or switched off; install its package, or name another "
            "tracker"
        )


def _check_attention(name: str) -> None:
    """Raises ConfigError where transformers has no attention of that name, or its package is not installed."""
    from transformers.integrations.hub_kernels import is_kernel
    from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils.import_utils import is_kernels_available

    if is_kernel(name):
        if not is_kernels_available():
            raise ConfigError(
                f"model.attn_implementation: '{name}' is a kernel of the hub and needs the package kernels, which is "
                "not installed: pip install kernels, or set sdpa"
            )
        return
    # The others are of generation, which has a paged cache, and names that mmembed registers.
    known = ["eager", *(one for one in ALL_ATTENTION_FUNCTIONS if not one.startswith(("paged|", "mmembed_")))]
    if name not in known:
        raise ConfigError(
            f"model.attn_implementation: there is no '{name}'; {nearest(name, known)}; a kernel of the hub is written "
            "org/repo"
        )
    version = re.fullmatch(r"flash_attention_(\d)", name)
    if version is None or is_kernels_available():  # then transformers takes the kernel of the hub
        return
    if not FLASH_ATTENTION_COMPATIBILITY_MATRIX[int(version[1])]["pkg_availability_check"]():
        raise ConfigError(
            f"model.attn_implementation: '{name}' needs FlashAttention {version[1]}, which is not installed; install "
            "it, or set sdpa, with which torch brings FlashAttention of its own"
        )


def check_scheduler(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for `lr_scheduler_kwargs` that the schedule does not take, or lacks."""
    from transformers import TrainingArguments
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, get_scheduler

    key, kind = "training.lr_scheduler_kwargs", str(arguments.get("lr_scheduler_type", "linear"))
    functions: dict[str, Any] = {one.value: function for one, function in TYPE_TO_SCHEDULER_FUNCTION.items()}
    if kind not in functions:
        return  # `training_arguments` has the known ones
    given = _mapping(key, arguments.get("lr_scheduler_kwargs"))
    of_class = {"reduce_lr_on_plateau": torch.optim.lr_scheduler.ReduceLROnPlateau, "greedy": GreedyLR}
    given_by_transformers = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    known = set(inspect.signature(of_class.get(kind, functions[kind])).parameters) - given_by_transformers
    if kind.startswith("constant"):
        known = set()  # transformers passes none on to them
    for name in given:
        if name not in known:
            remedy = nearest(str(name), known) if known else "it takes none: remove lr_scheduler_kwargs"
            raise ConfigError(f"{key}: lr_scheduler_type '{kind}' takes no '{name}'; {remedy}")
    rate = float(arguments.get("learning_rate", TrainingArguments.learning_rate))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    try:
        get_scheduler(kind, optimizer, 1, 2**30, dict(given))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: lr_scheduler_type '{kind}' cannot be made of {given} ({error})") from None


def _mapping(key: str, given: Any) -> Mapping[str, Any]:
    """A mapping that is given as one, or as JSON; nothing is an empty one."""
    try:
        found = json.loads(given) if isinstance(given, str) else given or {}
    except json.JSONDecodeError:
        found = given
    if not isinstance(found, Mapping):
        raise ConfigError(f"{key}: found {given!r}; give a mapping, for example {{num_cycles: 0.5}}")
    return found


def _check_backbone(config: EmbedderConfig) -> None:
    model, adapter = config.model, config.adapter
    backbone = outline_backbone(
        model.name_or_path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        attention=model.attention,
    )
    check_template(PROMPTS.build(config.prompt), backbone.processor, backbone.config.model_type)
    if config.head is not None:
        head = HEADS.build(config.head, hidden_size=8)
        if isinstance(head, Attention):
            check_lists(head, backbone)
        if word_ids(head, backbone.family.tokenizer):
            check_predictable(backbone.family, model.name_or_path, model.revision, WORDS)
    text = backbone.config.get_text_config()
    with torch.device("meta"):
        pooling = POOLINGS.build(config.pooling, hidden_size=text.hidden_size)
        size = config.projection or pooling.embedding_size
        objective = build_objective(config.objective, size, text.num_hidden_layers)
    if objective.layers:
        check_layers(text)
    if objective.predicts:
        check_predictable(backbone.family, model.name_or_path, model.revision)
    backbone.family.set_pixel_limits(config.lengths.min_pixels, config.lengths.max_pixels)
    check_adapter(backbone, adapter.type, model.freeze)
    if adapter.type not in LORA_TYPES or adapter.dropout == 0:
        check_dropout(config, backbone.model.named_modules(), backbone.family)
    if adapter.type in LORA_TYPES:
        lora_targets(backbone, adapter.model_dump(mode="json")["target_modules"], model.freeze)
        check_experts(backbone.model, adapter.experts, adapter.router)
