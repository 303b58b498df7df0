"""What a run will cost, said before it starts: what there is to encode, and how long each model takes for that here.

    work      texts, characters and pictures of every task: counted once in the data and kept under their fingerprint,
              or what mteb declares of sets that were not downloaded yet
    rate      seconds an item, a character and a picture of this model on this device, measured on texts and pictures
              of the repository: a second or two, more for a large model without an accelerator
    estimate  their product; while a run goes on, what is left is corrected by what the tasks so far took

Left out is what is no encoding: downloads, search, classifiers, clusterings. A rate of characters knows nothing of a
tokenizer that splits a language finer than those of the probe.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from eval.files import DATA, read_json, read_jsonl, write_json
from eval.tables import aligned
from mmembed.content import Content, Image, Text
from mmembed.media import default_cache_dir

TEXTS = ("xquad/de/corpus.jsonl", "xquad/zh/corpus.jsonl", "xquad/de/queries.jsonl", "xquad/zh/queries.jsonl")
PICTURES = "openstax-figures/images.parquet"
PROBED, TIMES = 16, 2  # texts of each file, and pictures; the fastest of so many tries counts
NO_CONTENT = {"id", "label", "labels", "lang", "language", "score"}


@dataclass(frozen=True)
class Load:
    """An amount of work.

    Attributes:
        items: contents that are encoded, or pairs that are scored.
        characters: of all texts. pictures: also frames of videos.
    """

    items: float = 0
    characters: float = 0
    pictures: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Load:
        return Load(*(value * times for value in astuple(self)))


@dataclass(frozen=True)
class Work:
    """What a task asks of a model.

    Attributes:
        encoded: of an embedder, by what it is (a digest): tasks with one corpus have one entry in common.
        judged: of a reranker, each candidate with its query; nothing where no query has any.
    """

    encoded: Mapping[str, Load]
    judged: Load = Load()

    @property
    def total(self) -> Load:
        return sum(self.encoded.values(), Load())


@dataclass(frozen=True)
class Rate:
    """Seconds that a model takes for an item, a character, a picture."""

    item: float
    character: float
    picture: float

    def seconds(self, load: Load) -> float:
        return load.items * self.item + load.characters * self.character + load.pictures * self.picture


# Work -----------------------------------------------------------------------------------------------------------------


def read_work(key: Sequence[Any]) -> Work | None:
    """What was counted before under a key; None: nothing was."""
    path = _file(key)
    if not path.is_file():
        return None
    kept = read_json(path)
    return Work({part: Load(*load) for part, load in kept["encoded"].items()}, Load(*kept["judged"]))


def write_work(key: Sequence[Any], work: Work) -> None:
    encoded = {part: astuple(load) for part, load in work.encoded.items()}
    write_json(_file(key), {"encoded": encoded, "judged": astuple(work.judged)}, indent=None)


def _file(key: Sequence[Any]) -> Path:
    told = json.dumps(list(key), sort_keys=True).encode() + Path(__file__).read_bytes()
    return default_cache_dir() / "evaluation" / f"{hashlib.blake2b(told, digest_size=16).hexdigest()}.json"


def work_of(task: Any, depth: int) -> Work:
    """Counts what a task holds, its data loaded; equal contents of a column count once.

    Args:
        depth: candidates that a first stage finds for a query of a task that brings none.
    """
    from eval.sets import is_ranking, parts, splits

    encoded: dict[str, Load] = {}
    judged = Load()
    for part in parts(task):
        for data in [*splits(part), *_fitted(part)]:
            if not is_ranking(part):
                encoded |= _columns(data, part.metadata.name)
                continue
            queries, documents = _columns(data["queries"], part.metadata.name), _columns(data["corpus"], "")
            encoded |= queries | documents
            pool = data["top_ranked"]
            pairs = sum(map(len, pool.values())) if pool is not None else len(data["queries"]) * depth
            judged += _pairs(_together(queries), len(data["queries"]), _together(documents), len(data["corpus"]), pairs)
    return Work(encoded, judged)


def declared_work(task: Any, depth: int, limit: int | None) -> Work | None:
    """What mteb declares of a task whose data are not here; None: it does not."""
    from eval.sets import parts

    works = [_declared(part, depth, limit) for part in parts(task)]
    known = [work for work in works if work is not None]
    if len(known) < len(works):
        return None
    encoded = {name: load for work in known for name, load in work.encoded.items()}
    return Work(encoded, sum((work.judged for work in known), Load()))


def _declared(task: Any, depth: int, limit: int | None) -> Work | None:
    stats = task.metadata.descriptive_stats or {}
    if any(split not in stats for split in task.eval_splits):
        return None
    name, encoded, judged = task.metadata.name, {}, Load()
    for split in task.eval_splits:
        own = stats[split]
        if "relevant_docs_statistics" not in own:
            rows = own["num_samples"]
            whole = sum((_described(own[key]) for key in own if key.endswith("_statistics")), Load())
            encoded[f"{name}/{split}"] = whole * (min(limit or rows, rows) / max(1, rows))
            continue
        sides = {side: sum((_described(own.get(f"{side}_{kind}_statistics")) for kind in ("text", "image", "video")),
                           Load()) for side in ("queries", "documents")}  # fmt: skip
        asked = own.get("num_queries", sides["queries"].items)
        share = min(limit or asked, asked) / max(1, asked)
        pool = own.get("top_ranked_statistics")
        each = pool["average_top_ranked_per_query"] if pool else depth
        queries, documents = sides["queries"] * share, sides["documents"] * (share if pool else 1)
        encoded |= {f"{name}/{split}/queries": queries, f"{name}/{split}/documents": documents}
        judged += _pairs(queries, asked * share, documents, documents.items, each * asked * share)
    return Work(encoded, judged)


def _described(column: Mapping[str, Any] | None) -> Load:
    """What mteb says of a column; nothing of one that is not encoded."""
    if column and "total_text_length" in column:
        return Load(column["unique_texts"], column["total_text_length"])
    if column and (pictures := column.get("unique_images", column.get("unique_videos"))):
        return Load(pictures, 0, pictures)
    return Load()


def _fitted(task: Any) -> list[Any]:
    """The examples that classifiers are fitted on; of mteb's few a label as many, drawn anew for each experiment."""
    from eval.sets import training

    found = []
    for data in training(task):
        labels = len(set(data[task.label_column_name]))
        most = min(len(data), task.samples_per_label * labels * task.n_experiments)
        found.append(data.select(range(most)))
    return found


def _columns(table: Any, task: str) -> dict[str, Load]:
    """The contents of a table by a digest of their columns.

    Args:
        task: whose instruction they are encoded with; empty for documents, which have none.
    """
    arrow = table.with_format("arrow")[:]
    digest, found = hashlib.blake2b(task.encode(), digest_size=12), Load()
    for name in (name for name in arrow.column_names if name not in NO_CONTENT):
        column = arrow.column(name).drop_null()
        load = _column(column, name)
        if load is not None:
            found = Load(max(found.items, load.items), found.characters + load.characters,
                         found.pictures + load.pictures)  # fmt: skip
            _digest(column, digest)
    return {digest.hexdigest(): found} if found.items else {}


def _digest(column: Any, digest: Any) -> None:
    """Adds a column's values, however they lie in memory."""
    table = pa.table({"": column}).combine_chunks()
    whole = pa.BufferOutputStream()
    with pa.ipc.new_stream(whole, table.schema) as stream:
        stream.write_table(table)
    digest.update(whole.getvalue())


def _column(column: Any, name: str) -> Load | None:
    """None: it is not encoded."""
    if name == "video" or name == "image":
        frames = column.combine_chunks().flatten() if pa.types.is_list(column.type) else column
        return Load(len(column), 0, len(frames))
    if pa.types.is_list(column.type) and pa.types.is_string(column.type.value_type):
        column = column.combine_chunks().flatten()
    if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
        return None
    texts = pyarrow.compute.unique(column)
    return Load(len(texts), pyarrow.compute.sum(pyarrow.compute.utf8_length(texts)).as_py() or 0)


def _together(parts: Mapping[str, Load]) -> Load:
    return sum(parts.values(), Load())


def _pairs(queries: Load, asked: float, documents: Load, held: float, pairs: float) -> Load:
    """So many pairs of average queries and documents."""
    each = queries * (1 / max(1, asked)) + documents * (1 / max(1, held))
    return Load(pairs, each.characters * pairs, each.pictures * pairs)


# Rate -----------------------------------------------------------------------------------------------------------------


def rate_of(run: Callable[[Sequence[Any]], Any], pairs: bool, sees: bool) -> Rate:
    """Measures a model on short texts, on long ones and, where it sees, on pictures.

    Args:
        run: encodes contents, or scores pairs of them.
    """
    short, long, pictures = probes()

    def timed(contents: Sequence[Content]) -> float:
        inputs: Sequence[Any] = [(short[0], content) for content in contents] if pairs else contents
        took = []
        for _ in range(TIMES):
            started = time.perf_counter()
            run(inputs)
            took.append(time.perf_counter() - started)
        return min(took)

    timed(short[:2])  # what happens once
    lengths = [sum(len(part.text) for content in contents for part in content if isinstance(part, Text))
               for contents in (short, long)]  # fmt: skip
    took = [timed(short), timed(long)]
    character = max(0.0, (took[1] - took[0] * len(long) / len(short)) / (lengths[1] - lengths[0]))
    item = max(0.0, took[0] - character * lengths[0]) / len(short)
    picture = max(0.0, timed(pictures) / len(pictures) - item) if sees else 0.0
    return Rate(item, character, picture)


@functools.cache
def probes() -> tuple[list[Content], list[Content], list[Content]]:
    """Questions, passages and pictures of the repository."""
    from PIL import Image as Pictures

    texts = [[(Text(row["text"]),) for row, _ in zip(read_jsonl(DATA / name), range(PROBED), strict=False)]
             for name in TEXTS]  # fmt: skip
    table = pyarrow.parquet.read_table(DATA / PICTURES, columns=["image"])[:PROBED].to_pylist()
    pictures: list[Content] = [
        (Image(Pictures.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")),) for row in table
    ]
    return [*texts[2], *texts[3]], [*texts[0], *texts[1]], pictures


# Estimate -------------------------------------------------------------------------------------------------------------


class Costs(Protocol):
    """What an estimate asks of a model; `eval.models.Loaded` has it."""

    @property
    def name(self) -> str: ...
    @property
    def reranks(self) -> bool: ...
    @property
    def sees(self) -> bool: ...
    @property
    def probe(self) -> Callable[[Sequence[Any]], Any] | None: ...


class Estimate:
    """How long the models take for the tasks of a run, and what is left of that.

    Args:
        works: task -> what it asks; None: nobody knows.
        models: each with the tasks that it does, and with the digests of what it has encoded before where it keeps
            vectors (None: it keeps none). One without a probe costs nothing that counts.
        shares: processes that divide what embedders encode.
    """

    def __init__(
        self,
        works: Mapping[str, Work | None],
        models: Sequence[tuple[Costs, Collection[str], Collection[str] | None]],
        shares: int = 1,
    ) -> None:
        self.works = works
        self.unknown = [task for task, work in works.items() if work is None]
        self.loads: dict[str, dict[str, Load]] = {}  # model -> task -> what it computes
        self.seconds: dict[str, float] = dict.fromkeys(works, 0.0)
        self.of_model: dict[str, float] = {}
        self.judging = {model.name for model, *_ in models if model.reranks}
        for model, does, encoded in models:
            if model.probe is None:
                continue
            done = None if encoded is None else set(encoded)
            own = {task: _left(work, model, done) for task, work in works.items() if work is not None and task in does}
            rate = rate_of(model.probe, model.reranks, model.sees) if any(load.items for load in own.values()) else None
            took = {task: rate.seconds(load) / (1 if model.reranks else shares) if rate else 0.0
                    for task, load in own.items()}  # fmt: skip
            self.loads[model.name], self.of_model[model.name] = own, sum(took.values())
            for task, seconds in took.items():
                self.seconds[task] += seconds

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def left(self, done: Collection[str], spent: float) -> float | None:
        """Seconds that the other tasks take, by what these took; None while that says nothing."""
        before = sum(self.seconds.get(task, 0.0) for task in done)
        remaining = sum(seconds for task, seconds in self.seconds.items() if task not in done)
        return remaining * max(1.0, spent) / before if before > 0 else None

    def __str__(self) -> str:
        lines = []
        for model, loads in self.loads.items():
            whole = sum(loads.values(), Load())
            asked = f"{whole.items:,.0f} {'pairs' if model in self.judging else 'contents'} of {len(loads)} tasks"
            if whole.items:
                asked += f", {whole.characters / 1e6:,.1f} M characters"
                asked += f" and {whole.pictures:,.0f} pictures" if whole.pictures else ""
                asked += f": about {duration(self.of_model[model])}"
            lines.append(f"to compute with {model}: {asked}")
        if self.unknown:
            lines.append(f"unknown before their data are here: {len(self.unknown)} tasks")
        return "\n".join(lines)

    def table(self) -> str:
        """Tasks with what is to compute, by model."""
        lines = [("task", *(name for name in self.loads))]
        for task in self.seconds:
            found = [loads.get(task) for loads in self.loads.values()]
            lines.append((task, *("unknown" if task in self.unknown else "–" if load is None else
                                  f"{load.items:,.0f}" for load in found)))  # fmt: skip
        return aligned(lines, left=1)


def _left(work: Work, model: Costs, done: set[str] | None) -> Load:
    """What a model computes of a task; with a cache each part once, from then on it is `done`."""
    if model.reranks:
        return work.judged
    if done is None:
        return work.total
    load = sum((load for part, load in work.encoded.items() if part not in done), Load())
    done.update(work.encoded)
    return load


def duration(seconds: float) -> str:
    """
    >>> duration(42), duration(400), duration(9000)
    ('42 s', '7 min', '2.5 h')
    """
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )
