"""mmE5's rows: VLM2Vec's with several negatives, as lists that are written as strings.

{"qry": "...", "qry_image_path": "", "pos_text": "...", "pos_image_path": "", "neg_text": "['...', '...']",
 "neg_image_path": "['', 'images/b.png']"}
"""

from __future__ import annotations

import ast
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmembed.data.formats.vlm2vec import VLM2Vec, is_list
from mmembed.data.holding import Holds
from mmembed.data.rows import Row
from mmembed.errors import RecordError


class MmE5(VLM2Vec):
    """Rows of mmE5: those of VLM2Vec, with `neg_text` and `neg_image_path` as lists within strings."""

    name: ClassVar[str] = "mme5"
    holds: Holds = dataclasses.replace(VLM2Vec.holds, negatives=(0, None))

    @classmethod
    def looks_like(cls, path: Path, first: Mapping[str, Any] | None) -> bool:
        return first is not None and cls.schema.takes(dict(first)) and is_list(first.get("neg_text"))

    def _negatives(self, row: Row, where: str) -> list[tuple[str, str]]:
        texts, images = (_listed(row.get(key), key, where) for key in ("neg_text", "neg_image_path"))
        texts, images = texts or [""] * len(images), images or [""] * len(texts)
        if len(texts) != len(images):
            found = f"neg_image_path has {len(images)} entries, neg_text has {len(texts)}"
            raise RecordError(where, found, "Give one path a text; an empty one where there is no picture", "bad field")
        return list(zip(texts, images, strict=True))

    def _written(self, negatives: list[tuple[str, str]]) -> Row:
        return {
            "neg_text": str([text for text, _ in negatives]),
            "neg_image_path": str([path for _, path in negatives]),
        }


def _listed(value: str | None, key: str, where: str) -> list[str]:
    """A list of strings, as Python or JSON write it."""
    if value is None or not value.strip():
        return []
    for read in (ast.literal_eval, json.loads):
        try:
            found = read(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
    raise RecordError(where, f"{key} is {value!r:.80}", "Write a list of strings: \"['...', '...']\"", "bad field")
