"""Mines hard negatives: encodes queries and documents, searches, chooses, writes records to train on, and a report.

    python -m data_tools.mine_negatives --config recipes/configs/mining/demo.yaml output=runs/mined

A run that was killed, at any moment, goes on where it was when the same command is started again: vectors, candidates
and a teacher's scores are kept in shards below OUTPUT/work (`data_tools.mining.shards`), each under a digest of what it
depends on: contents, model, settings. One process at a time works in an output folder; the lock of one that died is
free. The records of each source are put in place whole. docs/mining.md has the config.

Exit status: 0 done, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmembed.arguments import Parser
from mmembed.errors import MmembedError

if TYPE_CHECKING:
    from data_tools.mining.collection import Collection
    from data_tools.mining.settings import MiningConfig, MiningSource
    from data_tools.mining.steps import Mined

FRAGMENTS = 1 << 16  # documents whose JSON is kept while records are written, in case another record has them
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(prog="python -m data_tools.mine_negatives", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file, as in recipes/configs/mining")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config; they win over the file")
    options = parser.parse_intermixed_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(OwnKeys("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        from data_tools.mining.settings import load_mining

        config = load_mining(options.config, options.overrides)
        output = Path(config.output)
        try:
            with only_one(output):
                print(mine(config, output))
        except OSError as error:
            if error.errno in _FORBIDDEN:
                raise MmembedError(f"{error.filename or output}: {error.strerror}; correct its rights") from error
            if error.errno not in _FULL:
                raise
            raise MmembedError(
                f"{error.filename or output}: cannot be written ({error.strerror}); what is complete is kept: free "
                "disk space there, then the same command goes on"
            ) from error
    except MmembedError as error:
        print(f"error: {own_keys(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def mine(config: MiningConfig, output: Path) -> str:
    """Mines all sources; returns what to do with the result. The output folder is this process's alone."""
    from data_tools.mining.audit import audit, write_report
    from data_tools.mining.collection import collect
    from data_tools.mining.steps import Models, SourceMiner

    work = output / "work"
    work.mkdir(exist_ok=True)
    models = Models(config, work)
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
    return "\n".join([*lines, f"{output / 'report.html'}: what was mined", *_training(config, output, media_files)])


def write(config: MiningConfig, source: MiningSource, found: Collection, mined: Mined, output: Path) -> dict[str, Any]:
    """Puts the records of a source in place; returns their file and counts."""
    from mmembed.staging import staging

    file = output / f"{source.file}.jsonl"
    counts = {"file": file.name, "records": 0, "negatives": 0, "short": 0, "none": 0}
    with staging(file) as staged:
        with staged.open("wb") as lines:
            lines.writelines(_records(config, found, mined, counts))
            lines.flush()
            os.fsync(lines.fileno())
        os.replace(staged, file)
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


@contextmanager
def only_one(output: Path) -> Iterator[None]:
    """Holds the output folder. The system frees the lock of a process that died.

    Raises:
        MmembedError: another process works there.
    """
    from filelock import FileLock, Timeout

    output.mkdir(parents=True, exist_ok=True)
    owner = output / ".owner"
    lock = FileLock(output / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        who = owner.read_text(encoding="utf-8").strip() if owner.exists() else "another process"
        raise MmembedError(f"{output}: {who} is mining there; wait for its end, or choose another output") from None
    try:
        owner.write_text(f"process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def _training(config: MiningConfig, output: Path, media: list[str]) -> list[str]:
    """What to train with: the overrides that name these records and the folder of their media."""
    sources = ", ".join(_source(source) for source in config.sources)
    overrides = [f"data.root={output.absolute()}", f"data.train=[{sources}]"]
    if media:
        overrides.append(f"data.media_root={os.path.commonpath([str(Path(file).parent) for file in media])}")
    return [f"train on them with: {shlex.join(overrides)}"]


def _source(source: MiningSource) -> str:
    """As training reads it: instructions of queries stand in the records, that of documents does not."""
    if source.document_instruction is None:
        return f"{{path: {source.file}.jsonl}}"
    instruction = json.dumps(source.document_instruction, ensure_ascii=False)
    return f"{{path: {source.file}.jsonl, document_instruction: {instruction}}}"


def own_keys(message: str) -> str:
    """A message of parts that training shares, with the keys that a config of mining has."""
    message = re.sub(r"(?<![\w./-])data\.(on_bad_record|media_limits|media_root|root)\b", r"\1", message)
    return re.sub(r" \(--[\w-]+ of a command, MediaLimits in Python\)", "", message)


class OwnKeys(logging.Formatter):
    """Of warnings that those parts give."""

    def format(self, record: logging.LogRecord) -> str:
        return own_keys(super().format(record))


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C
    sys.exit(main())
