"""Which documents are one: by content, by id; and what the records keep of them."""

import json

import numpy as np
import pytest

from data_tools.mine_negatives import main
from data_tools.mining.collection import collect
from data_tools.mining.settings import load_mining
from tests.mining.conftest import read_lines, write_lines


def run(file, *overrides):
    assert main(["--config", str(file), *overrides]) == 0


def written(tmp_path):
    return read_lines(tmp_path / "out" / "train.jsonl")


def report(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]


def test_another_wording_of_a_positive_is_no_negative_of_its_query(mining, tmp_path, texts):
    """`p0` lies in the corpus again, nearer to the query than anything, in other words."""
    records, corpus = read_lines(texts / "train.jsonl"), read_lines(texts / "corpus.jsonl")
    write_lines(texts / "corpus.jsonl", [{"id": "p0", "text": f"{records[0]['query']} again"}, *corpus])
    records[1]["query"] = f"{records[0]['query']} again"
    write_lines(texts / "train.jsonl", records)
    run(mining(negatives=8))
    mined = [
        {document["content"]: document.get("id") for document in record["documents"][1:]}
        for record in written(tmp_path)
    ]
    wording = f"{records[0]['query']} again"
    assert wording not in mined[0] and len(mined[0]) == 8
    assert all("id" in document for record in written(tmp_path) for document in record["documents"])
    assert any(one.get(wording) == "p0" for one in mined[1:])  # elsewhere it is a negative like others


def test_ids_of_all_wordings_of_a_document_count(mining, tmp_path, texts):
    """Equal contents have the ids a and b, and another content has b as well."""
    records = read_lines(texts / "train.jsonl")[:3]
    text = records[0]["documents"][0]["content"]
    corpus = [{"id": "b", "text": text.upper()}, {"id": "b", "text": "other words"}, {"id": "c", "text": "more"}]
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", corpus)
    config = load_mining(mining())
    folder = tmp_path / "work"
    folder.mkdir()
    found, _ = collect(config, config.sources[0], folder)
    assert found.barred[0].tolist() == [3] and (found.barred[1:] < 0).all()
    assert found.summary["duplicates"] == 1


def test_a_line_without_an_id_is_called_by_no_id(mining, tmp_path, texts):
    """Its number, by which it is named in messages, is another document's id here."""
    records = read_lines(texts / "train.jsonl")
    for row, record in enumerate(records):
        record["documents"][0]["id"] = str(row)
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", [{"text": row["text"]} for row in read_lines(texts / "corpus.jsonl")])
    run(mining(negatives=8))
    own = {record["documents"][0]["content"]: record["documents"][0]["id"] for record in records}
    for record in written(tmp_path):
        for document in record["documents"]:
            assert document.get("id") == own.get(document["content"])


def test_all_copies_are_counted(mining, tmp_path, texts):
    """With ids, without them, in a corpus and in records; a document that is named again is none."""
    records, corpus = read_lines(texts / "train.jsonl"), read_lines(texts / "corpus.jsonl")
    for record in records[10:]:
        del record["documents"][0]["id"]
    same = dict(records[0], query="another query", id="again")  # the same document, with its id
    bare = dict(records[10], query="one more", id="more")  # the same, without one
    text, plain = records[3]["documents"][0]["content"], records[11]["documents"][0]["content"]
    write_lines(texts / "train.jsonl", [*records, same, bare])
    more = [
        {"id": "p1", "text": records[1]["documents"][0]["content"]},  # listed as BEIR does
        {"text": plain},  # listed, without ids
        {"id": "x", "text": text.upper()},  # copy 1
        {"text": f" {plain.upper()} "},  # copy 2
        {"text": "twice"},
        {"text": "twice"},  # copy 3
        {"id": corpus[0]["id"], "text": corpus[0]["text"]},
        {"id": "y", "text": corpus[0]["text"]},  # copy 4
    ]
    write_lines(texts / "corpus.jsonl", [*corpus, *more])
    run(mining())
    found = report(tmp_path)["duplicates"]
    assert found["removed"] == 4
    place = str(texts / "corpus.jsonl")
    assert [(one["id"], one["equal_to"]) for one in found["examples"]] == [
        ("x", "p3"),
        (f"{place}:64", f"{texts / 'train.jsonl'}:12"),
        (f"{place}:66", f"{place}:65"),
        ("y", "d0"),
    ]


@pytest.mark.parametrize("scores", ["none", "retriever"])
def test_a_labelled_negative_that_is_a_copy_of_the_positive_is_left_out(mining, tmp_path, texts, scores):
    records = read_lines(texts / "train.jsonl")
    text = records[2]["documents"][0]["content"]
    records[2]["documents"] += [{"content": text.upper(), "relevance": 0}, {"content": "a true one", "relevance": 0}]
    other = dict(records[5], id="q5b", documents=[{"content": "something else"}])  # an equal query
    other["documents"].append({"content": records[5]["documents"][0]["content"] + " ", "relevance": 0})
    write_lines(texts / "train.jsonl", [*records, other])
    run(mining(scores=scores))
    after = written(tmp_path)
    assert [one["content"] for one in after[2]["documents"][:2]] == [text, "a true one"]
    assert [one.get("relevance") for one in after[2]["documents"]] == [None, 0, 0, 0, 0]
    assert [one["content"] for one in after[30]["documents"][:1]] == ["something else"]
    assert records[5]["documents"][0]["content"] not in {one["content"].strip() for one in after[30]["documents"]}
    assert report(tmp_path)["duplicates"]["negatives_left_out"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Labelled negatives left out, copies of a positive of their query: 2." in page


def test_documents_are_encoded_under_the_instruction_of_their_source(mining, tmp_path, texts, capsys, monkeypatch):
    """As training encodes them; a line of the corpus may bring its own."""
    from data_tools.mining.retrievers.vectors import Vectors
    from tests.mining.test_mine_negatives import precomputed

    corpus = read_lines(texts / "corpus.jsonl")
    corpus[4]["instruction"] = "its own"
    write_lines(texts / "corpus.jsonl", corpus)
    seen = []
    encode = Vectors.encode
    monkeypatch.setattr(
        Vectors,
        "encode",
        lambda self, items, role: seen.extend((role, one.instruction) for one in items) or encode(self, items, role),
    )
    file = mining(retriever=precomputed(tmp_path))
    source = {"path": "train.jsonl", "corpus": ["corpus.jsonl"], "document_instruction": "a passage: all, of it"}
    run(file, f"sources=[{json.dumps(source)}]")
    documents = [instruction for role, instruction in seen if role == "document"]
    assert documents == [*["a passage: all, of it"] * 34, "its own", *["a passage: all, of it"] * 55]
    assert {instruction for role, instruction in seen if role == "query"} == {None}
    said = capsys.readouterr().out
    seen.clear()
    run(file)  # without it, the vectors are others
    assert {instruction for role, instruction in seen if role == "document"} >= {None}

    import shlex

    import yaml

    train = next(one for one in shlex.split(said.splitlines()[-1]) if one.startswith("data.train="))
    (source,) = yaml.safe_load(train.removeprefix("data.train="))
    assert source["document_instruction"] == "a passage: all, of it"


def test_the_vectors_of_documents_are_those_that_training_uses(mining, tmp_path, texts, family_folder):
    from mmembed import Embedder
    from mmembed.preprocess import Item

    model = str(family_folder("qwen3_vl"))
    source = {"path": "train.jsonl", "document_instruction": "a passage:"}
    run(mining(retriever={"type": "mmembed", "model": model}, sources=[source]))
    embedder = Embedder.from_pretrained(model)
    contents = [record["documents"][0]["content"] for record in read_lines(texts / "train.jsonl")]
    wanted = embedder.encode(contents, instruction="a passage:")
    found = np.memmap(tmp_path / "out/work/train/retriever-corpus.rows", np.float32, "r").reshape(30, -1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert np.abs(found - embedder.encode(contents)).max() > 1e-3
    assert Item.of_document.__doc__ is not None
