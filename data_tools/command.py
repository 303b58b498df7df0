"""What the commands that write records share: arguments, exit status, whole files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, TypeVar

from mmembed.arguments import Parser
from mmembed.errors import MmembedError
from mmembed.files import disk_errors
from mmembed.locks import only_one as only_one

if TYPE_CHECKING:
    from data_tools.mining.settings import MiningSource, RecordsConfig

C = TypeVar("C", bound="WithOutput")


class WithOutput(Protocol):
    """A config that names the folder of what is made."""

    @property
    def output(self) -> str: ...


class TooMuchLost(MmembedError):
    """The work is done, and `summary` says what it made; the message says why that is less than was wanted."""

    def __init__(self, summary: str, message: str) -> None:
        super().__init__(message)
        self.summary = summary


def parse(
    module: str, doc: str | None, configs: str, arguments: Sequence[str] | None, dry_run: bool = False
) -> argparse.Namespace:
    """`config` and `overrides` of a command whose shipped configs lie in a folder; `dry_run` where it has that."""
    parser = Parser(prog=f"python -m {module}", description=(doc or "").splitlines()[0])
    parser.add_argument("--config", required=True, help=f"YAML file, as in {configs}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the config; they win over the file")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="say what would be asked and cost; ask nothing")
    return parser.parse_intermixed_args(arguments)


def carry_out(load: Callable[[], C], work: Callable[[C, Path], str]) -> int:
    """Loads a config, holds its output folder and prints what `work` returns.

    0 done, 1 done but too much was lost on the way, 2 refused, 130 stopped.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(OwnKeys("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        config = load()
        output = Path(config.output)
        with disk_errors(output), only_one(output):
            print(work(config, output))
    except TooMuchLost as lost:
        print(lost.summary)
        print(f"error: {lost}", file=sys.stderr)
        return 1
    except MmembedError as error:
        print(f"error: {own_keys(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


def write_lines(file: Path, lines: Iterable[bytes]) -> None:
    """A file that is there whole, or not."""
    from mmembed.staging import staging

    with staging(file) as staged:
        with staged.open("wb") as output:
            output.writelines(lines)
            output.flush()
            os.fsync(output.fileno())
        os.replace(staged, file)


def training_overrides(config: RecordsConfig, output: Path, media: list[str]) -> list[str]:
    """What to train with: the overrides that name these records and the folder of their media."""
    return training_lines(output, [_source(source) for source in config.sources], media)


def training_lines(output: Path, sources: Sequence[str], media: Sequence[str]) -> list[str]:
    """As `training_overrides`, of sources as YAML."""
    overrides = [f"data.root={output.absolute()}", f"data.train=[{', '.join(sources)}]"]
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


def stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt
