"""Scores every document of every record with a teacher, for distillation: a reranker teaches an embedder.

    python -m data_tools.score --config recipes/configs/mining/score.yaml teacher.model=runs/reranker output=runs/scored

Reads records (mined ones, or any with documents), asks the teacher about each query with each of its documents, and
writes the records again with `score`. A killed run goes on where it was when the same command is started again: scores
are kept in shards below OUTPUT/work, as `data_tools.mine_negatives` keeps them. docs/reranking.md has the whole way
from a reranker to a distilled embedder.

Exit status: 0 done, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.command import carry_out, parse, stop, training_overrides, write_lines

if TYPE_CHECKING:
    from data_tools.mining.judging import Judge
    from data_tools.mining.settings import ScoreConfig

QUERIES = 4096  # whose scores are in memory together


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = parse("data_tools.score", __doc__, "recipes/configs/distil", arguments)

    def load() -> ScoreConfig:
        from data_tools.mining.settings import load_scoring

        return load_scoring(options.config, options.overrides)

    return carry_out(load, score)


def score(config: ScoreConfig, output: Path) -> str:
    """Scores all sources; returns what to do with the result. The output folder is this process's alone."""
    from data_tools.mining.collection import collect
    from data_tools.mining.judging import Judge, Place
    from data_tools.mining.models import Models

    work = output / "work"
    work.mkdir(exist_ok=True)
    models, places = Models(work, None, config.teacher, config.overwrite), []
    workers = None if config.ray is None else config.ray.used
    for source in config.sources:  # all are read before anything is scored
        folder = work / source.file
        folder.mkdir(exist_ok=True)
        found, media = collect(config, source, folder)
        places.append(Place(source.title, found, media, models, folder, config.shard, workers))
        places[-1].check_kinds()
    lines, media_files = [], list[str]()
    for source, place in zip(config.sources, places, strict=True):
        file = output / f"{source.file}.jsonl"
        counts = {"records": 0, "documents": 0, "compared": 0, "first": 0}
        write_lines(file, scored(Judge(place), counts))
        media_files += place.found.media_files()
        lines.append(f"{file}: {counts['records']:,} records, {counts['documents']:,} scores")
        if counts["compared"]:
            share = counts["first"] / counts["compared"]
            lines.append(
                f"    the teacher has a relevant document first in {share:.1%} of {counts['compared']:,} choices"
            )
    return "\n".join([*lines, *training_overrides(config, output, media_files)])


def scored(judge: Judge, counts: dict[str, int]) -> Iterator[bytes]:
    """The records of a source with a `score` of each document, as lines of JSON."""
    import numpy as np

    found = judge.place.found
    rows = np.concatenate([found.positives, found.barred], axis=1)  # (Q, W): all documents of a query's records
    encode = json.JSONEncoder(ensure_ascii=False).encode
    known: list[dict[int, float]] = []
    for number, start in enumerate(range(0, len(rows), QUERIES)):
        span = slice(start, min(start + QUERIES, len(rows)))
        given = judge.scores(f"own-{number:05d}", span, rows[span])
        known += [dict(zip(*pair, strict=True)) for pair in zip(rows[span].tolist(), given.tolist(), strict=True)]
    for number, (record, documents) in enumerate(found.records()):
        scores = known[int(found.query_of[number])]
        for document, row in zip(record["documents"], documents.tolist(), strict=True):
            document["score"] = scores[row]
        _count(record["documents"], counts)
        yield encode(record).encode() + b"\n"


def _count(documents: Sequence[dict[str, Any]], counts: dict[str, int]) -> None:
    relevant = [document["score"] for document in documents if document.get("relevance", 1) > 0]
    others = [document["score"] for document in documents if document.get("relevance", 1) <= 0]
    counts["records"] += 1
    counts["documents"] += len(documents)
    if relevant and others:
        counts["compared"] += 1
        counts["first"] += max(relevant) > max(others)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    sys.exit(main())
