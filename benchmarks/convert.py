"""Conversion of real data into each format and back: records, whether the round trip is equal, MB/s.

    python -m benchmarks.convert --json

A set is written in a format, with everything of it that the format holds; that file is read whole and written again
(`ours`: MB of the file a second, both ways together), and both must be the same file: rows as another parser reads
them, tables byte by byte; and the same records. There is no peer: each toolkit has scripts of its own, for one way.
`limit` is Python's json, which reads the same lines and writes them again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, alternate, environment, parser, show, told
from mmembed.data.format_base import FORMATS, RawRecord, WritableFormat
from mmembed.data.holding import LOSABLE, fitted, normal
from mmembed.errors import RecordError
from mmembed.media import MediaStore

SETS = {  # folder -> its format and options: texts with titles, graded judgements, pictures in a table, similarities
    "squad-en": {"type": "beir"},
    "dbpedia-entity": {"type": "beir", "split": "dev"},
    "noto-emoji": {"type": "beir"},
    "stsb-en": {"type": "pairs"},
}
OPTIONS = {"sentence_transformers": {"negatives": 1}}  # it needs as many of each record


def main() -> None:
    options = parser((__doc__ or "").splitlines()[0])
    options.add_argument("--data", type=Path, default=DATA, help="root of the sets (default: the shipped one)")
    options.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="default: all")
    options.set_defaults(rounds=3)
    arguments = options.parse_args()
    names = [name for name, cls in FORMATS.classes().items() if issubclass(cls, WritableFormat)]
    rows = [
        told(row)
        for folder in arguments.sets
        for name in names
        if (row := measured(arguments.data / folder, name, arguments.rounds)) is not None
    ]
    if arguments.json:
        print(json.dumps({"environment": environment(), "rows": [dataclasses.asdict(row) for row in rows]}))
    else:
        show(rows, False)


def measured(source: Path, name: str, rounds: int) -> Row | None:
    """One set in one format; None where the format holds none of its records."""
    target = FORMATS.build({"type": name, **OPTIONS.get(name, {})})
    assert isinstance(target, WritableFormat)
    with tempfile.TemporaryDirectory() as work:
        first, second = Path(work, "first"), Path(work, "second")
        kept = list(held(source, target))
        if not kept:
            return None
        target.write(first, iter(kept), MediaStore(source))
        media = MediaStore(first if first.is_dir() else first.parent, also=[source])
        size = sum(file.stat().st_size for file in files(first)) / 1e6

        def ours() -> None:
            shutil.rmtree(second) if second.is_dir() else second.unlink(missing_ok=True)
            target.write(second, records(target, first), media)

        seconds = alternate({"ours": ours, "limit": lambda: through_json(first, Path(work, "plain"))}, rounds)
        speeds = {key: size / statistics.median(times) for key, times in seconds.items()}
        again = same(target, first, second)
        details = {"format": name, "records": len(kept), "round trip equal": again, "MB": round(size, 2)}
        return Row(
            f"{name}, {source.name}",
            "MB/s",
            round(speeds["ours"], 2),
            limit=round(speeds["limit"], 2),
            ratio_to_limit=round(speeds["ours"] / speeds["limit"], 3),
            meets=again,
            details=details,
        )


def held(source: Path, target: WritableFormat) -> Iterator[RawRecord]:
    """What a format holds of a set. Where it needs a negative or scores that the set lacks, these are the document of
    the record before and the relevance."""
    reader = FORMATS.build(SETS[source.name])
    whole = reader.read_whole(source) if isinstance(reader, WritableFormat) else reader.read(source)
    before: list[dict[str, Any]] = []
    for record in whole:
        if isinstance(record, RecordError):
            raise record
        documents = record.get("documents") or []
        if "query" in record and documents and record.get("task") != "sts":
            others = before if target.holds.negatives[0] and all(one.get("relevance", 1) for one in documents) else []
            before = [{**documents[0], "relevance": 0}]
            documents = [*documents, *(one for one in others if one["content"] != documents[0]["content"])]
            if "score" in target.holds.needs:
                documents = [{**one, "score": one.get("relevance", 1)} for one in documents]
        try:
            kept, _ = fitted({**record, "documents": documents}, target.holds, frozenset(LOSABLE), target.name)
        except RecordError:  # nothing is left of it, or it lacks a side
            continue
        if kept is not None:
            yield kept


def records(target: WritableFormat, path: Path) -> Iterator[RawRecord]:
    for record in target.read_whole(path):
        if isinstance(record, RecordError):
            raise record
        yield record


def same(target: WritableFormat, first: Path, second: Path) -> bool:
    """Whether two files say the same, to another parser and as records."""
    names = [[str(file.relative_to(path)) for file in files(path)] for path in (first, second)]
    if names[0] != names[1]:
        return False
    if any(said(one) != said(other) for one, other in zip(files(first), files(second), strict=True)):
        return False
    told_by = [
        [
            json.dumps(normal(record), sort_keys=True).replace(str(path.resolve()), "")
            for record in records(target, path)
        ]
        for path in (first, second)
    ]  # pictures of a table are named from its folder
    return told_by[0] == told_by[1]


def said(file: Path) -> Any:
    """Objects of JSON whatever the order of their keys, lines, or bytes."""
    content = file.read_bytes()
    if file.suffix == ".parquet":
        return content
    lines = content.split(b"\n")
    return [json.loads(line) if line.startswith(b"{") and line.endswith(b"}") else line for line in lines]


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def through_json(path: Path, output: Path) -> None:
    """The limit; what is no line of JSON is copied."""
    encode: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode
    with output.open("wb") as target:
        for file in files(path):
            if file.suffix == ".json":
                target.write(encode(json.loads(file.read_bytes())).encode())
                continue
            with file.open("rb") as lines:
                is_json = lines.read(1) == b"{"
                lines.seek(0)
                target.writelines((encode(json.loads(line)).encode() + b"\n" for line in lines) if is_json else lines)


if __name__ == "__main__":
    main()
