"""What a config alone tells of a run, asked before its data is read and its weights are loaded.

Options of the named components, learning rates that would act on nothing, and what the backbone's config and processor
show: target modules, dims above the embedding, a chat prompt without a template. Reading ten million records to find a
misspelt option takes seven minutes; this takes about a second.
"""

from __future__ import annotations

from pathlib import Path

import torch

from mmembed.backbones import resolve_backbone
from mmembed.backbones.adapters import lora_targets
from mmembed.backbones.loading import outline_backbone
from mmembed.config.blocks import LORA_TYPES, EmbedderConfig
from mmembed.data.format_base import FORMATS
from mmembed.errors import ConfigError
from mmembed.models.folder import SETTINGS
from mmembed.objectives import Objective, build_objective
from mmembed.pooling import POOLINGS
from mmembed.preprocess import check_template
from mmembed.prompts import PROMPTS
from mmembed.training.optimizers import refuse_idle_rates


def preflight(config: EmbedderConfig) -> Objective:
    """Checks a config (of `inherit_settings`); the objective that it describes.

    Raises:
        ConfigError: an unknown name or option, a value of another type, or what this backbone cannot have.
    """
    POOLINGS.check(config.pooling)
    PROMPTS.build(config.prompt)
    objective = build_objective(config.objective)
    for source in (*config.data.train, *config.data.dev):
        try:
            FORMATS.build({"type": source.format, **source.options})
        except ConfigError as error:
            raise ConfigError(f"data source '{source.name}': {error}") from None
    towers = {"vision", "projector", "language", "pooling"} | ({"objective"} if list(objective.parameters()) else set())
    refuse_idle_rates(config.training.learning_rates, towers, config.model.freeze)
    if not Path(resolve_backbone(config.model.name_or_path), SETTINGS).exists():  # a saved embedder was checked so once
        _check_backbone(config)
    return objective


def _check_backbone(config: EmbedderConfig) -> None:
    model, adapter = config.model, config.adapter
    backbone = outline_backbone(model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code)
    check_template(PROMPTS.build(config.prompt), backbone.processor, backbone.config.model_type)
    with torch.device("meta"):
        pooling = POOLINGS.build(config.pooling, hidden_size=backbone.config.get_text_config().hidden_size)
        build_objective(config.objective, config.projection or pooling.embedding_size)
    if adapter.type in LORA_TYPES:
        lora_targets(backbone, adapter.model_dump(mode="json")["target_modules"], model.freeze)
