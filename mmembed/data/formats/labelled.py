"""Classification data as retrieval: a text or picture, and a document that stands for its class, as in NV-Embed.

`positive: example` takes another example of the class ("example-based", the second version of the paper),
`positive: label` the words of the label ("label-based", the first); negatives come from other classes. `auto` is the
rule of the second version: examples, but the words of the label where there are two classes only. Documents carry their
class as id, so that other documents of the same class in a batch are recognised as duplicates and not taken for
negatives. Costs: all contents and labels in memory while the cache is built, about 300 bytes a row.

Source: Lee et al., NV-Embed: Improved Techniques for Training LLMs as Generalist Embedding Models, arXiv 2405.17428,
the part on example-based multi-class labelling of classification and clustering data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mmembed.data.format_base import Format, RawRecord, column, existing, read_json_lines
from mmembed.errors import ConfigError, RecordError, nearest
from mmembed.registry import Count


class Labelled(Format):
    """A folder with `{split}.jsonl` (`text`, `label`), one such file, or a folder whose images.parquet has `label`.

    Args:
        split: which file; of images.parquet, which rows (its column `split`, where there is one).
        positive: `example`, `label`, or `auto`: `label` for two classes, `example` for more.
        negatives: documents of other classes a record; their classes are drawn without repetition.
        label_texts: label -> the words to embed for it; without it, `_` and `-` in labels become spaces.
        levels: what stands between the levels of a label, for objectives that compare labels as paths of a tree: with
            "." the label `travel.flight` lies below `travel`. Without it a label is one level.
        seed: of the drawn examples and classes.
    """

    name: ClassVar[str] = "labelled"

    def __init__(
        self,
        split: str = "train",
        positive: Literal["example", "label", "auto"] = "example",
        negatives: Count = 0,
        label_texts: Mapping[str, str] | None = None,
        levels: Annotated[str, Field(min_length=1)] | None = None,
        seed: int = 0,
    ) -> None:
        if positive not in ("example", "label", "auto"):
            known = ("example", "label", "auto")
            raise ConfigError(f"formats.labelled: positive is '{positive}'; {nearest(positive, known)}")
        if label_texts is not None and positive == "example":
            raise ConfigError("formats.labelled: label_texts has no effect with positive: example; remove one of them")
        self.split, self.positive, self.negatives = split, positive, negatives
        self.label_texts, self.levels, self.seed = label_texts, levels, seed

    def files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        pictures = path / "images.parquet"
        return [pictures if pictures.is_file() else path / f"{self.split}.jsonl"]

    def read(self, path: Path) -> Iterator[RawRecord | RecordError]:
        (file,) = self.files(path)
        is_table = file.suffix == ".parquet"
        rows = list(self._picture_rows(file) if is_table else self._text_rows(file))
        classes: dict[str, list[tuple[int, Any]]] = {}
        for index, row in enumerate(rows):
            if not isinstance(row, RecordError):
                classes.setdefault(row["label"], []).append((index, row["content"]))
        if self.negatives >= len(classes):
            raise ConfigError(
                f"{file}: {self.negatives} negatives of other classes asked, there are {len(classes)} classes"
            )
        if self.levels is not None and not any(self.levels in label for label in classes):
            raise ConfigError(f"{file}: levels {self.levels!r} stands in none of the labels; correct or remove it")
        by_label = self.positive == "label" or (self.positive == "auto" and len(classes) == 2)
        if self.label_texts is not None and not by_label:
            raise ConfigError(
                f"{file}: label_texts has no effect with positive: auto and {len(classes)} classes, whose "
                "documents are examples; remove it, or set positive: label"
            )
        for index, row in enumerate(rows):
            try:
                yield row if isinstance(row, RecordError) else self._record(index, row, classes, by_label)
            except RecordError as error:
                yield error

    def _record(
        self, index: int, row: RawRecord, classes: dict[str, list[tuple[int, Any]]], by_label: bool
    ) -> RawRecord:
        draw = random.Random(f"{self.seed}:{index}")
        label = row["label"]
        others = draw.sample([name for name in classes if name != label], self.negatives)

        def content(name: str) -> Any:
            if by_label:
                return self._words(name, row["where"])
            return self._example(name, classes[name], draw, index, row["where"])

        documents = [{"content": content(label), "id": label}]
        documents += [{"content": content(other), "relevance": 0.0, "id": other} for other in others]
        path = [label] if self.levels is None else label.split(self.levels)
        record = {"query": row["content"], "documents": documents, "task": "classification", "labels": [path]}
        record["where"] = row["where"]
        return {**record, "id": row["id"]} if row["id"] is not None else record

    def _words(self, label: str, where: str) -> Any:
        if self.label_texts is None:
            return label.replace("_", " ").replace("-", " ")
        return column(dict(self.label_texts), label, where)

    @staticmethod
    def _example(label: str, members: list[tuple[int, Any]], draw: random.Random, index: int, where: str) -> Any:
        """An example of a class other than the query's own row."""
        if all(place == index for place, _ in members):
            found = f"the class '{label}' has one example only"
            raise RecordError(where, found, "Use positive: label, or remove the record", "lonely class")
        place, content = draw.choice(members)
        while place == index:
            place, content = draw.choice(members)
        return content

    def _text_rows(self, path: Path) -> Iterator[RawRecord | RecordError]:
        for where, row in read_json_lines(path):
            try:
                if isinstance(row, RecordError):
                    raise row
                label, text = str(column(row, "label", where)), column(row, "text", where)
                yield {"content": text, "label": label, "id": row.get("_id"), "where": where}
            except RecordError as error:
                yield error

    def _picture_rows(self, path: Path) -> Iterator[RawRecord]:
        import pyarrow.parquet as pq

        known = pq.read_schema(existing(path)).names
        for name in ("image_id", "label"):
            if name not in known:
                raise ConfigError(f"{path}: there is no column '{name}'; {nearest(name, known)}")
        names = [name for name in ("image_id", "label", "split") if name in known]
        for number, row in enumerate(pq.read_table(path, columns=names).to_pylist(), start=1):
            if row.get("split", self.split) == self.split:
                content = {"image": f"{path.resolve()}#{row['image_id']}"}
                where = f"{path}:{number}"
                yield {"content": content, "label": str(row["label"]), "id": row["image_id"], "where": where}
