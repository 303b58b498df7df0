"""Formats and records: each layout gives the same strict examples, and bad records are named with file and line."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mmembed.config.blocks import DataConfig
from mmembed.content import Audio, Document, Example, Image, Task, Text, Video
from mmembed.data.format_base import FORMATS, Format, existing
from mmembed.data.records import example_to_record, parse_record, write_records
from mmembed.errors import ConfigError, MmembedError, RecordError


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def read(layout, path, **options):
    """Examples, and the errors that came between them."""
    examples, errors = [], []
    for record in FORMATS.build({"type": layout, **options}).read(path):
        try:
            if isinstance(record, RecordError):
                raise record
            examples.append(parse_record(record, record["where"]))
        except RecordError as error:
            errors.append(error)
    return examples, errors


def good(**changes):
    return {"query": "q", "documents": [{"content": "d"}], **changes}


FULL = Example(
    query=(Text("before"), Image("a.png"), Text("after")),
    documents=(
        Document((Image("b.png"), Image("t.parquet#7"), Text("x")), 2.0, 0.25, "d1"),
        Document((Video((Image("1.png"), Image("2.png"))),), 0.0),
        Document((Audio("s.wav", 16000), Text("said")), 0.0, -3.0),
    ),
    task=Task.RERANKING,
    instruction="find it",
    source="mine",
    id="7",
    where="f:1",
    labels=(("greeting",), ("hotel", "book")),
)


def test_a_record_is_written_and_read_without_loss(tmp_path):
    assert parse_record(json.loads(json.dumps(example_to_record(FULL))), "f:1") == FULL
    path = tmp_path / "r.jsonl"
    plain = Example((Text("q"),), (Document((Text("d"),)),), where=f"{path}:1")
    assert write_records(path, [plain]) == 1
    assert json.loads(path.read_text()) == {"query": "q", "documents": [{"content": "d"}]}
    assert read("jsonl", path) == ([plain], [])


def test_pictures_in_memory_are_not_written():
    with pytest.raises(MmembedError, match="save it and give its path"):
        example_to_record(Example((Image(b"..."),), (Document((Text("d"),)),)))


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"documents": []}, "no 'query'"),
        ({"query": "q"}, "no 'documents'"),
        (good(documents=[]), "at least one entry"),
        (good(documents="d"), "not a list"),
        (good(documents=["d"]), r"documents\[0\] is a str"),
        (good(documents=[{"text": "d"}]), "no 'content'. Write .*content"),
        (good(documents=[{}]), "no 'content'"),
        (good(queries="q"), "unknown key 'queries'. Did you mean 'query'"),
        (good(documents=[{"content": "d", "relevancy": 1}]), "Did you mean 'relevance'"),
        (good(documents=[{"content": {"txt": "d"}}]), "did you mean 'text'"),
        (good(query=""), "query has an empty text"),
        (good(query={"image": "a.png", "text": " \n"}), "query has an empty text"),
        (good(documents=[{"content": ""}]), r"documents\[0\] has an empty text"),
        (good(documents=[{"content": "d", "relevance": -1}]), "relevance is -1"),
        (good(documents=[{"content": "d", "relevance": True}]), "relevance is True"),
        (good(documents=[{"content": "d", "score": float("nan")}]), "score is nan"),
        (good(documents=[{"content": "d", "relevance": 0}]), "no document has a relevance above 0"),
        (good(task="retrieve"), "Did you mean 'retrieval'"),
        (good(instruction=3), "'instruction' is a int"),
        (good(instruction="a", query={"text": "q", "instruction": "b"}), "two instructions"),
        (good(documents=[{"content": {"text": "d", "instruction": "b"}}]), "document_instruction"),
        (good(labels=[]), r"'labels' is \[\]. Write a list of labels.*or remove the key"),
        (good(labels="greeting"), "'labels' is 'greeting'"),
        (good(labels=[[]]), r"'labels' is \[\[\]\]"),
        (good(labels=[["hotel", ""]]), "'labels' is"),
        (good(labels=[["hotel", ["book"]]]), "'labels' is"),
        (good(labels=[3]), r"'labels' is \[3\]"),
        (good(query="bad \ud800 x"), r"query is not valid Unicode \(a lone surrogate, \\ud800\)"),
        (good(query={"image": "\udfff.png"}), "query is not valid Unicode"),
        (good(documents=[{"content": {"text": "\ud800"}}]), r"documents\[0\] is not valid Unicode"),
        (good(instruction="\ud800"), "'instruction' is not valid Unicode"),
        (good(labels=["\ud800"]), "a label is not valid Unicode"),
        (good(documents=[{"content": "d", "relevance": 10**400}]), r"relevance is 1000\d*. Give a finite number"),
        (good(query={"audio": "a.wav", "sampling_rate": float("inf")}), "'sampling_rate' is inf"),
        (
            good(documents=[{"content": "d"}, {"content": {"text": "d"}, "relevance": 0}]),
            r"documents\[0\] is a positive, and its content is that of a negative",
        ),
        (
            good(documents=[{"content": "e", "relevance": 0, "id": "1"}, {"content": "d", "id": "1"}]),
            r"documents\[1\] is a positive, and its id is that of a negative",
        ),
    ],
)
def test_bad_records_name_place_and_remedy(record, named):
    with pytest.raises(RecordError, match=named) as caught:
        parse_record(record, "data.jsonl:12")
    assert str(caught.value).startswith("data.jsonl:12: ")


def test_an_instruction_inside_the_query_is_the_records():
    assert parse_record(good(query={"text": "q", "instruction": "i"}), "f:1").instruction == "i"


def test_jsonl_goes_on_after_a_bad_line(tmp_path):
    path = write(tmp_path / "r.jsonl", good(), "{broken", "[1]", "", good(extra=1), good())
    examples, errors = read("jsonl", path)
    assert [example.where for example in examples] == [f"{path}:1", f"{path}:6"]
    assert [(error.where, error.kind) for error in errors] == [
        (f"{path}:2", "not JSON"),
        (f"{path}:3", "not JSON"),
        (f"{path}:5", "unknown key"),
    ]


def test_the_same_document_twice_is_no_contradiction():
    twice = [{"content": "d"}, {"content": "d", "relevance": 2}, {"content": "e", "relevance": 0}]
    assert len(parse_record(good(documents=[*twice, twice[2]]), "f:1").documents) == 4


@pytest.mark.parametrize(
    ("line", "kind", "found"),
    [
        ('{"query": "\xe9"}'.encode("latin-1"), "not UTF-8", "not UTF-8"),
        ('{"query": "a"}'.encode("utf-16-le") + b"\0", "not UTF-8", "not UTF-8"),
        (b'{"query": "\xed\xa0\x80"}', "not UTF-8", "not UTF-8"),
        (b'{"query": "a", "query": "b"}', "repeated key", "the key 'query' stands twice in one object"),
        (b'{"documents": [{"content": "a", "content": "b"}]}', "repeated key", "the key 'content' stands twice"),
        (b'{"query": ' + b"[" * 3000 + b"]" * 3000 + b"}", "too deep", "more than 100 deep"),
        (b'{"query": ' + b"[" * 101 + b"]" * 101 + b"}", "too deep", "more than 100 deep"),
        (b'{"query": "a",}', "not JSON", "not valid JSON"),
    ],
)
def test_a_line_that_is_no_object(tmp_path, line, kind, found):
    whole = json.dumps(good(documents=[{"content": {"text": f"d{i}"}} for i in range(60)])).encode()
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + whole + b"\n" + line + b"\n" + whole + b"\n")
    examples, errors = read("jsonl", path)
    assert [example.where for example in examples] == [f"{path}:1", f"{path}:3"]
    assert [(error.where, error.kind) for error in errors] == [(f"{path}:2", kind)]
    assert found in str(errors[0])


def test_a_paragraph_that_is_not_utf8(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"one\n\ntwo\n\xe9t\xe9\n\nthree\n")
    records = list(FORMATS.build({"type": "documents"}).read(path))
    assert [isinstance(one, RecordError) and (one.where, one.kind) for one in records] == [
        False,
        (f"{path}:3", "not UTF-8"),
        False,
    ]


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "set"
    write(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "T", "text": "one"},
        {"_id": "d2", "title": "", "text": "two"},
        {"_id": "d3", "text": "", "image": "p1"},
        {"_id": "d4", "text": "four", "image": "p2"},
    )
    write(
        folder / "queries.jsonl",
        {"_id": "q1", "text": "first", "lang": "en", "kind": "a"},
        {"_id": "q2", "text": "zwei", "lang": "de", "kind": "a"},
        {"_id": "q3", "text": "", "image": "p2", "lang": "en", "kind": "b"},
        {"_id": "q4", "text": "unjudged", "lang": "en", "kind": "b"},
    )
    rows = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q1\td2\t0", "q2\td3\t1", "q3\td4\t1"]
    write(folder / "qrels" / "train.tsv", *rows)
    return folder


def test_beir_grades_and_pictures(beir):
    examples, errors = read("beir", beir)
    assert errors == []
    table = (beir / "images.parquet").resolve()
    assert [example.id for example in examples] == ["q1", "q2", "q3"]
    assert examples[0].documents == (
        Document((Text("T one"),), 2.0, None, "d1"),
        Document((Text("two"),), 0.0, None, "d2"),
    )
    assert examples[1].documents[0].content == (Image(f"{table}#p1"),)
    assert examples[2].query == (Image(f"{table}#p2"),)
    assert examples[2].documents[0].content == (Text("four"),)  # the query's own picture would give it away
    assert examples[1].where == f"{beir / 'queries.jsonl'}:2"


def test_beir_options_act(beir):
    assert [example.id for example in read("beir", beir, lang="en")[0]] == ["q1", "q3"]
    assert [example.id for example in read("beir", beir, lang=["en", "de"], kind=["a"])[0]] == ["q1", "q2"]
    assert len(read("beir", beir, negatives_from_zero_scores=False)[0][0].documents) == 1
    with pytest.raises(ConfigError, match=r"lang \['fr'\]"):
        read("beir", beir, lang="fr")
    with pytest.raises(ConfigError, match=r"did you mean 'train.tsv'"):
        read("beir", beir, split="trains")
    with pytest.raises(ConfigError, match="unknown option 'langs'; did you mean 'lang'"):
        read("beir", beir, langs="fr")


def test_beir_names_the_line_of_a_bad_judgement(beir):
    write(beir / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore", "q1\td9\t1", "q2\td1\thigh", "q3\td4\t1")
    examples, errors = read("beir", beir)
    assert [example.id for example in examples] == ["q3"]
    assert [error.where for error in errors] == [f"{beir / 'qrels' / 'train.tsv'}:{line}" for line in (2, 3)]


def test_parquet_takes_pictures_by_reference(tmp_path):
    table = pa.table(
        {
            "question": ["a", "b", None],
            "page": pa.array(
                [{"bytes": b"1", "path": None}, {"bytes": b"2", "path": None}, {"bytes": b"3", "path": None}]
            ),
            "wrong": ["x", None, "z"],
            "strength": [0.5, 1.5, None],
            "key": [1, 2, 3],
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table, path, row_group_size=2)
    options = {
        "query_column": "question",
        "document_column": None,
        "document_image_column": "page",
        "negative_columns": ["wrong"],
        "score_column": "strength",
        "id_column": "key",
    }
    examples, errors = read("parquet", path, **options)
    assert [example.documents[0].content for example in examples] == [(Image(f"{path}#page[{i}]"),) for i in (0, 1)]
    assert [len(example.documents) for example in examples] == [2, 1]
    assert [example.documents[0].score for example in examples] == [0.5, 1.5]
    assert [example.id for example in examples] == ["1", "2"]
    assert [(error.where, error.kind) for error in errors] == [(f"{path}:3", "empty text")]
    assert [e.id for e in read("parquet", tmp_path, **options)[0]] == ["1", "2"]
    with pytest.raises(ConfigError, match="did you mean 'question'"):
        read("parquet", path, **{**options, "query_column": "questions"})


def test_labelled_by_example_and_by_label(tmp_path):
    rows = [{"_id": f"r{i}", "text": f"text {i}", "label": f"class_{i % 3}"} for i in range(12)]
    path = write(tmp_path / "train.jsonl", *rows, {"_id": "r12", "text": "alone", "label": "class_x"})
    label_of = {row["text"]: row["label"] for row in rows} | {"alone": "class_x"}
    examples, errors = read("labelled", tmp_path, negatives=2)
    assert [error.kind for error in errors] == ["lonely class"]
    for example in examples:
        (query,), positive = example.query, example.documents[0]
        assert example.task is Task.CLASSIFICATION
        assert positive.id == label_of[query.text] == label_of[positive.content[0].text]
        assert positive.content != example.query
        negatives = {document.id for document in example.documents[1:]}
        assert len(negatives) == 2
        assert positive.id not in negatives
        assert all(label_of[document.content[0].text] == document.id for document in example.documents)
    assert examples == read("labelled", path, negatives=2)[0]
    assert examples != read("labelled", path, negatives=2, seed=1)[0]
    by_label, errors = read("labelled", path, positive="label", negatives=1)
    assert errors == []
    assert by_label[0].documents[0].content == (Text("class 0"),)
    named = read("labelled", path, positive="label", label_texts={f"class_{i}": f"number {i}" for i in range(3)})
    assert named[0][1].documents[0].content == (Text("number 1"),)
    assert [error.kind for error in named[1]] == ["missing key"]
    for options, match in [({"negatives": 4}, "4 classes"), ({"positive": "labels"}, "did you mean 'label'")]:
        with pytest.raises(ConfigError, match=match):
            read("labelled", path, **options)


@pytest.mark.parametrize(("classes", "by_label"), [(2, True), (3, False)])
def test_labelled_auto_takes_words_for_two_classes_and_examples_for_more(tmp_path, classes, by_label):
    rows = [{"text": f"text {i}", "label": f"class_{i % classes}"} for i in range(12)]
    path = write(tmp_path / "train.jsonl", *rows)
    examples, errors = read("labelled", path, positive="auto", negatives=1)
    assert errors == [] and len(examples) == 12
    assert {e.documents[0].content[0].text.startswith("class") for e in examples} == {by_label}
    texts = {f"class_{i}": f"number {i}" for i in range(classes)}
    if by_label:
        named, _ = read("labelled", path, positive="auto", label_texts=texts)
        assert named[1].documents[0].content == (Text("number 1"),)
    else:
        with pytest.raises(ConfigError, match="label_texts has no effect with positive: auto and 3 classes"):
            read("labelled", path, positive="auto", label_texts=texts)


def test_labelled_says_the_class_and_the_levels_of_it(tmp_path):
    rows = [{"text": f"text {i}", "label": f"travel.{name}"} for i, name in enumerate(["bus", "taxi", "bus", "taxi"])]
    path = write(
        tmp_path / "train.jsonl", *rows, {"text": "hi", "label": "greeting"}, {"text": "ho", "label": "greeting"}
    )
    examples, errors = read("labelled", path)
    assert errors == []
    assert [example.labels for example in examples[3:5]] == [(("travel.taxi",),), (("greeting",),)]
    deep, _ = read("labelled", path, levels=".")
    assert [example.labels for example in deep[3:5]] == [(("travel", "taxi"),), (("greeting",),)]
    assert [example.documents for example in deep] == [example.documents for example in examples]
    with pytest.raises(ConfigError, match="levels '/' stands in none of the labels"):
        read("labelled", path, levels="/")
    _, errors = read(
        "labelled", write(tmp_path / "bad.jsonl", *rows, *[{"text": "x", "label": "a..b"}] * 2), levels="."
    )
    assert {error.kind for error in errors} == {"bad labels"}


def test_pairs_in_both_directions(tmp_path):
    path = write(tmp_path / "train.jsonl", *({"sentence1": f"a{i}", "sentence2": f"b{i}", "score": i} for i in (3, 5)))
    examples, _ = read("pairs", path, at_least=4, both_directions=True)
    found = [(e.query[0].text, e.documents[0].content[0].text, e.documents[0].relevance) for e in examples]
    assert found == [("a5", "b5", 1.0), ("b5", "a5", 1.0)]


def test_pairs_are_scaled(tmp_path):
    row = {"_id": "p", "sentence1": "a", "sentence2": "b"}
    write(tmp_path / "dev.jsonl", {**row, "score": 0}, {**row, "score": 2.5}, {**row, "score": 6}, {**row, "scor": 1})
    examples, errors = read("pairs", tmp_path, split="dev")
    assert [(e.task, e.documents[0].relevance) for e in examples] == [(Task.STS, 0.0), (Task.STS, 0.5)]
    assert [error.kind for error in errors] == ["bad number", "missing key"]
    assert "Did you mean 'scor'" in str(errors[1])


@pytest.mark.parametrize("name", sorted(FORMATS.classes()))
def test_every_format_names_a_missing_source(name, tmp_path):
    with pytest.raises(ConfigError, match="no such file|no .parquet file"):
        read(name, tmp_path / "nowhere" / "x.parquet")


DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.MULTILINE | re.DOTALL)


def test_the_records_and_contents_of_the_docs_are_right():
    lines = [json.loads(line) for block in blocks("json") for line in block.splitlines()]
    records = [line for line in lines if isinstance(line, dict) and "query" in line]
    assert len(records) == 2
    assert len(lines) == 8
    for line in lines:
        parse_record(line if line in records else good(query=line), "docs:1")


def test_the_sources_of_the_docs_are_right():
    data = DataConfig.model_validate(yaml.safe_load(blocks("yaml")[0])["data"])
    kinds = [FORMATS.build({"type": source.format, **source.options}).name for source in data.train]
    assert kinds == ["beir", "beir", "pairs", "labelled", "jsonl", "documents"]


def test_the_format_of_the_docs_reads(tmp_path):
    names = {"Format": Format, "RecordError": RecordError, "existing": existing, "RawRecord": dict}
    exec("from __future__ import annotations\n" + blocks("python")[0], names)
    path = write(tmp_path / "film.tsv", "a\tb", "c", "d\te")
    records = list(names["Subtitles"]().read(path))
    assert [type(record) for record in records] == [dict, RecordError, dict]
    assert parse_record(records[2], records[2]["where"]).where == f"{path}:3"
