"""The config of a reranker that answers in words: what it is asked, what it is taught, and what is handed on to trl.

As `blocks`, a block refuses what it does not know and what would have no effect. `training` holds trl's own names
(`SFTConfig`, `DPOConfig`), which the recipe checks against the installed trl.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mmembed.config.blocks import AdapterConfig, LengthsConfig, MediaLimitsConfig, Positive, _Block
from mmembed.errors import ConfigError

ADAPTERS = ("lora", "dora", "rslora")


class _Typed(_Block):
    """A block whose `type` may stand alone, and whose other keys act with some types only."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value

    def _refuse_idle(self, acts_with: dict[str, str], given: str) -> None:
        for key in sorted(self.model_fields_set & acts_with.keys()):
            if acts_with[key] != given:
                raise ConfigError(f"'{key}' has no effect with type '{given}' (it belongs to {acts_with[key]})")


class GeneratorConfig(_Block):
    """The language model. Its vision tower, where it has one, stays frozen."""

    name_or_path: str = "mmembed-nano"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False


class AnswerConfig(_Typed):
    """What the model answers.

    `listwise`: the order of `documents` numbered documents, `[2] > [1] > [3]`, best first `by` their relevance or by a
    teacher's `score`; equal ones in the order in which they are shown. They are shown in a random order, of a record
    `shuffles` times.
    `rationale`: the `rationale` of a document, and in the last line whether it answers the query, in `words`.
    """

    type: Literal["listwise", "rationale"] = "listwise"
    documents: Annotated[int, Field(ge=2)] = 8
    by: Literal["relevance", "score"] = "relevance"
    shuffles: Positive = 1
    words: tuple[str, str] = ("yes", "no")

    @model_validator(mode="after")
    def _every_key_acts(self) -> AnswerConfig:
        of_lists = dict.fromkeys(("documents", "by", "shuffles"), "listwise")
        self._refuse_idle({**of_lists, "words": "rationale"}, self.type)
        if len({word.strip().lower() for word in self.words}) < 2 or not all(word.strip() for word in self.words):
            raise ConfigError(f'words: found {list(self.words)}; give two that differ, quoted: ["yes", "no"]')
        return self


class MethodConfig(_Typed):
    """How the answers are taught.

    `sft`: predict them (Rank-without-GPT, arXiv 2312.02969; RankZephyr, arXiv 2312.02724).
    `dpo`: prefer the right order to wrong ones (arXiv 2305.18290), `pairs` of a conversation: the right one after
    `swaps` exchanges of a better document with a worse one (`swapped`), or turned round (`reversed`).
    """

    type: Literal["sft", "dpo"] = "sft"
    rejected: Literal["swapped", "reversed"] = "swapped"
    swaps: Positive = 1
    pairs: Positive = 1

    @model_validator(mode="after")
    def _every_key_acts(self) -> MethodConfig:
        self._refuse_idle(dict.fromkeys(("rejected", "swaps", "pairs"), "dpo"), self.type)
        if self.rejected == "reversed" and self.model_fields_set & {"swaps", "pairs"}:
            raise ConfigError("'swaps' and 'pairs' have no effect with rejected 'reversed': there is one such order")
        return self


class GenerativeSource(_Block):
    """One data source: `path` is relative to `data.root`; `name` is the path unless given."""

    path: str
    format: str = "jsonl"
    options: dict[str, Any] = Field(default_factory=dict)
    name: str = ""
    instruction: str | None = None
    max_examples: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        return {"name": values.get("path", ""), **values} if isinstance(values, dict) else values


class GenerativeDataConfig(_Block):
    """Training sources. `ignore_fields` names fields of the data that may go unused."""

    root: str | None = None
    media_root: str | None = None
    media_limits: MediaLimitsConfig = MediaLimitsConfig()
    train: tuple[GenerativeSource, ...]
    on_bad_record: Literal["raise", "skip"] = "raise"
    ignore_fields: tuple[Literal["score", "relevance", "rationale", "labels"], ...] = ()

    @model_validator(mode="after")
    def _sources(self) -> GenerativeDataConfig:
        if not self.train:
            raise ConfigError("train: there is no source; add one, for example {path: squad-en, format: beir}")
        names = [source.name for source in self.train]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two sources are called '{name}'; give one a name of its own")
        return self


class GenerativeTrainingConfig(BaseModel):
    """The arguments of trl's trainer, by its own names."""

    model_config = ConfigDict(extra="allow", frozen=True)

    output_dir: str = "runs/generative-reranker"

    @property
    def arguments(self) -> dict[str, Any]:
        return {"output_dir": self.output_dir, **(self.model_extra or {})}


class GenerativeConfig(_Block):
    """A training run of a reranker that answers in words. `lengths` are the text tokens of the query and of each
    document, without the words around them."""

    model: GeneratorConfig = GeneratorConfig()
    answer: AnswerConfig = AnswerConfig()
    method: MethodConfig = MethodConfig()
    adapter: AdapterConfig = AdapterConfig()
    lengths: LengthsConfig = LengthsConfig(query_max_length=64, document_max_length=128)
    data: GenerativeDataConfig
    training: GenerativeTrainingConfig = GenerativeTrainingConfig()

    @field_validator("adapter")
    @classmethod
    def _lora(cls, value: AdapterConfig) -> AdapterConfig:
        if value.type not in ADAPTERS:
            raise ConfigError(f"type '{value.type}': trl trains {', '.join(ADAPTERS)} here; take one of them")
        return value

    @model_validator(mode="after")
    def _combinations(self) -> GenerativeConfig:
        if self.method.type == "dpo" and self.answer.type != "listwise":
            raise ConfigError("method 'dpo' compares orders: set answer: listwise, or method: sft")
        return self

    def hash(self) -> str:
        """Identifies the run: sha256 of the canonical JSON without `training`, first 16 hex digits."""
        told = self.model_dump(mode="json", exclude={"training"})
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
