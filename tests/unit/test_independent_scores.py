"""The scores of `eval.run` on the sets of the repository against implementations that share nothing with it.

The vectors are those of the library's `Embedder`, asked for content by content as the documentation says; everything
behind them is read from the files by a few lines here and scored by trec_eval, scipy and scikit-learn. With
MMEMBED_DATA_ROOT the sets of a fuller root are taken, all of them.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest
import pytrec_eval
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from eval import run
from eval.tasks.local import ROWS, available
from mmembed import Embedder

SLICE = Path(__file__).resolve().parents[2] / "data"
ROOT = Path(os.environ.get("MMEMBED_DATA_ROOT", SLICE))
CHOSEN = ("xquad/de", "mbpp", "dbpedia-entity/judged", "vega-charts", "stsb-en", "clothing")
NAMES = CHOSEN if ROOT == SLICE else [
    row.name for row in available(ROOT) if row.kind in ("retrieval", "reranking", "sts", "classification")
]  # fmt: skip


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    output = tmp_path_factory.mktemp("eval") / "results.json"
    flags = ["--model", "mmembed-nano", "--no-baselines", "--dtype", "float32", "--data-root", str(ROOT)]
    assert run.main([*flags, "--tasks", *NAMES, "--output", str(output)]) == 0
    return json.loads(output.read_text())["tasks"]


@pytest.fixture(scope="module")
def embedder():
    return Embedder.from_pretrained("mmembed-nano", dtype="float32", device="cpu")


def lines(path):
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def encode(embedder, contents, role):
    """float64 unit vectors."""
    vectors = np.asarray(embedder.encode(contents, role=role, token_budget=8192), dtype=np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pictures_of(folder):
    table = pyarrow.parquet.read_table(folder / "images.parquet").to_pylist()
    return {row["image_id"]: row for row in table}


def opened(row):
    return PIL.Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


def sides(row, folder):
    """query -> content, document -> content, query -> document -> grade, of a ranking."""

    def is_in(record):
        return all(record.get(key) != value[1:] if value.startswith("!") else record.get(key) == value
                   for key, value in row.where.items())  # fmt: skip

    pictures = pictures_of(folder) if "i" in row.category or row.document_text else {}
    documents = {record["_id"]: record for record in lines(folder / "corpus.jsonl")}
    queries = {record["_id"]: record for record in lines(folder / "queries.jsonl") if is_in(record)}
    qrels = {}
    for line in (folder / "qrels/dev.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        if query in queries:
            qrels.setdefault(query, {})[document] = int(float(grade))
    if row.query_picture:
        for query, judged in list(qrels.items()):
            own = next((documents[one].get("image") for one, grade in judged.items() if grade > 0), None)
            queries[query]["image"] = own
            if not own:
                del qrels[query]
    if row.document_text:
        documents = {key: {"text": pictures[one["image"]][row.document_text]} for key, one in documents.items()}
    left = {key: {**queries[key], "text": queries[key].get(row.query_column, "")} for key in qrels}
    if row.reverse:
        turned = {}
        for query, judged in qrels.items():
            for document, grade in judged.items():
                turned.setdefault(document, {})[query] = grade
        left, documents, qrels = {key: documents[key] for key in turned}, left, turned

    def content(record, modalities):
        picture = pictures.get(record.get("image")) if "i" in modalities else None
        text = " ".join(filter(None, (record.get("title"), record["text"]))) if "t" in modalities else ""
        return {**({"image": opened(picture)} if picture else {}), **({"text": text.strip() or "."} if text else {})}

    query_side, document_side = row.category.split("2")
    return ({key: content(one, query_side) for key, one in left.items()},
            {key: content(one, document_side) for key, one in documents.items()}, qrels)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_an_independent_implementation(name, results, embedder):
    row = next(row for row in ROWS if row.name == name)
    if name not in results:
        pytest.skip("these data have nothing for it")
    folder, scores = ROOT / row.folder, results[name]["scores"]["mmembed-nano"]
    if row.kind == "sts":
        pairs = lines(folder / "dev.jsonl")
        one, two = (encode(embedder, [pair[key] for pair in pairs], "query") for key in ("sentence1", "sentence2"))
        expected = spearmanr((one * two).sum(1), [pair["score"] for pair in pairs]).statistic
        assert scores["main"] == pytest.approx(expected, abs=1e-6)
    elif row.kind == "classification":
        train, dev = (labelled(row, folder, split) for split in ("train", "dev"))
        vectors = [encode(embedder, contents, "query") for contents, _ in (train, dev)]
        fitted = LogisticRegression(random_state=42, n_jobs=-1, max_iter=100).fit(vectors[0], train[1])
        assert scores["main"] == pytest.approx(fitted.score(vectors[1], dev[1]), abs=2 / len(dev[1]))
    else:
        queries, documents, qrels = sides(row, folder)
        if row.kind == "reranking":
            documents = {key: documents[key] for key in sorted({one for own in qrels.values() for one in own})}
        found = (
            encode(embedder, list(queries.values()), "query") @ encode(embedder, list(documents.values()), "document").T
        )
        ids = list(documents)
        ranked = {
            query: {key: float(np.float32(score)) for key, score in zip(ids, scored, strict=True)
                    if row.kind != "reranking" or key in qrels[query]}
            for query, scored in zip(queries, found, strict=True)
        }  # fmt: skip
        measures = {"ndcg_at_10": "ndcg_cut_10", "map_at_1000": "map_cut_1000", "recall_at_10": "recall_10"}
        judge = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.1000", "recall.10"})
        values = judge.evaluate(ranked).values()
        for ours, theirs in measures.items():
            expected, bound = np.mean([one[theirs] for one in values]), 1e-6 if ours == row.main_score else 1e-5
            if ours in scores:
                assert scores[ours] == pytest.approx(expected, abs=bound), ours
        assert scores["main"] == scores[row.main_score]


def labelled(row, folder, split):
    names = list(json.loads((folder / "labels.json").read_text()))
    if "i" in row.category:
        found = [
            one for one in pyarrow.parquet.read_table(folder / "images.parquet").to_pylist() if one["split"] == split
        ]
        return [{"image": opened(one)} for one in found], [names.index(one["label"]) for one in found]
    found = [one for one in lines(folder / f"{split}.jsonl") if all(one.get(k) == v for k, v in row.where.items())]
    return [one["text"] for one in found], [names.index(one["label"]) for one in found]
