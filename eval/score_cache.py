"""Scores that `--cache` keeps beside the vectors: a task that was finished is not evaluated again.

So a run that was killed goes on behind its last task, and one with another model or task more computes only that. A
score is kept under everything that makes it: the model as the results tell it (the fingerprint of its files, precision,
device, prompt, instructions), the task and the fingerprint of its data, what was left of them (`--limit`, `--proxy`),
the code of the evaluation and of the library, the versions below. A model from a hub, data without a revision: nothing
is kept of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from eval.files import digest_of_code, read_json, write_json
from eval.rows import Rows
from eval.scoring import Scored

CODE = ("eval", "mmembed")
NEWEST = "newest"  # the revision of data that have none


class ScoreCache:
    """A file for each score.

    Args:
        folder: of `--cache`.
        versions: of the packages that scores depend on.
    """

    def __init__(self, folder: Path, versions: Mapping[str, str]) -> None:
        self.folder, self.versions = folder / "scores", versions
        self.read = 0

    def get(self, about: Mapping[str, Any]) -> tuple[dict[str, Any], Scored] | None:
        """What `put` was given; None: there is nothing, or it is damaged."""
        try:
            kept = read_json(self._path(about))
            rows = Rows(**kept["rows"]) if kept["rows"] else None
            found = kept["entry"], Scored(kept["numbers"], rows, kept["ranked"], kept["result"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        self.read += 1
        return found

    def put(self, about: Mapping[str, Any], entry: Mapping[str, Any], scored: Scored) -> None:
        """Keeps a score.

        Args:
            about: all that makes it.
            entry: what the results say of the task.
        """
        rows = scored.rows and {"statistic": scored.rows.statistic, "values": scored.rows.values}
        told = {"entry": entry, "numbers": scored.numbers, "rows": rows, "ranked": scored.ranked,
                "result": scored.result}  # fmt: skip
        write_json(self._path(about), told, indent=None)

    def _path(self, about: Mapping[str, Any]) -> Path:
        told = json.dumps([about, self.versions, code_digest()], sort_keys=True, default=str)
        return self.folder / f"{hashlib.blake2b(told.encode(), digest_size=16).hexdigest()}.json"


@cache
def code_digest() -> str:
    """Of the code that evaluates and encodes, 16 hexadecimal digits."""
    return digest_of_code(CODE)
