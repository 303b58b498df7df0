"""Turns a row of the local benchmark into an mteb task that reads a folder instead of a hub.

Each kind is a thin subclass of mteb's own task: only `load_data` is ours, so the protocols, the metrics and their traps
are those of the field. What we add to rankings are numbers that mteb lacks (exponential-gain nDCG, pairwise accuracy
in judged pools) and the ranking itself, for reports. Pictures stay encoded bytes in an Arrow table until mteb's loader
asks for a batch: memory is the size of the files, not of the pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
import pyarrow.parquet
from mteb.abstasks import AbsTask, AbsTaskBitextMining, AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval
from mteb.abstasks import AbsTaskSTS as AbsTaskSentencePairs
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import Modalities

import mmembed.backbones  # noqa: F401 - lets torchvision import on a CPU before mteb.evaluate pulls it in
from eval.files import fingerprint, read_json, read_jsonl
from eval.tasks.local import LANGUAGES, Row
from mmembed import metrics
from mmembed.errors import ConfigError, RecordError

TOP_KEPT = 10  # documents of a ranking kept for reports
ALL_EXAMPLES = 1_000_000  # "samples per label" that takes the whole training part


def build_task(row: Row, root: Path, split: str) -> AbsTask:
    """The mteb task of a row; its data are read at `load_data`.

    Raises:
        ConfigError: the folder has no such split.
    """
    folder = root / row.folder
    kind = _KINDS[row.kind]
    needed = folder / kind.split_file(row, split)
    if not needed.exists():
        raise ConfigError(f"--split {split}: {row.name} needs {needed}, which is not there; "
                          f"the data here have {', '.join(_splits(folder)) or 'no splits'}")  # fmt: skip
    metadata = TaskMetadata(
        name=row.name,
        description=f"{row.folder} ({row.kind})",
        dataset={"path": row.folder, "revision": fingerprint(folder)},
        type=kind.mteb_type(row),
        category=row.category if row.kind != "classification" or row.has_images else "t2c",
        modalities=cast(list[Modalities], list(row.modalities)),
        eval_splits=[split],
        eval_langs=_languages(row),
        main_score=row.main_score,
        prompt=row.instruction,
    )
    # A class of its own: mteb restores `metadata` from the class when it unloads a task's data.
    task = type(f"Local{kind.__name__}", (kind,), {"metadata": metadata})()
    task.row, task.folder, task.split = row, folder, split
    return task


class EmptyTask(ConfigError):
    """The folder is there, but holds nothing for this task (a slice may lack a language)."""


class _Local(AbsTask):
    """What every local task knows about itself."""

    row: Row
    folder: Path
    split: str

    @classmethod
    def split_file(cls, row: Row, split: str) -> str:
        return f"{split}.jsonl"

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        raise NotImplementedError

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            self.dataset = self.read()
            self.data_loaded = True

    def read(self) -> Any:
        """What `load_data` makes `dataset` of, in the shape that mteb's task of this kind wants."""
        raise NotImplementedError

    def rows(self, split: str) -> list[dict[str, Any]]:
        return self.some([row for row in read_jsonl(self.folder / f"{split}.jsonl") if matches(row, self.row.where)])

    def some(self, found: Any) -> Any:
        """What was found, if anything. Raises EmptyTask."""
        if not found:
            wanted = ", ".join(f"{key} {value}" for key, value in self.row.where.items()) or "anything to judge"
            raise EmptyTask(
                f"{self.row.name}: {self.folder} has no {self.split} rows with {wanted}; use a fuller data root"
            )
        return found


class Ranked(AbsTaskRetrieval):
    """A ranking that keeps the best documents of each query of its latest run, and gives exponential-gain nDCG.

    Attributes:
        rankings: query -> text, top [(document, score)], relevant, rank.
    """

    rankings: dict[str, dict[str, Any]]

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        ranked, judged = metrics.rank_run(results, qrels)
        queries = self.dataset["default"][hf_split]["queries"]
        texts = dict(
            zip(queries["id"], queries["text"] if "text" in queries.column_names else queries["id"], strict=True)
        )
        self.rankings = {}
        for (query, documents), row in zip(results.items(), ranked, strict=True):
            best = sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True)[:TOP_KEPT]
            relevant = [key for key, relevance in qrels[query].items() if relevance > 0]
            rank = int(row.argmax()) + 1 if (row > 0).any() else None
            self.rankings[query] = {"text": texts[query], "top": best, "relevant": relevant, "rank": rank}
        return {"ndcg_exp_at_10": float(metrics.ndcg_at_k(ranked, judged, 10, gain="exponential").mean())}


class Retrieval(_Local, Ranked):
    """Queries against the whole corpus of the folder."""

    k_values: Sequence[int] = (1, 5, 10, 100)

    @classmethod
    def split_file(cls, row: Row, split: str) -> str:
        return f"qrels/{split}.tsv"

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "Any2AnyRetrieval" if row.has_images else "Retrieval"

    def read(self) -> dict[str, dict[str, Any]]:
        row = self.row
        pictures = self._pictures()
        documents = by_id(self.folder / "corpus.jsonl")
        queries = {key: query for key, query in by_id(self.folder / "queries.jsonl").items()
                   if matches(query, row.where)}  # fmt: skip
        judged = self.some({query: judgements for query, judgements in self._qrels().items() if query in queries})
        texts = {key: {"_id": key, "text": query.get(row.query_column, ""), "image": query.get("image")}
                 for key, query in queries.items()}  # fmt: skip
        if row.query_picture:
            judged = self.some(self._with_pictures(judged, texts, documents))
        if row.document_text is not None:
            documents = {key: {"_id": key, "text": pictures[document["image"]][row.document_text]}
                         for key, document in documents.items()}  # fmt: skip
        if row.reverse:
            judged = _transpose(judged)
            texts, documents = documents, texts
        pool = self.pool(judged)
        if pool is not None:
            kept = {document for candidates in pool.values() for document in candidates}
            documents = {key: document for key, document in documents.items() if key in kept}
        query_part, document_part = row.category.split("2")
        data = {
            "queries": _table([texts[key] for key in judged], query_part, pictures),
            "corpus": _table(list(documents.values()), document_part, pictures),
            "relevant_docs": judged,
            "top_ranked": pool,
        }
        return {"default": {self.split: data}}

    def pool(self, judged: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]] | None:
        """The candidates of each query; None is the whole corpus."""
        return None

    def _with_pictures(
        self, judged: dict[str, dict[str, int]], queries: dict[str, Any], documents: dict[str, Any]
    ) -> dict[str, dict[str, int]]:
        """The judgements of queries that have a document with a picture, which the query gets."""
        kept = {}
        for query, judgements in judged.items():
            own = [documents[key].get("image") for key, relevance in judgements.items() if relevance > 0]
            if own and own[0]:
                queries[query]["image"], kept[query] = own[0], judgements
        return kept

    def _pictures(self) -> dict[str, dict[str, Any]]:
        """image id -> its row of the picture table. Empty where the task sees no picture."""
        if not self.row.has_images and self.row.document_text is None:
            return {}
        table = pyarrow.parquet.read_table(self.folder / "images.parquet")
        return {picture["image_id"]: picture for picture in table.to_pylist()}

    def _qrels(self) -> dict[str, dict[str, int]]:
        judged: dict[str, dict[str, int]] = {}
        path = self.folder / "qrels" / f"{self.split}.tsv"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[1:], start=2):
            fields = line.split("\t")
            if len(fields) != 3:
                raise RecordError(f"{path}:{number}", f"{len(fields)} columns", "Write query-id, corpus-id and score.")
            judged.setdefault(fields[0], {})[fields[1]] = int(float(fields[2]))
        return judged


class Reranking(Retrieval):
    """Queries against their own judged documents."""

    k_values = (1, 5, 10, 100, 1000)

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "Any2AnyReranking" if row.has_images else "Reranking"

    def pool(self, judged: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]]:
        # By id: files list the best grades first, which a reranker of lists would see.
        return {query: sorted(judgements) for query, judgements in judged.items()}

    def task_specific_scores(
        self,
        scores: dict[str, dict[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: dict[str, dict[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        accuracies = [
            metrics.pairwise_accuracy([list(documents.values())], [[qrels[query][key] for key in documents]])[0]
            for query, documents in results.items()
        ]
        return {
            **super().task_specific_scores(scores, qrels, results, hf_split, hf_subset),
            "pairwise_accuracy": float(np.nanmean(accuracies)),
        }


class SentencePairs(_Local, AbsTaskSentencePairs):
    """Sentence pairs with a human similarity from 0 to 5."""

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "STS"

    def read(self) -> datasets.DatasetDict:
        rows = self.rows(self.split)
        columns = {name: [record[name] for record in rows] for name in ("sentence1", "sentence2", "score")}
        return datasets.DatasetDict({self.split: datasets.Dataset.from_dict(columns)})


class Classification(_Local, AbsTaskClassification):
    """Logistic regression on the vectors of the whole training part (mteb's default takes 8 examples a label)."""

    samples_per_label = ALL_EXAMPLES
    n_experiments = 1

    @classmethod
    def split_file(cls, row: Row, split: str) -> str:
        return "images.parquet" if row.has_images else f"{split}.jsonl"

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "ImageClassification" if row.has_images else "Classification"

    def read(self) -> datasets.DatasetDict:
        names = {label: number for number, label in enumerate(labels(self.folder))}
        parts = {}
        for split in ("train", self.split):
            if self.row.has_images:
                rows = pyarrow.parquet.read_table(self.folder / "images.parquet").to_pylist()
                rows = [record for record in rows if record["split"] == split]
                self.input_column_name = "image"
                inputs: datasets.Dataset = _images([record["image"] for record in rows])
            else:
                rows = self.rows(split)
                inputs = datasets.Dataset.from_dict({"text": [record["text"] for record in rows]})
            parts[split] = inputs.add_column("label", [names[record["label"]] for record in rows])
        return datasets.DatasetDict(parts)


class Clustering(_Local, AbsTaskClustering):
    """k-means on the vectors of the split, ten bootstraps, V-measure."""

    max_fraction_of_documents_to_embed = None

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "Clustering"

    def read(self) -> datasets.DatasetDict:
        rows = self.rows(self.split)
        self.max_documents_per_cluster = len(rows)
        columns = {"sentences": [record["text"] for record in rows], "labels": [record["label"] for record in rows]}
        return datasets.DatasetDict({self.split: datasets.Dataset.from_dict(columns)})


class Bitext(_Local, AbsTaskBitextMining):
    """Sentences of one language against those of another; rows with one `index` are translations."""

    @classmethod
    def mteb_type(cls, row: Row) -> str:
        return "BitextMining"

    def read(self) -> dict[str, datasets.DatasetDict]:
        rows = list(read_jsonl(self.folder / f"{self.split}.jsonl"))
        source, target = self.row.languages
        sentences = {code: {record["index"]: record["text"] for record in rows if record["lang"] == code}
                     for code in (source, target)}  # fmt: skip
        shared = self.some(sorted(set(sentences[source]) & set(sentences[target])))
        columns = {"sentence1": [sentences[source][index] for index in shared],
                   "sentence2": [sentences[target][index] for index in shared]}  # fmt: skip
        return {f"{source}-{target}": datasets.DatasetDict({self.split: datasets.Dataset.from_dict(columns)})}


_KINDS: dict[str, type[Any]] = {
    "retrieval": Retrieval,
    "reranking": Reranking,
    "sts": SentencePairs,
    "classification": Classification,
    "clustering": Clustering,
    "bitext": Bitext,
}


def labels(folder: Path) -> list[str]:
    """The label names of a classification folder, in the order of labels.json."""
    return list(read_json(folder / "labels.json"))


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file by their ids. Raises RecordError: two have the same."""
    records: dict[str, dict[str, Any]] = {}
    for number, record in enumerate(read_jsonl(path), start=1):
        if record["_id"] in records:
            raise RecordError(f"{path}:{number}", f"another record with the id '{record['_id']}'", "Make ids unique.")
        records[record["_id"]] = record
    return records


def matches(record: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether a record has the wanted column values; `!x` wants any value but x."""
    return all(record.get(key) != value[1:] if value.startswith("!") else record.get(key) == value
               for key, value in where.items())  # fmt: skip


def _table(records: list[dict[str, Any]], part: str, pictures: Mapping[str, Mapping[str, Any]]) -> datasets.Dataset:
    """Documents or queries with the columns that their modalities (`t`, `i`, `it`) ask for."""
    columns: dict[str, list[Any]] = {"id": [record["_id"] for record in records]}
    if "t" in part:
        columns["text"] = [" ".join(filter(None, (record.get("title"), record["text"]))) for record in records]
    table = datasets.Dataset.from_dict(columns)
    if "i" in part:
        encoded = [pictures[record["image"]]["image"] if record.get("image") else None for record in records]
        table = datasets.concatenate_datasets([table, _images(encoded)], axis=1)
    return table


def _images(encoded: list[Any]) -> datasets.Dataset:
    """A column `image` of encoded pictures, decoded when a row is read."""
    return datasets.Dataset.from_dict({"image": encoded}, features=datasets.Features({"image": datasets.Image()}))


def _transpose(judged: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    turned: dict[str, dict[str, int]] = {}
    for query, judgements in judged.items():
        for document, relevance in judgements.items():
            turned.setdefault(document, {})[query] = relevance
    return turned


def _languages(row: Row) -> Any:
    codes = [LANGUAGES[code] for code in row.languages]
    return {"-".join(row.languages): codes} if row.kind == "bitext" else codes


def _splits(folder: Path) -> list[str]:
    return sorted({path.stem for path in [*folder.glob("qrels/*.tsv"), *folder.glob("*.jsonl")]
                   if path.stem not in ("corpus", "queries", "stories")})  # fmt: skip
