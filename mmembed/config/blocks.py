"""The typed objects of a run: what may be set, its defaults, and which values cannot go together.

A block refuses what it does not know and what would have no effect. Blocks with a `type` (`pooling`, `prompt`,
`objective`) are handed to their registry, where the constructor of the named class is the schema.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmembed.config.arguments import UNUSABLE_ARGUMENTS, training_argument_names, wrong_values
from mmembed.content import Task
from mmembed.errors import ConfigError, nearest
from mmembed.media_limits import MediaLimits

Positive = Annotated[int, Field(gt=0)]
Tower = Literal["vision", "audio", "projector", "router", "language", "pooling", "objective"]
TypedBlock = str | dict[str, Any]  # "mean", or {"type": "latent_attention", **constructor arguments}


class _Block(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Block):
    """The backbone. `attention: null` keeps the backbone's own; `freeze` names towers (vision, audio, projector,
    language, and router: what chooses the experts of a mixture)."""

    name_or_path: str = "mmembed-nano"
    revision: str | None = None
    attention: Literal["causal", "bidirectional"] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    freeze: tuple[Literal["vision", "audio", "projector", "router", "language"], ...] = ("vision", "audio")
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
    "experts": ("lora", "rslora"),
    "router": LORA_TYPES,
    "num_virtual_tokens": PROMPT_TYPES,
    "quant_type": ("qlora",),
}


class AdapterConfig(_Block):
    """What is trained of the backbone: a peft adapter, or all of it (`none`).

    Of a mixture of experts an adapter is of the attention alone, unless `experts` asks for one of each expert as well;
    `router` trains the routers whole.
    """

    type: Literal["lora", "dora", "rslora", "qlora", "prefix", "prompt", "none"] = "lora"
    r: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    init: Literal["default", "gaussian"] = "default"
    experts: bool = False
    router: bool = False
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
        if self.experts and self.dropout:
            raise ConfigError(
                f"'experts' + dropout {self.dropout:g}: peft cannot drop inputs of experts that are one parameter; set "
                "dropout: 0"
            )
        return self


class LengthsConfig(_Block):
    """Limits of the text tokens (prompt included; images are never cut) and of the area of an image, in pixels."""

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
    unless given. `pairs` says how pairs are made of raw documents; their format is `documents` unless given.
    `streaming` reads it while training goes on, shuffled through `shuffle_buffer` records (10,000).
    `batch_size` takes the place of training.per_device_train_batch_size for its batches. `replay` says that it is of an
    earlier stage, and which share of the batches it has (0.1). `domain` is a tag that conditions the routers of a
    mixture of experts."""

    path: str
    format: str = "jsonl"
    options: dict[str, Any] = Field(default_factory=dict)
    pairs: TypedBlock | None = None
    name: str = ""
    weight: float | None = Field(default=None, gt=0)
    replay: float | None = Field(default=None, gt=0, lt=1)
    domain: str | None = Field(default=None, min_length=1)
    instruction: str | None = None
    document_instruction: str | None = None
    in_batch_negatives: bool = True
    task: Task | None = None
    max_examples: Positive | None = None
    batch_size: Positive | None = None
    streaming: bool = False
    shuffle_buffer: Positive | None = None

    @property
    def unforeseen(self) -> str | None:
        """Why its inputs are not known before the first step; None: they are."""
        if self.streaming:
            return "streaming: its records are not known"
        return None if self.pairs is None else "pairs: they are drawn anew"

    @model_validator(mode="after")
    def _streamed(self) -> SourceConfig:
        if self.streaming and self.max_examples is not None:
            raise ConfigError("'max_examples' has no effect with 'streaming': training.max_steps says how much is read")
        if self.shuffle_buffer is not None and not self.streaming:
            raise ConfigError("'shuffle_buffer' has no effect without 'streaming': others are shuffled as a whole")
        return self

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        raw = {} if values.get("pairs") is None else {"format": "documents"}
        return {"name": values.get("path", ""), **raw, **values}


class MediaLimitsConfig(_Block):
    """What may be opened of the media that records name: see `mmembed.media_limits.MediaLimits`."""

    allow_urls: bool = MediaLimits.allow_urls
    max_pixels_decoded: Positive = MediaLimits.max_pixels_decoded
    max_bytes: Positive = MediaLimits.max_bytes
    max_seconds: float = Field(default=MediaLimits.max_seconds, gt=0, allow_inf_nan=False)
    max_sampling_rate: Positive = MediaLimits.max_sampling_rate

    @model_validator(mode="after")
    def _act(self) -> MediaLimitsConfig:
        MediaLimits(**self.model_dump())
        return self


class MiningConfig(_Block):
    """Hard negatives that the model in training mines of the documents of each source: `negatives` a query, chosen by
    `rules` of the `depth` nearest ones, before the first step and after every `every` optimizer steps (null: never
    again). `asynchronous`: in a process of its own, on `device`; what it mines acts `every` steps later."""

    rules: tuple[TypedBlock, ...] = ("percent_of_positive",)
    depth: Positive = 50
    negatives: Positive = 8
    every: Positive | None = None
    asynchronous: bool = False
    device: str = "cpu"

    @model_validator(mode="after")
    def _every_key_acts(self) -> MiningConfig:
        for block in self.rules:
            if isinstance(block, dict) and not isinstance(block.get("type"), str):
                raise ConfigError("rules: a block has no 'type'; write the name, or {type: name, ...options}")
        if self.negatives > self.depth:
            raise ConfigError(f"negatives {self.negatives} is above depth {self.depth}; they are chosen of those")
        if self.asynchronous and self.every is None:
            raise ConfigError("'asynchronous' has no effect without 'every': what is mined first is waited for")
        if "device" in self.model_fields_set and not self.asynchronous:
            raise ConfigError("'device' has no effect without 'asynchronous'; remove it")
        return self


class DataConfig(_Block):
    """Training and dev sources. A query gets `train_group_size` documents, `positives_per_query` of them positive.

    `mixing` says how often which source comes: `temperature` gives a source without `weight` the weight size**alpha
    (`mixing_alpha`), `proportional` as many batches as it fills, `round_robin` one after the other. `batch_order` names
    a rule by which similar pairs meet in a batch, and by `model` the embedder that says which are. `mining` gives
    queries hard negatives that the model in training finds, in place of those of the records. `ignore_fields`
    names fields of the data that may go unused (`score`, `negatives`, `instruction`, `relevance`, `labels`,
    `rationale`) or are taken out of every record (`image`, `video`, `audio`).
    """

    root: str | None = None
    media_root: str | None = None
    media_limits: MediaLimitsConfig = MediaLimitsConfig()
    train: tuple[SourceConfig, ...] = ()
    dev: tuple[SourceConfig, ...] = ()
    on_bad_record: Literal["raise", "skip"] = "raise"
    train_group_size: Positive = 8
    positives_per_query: Positive = 1
    mixing: Literal["temperature", "proportional", "round_robin"] = "temperature"
    mixing_alpha: float = Field(default=0.5, ge=0)
    batch_order: TypedBlock | None = None
    mining: MiningConfig | None = None
    ignore_fields: tuple[
        Literal["score", "negatives", "instruction", "image", "video", "audio", "relevance", "labels", "rationale"], ...
    ] = ()

    @field_validator("batch_order")
    @classmethod
    def _has_type(cls, value: TypedBlock | None) -> TypedBlock | None:
        check_type(value)
        return value

    @model_validator(mode="after")
    def _ordered(self) -> DataConfig:
        for key in ("batch_order", "mining"):
            for source in self.train if getattr(self, key) is not None else ():
                if source.unforeseen is not None:
                    raise ConfigError(f"{key} + data.train '{source.name}' ({source.unforeseen}); remove one of them")
        if self.mining is not None and self.train_group_size == self.positives_per_query:
            raise ConfigError(
                f"mining + train_group_size {self.train_group_size}: that leaves no room for negatives beside "
                f"{self.positives_per_query} positives; raise it"
            )
        if self.batch_order is None:
            return self
        if self.train and not any(source.in_batch_negatives for source in self.train):
            raise ConfigError("batch_order has no effect: in_batch_negatives is false for all sources; remove it")
        return self

    @model_validator(mode="after")
    def _replayed(self) -> DataConfig:
        for source in self.dev:
            if source.replay is not None:
                raise ConfigError(f"data.dev '{source.name}': replay acts in training only; remove it")
        replayed = [source for source in self.train if source.replay is not None]
        for source in replayed:
            if source.weight is not None:
                raise ConfigError(
                    f"data.train '{source.name}': weight {source.weight:g} has no effect beside replay, which is its "
                    "share of batches; remove one of them"
                )
        if replayed and len(replayed) == len(self.train):
            raise ConfigError("data.train: every source is replayed, and none is new; leave replay out of the new ones")
        total = sum(source.replay or 0.0 for source in replayed)
        if total >= 1:
            raise ConfigError(
                f"data.train: replay adds up to {total:g} and leaves no batches to the new sources; lower it"
            )
        if replayed and self.mixing == "round_robin":
            raise ConfigError(
                "data.mixing 'round_robin' + replay: taking turns gives all sources the same share; set mixing: "
                "temperature or proportional"
            )
        return self

    @model_validator(mode="after")
    def _group(self) -> DataConfig:
        if self.positives_per_query > self.train_group_size:
            raise ConfigError(
                f"positives_per_query {self.positives_per_query} is above train_group_size "
                f"{self.train_group_size}; a group holds positives and negatives"
            )
        if "mixing_alpha" in self.model_fields_set and self.mixing != "temperature":
            raise ConfigError(f"mixing_alpha has no effect with mixing '{self.mixing}'; remove one of them")
        for source in self.train if self.mixing == "round_robin" else ():
            if source.weight is not None:
                raise ConfigError(
                    f"mixing 'round_robin' gives all sources the same share: weight {source.weight:g} of "
                    f"'{source.name}' has no effect; remove one of them"
                )
        for source in self.dev:
            if source.batch_size is not None:
                raise ConfigError(f"data.dev '{source.name}': batch_size acts in training only; remove it")
            if source.pairs is not None:
                raise ConfigError(
                    f"data.dev '{source.name}': pairs that are made would measure how they are made; give a source "
                    "with queries and judged documents"
                )
        for sources in (self.train, self.dev):
            names = [source.name for source in sources]
            for name in names:
                if names.count(name) > 1:
                    raise ConfigError(f"two sources are called '{name}'; give one a name of its own")
        return self


class TrainingConfig(_Block):
    """The names of transformers.TrainingArguments, of which some are refused with the reason, and ours.

    token_budget: padded tokens (visual ones counted) whose activations may be alive at once.
    grad_cache: `auto` recomputes in a second pass only the chunks that the budget cannot keep; `true` recomputes all
        (least memory); `false` keeps all (one pass, whatever it takes).
    chunk_rows: at most so many inputs a chunk (default: bounded by tokens only).
    share_prefix: `auto` computes the tokens that the inputs of a chunk begin with (an instruction, a system turn) once
        a chunk, where the backbone allows it: same vectors and gradients. `off` computes them for each input.
    attention_kernel: `packed` computes texts without padding, `padded` with it: same vectors and gradients. `auto`
        packs where torch has a kernel for it (CUDA, bf16 or fp16) and the backbone is known to allow it.
    vision_cache: keep the features of images on disk where the vision tower and projector are frozen: `auto` in
        mmembed's cache folder where that is possible, a folder to insist on it, `off`.
    vision_cache_gb: what all features in that folder may take; then nothing is added.
    worst_batch_first: before step 1 the planned batch with the most padded tokens goes forward and backward, and its
        gradients are dropped: running out of memory shows at once. `true` looks at some 20,000 inputs, a number at so
        many batches of the epoch.
    optimizer: by name; `training.optim` (transformers' own names) may be given instead.
    learning_rates: by tower (vision, projector, language, pooling, objective); others use `learning_rate`.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    output_dir: str = "runs/embedder"
    token_budget: Positive = 16384
    grad_cache: Literal["auto"] | bool = "auto"
    chunk_rows: Positive | None = None
    share_prefix: Literal["auto", "off"] = "auto"
    attention_kernel: Literal["auto", "padded", "packed"] = "auto"
    vision_cache: str = "off"
    vision_cache_gb: float = Field(default=20.0, gt=0, allow_inf_nan=False)
    worst_batch_first: bool | Positive = False
    optimizer: Literal["adamw", "adamw_8bit", "lion", "adafactor"] | None = None
    learning_rates: dict[Tower, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(default_factory=dict)
    early_stopping_patience: Positive | None = None
    early_stopping_threshold: float = Field(default=0.0, ge=0)

    @field_validator("share_prefix", "vision_cache", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        return "off" if value is False else value  # YAML reads an unquoted `off` as false

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
        if "vision_cache_gb" in self.model_fields_set and self.vision_cache == "off":
            raise ConfigError("'vision_cache_gb' has no effect with vision_cache 'off'; set vision_cache, or remove it")
        if self.grad_cache is True and self.chunk_rows is None and "token_budget" not in self.model_fields_set:
            raise ConfigError(
                "grad_cache: true recomputes every chunk; say how large a chunk is with token_budget "
                "or chunk_rows, or use grad_cache: auto"
            )
        return self


class EvaluationConfig(_Block):
    """Tasks of a benchmark that the model in training is scored on whenever `training.eval_strategy` says so, by the
    command `python -m eval.run` with these options: `limit` queries of each task (all of them unless given), on
    `device` (the command's default unless given). No `tasks` are all of the benchmark."""

    benchmark: str = "local"
    tasks: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    limit: Positive | None = None
    data_root: str | None = None
    source: str | None = None
    device: str | None = None


class EmbedderConfig(_Block):
    """A training run of an embedder. `head` is a reranker's."""

    model: ModelConfig = ModelConfig()
    adapter: AdapterConfig = AdapterConfig()
    pooling: TypedBlock = "mean"
    normalize: bool = True
    projection: Positive | None = None
    prompt: TypedBlock = "plain"
    lengths: LengthsConfig = LengthsConfig()
    data: DataConfig = DataConfig()
    objective: TypedBlock | tuple[TypedBlock, ...] = "contrastive"
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig | None = None
    head: TypedBlock | None = None

    @field_validator("pooling", "prompt", "objective")
    @classmethod
    def _has_type(cls, value: TypedBlock | tuple[TypedBlock, ...]) -> TypedBlock | tuple[TypedBlock, ...]:
        for block in objective_blocks(value):
            several = next((key for key in ("by_task", "by_source") if isinstance(block, dict) and key in block), None)
            if isinstance(block, dict) and several and len(block) > 1:
                others = ", ".join(f"'{key}'" for key in block if key != several)
                raise ConfigError(f"beside '{several}' stands {others}; remove it, or write it into the entries")
            check_type(block)
        return value

    @model_validator(mode="after")
    def _combinations(self) -> EmbedderConfig:
        for clash in _clashes(self):
            raise ConfigError(clash)
        return self

    def hash(self) -> str:
        """Identifies the run in checkpoints: sha256 of the canonical JSON, first 16 hex digits."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()[:16]


class RerankerConfig(EmbedderConfig):
    """A training run of a reranker: an embedder of pairs of a query and a document, whose vector is the logits of
    `head`. A pair may take the text tokens of `lengths.query_max_length` and `document_max_length` together."""

    pooling: Literal["last_token"] = "last_token"
    normalize: Literal[False] = False
    projection: None = None
    prompt: TypedBlock = "judge"
    objective: TypedBlock | tuple[TypedBlock, ...] = "ranking"
    head: TypedBlock | None = "yes_no"

    @field_validator("head")
    @classmethod
    def _has_head(cls, value: TypedBlock | None) -> TypedBlock:
        if value is None:
            raise ConfigError("a reranker needs one: yes_no or linear")
        check_type(value)
        return value


def objective_blocks(value: Any) -> list[Any]:
    """The blocks of an objective, which is one, a list, or either of these for each task or source."""
    if isinstance(value, list | tuple):
        return list(value)
    per_batch = [value[key] for key in ("by_task", "by_source") if isinstance(value, dict) and key in value]
    if len(per_batch) == 1 and isinstance(per_batch[0], dict) and len(value) == 1:
        return [block for entry in per_batch[0].values() for block in objective_blocks(entry)]
    return [value]


def check_type(*blocks: TypedBlock | None) -> None:
    """Raises ConfigError where a block does not say what its options are of."""
    for block in blocks:
        if isinstance(block, dict) and not isinstance(block.get("type"), str):
            raise ConfigError("the block has no 'type'; write the name, or {type: name, ...options}")


def block_type(block: TypedBlock) -> str:
    """The name in `"mean"` or `{"type": "mean", ...}`."""
    return block if isinstance(block, str) else str(block["type"])


def block_options(block: TypedBlock) -> dict[str, Any]:
    """The options beside `type`."""
    return {} if isinstance(block, str) else {key: value for key, value in block.items() if key != "type"}


def frozen_rate(tower: str, freeze: Collection[str]) -> str:
    """The message for a learning rate of a frozen tower."""
    others = ", ".join(sorted(set(freeze) - {tower}))
    return (
        f"training.learning_rates.{tower}: model.freeze [{', '.join(sorted(freeze))}] keeps that tower as it is, so "
        f"its rate has no effect; set model.freeze: [{others}], or remove the rate"
    )


def _objective_clashes(config: EmbedderConfig, block: TypedBlock) -> list[str]:
    """Of one objective's options."""
    where, objective = f"objective '{block_type(block)}'", block_options(block)
    pooling, similarity, matryoshka = (
        block_type(config.pooling),
        objective.get("similarity"),
        objective.get("matryoshka"),
    )
    clashes = []
    if pooling == "multi_vector":
        if similarity in ("cosine", "dot"):
            clashes.append(
                f"pooling 'multi_vector' + {where}.similarity '{similarity}': an input is many vectors; use "
                "maxsim or maxsim_mean"
            )
    elif similarity in ("maxsim", "maxsim_mean"):
        clashes.append(
            f"pooling '{pooling}' + {where}.similarity '{similarity}': late interaction needs pooling 'multi_vector'"
        )
    dims = matryoshka.get("dims") if isinstance(matryoshka, Mapping) else None
    if dims and config.projection and max(dims) > config.projection:
        clashes.append(f"{where}.matryoshka.dims {dims}: above projection {config.projection}")
    if dims and similarity == "dot" and config.normalize:
        clashes.append(
            f"{where}.matryoshka.dims + similarity 'dot' + normalize: a truncated unit vector is not a unit vector; "
            "use cosine, or normalize: false"
        )
    if objective.get("positives") == "one_at_a_time" and config.data.positives_per_query == 1:
        clashes.append(
            f"{where}.positives 'one_at_a_time' has no effect with one positive a query; set data.positives_per_query "
            "to 2 or more"
        )
    return clashes


def _head_clashes(config: EmbedderConfig) -> list[str]:
    """What an embedder has and a reranker does not, and the other way round."""
    if not isinstance(config, RerankerConfig):
        return [] if config.head is None else ["head: is a reranker's; train it with recipes/train_reranker.py"]
    clashes = [
        f"data.{key}: compares vectors of queries and documents, and a reranker has none; mine the negatives before "
        "(python -m data_tools.mine_negatives), or remove it"
        for key in ("mining", "batch_order")
        if getattr(config.data, key) is not None
    ]
    for source in config.data.train:
        if source.pairs is not None:
            clashes.append(f"data source '{source.name}': pairs that are made have no negatives to rank; remove it")
        if source.document_instruction is not None:
            clashes.append(
                f"data source '{source.name}': document_instruction has no effect, a pair has one instruction; set "
                "instruction"
            )
        if source.domain is not None:
            clashes.append(
                f"data source '{source.name}': domain conditions the routers of an embedder; remove it of a reranker"
            )
        if "in_batch_negatives" in source.model_fields_set:
            clashes.append(
                f"data source '{source.name}': in_batch_negatives has no effect, a query meets its own documents "
                "alone; remove it"
            )
    return clashes


def _clashes(config: EmbedderConfig) -> list[str]:
    """Combinations that cannot work, found before weights are loaded."""
    adapter, arguments = config.adapter.type, config.training.arguments
    clashes = wrong_values(arguments) + _stream_clashes(config) + _head_clashes(config)
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
    if config.model.gradient_checkpointing and any(source.domain for source in config.data.train):
        clashes.append(
            "model.gradient_checkpointing + data.train domain: what is computed again in the backward pass would not "
            "know its domain; remove one of them"
        )
    trained = {source.domain for source in config.data.train}
    for source in config.data.dev:
        if source.domain not in trained | {None}:
            clashes.append(
                f"data.dev '{source.name}': domain '{source.domain}' is of no source of data.train; "
                f"{nearest(str(source.domain), sorted(one for one in trained if one))}"
            )
    if config.adapter.router and "router" in config.model.freeze:
        clashes.append("adapter.router + model.freeze 'router': it is trained or it is not; remove one of them")
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
    if arguments.get("fp16") and arguments.get("bf16"):
        clashes.append("training.fp16 + training.bf16: both are true, and a run has one half precision; keep one")
    for block in objective_blocks(config.objective):
        clashes += _objective_clashes(config, block)
    by_source = config.objective.get("by_source") if isinstance(config.objective, dict) else None
    names = [source.name for source in config.data.train]
    for name in by_source if isinstance(by_source, dict) and names else ():
        if name not in names:
            clashes.append(
                f"objective.by_source: there is no source '{name}' in data.train; {nearest(str(name), names)}"
            )
    if "freeze" in config.model.model_fields_set:  # the default gives way to that of a saved embedder, not read here
        frozen = [tower for tower in config.training.learning_rates if tower in config.model.freeze]
        clashes += [frozen_rate(tower, config.model.freeze) for tower in frozen]
    evaluates = arguments.get("eval_strategy", "no") not in ("no", False, None)
    if not config.data.dev and config.evaluation is None:
        if config.training.early_stopping_patience is not None:
            clashes.append("training.early_stopping_patience: there is no data.dev to watch, and no evaluation")
        if evaluates:
            clashes.append("training.eval_strategy: there is no data.dev to evaluate on, and no evaluation")
        if arguments.get("eval_on_start"):
            clashes.append(
                "training.eval_on_start: there is no data.dev to evaluate on, and no evaluation; give one, or remove it"
            )
    return clashes + _idle(config, evaluates)


def _idle(config: EmbedderConfig, evaluates: bool) -> list[str]:
    """Options of dev evaluations and of checkpoints that a run has none of."""
    arguments, clashes = config.training.arguments, []
    written = {key for key in ("metric_for_best_model", "greater_is_better") if arguments.get(key) is not None}
    written |= {key for key in ("eval_steps", "eval_delay", "load_best_model_at_end") if arguments.get(key)}
    if config.training.early_stopping_patience is not None:
        written.add("early_stopping_patience")
    if arguments.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        written.add("lr_scheduler_type")
    saves = arguments.get("save_strategy", "steps")
    if saves == "best":
        written.add("save_strategy")
    for key in sorted(written) if not evaluates else ():
        value = f" '{arguments[key]}'" if key in ("lr_scheduler_type", "save_strategy") else ""
        remedy = "set training.eval_strategy to steps or epoch"
        if not config.data.dev and config.evaluation is None:
            remedy = f"give data.dev, and {remedy}"
        clashes.append(f"training.{key}{value}: nothing is evaluated while training; {remedy}, or remove it")
    if config.evaluation is not None and not evaluates and not arguments.get("eval_on_start"):
        clashes.append(
            "evaluation: nothing is evaluated while training; set training.eval_strategy to steps or epoch, or remove "
            "it and evaluate what comes out (python -m eval.run)"
        )
    for key, strategy, found in (
        ("eval_steps", "eval_strategy", arguments.get("eval_strategy")),
        ("save_steps", "save_strategy", saves),
    ):
        if arguments.get(key) and found != "steps":
            clashes.append(
                f"training.{key} has no effect with training.{strategy} '{found or 'no'}'; set {strategy}: steps, or "
                f"remove {key}"
            )
    return clashes


def _stream_clashes(config: EmbedderConfig) -> list[str]:
    """What a source without a known length cannot go with."""
    clashes = []
    for source in config.data.dev:
        if source.streaming:
            clashes.append(f"data.dev '{source.name}': dev sources are ranked as a whole; remove streaming")
    for source in config.data.train:
        if source.streaming and int(config.training.arguments.get("max_steps", -1)) < 1:
            clashes.append(f"data.train '{source.name}': nobody knows the length of a stream; set training.max_steps")
        shared = len(config.data.train) > 1 and config.data.mixing != "round_robin"
        if source.streaming and source.weight is None and source.replay is None and shared:
            clashes.append(f"data.train '{source.name}': a stream beside others needs a weight (1.0: an average one)")
    return clashes
