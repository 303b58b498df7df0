"""Opens sets of public benchmarks: from the hub, or from a folder with copies of their repositories.

A set that cannot be had raises `MissingSet` with the reason and what to do, so that a run can name it and go on.
"""

import io
import tarfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.compute

import mmembed.backbones  # noqa: F401 - lets torchvision import on a CPU before mteb pulls it in
from eval.examples import by_hash
from mmembed.errors import ConfigError

RESUMES = "what has arrived is kept: the same command goes on from there, and --source reads copies"

Result = TypeVar("Result")


class MissingSet(ConfigError):
    """A set that cannot be read here."""


@dataclass(frozen=True)
class Source:
    """Where sets are read from.

    Attributes:
        folder: holds copies, of a set that mteb has in a subfolder of the task's name, of others in `owner/repository`;
            None: the hub.
    """

    folder: Path | None = None

    def copy(self, wanted: str, name: str) -> Path:
        """The folder of a copy. Raises MissingSet."""
        assert self.folder is not None
        if not (self.folder / wanted).is_dir():
            raise MissingSet(f"{name}: there is no {self.folder / wanted}")
        return self.folder / wanted

    def rows(self, name: str, repository: str, config: str | None, split: str, revision: str | None) -> Any:
        """One table of a repository. Raises MissingSet."""
        if self.folder is None:
            return self.had(name, lambda: datasets.load_dataset(repository, config, split=split, revision=revision))
        folder = self.copy(repository, name)
        with tables_of(folder):
            return self.had(name, lambda: datasets.load_dataset(str(folder), config, split=split))

    def had(self, name: str, load: Callable[[], Result]) -> Result:
        """What `load` gives. Whatever keeps it from that, data of another form too, is the reason of a MissingSet."""
        try:
            return load()
        except MissingSet:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            reason = f"it has no {reason}" if isinstance(error, LookupError) else reason
            interrupted = self.folder is None and not isinstance(error, (FileNotFoundError, ValueError, LookupError))
            raise MissingSet(f"{name}: {reason}{f'; {RESUMES}' if interrupted else ''}") from error


@contextmanager
def tables_of(folder: Path) -> Iterator[None]:
    """Inside, `datasets` keeps the tables of a copy under the state of its files: by its path alone it would give those
    of an earlier copy."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    usual = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = Path(usual) / "copies" / sha256(repr(state).encode()).hexdigest()[:16]
    try:
        yield
    finally:
        datasets.config.HF_DATASETS_CACHE = usual


@cache
def unpacked(repository: str, revision: str, files: tuple[str, ...], below: str, inside: str) -> Path:
    """Downloads the parts of an archive and unpacks them beside the download, once: the folder `below`.

    What was half unpacked when a run was stopped is unpacked anew; what was downloaded is not downloaded again.
    """
    from huggingface_hub import snapshot_download

    snapshot = Path(snapshot_download(repository, repo_type="dataset", revision=revision, allow_patterns=list(files)))
    root = snapshot / "unpacked"
    done = root / f".{Path(files[0]).name}.done"
    if not done.is_file():
        stream = io.BufferedReader(Joined([snapshot / file for file in files]))
        with stream, tarfile.open(fileobj=stream, mode="r|gz") as archive:
            archive.extractall(root / below / inside, filter="data")
        done.touch()
    return root / below


class Joined(io.RawIOBase):
    """Files one behind another as one stream."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._left = list(paths)
        self._file = self._left.pop(0).open("rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        while not count and self._left:
            self._file.close()
            self._file = self._left.pop(0).open("rb")
            count = self._file.readinto(buffer)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def open_task(task: Any, source: Source) -> None:
    """Loads the data of an mteb task, of each of its parts where it is an aggregate. Raises MissingSet."""
    for part in parts(task):
        name = part.metadata.name
        if source.folder is None:
            source.had(name, part.load_data)
        else:
            folder = source.copy(name, task.metadata.name)
            copied = {**part.metadata.dataset, "path": str(folder)}
            part.metadata = part.metadata.model_copy(update={"dataset": copied})
            with tables_of(folder):
                source.had(name, part.load_data)
        if is_ranking(part):
            part.convert_v1_dataset_format_to_v2(num_proc=None)
            for data in splits(part):
                data["corpus"] = _with_titles(data["corpus"])


def parts(task: Any) -> list[Any]:
    """An mteb task's own tasks, where its score is an average of theirs; else itself."""
    return list(task.metadata.tasks) if task.is_aggregate else [task]


def is_ranking(task: Any) -> bool:
    from mteb.abstasks import AbsTaskRetrieval

    return isinstance(task, AbsTaskRetrieval)


def splits(task: Any) -> Iterator[Any]:
    """What a task holds for each of its subsets and evaluated parts: queries, corpus and judgements, or a table."""
    for level, split in _tables(task):
        yield level[split]


def _tables(task: Any) -> Iterator[tuple[Any, str]]:
    for split in task.eval_splits:
        for level in [task.dataset] if split in task.dataset else list(task.dataset.values()):
            if split in level:
                yield level, split


def training(task: Any) -> list[Any]:
    """The rows that a task's classifier is fitted on, of each subset."""
    return [level[split] for level, split in _training_tables(task)]


def _training_tables(task: Any) -> Iterator[tuple[Any, str]]:
    from mteb.abstasks import AbsTaskClassification

    if isinstance(task, AbsTaskClassification):
        held: Any = task.dataset
        for level in [held] if task.train_split in held else list(held.values()):
            if task.train_split in level:
                yield level, task.train_split


def check_rankings(task: Any) -> None:
    """Raises MissingSet where ids stand for two documents or queries, or nothing is judged relevant."""
    for part in filter(is_ranking, parts(task)):
        name = part.metadata.name
        for data in splits(part):
            for side in ("corpus", "queries"):
                ids = data[side].select_columns("id").with_format("arrow")[:]["id"]
                if pyarrow.compute.count_distinct(ids).as_py() < len(ids):
                    first, second, key = _twice(ids.to_pylist())
                    raise MissingSet(f"{name}: rows {first} and {second} of its {side} are both called '{key}'; give "
                                     "each an id of its own")  # fmt: skip
            judged = data["relevant_docs"]
            if not any(grade > 0 for query in data["queries"]["id"] for grade in judged.get(query, {}).values()):
                raise MissingSet(f"{name}: no query has a relevant document; look at the set's qrels")


def _twice(ids: Sequence[str]) -> tuple[int, int, str]:
    """The places of the first id that stands twice, and the id."""
    places: dict[str, int] = {}
    for number, key in enumerate(ids):
        if key in places:
            return places[key], number, key
        places[key] = number
    raise AssertionError("all ids are different")


@dataclass(frozen=True)
class Cut:
    """What is left of a task; None: all.

    Attributes:
        queries: of a ranking, of those that have judged documents.
        documents: of a whole corpus, beside those that are judged for these queries.
        rows: of another task. training: of the rows that its classifier is fitted on.
    """

    queries: int | None = None
    documents: int | None = None
    rows: int | None = None
    training: int | None = None

    def told(self) -> dict[str, int | None]:
        return asdict(self)


PROXY = Cut(queries=100, documents=500, rows=300, training=1000)  # of `--proxy`


def cut(task: Any, left: Cut) -> None:
    """Cuts a task; what is left is drawn by a hash of ids, or of numbers of rows, so it is the same for every model.
    Queries without a judged document go; of documents that are candidates those of the queries are left."""
    for part in parts(task):
        for level, split in _tables(part):
            if is_ranking(part):
                _cut_ranking(level[split], left)
            else:
                _cut_rows(level, split, left.rows)
        for level, split in _training_tables(part):
            _cut_rows(level, split, left.training)


def _cut_rows(level: Any, split: str, most: int | None) -> None:
    rows = level.get(split)
    if most is not None and isinstance(rows, datasets.Dataset) and len(rows) > most:
        level[split] = rows.select(sorted(_drawn(map(str, range(len(rows))), most, int)))


def _cut_ranking(data: Any, left: Cut) -> None:
    ids = [query for query in data["queries"]["id"] if data["relevant_docs"].get(query)]
    kept = set(ids if left.queries is None else _drawn(ids, left.queries, str))
    data["queries"] = data["queries"].select([at for at, key in enumerate(data["queries"]["id"]) if key in kept])
    for part in ("relevant_docs", "top_ranked"):
        if data[part] is not None:
            data[part] = {query: value for query, value in data[part].items() if query in kept}
    if data["top_ranked"] is not None:
        if left.queries is not None:
            _keep_documents(data, {document for own in data["top_ranked"].values() for document in own})
    elif left.documents is not None:
        judged = {document for own in data["relevant_docs"].values() for document in own}
        others = [document for document in data["corpus"]["id"] if document not in judged]
        _keep_documents(data, judged | set(_drawn(others, left.documents, str)))


def _keep_documents(data: Any, kept: Collection[str]) -> None:
    data["corpus"] = data["corpus"].select([at for at, key in enumerate(data["corpus"]["id"]) if key in kept])


def _drawn(keys: Any, most: int, kind: Callable[[str], Result]) -> list[Result]:
    return [kind(key) for key in by_hash(keys)[:most]]


def _with_titles(corpus: Any) -> Any:
    """Documents whose text begins with their title, as encoders of mteb and the local sets have it."""
    if not {"title", "text"} <= set(corpus.column_names):
        return corpus
    return corpus.map(
        lambda row: {"text": " ".join(filter(None, (row["title"], row["text"])))}, remove_columns=["title"]
    )
