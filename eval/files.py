"""Reading and writing of the files that evaluation lives on. Light: imports neither mteb nor torch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mmembed.errors import RecordError

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY / "data"
DATA_FILES = (".jsonl", ".json", ".tsv", ".parquet")


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. Raises RecordError naming the line that is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number}", f"no JSON ({error})", "Write one object a line.") from error


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes beside the destination, then moves: a kill never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


@cache
def fingerprint(folder: Path) -> str:
    """A digest of a folder's data files (names and bytes), 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in DATA_FILES):
        digest.update(path.relative_to(folder).as_posix().encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def digest_of_code(parts: Sequence[str]) -> str:
    """Of files and folders of the repository, 16 hexadecimal digits: code, and what it reads beside itself."""
    digest = hashlib.sha256()
    for part in parts:
        path = REPOSITORY / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".json", ".jinja", ".safetensors"):
                digest.update(file.relative_to(REPOSITORY).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]
