"""What is trained of a backbone: a peft adapter or all of it, and which towers stand still.

LoRA (arXiv 2106.09685), DoRA (2402.09353), rsLoRA (2312.03732), QLoRA (2305.14314: nf4 base, LoRA on top), prefix
tuning (2101.00190), prompt tuning (2104.08691), or `none` for full fine-tuning. Frozen towers (vision by default) get
no adapter and no gradient. LoRA costs two thin matrices a linear layer, and some percent of the forward pass.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from mmembed.backbones.experts import check_experts, expert_parameters, router_names
from mmembed.backbones.family import Family
from mmembed.backbones.loading import Backbone
from mmembed.backbones.quiet_imports import old_name_in_peft
from mmembed.config.blocks import LORA_TYPES, PROMPT_TYPES
from mmembed.errors import ConfigError, nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

UNQUANTIZED = ["visual", "vision_tower", "vision_model", "multi_modal_projector", "connector"]  # small and sensitive


def quantization_of(adapter: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Arguments of `transformers.BitsAndBytesConfig` that an adapter block asks for, None for an unquantized base."""
    if adapter is None or adapter["type"] != "qlora":
        return None
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": adapter["quant_type"],
        "bnb_4bit_use_double_quant": True,
        "llm_int8_skip_modules": UNQUANTIZED,
        "bnb_4bit_compute_dtype": torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    }


def apply_adapter(
    backbone: Backbone, adapter: Mapping[str, Any], freeze: Collection[str]
) -> PreTrainedModel | PeftModel:
    """Freezes towers and adds the adapter.

    Args:
        adapter: the `adapter` block of the config: type, r, alpha, dropout, target_modules, init, num_virtual_tokens,
            experts, router.
            `target_modules`: `auto` is every linear layer of the language tower (and of the vision tower where that is
            not frozen), `all-linear` every linear layer outside frozen towers, a list names layers by suffix.
        freeze: towers that are not trained; ones that the family does not have are ignored.

    Returns:
        The model to train: the backbone itself for `none`, a PeftModel otherwise.

    Raises:
        ConfigError: an unknown type or layer, or prefix tuning of a backbone that cannot have it.
    """
    kind = adapter["type"]
    check_adapter(backbone, kind, freeze)
    if kind == "none":
        freeze_towers(backbone, freeze)
        return backbone.model
    if kind == "qlora":
        _stay_differentiable(backbone.model)
    from peft import get_peft_model

    backbone.model.requires_grad_(False)  # peft forgets parameters of the model itself (LLaVA's image_newline)
    config = _peft_config(backbone, adapter, freeze)
    asked = set(getattr(config, "target_parameters", None) or ())
    with old_name_in_peft():
        model = get_peft_model(backbone.model, config)
    if set(getattr(config, "target_parameters", None) or ()) != asked:
        raise ConfigError(
            f"adapter.target_modules: '{backbone.config.model_type}' has dense feed-forwards beside its experts, and "
            "peft takes their names for those of experts; name the layers, for example [q_proj, k_proj, v_proj, o_proj]"
        )
    return model


def _stay_differentiable(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights for its CPU inference kernel.

    It would do so at the first forward pass in evaluation mode, for good: later training steps would run through a
    kernel without a gradient (silently wrong below the last layer), and saving would round the scales.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def check_adapter(backbone: Backbone, kind: str, freeze: Collection[str]) -> None:
    """Refuses, of a backbone or its outline, an adapter that it cannot have, and to freeze nothing: a vision-language
    model whose vision tower has a name that no family knows.

    Raises:
        ConfigError: with the key and what to do.
    """
    if kind == "prefix" and not backbone.family.prefix_tuning:
        raise ConfigError(
            f"adapter.type 'prefix': '{backbone.config.model_type}' lets tokens attend by type, which cached keys do "
            "not have; use 'prompt' or 'lora'"
        )
    names = [name for name, _ in backbone.model.named_parameters()]
    for tower, pattern in backbone.family.towers().items():
        if tower in freeze and not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"model.freeze: '{tower}' matches no parameter of '{backbone.config.model_type}'; add a file for this "
                "family in mmembed/backbones that names its towers, or remove it"
            )


def freeze_towers(backbone: Backbone, freeze: Collection[str]) -> None:
    """Switches the gradient off in the named towers, in place."""
    patterns = [pattern for tower, pattern in backbone.family.towers().items() if tower in freeze]
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(parameter.is_floating_point() and not any(re.search(p, name) for p in patterns))


def adapted(model: PreTrainedModel | PeftModel) -> PeftModel:
    """What `apply_adapter` returned for any adapter, for the calls that peft adds."""
    from peft import PeftModel

    assert isinstance(model, PeftModel), "the settings name an adapter, but the backbone has none"
    return model


def run(family: Family, model: PreTrainedModel | PeftModel, tensors: dict[str, Any], adapter_type: str) -> torch.Tensor:
    """Last hidden states (B, T, H) of a right-padded batch, through whatever `apply_adapter` returned."""
    if adapter_type == "prompt":
        return _run_behind_prompt(family, adapted(model), tensors)
    if adapter_type == "prefix" or family.tells_positions:
        base = model if adapter_type == "none" else adapted(model).get_base_model()
        positions = family.position_ids(base, tensors)
        tensors = tensors if positions is None else {**tensors, "position_ids": positions}
    return model(**tensors, return_dict=True).last_hidden_state


def _run_behind_prompt(family: Family, model: PeftModel, tensors: dict[str, Any]) -> torch.Tensor:
    """As peft's own forward, but image positions and token types survive the V virtual tokens in front."""
    base = cast("PreTrainedModel", model.get_base_model())
    positions = family.position_ids(base, tensors)
    tensors = {name: tensor for name, tensor in tensors.items() if name != "mm_token_type_ids"}
    embedded = base.get_input_embeddings()(tensors.pop("input_ids"))  # (B, T, H)
    batch, length = embedded.shape[:2]
    prompt = model.get_prompt(batch).to(embedded.dtype)  # (B, V, H)
    virtual = prompt.shape[1]
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if name in tensors:
            tensors[name] = F.pad(tensors[name], (virtual, 0), value=value)  # (B, V + T)
    if positions is not None:
        front = torch.arange(virtual, device=positions.device).expand(*positions.shape[:-1], virtual)
        tensors["position_ids"] = torch.cat([front, positions + virtual], dim=-1)  # (3, B, V + T)
    embedded = torch.cat([prompt, embedded], dim=1)
    return base(inputs_embeds=embedded, **tensors, return_dict=True).last_hidden_state[:, -length:]


def _peft_config(backbone: Backbone, adapter: Mapping[str, Any], freeze: Collection[str]) -> Any:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    kind = adapter["type"]
    if kind in LORA_TYPES:
        targets, excluded = lora_targets(backbone, adapter["target_modules"], freeze)
        experts, router = adapter.get("experts", False), adapter.get("router", False)  # older checkpoints lack them
        check_experts(backbone.model, experts, router)
        return LoraConfig(
            r=adapter["r"],
            lora_alpha=adapter["alpha"],
            lora_dropout=adapter["dropout"],
            target_modules=targets,
            exclude_modules=excluded,
            target_parameters=_ends(expert_parameters(backbone.model)) if experts else None,
            modules_to_save=_ends(router_names(backbone.model)) if router else None,
            use_dora=kind == "dora",
            use_rslora=kind == "rslora",
            init_lora_weights="gaussian" if adapter.get("init") == "gaussian" else True,
        )
    if kind not in PROMPT_TYPES:
        raise ConfigError(f"adapter.type: there is no '{kind}'; {nearest(kind, (*LORA_TYPES, *PROMPT_TYPES, 'none'))}")
    cls = PrefixTuningConfig if kind == "prefix" else PromptTuningConfig
    return cls(task_type="FEATURE_EXTRACTION", num_virtual_tokens=adapter["num_virtual_tokens"])


def _ends(names: Iterable[str]) -> list[str]:
    """The last parts of names, which are the same in every layer: `mlp.gate`, `experts.down_proj`."""
    return sorted({".".join(name.split(".")[-2:]) for name in names})


def lora_targets(backbone: Backbone, target_modules: Any, freeze: Collection[str]) -> tuple[list[str], str | None]:
    """Layer suffixes to adapt and a regular expression of modules to leave alone. Raises ConfigError."""
    towers = backbone.family.towers()
    skipped = set(freeze) | ({"projector"} if target_modules == "auto" else set())
    patterns = [f".*{towers[tower]}.*" for tower in towers if tower in skipped]
    linear = {
        name
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Linear) and not any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    if not linear:
        raise ConfigError(f"model.freeze: {sorted(freeze)} leaves no linear layer to adapt; free a tower")
    leaves = {name.rsplit(".", 1)[-1] for name in linear}
    leaves = {leaf for leaf in leaves if not leaf.isdigit()} | {  # "0" would match decoder layer 0 too
        name for name in linear if name.rsplit(".", 1)[-1].isdigit()
    }
    if not isinstance(target_modules, str):
        tables = {name for name, module in backbone.model.named_modules() if isinstance(module, nn.Embedding)}
        for target in target_modules:  # a token table is adapted only where it is named
            if not any(name == target or name.endswith("." + target) for name in linear | tables):
                raise ConfigError(
                    f"adapter.target_modules: no layer outside frozen towers ends in '{target}'; "
                    f"{nearest(target, leaves)}"
                )
        leaves = set(target_modules)
    return sorted(leaves), "|".join(patterns) or None
