"""The config of a mining run. The constructors of retrievers, teachers and rules are the schema of their blocks."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from data_tools.settings import Block, RayConfig, Reading, listed
from mmembed.config import load_blocks
from mmembed.config.blocks import Positive, SourceConfig, TypedBlock, block_type, check_type
from mmembed.content import Task
from mmembed.errors import ConfigError, MmembedError, nearest


class MiningSource(Block):
    """Records to mine for. Their documents are the corpus, and what is in `corpus` beside them.

    path, format, options, name, instruction, document_instruction, task, max_examples: as of a training source.
    corpus: `.jsonl` files of documents (a corpus.jsonl of BEIR, lines of content, records) and folders of pictures,
        relative to `root`.
    """

    path: str
    format: str = "jsonl"
    options: dict[str, Any] = Field(default_factory=dict)
    name: str = ""
    instruction: str | None = None
    document_instruction: str | None = None
    task: Task | None = None
    max_examples: Positive | None = None
    corpus: tuple[str, ...] = ()

    @field_validator("corpus", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return listed(value)

    @property
    def title(self) -> str:
        return self.name or self.path

    @property
    def file(self) -> str:
        """The name of its folder and file: letters, digits, `-`, `_` and `.`."""
        plain = "".join(one if one.isalnum() or one in "-_." else "-" for one in self.title).strip("-.")
        return plain.removesuffix(".jsonl") or "records"

    @property
    def records(self) -> SourceConfig:
        """As the data set takes it."""
        return SourceConfig(**{**self.model_dump(exclude={"corpus", "name"}), "name": self.title})


class SearchConfig(Block):
    """The search for candidates.

    depth: candidates a query.
    index: exact, or a FAISS index: flat, ivf, hnsw.
    options: of the FAISS index: lists and probes (ivf), links and effort (hnsw).
    similarity, precision: of vectors; `precision` is how they are stored.
    device: where exact search multiplies and FAISS searches.
    queries: searched at a time; a kill loses the search for so many.
    """

    depth: Positive = 50
    index: Literal["exact", "flat", "ivf", "hnsw"] = "exact"
    options: dict[str, Positive] = Field(default_factory=dict)
    similarity: Literal["cosine", "dot"] = "cosine"
    precision: Literal["float32", "float16", "bfloat16", "int8", "binary"] = "float32"
    device: str = "cpu"
    queries: Positive = 4096

    @model_validator(mode="after")
    def _options(self) -> SearchConfig:
        if self.similarity == "dot" and self.precision in ("int8", "binary"):
            raise ConfigError(
                f"similarity 'dot' + precision '{self.precision}': lengths are not stored; use cosine or float16"
            )
        return self


class RecordsConfig(Reading):
    """A run that reads sources, asks models about them, and writes records.

    output: folder of the records (a .jsonl file a source), and `work`, what was computed.
    root, media_root, media_limits, on_bad_record: as `data` of a training run.
    shard: contents encoded at a time; a kill loses so many at most.
    overwrite: what was computed by another retriever or teacher may be replaced.
    ray: workers that compute vectors of queries and documents, in shards; None computes them in this process.
    """

    sources: tuple[MiningSource, ...] = Field(min_length=1)
    shard: Positive = 1024
    overwrite: bool = False
    ray: RayConfig | None = None

    @field_validator("sources", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return listed(value)

    @model_validator(mode="after")
    def _files(self) -> Self:
        files = [source.file for source in self.sources]
        for source in self.sources:
            if files.count(source.file) > 1:
                raise ConfigError(f"two sources would be written to '{source.file}.jsonl'; give one a name of its own")
        return self


class ScoreConfig(RecordsConfig):
    """A run of `data_tools.score`.

    teacher: what scores every document of every record.
    """

    teacher: TypedBlock

    @field_validator("teacher")
    @classmethod
    def _has_type(cls, value: Any) -> Any:
        check_type(value)
        return value

    @model_validator(mode="after")
    def _no_corpus(self) -> Self:
        for source in self.sources:
            if source.corpus:
                raise ConfigError(
                    f"sources '{source.title}': corpus has no effect, the records' own documents are scored; remove it"
                )
        return self


class MiningConfig(RecordsConfig):
    """A run of `data_tools.mine_negatives`; it writes a report, too.

    retriever: what finds candidates.
    rules: filters, a pick, a fill of `mmembed.mining`.
    negatives: added to each record.
    clusters: k-means clusters of the corpus, for rules that read clusters.
    earlier: outputs of mining runs with clusters, which are joined with those of this one (MCL's stages).
    teacher: what judges candidates beside the retriever; `rescore` says which: all `candidates`, by whose scores the
        rules then choose, or the `chosen` ones, for the report alone.
    scores: which scores the documents of the records get.
    seed: of rules that draw, and of k-means.
    examples: suspected false negatives that the report shows, of each source; it shows some of all negatives besides.
    """

    retriever: TypedBlock = "mmembed"
    search: SearchConfig = SearchConfig()
    rules: tuple[TypedBlock, ...] = ({"type": "percent_of_positive", "percent": 5.0}, "random_fill")
    negatives: Positive = 7
    clusters: Positive | None = None
    earlier: tuple[str, ...] = ()
    teacher: TypedBlock | None = None
    rescore: Literal["candidates", "chosen"] = "candidates"
    scores: Literal["none", "retriever", "teacher"] = "none"
    seed: int = Field(default=0, ge=0)
    examples: int = Field(default=12, ge=0)

    @field_validator("rules", "earlier", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("retriever", "teacher", "rules")
    @classmethod
    def _has_type(cls, value: Any) -> Any:
        check_type(*(value if isinstance(value, tuple) else (value,)))
        return value

    @model_validator(mode="after")
    def _combinations(self) -> MiningConfig:
        if "rescore" in self.model_fields_set and self.teacher is None:
            raise ConfigError("'rescore' has no effect without 'teacher'; give one, or remove it")
        if self.scores == "teacher" and self.teacher is None:
            raise ConfigError("scores 'teacher': there is no teacher; give one, or write the retriever's")
        if self.negatives > self.search.depth:
            raise ConfigError(f"negatives {self.negatives} is above search.depth {self.search.depth}; raise the depth")
        if block_type(self.retriever) == "bm25":
            fields = self.search.model_fields_set
            for key in sorted(fields - {"depth", "queries"}):
                raise ConfigError(f"search.{key} has no effect with retriever 'bm25', which has no vectors; remove it")
            if self.clusters is not None:
                raise ConfigError("clusters: retriever 'bm25' has no vectors to cluster; remove it")
        if self.earlier and self.clusters is None:
            raise ConfigError("earlier: its clusters are joined with those of this run; set clusters, or remove it")
        folders = [Path(one).resolve() for one in self.earlier]
        for one, folder in zip(self.earlier, folders, strict=True):
            if folders.count(folder) > 1:
                raise ConfigError(f"earlier: '{one}' is there twice; give each run once")
            if folder == Path(self.output).resolve():
                raise ConfigError(f"earlier: '{one}' is the output of this run; give runs before it")
        if self.clusters is not None and self.search.precision in ("int8", "binary", "bfloat16"):
            raise ConfigError(f"clusters + search.precision '{self.search.precision}': use float32 or float16")
        return self


def load_mining(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> MiningConfig:
    """Reads and checks a config with its blocks. Raises ConfigError; loads no weights."""
    config = load_blocks(MiningConfig, path, overrides, "recipes/configs/mining")
    try:
        _check_blocks(config)
    except MmembedError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def load_scoring(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> ScoreConfig:
    """Reads and checks a config of `data_tools.score`. Raises ConfigError; loads no weights."""
    from data_tools.mining.teachers import TEACHERS

    config = load_blocks(ScoreConfig, path, overrides, "recipes/configs/distil")
    try:
        _check_ray(config, TEACHERS.build(config.teacher))
    except MmembedError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def _check_blocks(config: MiningConfig) -> None:
    from data_tools.mining.retrievers import RETRIEVERS
    from data_tools.mining.teachers import TEACHERS
    from mmembed.mining import MINERS
    from mmembed.search.faiss_index import OPTIONS

    index, options = config.search.index, OPTIONS.get(config.search.index, set())
    for key in config.search.options:
        if key not in options:
            hint = nearest(key, options) if options else "it takes none"
            raise ConfigError(f"search.options: index '{index}' has no '{key}'; {hint}")
    if index != "exact" and importlib.util.find_spec("faiss") is None:
        raise ConfigError(f"search.index '{index}': faiss is not installed; pip install faiss-cpu, or use exact")
    if config.search.device != "cpu":
        _check_device(config.search)
    retriever = RETRIEVERS.build(config.retriever)
    _check_ray(config, retriever, None if config.teacher is None else TEACHERS.build(config.teacher))
    roles: dict[str, str] = {}
    for block in config.rules:
        rule, name = MINERS.build(block), block_type(block)
        if rule.role == "cluster":
            raise ConfigError(
                f"rules: '{name}' makes clusters of pairs, not negatives; write it as data.batch_order of "
                "the training run, or take owner_similarity, which chooses negatives in the same way"
            )
        if rule.role != "filter" and rule.role in roles:
            raise ConfigError(f"rules: '{roles[rule.role]}' and '{name}' both {rule.role} the negatives; keep one")
        roles[rule.role] = name
        if "owners" in rule.reads and block_type(config.retriever) == "bm25":
            raise ConfigError(f"rules: '{name}' compares vectors of queries; retriever 'bm25' has none")
        if "clusters" in rule.reads and config.clusters is None:
            raise ConfigError(f"rules: '{name}' reads clusters; set clusters to how many there shall be")
    if config.clusters is not None and not any("clusters" in MINERS.build(one).reads for one in config.rules):
        raise ConfigError("clusters: no rule reads them; add cluster_diverse or mcl, or remove it")


def _check_ray(config: RecordsConfig, *models: Any) -> None:
    """Raises ConfigError where `ray` would have nothing to do."""
    from data_tools.mining.retrievers import Encoder
    from data_tools.mining.teachers.embedder import EmbedderTeacher

    if config.ray is None:
        return
    if not any(isinstance(model, Encoder | EmbedderTeacher) for model in models):
        names = " and ".join(f"'{model.name}'" for model in models if model is not None)
        raise ConfigError(f"ray: its workers compute vectors, and {names} has none to compute; remove it")


def _check_device(search: SearchConfig) -> None:
    from mmembed.inference.devices import check_device
    from mmembed.search.faiss_index import check_gpu

    try:
        check_device(search.device)
        if search.index != "exact":
            check_gpu(search.index, search.device)
    except MmembedError as error:
        raise ConfigError(f"search.device '{search.device}': {error}") from None
