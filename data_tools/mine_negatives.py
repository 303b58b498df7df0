"""Mines hard negatives: encodes queries and documents, searches, chooses, writes records to train on, and a report.

    python -m data_tools.mine_negatives --config recipes/configs/mining/demo.yaml output=runs/mined

A run that was killed, at any moment, goes on where it was when the same command is started again: vectors, candidates
and a teacher's scores are kept in shards below OUTPUT/work (`mmembed.shards`), each under a digest of what it
depends on: contents, model, settings. One process at a time works in an output folder; the lock of one that died is
free. The records of each source are put in place whole. docs/mining.md has the config.

Exit status: 0 done, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.command import carry_out, parse, stop, training_overrides, write_lines

if TYPE_CHECKING:
    from data_tools.mining.collection import Collection
    from data_tools.mining.settings import MiningConfig, MiningSource
    from data_tools.mining.steps import Mined

FRAGMENTS = 1 << 16  # documents whose JSON is kept while records are written, in case another record has them


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = parse("data_tools.mine_negatives", __doc__, "recipes/configs/mining", arguments)

    def load() -> MiningConfig:
        from data_tools.mining.settings import load_mining

        return load_mining(options.config, options.overrides)

    return carry_out(load, mine)


def mine(config: MiningConfig, output: Path) -> str:
    """Mines all sources; returns what to do with the result. The output folder is this process's alone."""
    from data_tools.mining.audit import audit, write_report
    from data_tools.mining.collection import collect
    from data_tools.mining.models import Models
    from data_tools.mining.steps import SourceMiner

    work = output / "work"
    work.mkdir(exist_ok=True)
    models = Models(work, config.retriever, config.teacher, config.overwrite)
    sources = []
    for source in config.sources:  # all are read before anything is encoded
        folder = work / source.file
        folder.mkdir(exist_ok=True)
        found, media = collect(config, source, folder)
        sources.append((source, found, media, SourceMiner(config, source.title, found, media, models, folder)))
    lines, reports, media_files = [], [], list[str]()
    for source, found, media, miner in sources:
        mined = miner.run()
        written = write(config, source, found, mined, output)
        reports.append(audit(config, source.title, found, mined, media, written))
        media_files += found.media_files()
        lines.append(f"{output / written['file']}: {written['records']:,} records, {written['negatives']:,} negatives")
        if mined.clusters is not None:
            lines[-1] += f", {mined.clusters['count']:,} clusters of {mined.clusters['stages']} stage(s)"
    write_report(config, reports, output)
    lines.append(f"{output / 'report.html'}: what was mined")
    return "\n".join([*lines, *training_overrides(config, output, media_files)])


def write(config: MiningConfig, source: MiningSource, found: Collection, mined: Mined, output: Path) -> dict[str, Any]:
    """Puts the records of a source in place; returns their file and counts."""
    file = output / f"{source.file}.jsonl"
    counts = {"file": file.name, "records": 0, "negatives": 0, "short": 0, "none": 0}
    write_lines(file, _records(config, found, mined, counts))
    return counts


def _records(config: MiningConfig, found: Collection, mined: Mined, counts: dict[str, Any]) -> Iterator[bytes]:
    """Lines of JSON. What is mined is put into a record as text: documents are encoded once, not once a record."""
    by_teacher = config.scores == "teacher"
    scores, known_scores = (mined.judged, mined.known_judged) if by_teacher else (mined.scores, mined.known_scores)
    assert scores is not None and known_scores is not None, "checked with the config"
    encode, scored = json.JSONEncoder(ensure_ascii=False).encode, config.scores != "none"

    @lru_cache(FRAGMENTS)
    def fragment(row: int) -> tuple[str, str]:
        """What stands before and behind the score of a document."""
        (item,) = found.items("corpus", [row])
        head = f'{{"content": {encode(item.content)}, "relevance": 0.0'
        return head, f', "id": {encode(item.id)}}}' if item.id is not None and found.named[row] else "}"

    for number, (record, rows) in enumerate(found.records()):
        query = int(found.query_of[number])
        chosen = [place for place, row in enumerate(mined.negatives[query].tolist()) if row >= 0]
        if scored:
            known = dict(zip(mined.known[query].tolist(), known_scores[query].tolist(), strict=True))
            for document, row in zip(record["documents"], rows.tolist(), strict=True):
                document["score"] = known[row]
        documents = [encode(document) for document in record["documents"]]
        for place in chosen:
            head, tail = fragment(int(mined.negatives[query, place]))
            documents.append(f'{head}, "score": {float(scores[query, place])!r}{tail}' if scored else head + tail)
        counts["records"] += 1
        counts["negatives"] += len(chosen)
        counts["short"] += len(chosen) < config.negatives
        counts["none"] += not chosen
        texts = {key: encode(value) for key, value in record.items() if key != "documents"}
        texts["documents"] = f"[{', '.join(documents)}]"
        yield f"{{{', '.join(f'{encode(key)}: {texts[key]}' for key in record)}}}\n".encode()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    sys.exit(main())
