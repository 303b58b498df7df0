"""Damaged BEIR folders: every bad line has its file and number, is counted under `skip`, and the rest is read."""

import json

import pytest

from mmembed.config.blocks import SourceConfig
from mmembed.data.dataset import RecordDataset
from mmembed.errors import RecordError

CORPUS = [{"_id": "d1", "text": "a"}, {"_id": "d2", "text": "b"}]
QUERIES = [{"_id": "q1", "text": "x"}, {"_id": "q2", "text": "y"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td2\t1\n"


def read(folder, on_bad_record, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (folder / "qrels").mkdir(exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "train.tsv").write_bytes(qrels.encode("latin-1"))
    source = SourceConfig(path=str(folder), format="beir")
    return RecordDataset(source, on_bad_record=on_bad_record, cache_dir=folder / "cache")


@pytest.mark.parametrize(
    ("damage", "where", "kinds", "left"),
    [
        ({"corpus": [*CORPUS, "{broken"]}, "corpus.jsonl:3: not valid JSON", {"not JSON": 1}, 2),
        ({"corpus": ['["d1"]', *CORPUS]}, "corpus.jsonl:1: a JSON list", {"not JSON": 1}, 2),
        ({"corpus": [*CORPUS[:1], "{broken"]}, "corpus.jsonl:2", {"not JSON": 1, "missing document": 1}, 1),
        ({"corpus": [*CORPUS, {"text": "no id"}]}, "corpus.jsonl:3: there is no '_id'", {"missing key": 1}, 2),
        ({"corpus": [*CORPUS, '{"_id": "d3", "x": ' + "[" * 3000]}, "corpus.jsonl:3: lists", {"too deep": 1}, 2),
        (
            {"corpus": [CORPUS[0], '{"_id": "d2", "text": "b", "text": "c"}']},
            "corpus.jsonl:2: the key 'text' stands twice",
            {"repeated key": 1, "missing document": 1},
            1,
        ),
        (
            {"corpus": [*CORPUS, {"_id": "d1", "text": "c"}]},
            "corpus.jsonl:3: a second document with the _id 'd1'",
            {"repeated id": 1},
            2,
        ),
        (
            {"queries": [*QUERIES, {"_id": "q1", "text": "z"}]},
            "queries.jsonl:3: a second query with the _id 'q1'",
            {"repeated id": 1},
            2,
        ),
        (
            {"qrels": QRELS + "q3\td1\t1\nq3\td2\t1\nq4\td1\t1\n"},
            "train.tsv:4: query 'q3' is not in queries.jsonl",
            {"missing query": 2},
            2,
        ),
        (
            {"qrels": QRELS + "q1\td1\t0\n"},
            "train.tsv:4: document 'd1' has the score 0 here and 1 above",
            {"two scores": 1},
            1,
        ),
        ({"qrels": QRELS + "q1 d2 1\n"}, "train.tsv:4: 1 columns", {"not a judgement": 1}, 2),
        ({"qrels": QRELS + "q1\td\xe9\t1\n"}, "train.tsv:4", {"missing document": 1}, 1),
        ({"queries": [*QUERIES, {"text": "no id"}]}, "queries.jsonl:3: there is no '_id'", {"missing key": 1}, 2),
        (
            {"corpus": [{"_id": "d1", "text": 5}, CORPUS[1]]},
            "corpus.jsonl:1: 'text' of document 'd1'",
            {"not a string": 1},
            1,
        ),
        (
            {"corpus": [{"_id": "d1", "image": ["p"]}, CORPUS[1]]},
            "corpus.jsonl:1: 'image' of document 'd1'",
            {"not a string": 1},
            1,
        ),
        (
            {"corpus": [CORPUS[0], {"_id": "d2", "title": " ", "text": ""}]},
            "corpus.jsonl:2: document 'd2' has an empty text",
            {"empty text": 1},
            1,
        ),
        (
            {"corpus": [CORPUS[0], {"_id": "d2", "image": "p"}], "queries": [QUERIES[0], {**QUERIES[1], "image": "p"}]},
            "train.tsv:3: document 'd2' has nothing but the query's own picture",
            {"same picture": 1},
            1,
        ),
        (
            {"queries": [{"_id": "q1", "image": 7}, QUERIES[1]]},
            "queries.jsonl:1: 'image' of the query",
            {"not a string": 1},
            1,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_line_is_named_or_counted(tmp_path, damage, where, kinds, left):
    with pytest.raises(RecordError) as caught:
        read(tmp_path, "raise", **damage)
    assert where in str(caught.value)
    data = read(tmp_path, "skip", **damage)
    assert dict(data.skipped) == kinds
    assert len(data) == left


def test_what_is_no_damage(tmp_path):
    """A judgement twice, and lines that no judgement names."""
    others = [{"_id": "d3", "text": "c"}, {"_id": "d3", "text": "c"}]
    queries = [*QUERIES, {"_id": "q3", "text": "z"}]
    data = read(tmp_path, "raise", corpus=[*CORPUS, *others], queries=queries, qrels=QRELS + "q1\td1\t1.0\n")
    assert [len(example.documents) for example in data] == [1, 1]
