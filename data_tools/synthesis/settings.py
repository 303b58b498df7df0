"""The config of a pipeline. The constructors of generators and stages are the schema of their blocks."""

from __future__ import annotations

from collections.abc import Collection
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from data_tools.settings import Block, RayConfig, Reading, listed
from data_tools.synthesis.stages import STAGES, AskingStage, Kind, Stage
from mmembed.config import load_blocks
from mmembed.config.blocks import Positive, TypedBlock, block_type, check_type
from mmembed.content import Task
from mmembed.errors import ConfigError, MmembedError, nearest

EXAMPLES = "recipes/configs/synthesis"


class SynthesisSource(Block):
    """What a pipeline begins with.

    path: relative to `root`. Of documents and queries a `.jsonl` file (a corpus.jsonl or queries.jsonl of BEIR, lines
        of content, records, of which one side is taken) or a folder of pictures; of records what `format` reads.
    kind: documents, queries or records.
    format, options: of records, as in a training config.
    name: goes into the records as their source.
    instruction, task: of queries and records that have none of their own.
    max_examples: a sample, drawn with the run's seed.
    """

    path: str
    kind: Kind = "records"
    format: str = "jsonl"
    options: dict[str, Any] = Field(default_factory=dict)
    name: str = ""
    instruction: str | None = None
    task: Task | None = None
    max_examples: Positive | None = None

    @model_validator(mode="after")
    def _readable(self) -> SynthesisSource:
        if self.kind != "records" and (self.format != "jsonl" or self.options):
            raise ConfigError(
                f"source '{self.path}': format and options are of records; remove them, or set kind: records"
            )
        if self.kind == "documents" and (self.instruction is not None or self.task is not None):
            raise ConfigError(f"source '{self.path}': documents have no instruction and no task; give them to a stage")
        return self

    @property
    def title(self) -> str:
        return self.name or self.path


class Budget(Block):
    """What a run may ask for in all its lives; None is without bound. tokens: of prompts and answers together."""

    requests: Positive | None = None
    tokens: Positive | None = None


class SamplingConfig(Block):
    """Of asks whose stage says nothing else."""

    max_tokens: Positive = 512
    temperature: float = Field(default=0.7, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: tuple[str, ...] = ()


class Prices(Block):
    """Of a million tokens, in any currency, for the estimate. tokens_per_second: of answers, for its time."""

    prompt: float = Field(default=0.0, ge=0)
    answer: float = Field(default=0.0, ge=0)
    tokens_per_second: float | None = Field(default=None, gt=0)


class SynthesisConfig(Reading):
    """A run of `data_tools.synthesize`.

    output: folder of what is made, and `work`, what was answered and computed.
    root, media_root, media_limits, on_bad_record: as `data` of a training run.
    generator: what answers; `generators` are others by names, which a stage's `generator` chooses.
    stages: blocks in order; besides the stage's options each may hold `generator` and `name`.
    attempts: of a question whose answer cannot be used.
    max_lost: the share of a stage's items that may be lost before the run ends with status 1.
    ray: workers that ask, each with a generator of its own; None asks from this process.
    """

    sources: tuple[SynthesisSource, ...] = Field(min_length=1)
    generator: TypedBlock | None = None
    generators: dict[str, TypedBlock] = Field(default_factory=dict)
    sampling: SamplingConfig = SamplingConfig()
    stages: tuple[TypedBlock, ...] = Field(min_length=1)
    attempts: Positive = 3
    budget: Budget = Budget()
    prices: Prices = Prices()
    max_lost: float = Field(default=0.05, ge=0, le=1)
    seed: int = Field(default=0, ge=0)
    ray: RayConfig | None = None

    @field_validator("sources", "stages", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("generator", "stages")
    @classmethod
    def _has_type(cls, value: Any) -> Any:
        check_type(*(value if isinstance(value, tuple) else (value,)))
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> SynthesisConfig:
        kinds = {source.kind for source in self.sources}
        if len(kinds) > 1:
            raise ConfigError(f"sources: {' and '.join(sorted(kinds))} in one run; give each kind a run of its own")
        return self

    @model_validator(mode="after")
    def _one_counter(self) -> SynthesisConfig:
        if self.ray is not None and self.budget != Budget():
            raise ConfigError("ray + budget: no worker knows what the others have asked; remove one of them")
        return self


class Step:
    """A stage of a run.

    Attributes:
        title: its type, or the name that it has in the config; `TYPE-2` of the second one. Names its folder, and its
            seeds follow from it, so a stage more in front of it asks for nothing anew.
        name: NN-TITLE, in reports.
        block: the stage's own options.
        generator: block of what answers it; None where it asks nothing.
        takes, gives: kinds of items.
    """

    def __init__(
        self, number: int, block: TypedBlock, config: SynthesisConfig, takes: Kind, taken: Collection[str]
    ) -> None:
        options: dict[str, Any] = {"type": block} if isinstance(block, str) else dict(block)
        where = f"stages[{number}] ({block_type(block)})"
        chosen, title = options.pop("generator", None), options.pop("name", None)
        if title is not None and (not isinstance(title, str) or not title.replace("-", "").replace("_", "").isalnum()):
            raise ConfigError(f"{where}: name {title!r}: use letters, digits, - and _")
        try:
            self.stage: Stage = STAGES.build(options, below_root=config.below_root)
        except MmembedError as error:
            raise ConfigError(f"{where}: {error}") from None
        first = title or self.stage.name
        again = next(turn for turn in count(1) if (first if turn == 1 else f"{first}-{turn}") not in taken)
        self.title, self.block = first if again == 1 else f"{first}-{again}", options
        self.name = f"{number + 1:02d}-{self.title}"
        self.generator = _generator_of(self.stage, chosen, config, where)
        if takes not in self.stage.takes:
            raise ConfigError(
                f"{where} works on {' or '.join(sorted(self.stage.takes))}, and what comes to it are {takes}; "
                "put a stage in between that makes them, or change the sources"
            )
        self.takes, self.gives = takes, self.stage.gives(takes)


def load_synthesis(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> SynthesisConfig:
    """Reads and checks a config with its blocks. Raises ConfigError; loads no weights."""
    config = load_blocks(SynthesisConfig, path, overrides, EXAMPLES)
    try:
        found = steps(config)
        if config.ray is not None and not any(isinstance(step.stage, AskingStage) for step in found):
            raise ConfigError("ray: its workers ask language models, and no stage asks; remove it")
    except MmembedError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def steps(config: SynthesisConfig) -> list[Step]:
    """The stages of a run, and that they fit together.

    Raises:
        ConfigError: an unknown stage, generator or option, a stage that cannot work on what comes to it, or a generator
            that nothing uses.
    """
    from data_tools.generators import GENERATORS

    kind, found = config.sources[0].kind, list[Step]()
    for block in (config.generator, *config.generators.values()):
        if block is not None:
            GENERATORS.build(block)
    for number, block in enumerate(config.stages):
        found.append(Step(number, block, config, kind, [step.title for step in found]))
        kind = found[-1].gives
    _check_left(found)
    used = [step.generator for step in found]
    for name, block in (("generator", config.generator), *config.generators.items()):
        if block is not None and not any(block is one for one in used):
            raise ConfigError(f"no stage asks generator '{name}'; remove it, or name it in a stage")
    return found


def _check_left(found: list[Step]) -> None:
    """Raises ConfigError where a stage needs what none before it adds, or adds what none behind it uses."""
    for number, step in enumerate(found):
        where = f"stages[{number}] ({step.stage.name})"
        for key in sorted(step.stage.needs):
            adding = sorted(name for name, cls in STAGES.classes().items() if key in cls.adds)
            if not any(key in earlier.stage.adds for earlier in found[:number]):
                raise ConfigError(f"{where}: needs {key}, and no stage before it adds them; add {' or '.join(adding)}")
        for key in sorted(step.stage.adds):
            using = sorted(name for name, cls in STAGES.classes().items() if key in cls.uses)
            if not any(key in later.stage.uses for later in found[number + 1 :]):
                raise ConfigError(
                    f"{where}: adds {key}, and no stage behind it uses them; remove it, or add {' or '.join(using)}"
                )


def _generator_of(stage: Stage, chosen: Any, config: SynthesisConfig, where: str) -> TypedBlock | None:
    if not isinstance(stage, AskingStage):
        if chosen is not None:
            raise ConfigError(f"{where}: asks nothing, so 'generator' has no effect; remove it")
        return None
    if chosen is None:
        if config.generator is None:
            raise ConfigError(f"{where}: asks a language model, and there is no 'generator'; add one")
        return config.generator
    if chosen not in config.generators:
        known = nearest(str(chosen), config.generators) if config.generators else "there are none in 'generators'"
        raise ConfigError(f"{where}: there is no generator '{chosen}'; {known}")
    return config.generators[chosen]
