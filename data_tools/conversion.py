"""Records on their way from one format into another: what is wrong, what is lost, where their pictures lie then."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmembed.data.format_base import FORMATS, Format, RawRecord, WritableFormat, read_json_lines
from mmembed.data.holding import LOSABLE, MEDIA, Holds, check, fitted
from mmembed.errors import ConfigError, RecordError, nearest
from mmembed.progress import bar

_MEDIA_KEYS = (*MEDIA, "images")


@dataclass
class Conversion:
    """One run.

    Args:
        allowed: what may be dropped, as `--drop` names it.
        skip: bad records are counted and left out; else the first one is raised.
        relocate: a path of a medium -> the path to write.
        told: is called with each bad record that is left out.

    Attributes:
        records: that were given on; `bad` by kind, and `dropped` by name, count the others.
    """

    reader: Format
    path: Path
    writer: WritableFormat | None
    allowed: frozenset[str] = frozenset()
    skip: bool = False
    relocate: Callable[[str], str] | None = None
    told: Callable[[RecordError], None] = lambda error: None
    records: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[RawRecord]:
        for record in self._watched():
            try:
                if isinstance(record, RecordError):
                    raise record
                kept = self._converted(record)
            except RecordError as error:
                if not self.skip:
                    raise
                self.bad[error.kind] += 1
                self.told(error)
                continue
            if kept is not None:
                self.records += 1
                yield kept

    def _watched(self) -> Iterator[RawRecord | RecordError]:
        with bar(f"reading {self.path.name}", None, " records") as shown:
            for record in whole(self.reader, self.path):
                yield record
                shown.update()

    def _converted(self, record: RawRecord) -> RawRecord | None:
        check(record)
        if self.writer is None:
            return record
        kept, dropped = fitted(record, self.writer.holds, self.allowed, self.writer.name)
        self.dropped.update(dropped)
        return kept if kept is None or self.relocate is None else relocated(kept, self.relocate)


class Relocation:
    """Paths of media that mean from another folder what they meant from the first.

    Below the new folder they are relative, elsewhere absolute: a path with `..` opens nothing, since media may not
    leave their folder.

    Attributes:
        absolute: files that are named by absolute paths now.
    """

    def __init__(self, old: Path, new: Path) -> None:
        self.old, self.new = (Path(os.path.abspath(folder)) for folder in (old, new))
        self.absolute: set[str] = set()

    def __call__(self, path: str) -> str:
        if "://" in path or path.startswith("data:"):
            return path
        meant = Path(os.path.normpath(self.old / path))
        if meant.is_relative_to(self.new):
            return str(meant.relative_to(self.new))
        self.absolute.add(str(meant).partition(".parquet#")[0])
        return str(meant)


def relocated(record: RawRecord, change: Callable[[str], str]) -> RawRecord:
    """The record with other paths of media."""
    moved = dict(record)
    if "query" in moved:
        moved["query"] = _moved(moved["query"], change)
    moved["documents"] = [
        {**one, "content": _moved(one["content"], change)} if "content" in one else one for one in moved["documents"]
    ]
    return moved


def _moved(content: Any, change: Callable[[str], str], is_path: bool = False) -> Any:
    if isinstance(content, list):
        return [_moved(one, change, is_path) for one in content]
    if isinstance(content, Mapping):
        return {key: _moved(one, change, key in _MEDIA_KEYS) for key, one in content.items()}
    return change(content) if is_path and isinstance(content, str) else content


def whole(reader: Format, path: Path) -> Iterator[RawRecord | RecordError]:
    """Everything of a file; of a format that is only read, what training takes of it."""
    found = reader.read_whole(path) if isinstance(reader, WritableFormat) else reader.read(path)
    for record in found:
        yield record if isinstance(record, RecordError) else {"documents": [], **record}


def table() -> str:
    """What each format that is written holds, in Markdown."""
    lines = [
        "| format | relevance | media | positives, negatives | of a record | of a document | keeps apart |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cls in FORMATS.classes().items():
        if issubclass(cls, WritableFormat):
            lines.append(f"| `{name}` | {' | '.join(_cells(cls.holds))} |")
    return "\n".join(lines)


def _cells(holds: Holds) -> list[str]:
    relevance = {"any": "graded, or not known", "graded": "graded", "binary": "yes or no", "unknown": "none"}
    media = [
        kind + ("s" if kind == "image" and holds.pictures is None else "") for kind in MEDIA if kind in holds.media
    ]
    order = {"no": "", "around": ", among the text", "any": ", in any order"}[holds.interleaved]
    counts = [_range(*side) for side in (holds.positives, holds.negatives)] if holds.documents else ["no documents"]
    fields = [[*sorted(held), *sorted(keys)] for held, keys in _fields(holds)]
    apart = [*sorted(holds.unjudged), *(["order of documents"] if holds.ordered else [])]
    return [
        relevance[holds.relevance] + (", or a similarity" if holds.sts else ""),
        (", ".join(media) + order) if media else ("no" if holds.contents else "no, ids only"),
        ", ".join(counts),
        *(", ".join(f"`{field}`" for field in one) or "-" for one in fields),
        ", ".join(apart) or "-",
    ]


def _fields(holds: Holds) -> list[tuple[frozenset[str], list[str]]]:
    return [
        (holds.record, [f"meta.{key}" for key in holds.meta]),
        (holds.document, [f"meta.{key}" for key in holds.document_meta]),
    ]


def _range(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else str(least) if least == most else f"{least} to {most}"


def writer_of(name: str, options: Mapping[str, Any]) -> WritableFormat:
    """Raises ConfigError: no such format, one that is only read, an unknown option."""
    writer = FORMATS.build({"type": name, **options})
    if not isinstance(writer, WritableFormat):
        written = [known for known, cls in FORMATS.classes().items() if issubclass(cls, WritableFormat)]
        raise ConfigError(f"--to: the format '{name}' is only read; written are {', '.join(written)}")
    return writer


def allowed_of(names: str | None, writer: WritableFormat) -> frozenset[str]:
    """Of `--drop`. Raises ConfigError for a name that nothing has, or that the format holds."""
    given = [name.strip() for name in (names or "").split(",") if name.strip()]
    can = writer.holds.losable()
    for name in given:
        if name not in LOSABLE:
            raise ConfigError(f"--drop: there is no '{name}'; {nearest(name, LOSABLE)}")
        if name not in can:
            raise ConfigError(f"--drop: {writer.name} holds '{name}'; what it may lose is {', '.join(can)}")
    return frozenset(given)


def detected(path: Path) -> str:
    """The format that files look like. Raises ConfigError where that is none, or more than one."""
    first = _first(path)
    found = [
        name
        for name, cls in FORMATS.classes().items()
        if issubclass(cls, WritableFormat) and cls.looks_like(path, first)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{path}: may be {', '.join(found)}; say which with --from")
    keys = "" if first is None else f", whose first line has {', '.join(map(repr, first))}"
    raise ConfigError(f"{path}{keys}: looks like no format; name one with --from: {', '.join(FORMATS.classes())}")


def _first(path: Path) -> Mapping[str, Any] | None:
    """The first object of a file of JSON lines, or of the only such file of a folder."""
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if ".jsonl" in one.name)
        return _first(inside[0]) if len(inside) == 1 else None
    if not any(suffix == ".jsonl" for suffix in path.suffixes):
        return None
    return next((row for _, row in read_json_lines(path) if not isinstance(row, RecordError)), None)
