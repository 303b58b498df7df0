"""One YAML file (+ `key=value` overrides) becomes typed objects; the only source of truth of a run.

`load_config` reads the file, translates the names that users of other toolkits know (`lora_r`, `query_max_len`, ...),
applies the overrides, and validates everything before anything heavy is loaded: neither torch nor transformers is
imported here. A key that is unknown, given twice, or of no effect with the others is a ConfigError that names the
nearest key. Blocks with a `type` (`pooling`, `prompt`, `objective`) are handed to their registry, where the constructor
of the named class is the schema. Costs a few milliseconds.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mmembed.content import Task
from mmembed.errors import ConfigError, nearest

Positive = Annotated[int, Field(gt=0)]
TypedBlock = str | dict[str, Any]  # "mean", or {"type": "latent_attention", **constructor arguments}


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Block):
    """The backbone. `attention: null` keeps the backbone's own; `freeze` names towers (vision, projector, language)."""

    name_or_path: str = "mmembed-nano"
    revision: str | None = None
    attention: Literal["causal", "bidirectional"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    freeze: tuple[Literal["vision", "projector", "language"], ...] = ("vision",)
    gradient_checkpointing: bool = False


LORA_TYPES = ("lora", "dora", "rslora", "qlora")
PROMPT_TYPES = ("prefix", "prompt")
_OPTIMIZER_KEYS = {"lion": ("adam_epsilon",), "adafactor": ("adam_beta1", "adam_beta2", "adam_epsilon")}  # unread by it
_WITHOUT_ARGUMENTS = {  # ours, and those of transformers.TrainingArguments.optim that leave optim_args unread
    *("adamw", "adamw_8bit", "lion", "adafactor", "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit"),
    *("paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit"),
}
_ADAPTER_KEYS = {  # which types each key acts on; given with another type it is refused instead of ignored
    "r": LORA_TYPES,
    "alpha": LORA_TYPES,
    "dropout": LORA_TYPES,
    "target_modules": LORA_TYPES,
    "init": LORA_TYPES,
    "num_virtual_tokens": PROMPT_TYPES,
    "quant_type": ("qlora",),
}


class AdapterConfig(_Block):
    """What is trained of the backbone: a peft adapter, or all of it (`none`)."""

    type: Literal["lora", "dora", "rslora", "qlora", "prefix", "prompt", "none"] = "lora"
    r: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    init: Literal["default", "gaussian"] = "default"
    num_virtual_tokens: Positive = 16
    quant_type: Literal["nf4", "fp4"] = "nf4"

    @model_validator(mode="after")
    def _every_key_acts(self) -> AdapterConfig:
        for key in sorted(self.model_fields_set - {"type"}):
            if self.type not in _ADAPTER_KEYS[key]:
                raise ConfigError(
                    f"'{key}' has no effect with type '{self.type}' (it belongs to "
                    f"{', '.join(_ADAPTER_KEYS[key])}); remove it"
                )
        return self


class LengthsConfig(_Block):
    """Limits of the text tokens (prompt included; images are never cut) and of the area of a picture, in pixels."""

    query_max_length: Positive = 512
    document_max_length: Positive = 512
    min_pixels: Positive | None = None
    max_pixels: Positive | None = None

    @model_validator(mode="after")
    def _range(self) -> LengthsConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}; swap them")
        return self


class SourceConfig(_Block):
    """One data source. `path` is relative to `data.root`; `options` go to the format's constructor; `name` is the path
    unless given."""

    path: str
    format: str = "jsonl"
    options: dict[str, Any] = Field(default_factory=dict)
    name: str = ""
    weight: float | None = Field(default=None, gt=0)
    instruction: str | None = None
    document_instruction: str | None = None
    in_batch_negatives: bool = True
    task: Task | None = None
    max_examples: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return {"name": values.get("path", ""), **values} if isinstance(values, dict) else values


class DataConfig(_Block):
    """Training and dev sources. A query gets `train_group_size` documents, `positives_per_query` of them positive.

    `mixing_alpha` gives a source without `weight` the weight size**alpha. `ignore_fields` names fields of the data
    that may go unused (`score`, `negatives`, `instruction`, `image`, `video`, `audio`, `relevance`).
    """

    root: str | None = None
    media_root: str | None = None
    train: tuple[SourceConfig, ...] = ()
    dev: tuple[SourceConfig, ...] = ()
    on_bad_record: Literal["raise", "skip"] = "raise"
    train_group_size: Positive = 8
    positives_per_query: Positive = 1
    mixing_alpha: float = Field(default=0.5, ge=0)
    ignore_fields: tuple[Literal["score", "negatives", "instruction", "image", "video", "audio", "relevance"], ...] = ()

    @model_validator(mode="after")
    def _group(self) -> DataConfig:
        if self.positives_per_query > self.train_group_size:
            raise ConfigError(
                f"positives_per_query {self.positives_per_query} is above train_group_size "
                f"{self.train_group_size}; a group holds positives and negatives"
            )
        for sources in (self.train, self.dev):
            names = [source.name for source in sources]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"two sources are called '{name}'; give one a name of its own")
        return self


class TrainingConfig(_Block):
    """Every transformers.TrainingArguments name, and ours.

    token_budget: padded tokens (visual ones counted) whose activations may be alive at once.
    grad_cache: `auto` recomputes in a second pass only the chunks that the budget cannot keep; `true` recomputes all
        (least memory); `false` keeps all (one pass, whatever it takes).
    chunk_rows: at most so many inputs a chunk (default: bounded by tokens only).
    optimizer: by name; `training.optim` (transformers' own names) may be given instead.
    learning_rates: by tower (vision, projector, language, pooling, objective); others use `learning_rate`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    output_dir: str = "runs/embedder"
    token_budget: Positive = 16384
    grad_cache: Literal["auto"] | bool = "auto"
    chunk_rows: Positive | None = None
    optimizer: Literal["adamw", "adamw_8bit", "lion", "adafactor"] | None = None
    learning_rates: dict[Literal["vision", "projector", "language", "pooling", "objective"], float] = Field(
        default_factory=dict
    )
    early_stopping_patience: Positive | None = None
    early_stopping_threshold: float = Field(default=0.0, ge=0)

    @property
    def arguments(self) -> dict[str, Any]:
        """What goes to transformers.TrainingArguments, `output_dir` included."""
        return {"output_dir": self.output_dir, **(self.model_extra or {})}

    @property
    def _optim(self) -> str:
        return str((self.model_extra or {}).get("optim", self.optimizer or "adamw"))

    @model_validator(mode="after")
    def _names(self) -> TrainingConfig:
        for key in self.model_extra or {}:
            if key in UNUSABLE_ARGUMENTS:
                raise ConfigError(f"'{key}' has no effect here: {UNUSABLE_ARGUMENTS[key]}")
            if key not in training_argument_names():
                known = training_argument_names() | set(type(self).model_fields)
                raise ConfigError(f"unknown key '{key}'; {nearest(key, known)}")
        if self.optimizer is not None and "optim" in (self.model_extra or {}):
            raise ConfigError("'optimizer' and 'optim' are both given; keep one")
        if "optim_args" in (self.model_extra or {}) and self._optim in _WITHOUT_ARGUMENTS:
            raise ConfigError(
                f"'optim_args' has no effect with optimizer '{self._optim}'; remove it, or name with 'optim' an "
                "optimizer of transformers that reads it"
            )
        for key in sorted(set(self.model_extra or {}) & set(_OPTIMIZER_KEYS.get(self.optimizer or "adamw", ()))):
            raise ConfigError(f"'{key}' has no effect with optimizer '{self.optimizer}'; remove it")
        if "early_stopping_threshold" in self.model_fields_set and self.early_stopping_patience is None:
            raise ConfigError("'early_stopping_threshold' has no effect without 'early_stopping_patience'")
        if self.grad_cache is True and self.chunk_rows is None and "token_budget" not in self.model_fields_set:
            raise ConfigError(
                "grad_cache: true recomputes every chunk; say how large a chunk is with token_budget "
                "or chunk_rows, or use grad_cache: auto"
            )
        return self


class EmbedderConfig(_Block):
    """A training run of an embedder."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    pooling: TypedBlock = "mean"
    normalize: bool = True
    projection: Positive | None = None
    prompt: TypedBlock = "plain"
    lengths: LengthsConfig = LengthsConfig()
    data: DataConfig = DataConfig()
    objective: TypedBlock = "contrastive"
    training: TrainingConfig = TrainingConfig()

    @field_validator("pooling", "prompt", "objective")
    @classmethod
    def _has_type(cls, value: TypedBlock) -> TypedBlock:
        if isinstance(value, dict) and not isinstance(value.get("type"), str):
            raise ConfigError("the block has no 'type'; write the name, or {type: name, ...options}")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> EmbedderConfig:
        for clash in _clashes(self):
            raise ConfigError(clash)
        return self

    def hash(self) -> str:
        """Identifies the run in checkpoints: sha256 of the canonical JSON, first 16 hex digits."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


def block_type(block: TypedBlock) -> str:
    """The name in `"mean"` or `{"type": "mean", ...}`."""
    return block if isinstance(block, str) else str(block["type"])


def block_options(block: TypedBlock) -> dict[str, Any]:
    """The options beside `type`."""
    return {} if isinstance(block, str) else {key: value for key, value in block.items() if key != "type"}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> EmbedderConfig:
    """Reads and validates a run.

    Args:
        path: a YAML file.
        overrides: `a.b=value` strings; the value is YAML (`training.learning_rate=1e-4`). They win over the file.

    Raises:
        ConfigError: with the file, the key, what was found, and the nearest key or the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such file; give a YAML file, as in recipes/configs/embedder")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # _Loader is a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path}: holds a {type(tree).__name__}; a config is a mapping of blocks")
    return build_config(tree or {}, overrides, where=str(path))


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "config") -> EmbedderConfig:
    """As load_config, from a mapping. `where` opens the error messages."""
    try:
        canonical = _translate(tree)
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ConfigError(f"override '{override}' has no '='; write key=value")
            _assign(canonical, _ALIASES.get(key, _top_level(key)), yaml.load(value, _Loader), replace=True)
        if canonical.pop("same_dataset_within_batch", True) is not True:
            raise ConfigError(
                "same_dataset_within_batch: false is not offered: a batch holds one source (negatives of "
                "another task teach a shortcut)"
            )
        return EmbedderConfig.model_validate(canonical)
    except ValidationError as error:
        raise ConfigError("\n".join(f"{where}: {_explain(item)}" for item in error.errors())) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


@cache
def training_argument_names() -> frozenset[str]:
    """The fields of transformers.TrainingArguments, read from its source: importing it would load torch (3 s)."""
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("training needs transformers; install it with: pip install 'mmembed[train]'")
    module = ast.parse((Path(spec.submodule_search_locations[0]) / "training_args.py").read_text(encoding="utf-8"))
    owner = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [node.target for node in owner.body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))


_NO_FSDP = (
    "processes hold the whole model (DDP); training.deepspeed with recipes/deepspeed/zero1.json or zero2.json shards "
    "optimizer state and gradients, and parameters are not sharded in this version"
)
UNUSABLE_ARGUMENTS = {
    "auto_find_batch_size": "memory is bounded by training.token_budget, the batch stays as asked",
    "label_smoothing_factor": "it belongs to classification losses",
    "prediction_loss_only": "dev evaluation ranks, it has no loss",
    "include_for_metrics": "dev evaluation ranks; its metrics are fixed",
    "batch_eval_metrics": "dev evaluation ranks; its metrics are fixed",
    "eval_accumulation_steps": "dev vectors are kept on the CPU",
    "eval_do_concat_batches": "dev evaluation has its own batches",
    "eval_use_gather_object": "dev evaluation gathers vectors itself",
    "per_device_eval_batch_size": "dev batches are bounded by training.token_budget",
    "label_names": "batches carry their labels",
    "remove_unused_columns": "records are not tables of model inputs",
    "train_sampling_strategy": "batches are planned by source; set data.mixing_alpha or source weights",
    "length_column_name": "chunks are sorted by length always",
    "dataloader_drop_last": "batches are always full",
    "neftune_noise_alpha": "noise on input embeddings is not offered",
    "use_liger_kernel": "its kernels patch language-modelling heads, an embedder has none",
    "liger_kernel_config": "its kernels patch language-modelling heads, an embedder has none",
    "use_cache": "no generation happens in training",
    "gradient_checkpointing_kwargs": "checkpointing is non-reentrant; set model.gradient_checkpointing",
    "activation_checkpointing_kwargs": "checkpointing is non-reentrant; set model.gradient_checkpointing",
    "optim_target_modules": "choose what is trained with adapter.target_modules and model.freeze",
    "average_tokens_across_devices": "the loss is a mean over queries",
    "do_train": "the recipe trains and evaluates on dev",
    "do_eval": "set training.eval_strategy",
    "do_predict": "use python -m eval.run",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
    "parallelism_config": "tensor and context parallelism are not offered",
    "ddp_find_unused_parameters": "gradients are reduced once a step, unused parameters included",
    "ddp_bucket_cap_mb": "gradients are reduced once a step",
    "ddp_static_graph": "gradients are reduced once a step",
    "debug": "use torch's own tools",
    "local_rank": "the launcher sets it",
    "accelerator_config": "batches are planned for each process before they are loaded",
    "bf16_full_eval": "dev evaluation runs in the precision of training",
    "fp16_full_eval": "dev evaluation runs in the precision of training",
    "torch_empty_cache_steps": "memory is bounded by training.token_budget",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_model_id",
            "hub_strategy",
            "hub_token",
            "hub_private_repo",
            "hub_always_push",
            "hub_revision",
        ),
        "nothing is uploaded from training; upload the finished folder yourself",
    ),
}

_ALIASES: dict[str, tuple[str, ...]] = {  # names that users' hands know -> ours
    "model_name_or_path": ("model", "name_or_path"),
    "lora_r": ("adapter", "r"),
    "lora_alpha": ("adapter", "alpha"),
    "lora_dropout": ("adapter", "dropout"),
    "lora_target_modules": ("adapter", "target_modules"),
    "temperature": ("objective", "temperature"),
    "negatives_cross_device": ("objective", "cross_device_negatives"),
    "mrl_dims": ("objective", "matryoshka", "dims"),
    "train_group_size": ("data", "train_group_size"),
    "query_max_len": ("lengths", "query_max_length"),
    "passage_max_len": ("lengths", "document_max_length"),
    "min_pixels": ("lengths", "min_pixels"),
    "max_pixels": ("lengths", "max_pixels"),
    "query_prefix": ("prompt", "query_prefix"),
    "passage_prefix": ("prompt", "document_prefix"),
    "grad_cache": ("training", "grad_cache"),
    "gc_chunk_size": ("training", "chunk_rows"),
    "training.gradient_checkpointing": ("model", "gradient_checkpointing"),
    "training.activation_checkpointing": ("model", "gradient_checkpointing"),
    "gradient_checkpointing": ("model", "gradient_checkpointing"),
    "activation_checkpointing": ("model", "gradient_checkpointing"),
}
_DEFAULT_TYPES = {"objective": "contrastive", "prompt": "plain", "pooling": "mean"}


def _top_level(key: str) -> tuple[str, ...]:
    """A flat TrainingArguments name (`learning_rate`) belongs to `training`."""
    if "." not in key and key not in EmbedderConfig.model_fields and key in training_argument_names():
        return ("training", key)
    return tuple(key.split("."))


def _translate(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A new tree with our names only. Raises ConfigError when one thing is said twice."""
    canonical: dict[str, Any] = {}
    for key, value in tree.items():
        if key in EmbedderConfig.model_fields:
            block = dict(value) if isinstance(value, Mapping) else value
            for inner in list(block) if isinstance(block, dict) else []:
                if f"{key}.{inner}" in _ALIASES:
                    _assign(canonical, _ALIASES[f"{key}.{inner}"], block.pop(inner))
            _merge(canonical, key, block)
        else:
            _assign(canonical, _ALIASES.get(key) or _top_level(key), value)
    return canonical


def _merge(canonical: dict[str, Any], key: str, block: Any) -> None:
    if key not in canonical:
        canonical[key] = block
    elif isinstance(block, dict):
        for inner, value in block.items():
            _assign(canonical, (key, inner), value)
    else:
        canonical[key] = {**canonical[key], "type": block}


def _assign(tree: dict[str, Any], path: tuple[str, ...], value: Any, replace: bool = False) -> None:
    for depth, name in enumerate(path[:-1]):
        inner = tree.get(name)
        if isinstance(inner, str) or (inner is None and depth == 0 and name in _DEFAULT_TYPES):
            inner = {"type": inner or _DEFAULT_TYPES[name]}
        elif isinstance(inner, list):
            inner = {str(index): item for index, item in enumerate(inner)}
        elif not isinstance(inner, dict | None):
            raise ConfigError(f"'{'.'.join(path)}': '{name}' is not a block")
        was_list = isinstance(tree.get(name), list)
        tree[name] = dict(inner or {})
        if was_list:
            _assign(tree[name], path[depth + 1 :], value, replace)
            tree[name] = [tree[name][str(index)] for index in range(len(tree[name]))]
            return
        tree = tree[name]
    if path[-1] in tree and not replace and tree[path[-1]] != value:
        raise ConfigError(f"'{'.'.join(path)}' is given twice ({tree[path[-1]]} and {value}); keep one")
    tree[path[-1]] = value


def _clashes(config: EmbedderConfig) -> list[str]:
    """Combinations that cannot work, found before weights are loaded."""
    pooling, objective = block_type(config.pooling), block_options(config.objective)
    similarity, matryoshka = objective.get("similarity"), objective.get("matryoshka")
    adapter, arguments = config.adapter.type, config.training.arguments
    clashes = []
    if adapter in PROMPT_TYPES and config.model.attention == "bidirectional":
        clashes.append(
            f"adapter.type '{adapter}' + model.attention 'bidirectional': virtual tokens live in the "
            "cache of causal attention; use lora, or causal attention"
        )
    if adapter in PROMPT_TYPES and config.model.gradient_checkpointing:
        clashes.append(
            f"adapter.type '{adapter}' + model.gradient_checkpointing: checkpointing drops the cache "
            "that holds the virtual tokens; use lora, or no checkpointing"
        )
    if adapter != "none" and "language" in config.model.freeze:
        clashes.append(
            f"adapter.type '{adapter}' + model.freeze 'language': the adapter trains the language "
            "tower; use adapter.type none, or do not freeze it"
        )
    if adapter == "qlora" and config.model.dtype == "float32":
        clashes.append(
            "adapter.type 'qlora' + model.dtype 'float32': quantised weights compute in half precision; use "
            "bfloat16 or auto"
        )
    if config.model.dtype == "float16" and adapter == "none" and not arguments.get("fp16"):
        clashes.append(
            "model.dtype 'float16' + adapter.type 'none': half-precision weights lose small updates; use float32 "
            "weights with training.fp16 or training.bf16"
        )
    if pooling == "multi_vector":
        if similarity in ("cosine", "dot"):
            clashes.append(
                f"pooling 'multi_vector' + objective.similarity '{similarity}': an input is many vectors; use "
                "maxsim or maxsim_mean"
            )
    elif similarity in ("maxsim", "maxsim_mean"):
        clashes.append(
            f"pooling '{pooling}' + objective.similarity '{similarity}': late interaction needs pooling 'multi_vector'"
        )
    if isinstance(matryoshka, Mapping) and config.projection and max(matryoshka.get("dims") or [0]) > config.projection:
        clashes.append(f"objective.matryoshka.dims {matryoshka['dims']}: above projection {config.projection}")
    if matryoshka and similarity == "dot" and config.normalize:
        clashes.append(
            "objective.matryoshka + similarity 'dot' + normalize: a truncated unit vector is not a unit vector; use "
            "cosine, or normalize: false"
        )
    if config.training.early_stopping_patience is not None and not config.data.dev:
        clashes.append("training.early_stopping_patience: there is no data.dev to watch")
    evaluates = arguments.get("eval_strategy", "no") not in ("no", False, None)
    if evaluates and not config.data.dev:
        clashes.append("training.eval_strategy: there is no data.dev to evaluate on")
    if config.training.early_stopping_patience is not None and not evaluates:
        clashes.append(
            "training.early_stopping_patience: nothing is evaluated while training; set training.eval_strategy to "
            "steps or epoch"
        )
    return clashes


def _explain(item: Any) -> str:
    """One pydantic error as: key: found; remedy."""
    branch = re.compile(r"(function-|literal|bool|str|dict|tuple|union).*")  # which branch of a union pydantic tried
    location = [str(part) for part in item["loc"] if not branch.fullmatch(str(part))]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        model: Any = EmbedderConfig
        for part in location[:-1]:
            if not part.isdigit():
                model = _field_model(model, part)
        owner = ".".join(location[:-1])
        return f"unknown key '{key}'; {nearest(location[-1], model.model_fields)}" + (
            f" (in '{owner}')" if owner else ""
        )
    if item["type"] == "value_error":
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    return f"{key}: found {item['input']!r}; {item['msg'][0].lower()}{item['msg'][1:]}"


def _field_model(model: type[BaseModel], name: str) -> type[BaseModel]:
    annotation = model.model_fields[name].annotation
    while not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        annotation = annotation.__args__[0]  # type: ignore[union-attr]  # tuple[SourceConfig, ...] -> SourceConfig
    return annotation


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (`1e-4` is a number) and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
