"""What each format's files mean, by hand-written pairs of a file and its records, and what is wrong with bad ones.

That files and records come back is tested of everything that can be drawn, in tests/property/test_format_round_trip.py.
"""

from __future__ import annotations

import gzip
import json
import re

import datasets
import pytest
import pytrec_eval
from formats import WRITABLE, place

from mmembed.config.blocks import SourceConfig
from mmembed.data.dataset import RecordDataset
from mmembed.data.format_base import FORMATS
from mmembed.data.holding import SPELLING, check
from mmembed.data.records import parse_record
from mmembed.data.streaming import RecordStream
from mmembed.errors import ConfigError, RecordError
from mmembed.media import MediaStore


def pos(content, **more):
    return {"content": content, **more}


def neg(content, **more):
    return {"content": content, "relevance": 0, **more}


BUS = {"image": "bus.png", "text": "What is this?"}
EXAMPLES = {  # format -> its files, and the records that they are
    "jsonl": ({"a.jsonl": [{"query": "q", "documents": [pos("d")]}]}, [{"query": "q", "documents": [pos("d")]}]),
    "flag_embedding": (
        {
            "a.jsonl": [
                {
                    "query": "q",
                    "pos": ["a"],
                    "neg": ["b", "c"],
                    "pos_scores": [0.9],
                    "neg_scores": [0.2, -1],
                    "prompt": "Find it",
                    "type": "normal",
                }
            ]
        },
        [
            {
                "query": "q",
                "documents": [pos("a", score=0.9), neg("b", score=0.2), neg("c", score=-1)],
                "instruction": "Find it",
                "meta": {"type": "normal"},
            }
        ],
    ),
    "gritlm": (
        {"a.jsonl": [{"query": ["Find it", "q"], "pos": [["", "a"]], "neg": ["b"]}]},
        [{"query": "q", "documents": [pos("a", meta={"instruction": ""}), neg("b")], "instruction": "Find it"}],
    ),
    "llm2vec": (
        {"a.jsonl": [{"query": "q", "positive": "a", "negative": "b"}]},
        [{"query": "q", "documents": [pos("a"), neg("b")]}],
    ),
    "tevatron": (
        {
            "train.jsonl": [
                {
                    "query_id": "1",
                    "query_text": "What is this?",
                    "query_image": "bus.png",
                    "query_video": None,
                    "query_audio": None,
                    "positive_document_ids": ["d1"],
                    "negative_document_ids": ["d2"],
                    "source": "mine",
                }
            ],
            "corpus.jsonl": [
                {"docid": "d0", "text": "alone", "image": None, "video": None, "audio": None},
                {"docid": "d1", "text": "a bus", "image": None, "video": None, "audio": None},
                {"docid": "d2", "text": None, "image": None, "video": ["1.png", "2.png"], "audio": "s.wav"},
            ],
        },
        [
            {
                "query": BUS,
                "documents": [
                    pos("a bus", id="d1"),
                    neg({"video": ["1.png", "2.png"], "audio": "s.wav"}, id="d2"),
                ],
                "id": "1",
                "meta": {"source": "mine"},
            },
            {"documents": [{"content": "alone", "id": "d0"}]},
        ],
    ),
    "tevatron_legacy": (
        {
            "a.jsonl": [
                {
                    "query_id": "1",
                    "query": "q",
                    "positive_passages": [{"docid": "d1", "title": "T", "text": "a"}],
                    "negative_passages": [{"docid": "d2", "text": "b", "rank": 3}],
                }
            ]
        },
        [
            {
                "query": "q",
                "documents": [pos("a", title="T", id="d1"), neg("b", id="d2", meta={"rank": 3})],
                "id": "1",
            }
        ],
    ),
    "tevatron_distil": (
        {
            "a.jsonl": [
                {
                    "query_id": "1",
                    "query": "q",
                    "passages": [{"title": "T", "text": "a"}, {"title": "", "text": "b"}],
                    "scores": [9.5, -2],
                }
            ]
        },
        [{"query": "q", "documents": [pos("a", title="T", score=9.5), neg("b", title="", score=-2)], "id": "1"}],
    ),
    "vlm2vec": (
        {
            "a.jsonl": [
                {
                    "qry": "<|image_1|>\nWhat is this?",
                    "qry_image_path": "bus.png",
                    "pos_text": "a bus",
                    "pos_image_path": "",
                    "neg_text": "<|image_1|>",
                    "neg_image_path": "train.png",
                }
            ]
        },
        [{"query": BUS, "documents": [pos("a bus"), neg({"image": "train.png"})]}],
    ),
    "mme5": (
        {
            "a.jsonl": [
                {
                    "qry": "<|image_1|>\nWhat is this?",
                    "qry_image_path": "bus.png",
                    "pos_text": "a bus",
                    "pos_image_path": "",
                    "neg_text": "['a \"train\"', '<|image_1|>\\nsee']",
                    "neg_image_path": "['', 'train.png']",
                }
            ]
        },
        [
            {
                "query": BUS,
                "documents": [pos("a bus"), neg('a "train"'), neg({"image": "train.png", "text": "see"})],
            }
        ],
    ),
    "ms_swift": (
        {
            "a.jsonl": [
                {
                    "messages": [
                        {"role": "system", "content": "Find it"},
                        {"role": "user", "content": "<image>What is this?"},
                    ],
                    "images": ["bus.png"],
                    "positive_messages": [[{"role": "user", "content": "a bus"}]],
                    "negative_messages": [[{"role": "user", "content": "see <video> <image>"}]],
                    "negative_images": [["train.png"]],
                    "negative_videos": [[["1.png", "2.png"]]],
                },
                {
                    "messages": [{"role": "user", "content": "q"}],
                    "positive_messages": [[{"role": "user", "content": "a"}]],
                    "label": 0.8,
                },
            ]
        },
        [
            {
                "query": BUS,
                "documents": [
                    pos("a bus"),
                    neg([{"text": "see "}, {"video": ["1.png", "2.png"]}, {"image": "train.png"}]),
                ],
                "instruction": "Find it",
            },
            {"query": "q", "documents": [pos("a", relevance=0.8)], "task": "sts"},
        ],
    ),
    "ms_swift_reranker": (
        {
            "a.jsonl": [
                {
                    "messages": [{"role": "user", "content": "q"}],
                    "positive_messages": [[{"role": "assistant", "content": "a"}]],
                    "negative_messages": [[{"role": "assistant", "content": "b"}], [{"role": "user", "content": "c"}]],
                }
            ]
        },
        [{"query": "q", "documents": [pos("a"), neg("b"), neg("c", meta={"role": "user"})]}],
    ),
    "nemo": (
        {
            "a.jsonl": [
                {"query": "q", "pos_doc": ["a", "b"], "neg_doc": ["c"]},
                {"question": "q", "pos_doc": "a", "neg_doc": "c"},
            ]
        },
        [
            {"query": "q", "documents": [pos("a"), pos("b"), neg("c")]},
            {"query": "q", "documents": [pos("a"), neg("c")]},
        ],
    ),
    "nemo_corpus": (
        {
            "train.json": {
                "corpus": [{"path": "./files"}],
                "data": [
                    {
                        "question_id": "1",
                        "question": "q",
                        "corpus_id": "wiki",
                        "pos_doc": [{"id": "d1"}],
                        "neg_doc": [{"id": "d2"}],
                    }
                ],
            },
            "files/merlin_metadata.json": {"class": "TextQADataset", "corpus_id": "wiki"},
            "files/train.parquet": [{"id": f"d{n}", "text": text} for n, text in enumerate("abc", start=1)],
        },
        [
            {
                "query": "q",
                "documents": [pos("a", id="d1"), neg("b", id="d2")],
                "id": "1",
                "meta": {"corpus_id": "wiki"},
            },
            {"documents": [{"content": "c", "id": "d3"}], "meta": {"corpus_id": "wiki"}},
        ],
    ),
    "qwen3_vl": (
        {
            "a.jsonl": [
                {"text": "What is this?", "image": "bus.png", "instruction": "Find it", "fps": 2.0, "max_frames": 8},
                {"video": ["1.png"]},
            ]
        },
        [
            {"query": BUS, "documents": [], "instruction": "Find it", "meta": {"fps": 2.0, "max_frames": 8}},
            {"query": {"video": ["1.png"]}, "documents": []},
        ],
    ),
    "qwen3_vl_rerank": (
        {
            "a.jsonl": [
                {
                    "instruction": "Find it",
                    "query": {"text": "q"},
                    "documents": [{"text": "a"}, {"image": ["1.png", "2.png"]}],
                }
            ]
        },
        [
            {
                "query": "q",
                "documents": [pos("a", relevance=None), pos({"images": ["1.png", "2.png"]}, relevance=None)],
                "instruction": "Find it",
            }
        ],
    ),
    "colpali": (
        {"a.jsonl": [{"query": "q", "pos_target": {"image": "1.png"}, "neg_target": ["b", {"image": "2.png"}]}]},
        [{"query": "q", "documents": [pos({"image": "1.png"}), neg("b"), neg({"image": "2.png"})]}],
    ),
    "blockrank": (
        {
            "a.jsonl": [
                {
                    "query": "q",
                    "query_id": "1",
                    "documents": [
                        {"doc_id": "d1", "title": "T", "text": "a"},
                        {"doc_id": "d2", "title": "", "text": "b"},
                    ],
                    "answer_ids": ["d2"],
                }
            ]
        },
        [{"query": "q", "documents": [neg("a", title="T", id="d1"), pos("b", title="", id="d2")], "id": "1"}],
    ),
    "sentence_transformers": (
        {"a.jsonl": [{"anchor": BUS, "positive": "a", "negative_1": "b", "negative_2": "c"}]},
        [{"query": BUS, "documents": [pos("a"), neg("b"), neg("c")]}],
    ),
    "sentence_transformers_list": (
        {"a.jsonl": [{"query": "q", "docs": ["a", "b", "c"], "labels": [0, 3, 1]}]},
        [{"query": "q", "documents": [neg("a"), pos("b", relevance=3), pos("c", relevance=1)]}],
    ),
    "beir": (
        {
            "corpus.jsonl": [
                {"_id": "d1", "title": "T", "text": "a", "topic": "x"},
                {"_id": "d2", "title": "", "text": "b"},
                {"_id": "d3", "title": "", "text": "alone"},
            ],
            "queries.jsonl": [{"_id": "q1", "text": "q", "lang": "en"}, {"_id": "q2", "text": "unjudged"}],
            "qrels/train.tsv": ["query-id\tcorpus-id\tscore", "q1\td2\t2", "q1\td1\t0"],
        },
        [
            {
                "query": "q",
                "documents": [
                    pos("b", title="", id="d2", relevance=2),
                    neg("a", title="T", id="d1", meta={"topic": "x"}),
                ],
                "id": "q1",
                "meta": {"lang": "en"},
            },
            {"query": "unjudged", "documents": [], "id": "q2"},
            {"documents": [{"content": "alone", "title": "", "id": "d3"}]},
        ],
    ),
    "trove": (
        {
            "corpus.jsonl": [{"_id": "d1", "title": "T", "text": "a"}, {"_id": "d2", "title": "", "text": "b"}],
            "queries.jsonl": [{"_id": "q1", "text": "q"}],
            "qrels.jsonl": [{"qid": "q1", "docid": ["d2", "d1"], "score": [3, 0]}],
        },
        [
            {
                "query": "q",
                "documents": [pos("b", title="", id="d2", relevance=3), neg("a", title="T", id="d1")],
                "id": "q1",
            }
        ],
    ),
    "trec_qrels": (
        {"a.txt": ["q1 0 d1 2", "q1 0 d2 0", "q1 0 d3 -2", "q2 1 d1 1"]},
        [
            {
                "documents": [
                    {"id": "d1", "relevance": 2},
                    {"id": "d2", "relevance": 0},
                    {"id": "d3", "relevance": 0, "meta": {"grade": -2}},
                ],
                "id": "q1",
            },
            {"documents": [{"id": "d1", "relevance": 1, "meta": {"iteration": "1"}}], "id": "q2"},
        ],
    ),
    "trec_run": (
        {"a.txt": ["q1 Q0 d2 1 12.5 bm25", "q1 Q0 d1 2 -3 bm25"]},
        [
            {
                "documents": [
                    {"id": "d2", "relevance": None, "score": 12.5, "meta": {"rank": 1, "tag": "bm25"}},
                    {"id": "d1", "relevance": None, "score": -3, "meta": {"rank": 2, "tag": "bm25"}},
                ],
                "id": "q1",
            }
        ],
    ),
}


def whole(name, path, **options):
    return list(FORMATS.build({"type": name, **options}).read_whole(path))


def bare(record):
    """Without its place, and how its file spelled it."""
    found = {key: value for key, value in record.items() if key != "where"}
    for item in (found, *found["documents"]):
        if SPELLING in item.get("meta", {}):
            item["meta"] = {key: value for key, value in item["meta"].items() if key != SPELLING}
        if not item.get("meta", True):
            del item["meta"]
    return found


def write(name, path, records, **options):
    numbered = ({**record, "where": f"f:{place}"} for place, record in enumerate(records, start=1))
    FORMATS.build({"type": name, **options}).write(path, numbered, MediaStore())


@pytest.mark.parametrize("name", WRITABLE)
def test_a_file_means_these_records(name, tmp_path):
    files, records = EXAMPLES[name]
    path = place(files, tmp_path)
    assert [bare(record) for record in whole(name, path)] == records


TRAINABLE = [name for name in WRITABLE if name not in ("qwen3_vl", "qwen3_vl_rerank", "trec_qrels", "trec_run")]


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_file_is_a_source_of_training(name, tmp_path):
    """Its documents are those that were judged, and titles stand in front."""
    files, records = EXAMPLES[name]
    found = list(WRITABLE[name]().read(place(files, tmp_path)))
    examples = [parse_record(record, record["where"]) for record in found]
    assert len(examples) == len([record for record in records if "query" in record and record["documents"]])
    wanted = [parse_record(record, "").documents for record in records if "query" in record and record["documents"]]
    assert [example.documents for example in examples] == wanted


def test_a_folder_of_files_is_a_source_and_a_stream(tmp_path):
    """Of a format whose records lie in its rows; the options of a source name the format."""
    for name in ("a", "b"):
        rows = [{"query": f"{name}{n}", "pos": ["p"], "neg": ["n"], "pos_scores": [1]} for n in range(3)]
        place({f"{name}.jsonl": rows, "notes.txt": []}, tmp_path / "set")
    source = SourceConfig(path=str(tmp_path / "set"), format="flag_embedding")
    found = RecordDataset(source, cache_dir=tmp_path / "cache")
    assert [example.query[0].text for example in found] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert found.fields == {"negatives", "score"}
    stream = RecordStream(SourceConfig(path=str(tmp_path / "set"), format="flag_embedding", streaming=True))
    assert {stream[place].query[0].text for place in range(6)} == {"a0", "a1", "a2", "b0", "b1", "b2"}


def test_inputs_without_judgements_are_no_source_of_training(tmp_path):
    for name, message in (
        ("qwen3_vl_rerank", "are not judged"),
        ("trec_qrels", "name their files with queries and corpus"),
        ("trec_run", "with queries, corpus, qrels"),
    ):
        path = place(EXAMPLES[name][0], tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            list(WRITABLE[name]().read(path))
    path = place({"a.jsonl": [{"text": "a text", "fps": 1.0}, {"image": "a.png"}]}, tmp_path)
    text, media = WRITABLE["qwen3_vl"]().read(path)
    assert {key: text[key] for key in text if key != "where"} == {"query": "a text"}
    assert "pairs are made of texts" in str(media)


TEXTS = {
    "queries.jsonl": [{"_id": "q1", "text": "asked"}, {"_id": "q2", "text": "q"}],
    "corpus.jsonl": [{"_id": f"d{n}", "title": "T" * n, "text": f"text {n}"} for n in (1, 2, 3)],
}


def test_trec_files_take_texts_and_grades_from_beside_them(tmp_path):
    place(TEXTS | {"qrels.txt": ["q1 0 d1 3"], "run.txt": EXAMPLES["trec_run"][0]["a.txt"]}, tmp_path)
    names = {"queries": "queries.jsonl", "corpus": "corpus.jsonl"}
    (record,) = FORMATS.build({"type": "trec_run", **names, "qrels": "qrels.txt"}).read(tmp_path / "run.txt")
    example = parse_record(record, "")
    assert [(one.id, one.relevance, one.score) for one in example.documents] == [("d2", 0.0, 12.5), ("d1", 3.0, -3.0)]
    assert [one.content[0].text for one in example.documents] == ["TT text 2", "T text 1"]
    assert example.query[0].text == "asked"
    (record,) = FORMATS.build({"type": "trec_qrels", **names}).read(tmp_path / "qrels.txt")
    assert parse_record(record, "").documents[0].relevance == 3.0


# Other readers --------------------------------------------------------------------------------------------------------


def test_pytrec_eval_reads_what_was_written(tmp_path):
    judged = [{"id": "q1", "documents": [{"id": "d1", "relevance": 2.0}, {"id": "d2", "relevance": 0}]}]
    write("trec_qrels", tmp_path / "qrels", judged)
    found = [{"id": "q1", "documents": [{"id": "d2", "score": 0.1}, {"id": "d1", "score": 0.1 + 0.2}]}]
    write("trec_run", tmp_path / "run", found)
    with (tmp_path / "qrels").open() as qrels, (tmp_path / "run").open() as run:
        qrels, run = pytrec_eval.parse_qrel(qrels), pytrec_eval.parse_run(run)
    assert qrels == {"q1": {"d1": 2, "d2": 0}}
    assert run == {"q1": {"d1": 0.1 + 0.2, "d2": 0.1}}
    assert pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)["q1"]["recip_rank"] == 1.0
    assert [line.split()[3] for line in (tmp_path / "run").read_text().splitlines()] == ["2", "1"]


def test_datasets_loads_the_columns_that_sentence_transformers_gets(tmp_path):
    records = [
        {"query": f"q{n}", "documents": [neg(f"b{n}", score=0.5), pos(f"a{n}", score=2), neg(f"c{n}", score=0)]}
        for n in range(3)
    ]
    write("sentence_transformers", tmp_path / "a.jsonl", records)
    table = datasets.load_dataset("json", data_files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path))["train"]
    assert table.column_names == ["anchor", "positive", "negative_1", "negative_2", "label"]
    assert table[1] == {"anchor": "q1", "positive": "a1", "negative_1": "b1", "negative_2": "c1", "label": [2, 0.5, 0]}


def test_datasets_loads_a_corpus_as_nemo_does(tmp_path):
    write("nemo_corpus", tmp_path / "out", [{"query": "q", "documents": [pos("a"), neg("b")]}])
    train = json.loads((tmp_path / "out" / "train.json").read_text())
    folder = tmp_path / "out" / train["corpus"][0]["path"]
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    texts = dict(zip(table["id"], table["text"], strict=True))
    (row,) = train["data"]
    assert (texts[row["pos_doc"][0]["id"]], texts[row["neg_doc"][0]["id"]]) == ("a", "b")
    assert json.loads((folder / "merlin_metadata.json").read_text())["corpus_id"] == row["corpus_id"]


@pytest.mark.parametrize("ending", ["gz", "zst", "bz2", "lz4"])
def test_packed_files_are_read_and_written(ending, tmp_path):
    records = [{"query": f"q{n}", "documents": [pos(f"a{n}")]} for n in range(2000)]
    write("flag_embedding", tmp_path / f"a.jsonl.{ending}", records)
    assert [bare(record) for record in whole("flag_embedding", tmp_path / f"a.jsonl.{ending}")] == records
    if ending == "gz":
        with gzip.open(tmp_path / "a.jsonl.gz", "rt", encoding="utf-8") as lines:
            assert json.loads(next(lines)) == {"query": "q0", "pos": ["a0"], "neg": []}


def test_the_corpus_may_be_packed_too(tmp_path):
    files, records = EXAMPLES["tevatron"]
    place(files, tmp_path)
    packed = gzip.compress((tmp_path / "corpus.jsonl").read_bytes())
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed)
    found = whole("tevatron", tmp_path, corpus="corpus.jsonl.gz")
    assert [bare(record) for record in found] == records
    (tmp_path / "corpus.jsonl.gz").write_bytes(packed[:-12])
    with pytest.raises(ConfigError, match=r"corpus.jsonl.gz: not a readable .gz file"):
        whole("tevatron", tmp_path, corpus="corpus.jsonl.gz")


# Bad input ------------------------------------------------------------------------------------------------------------

USER = [{"role": "user", "content": "q"}]
BAD = [  # format, a row, what is said
    ("jsonl", {"documents": [{"content": "a"}]}, "the record has no 'query'"),
    ("jsonl", {"query": "q", "documents": []}, "the record has no 'documents'"),
    ("jsonl", {"query": "q", "documents": ["a"]}, r"documents\[0\] is a str"),
    ("jsonl", {"query": "q", "documents": [{"content": "a"}], "lang": "en"}, "the record has an unknown key 'lang'"),
    (
        "jsonl",
        {"query": "q", "documents": [{"content": "a"}], "where": "here"},
        "unknown key 'where'. Put it into meta",
    ),
    ("flag_embedding", {"qury": "q", "pos": ["a"]}, "there is no 'query'. Did you mean 'qury'?"),
    ("flag_embedding", {"query": "q", "pos": []}, r"pos is \[\]. Give at least one entry"),
    ("flag_embedding", {"query": "q", "pos": "a"}, "pos is 'a'. It should be a valid list"),
    ("flag_embedding", {"query": "q", "pos": ["a", 3]}, r"pos\[1\] is 3. It should be a valid string"),
    ("flag_embedding", {"query": " ", "pos": ["a"]}, "query is ' '. Write a text that is not empty"),
    ("flag_embedding", {"query": "q", "pos": ["a"], "pos_scores": [True]}, r"pos_scores\[0\] is True"),
    ("flag_embedding", {"query": "q", "pos": ["a"], "pos_scores": [1, 2]}, "pos_scores has 2 entries, pos has 1"),
    ("flag_embedding", {"query": "q", "pos": ["a"], "neg": ["a"]}, "a positive, and its content is that of a negative"),
    ("flag_embedding", {"query": "q", "pos": ["\ud800"]}, r"pos\[0\]|not valid Unicode"),
    ("gritlm", {"query": ["i", "q", "x"], "pos": ["a"]}, "query is"),
    ("gritlm", {"query": "q", "pos": [["i", " "]]}, r"pos\[0\] is \['i', ' '\]. Write a text that is not empty"),
    ("llm2vec", {"query": "q", "positive": "a"}, "there is no 'negative'"),
    ("tevatron_legacy", {"query": "q", "positive_passages": [{"docid": 3, "text": "a"}]}, r"passages\[0\].docid is 3"),
    ("tevatron_legacy", {"query": "q", "positive_passages": [{"text": "a"}]}, r"passages\[0\] has no 'docid'"),
    ("tevatron_legacy", {"query": "q", "positive_passages": [{"docid": "1", "text": ""}]}, "has an empty text"),
    (
        "tevatron_legacy",
        {
            "query": "q",
            "positive_passages": [{"docid": "1", "text": "a"}],
            "negative_passages": [{"docid": "1", "text": "b"}],
        },
        r"documents\[1\] is the document '1' once more",
    ),
    (
        "tevatron_distil",
        {"query": "q", "passages": [{"text": "a"}], "scores": [1, 2]},
        "scores has 2 entries, passages",
    ),
    ("vlm2vec", {"qry": "q", "qry_image_path": "", "pos_text": ""}, "pos_text is empty, and there is no picture"),
    ("vlm2vec", {"qry": "<|image_1|> q", "pos_text": "a"}, r"qry has <\|image_1\|>, and there is no picture"),
    ("mme5", {"qry": "q", "pos_text": "a", "neg_text": "b"}, "neg_text is 'b'. Write a list of strings"),
    (
        "mme5",
        {"qry": "q", "pos_text": "a", "neg_text": "['b']", "neg_image_path": "['', '']"},
        "neg_image_path has 2 entries, neg_text has 1",
    ),
    ("ms_swift", {"messages": USER * 2, "positive_messages": [USER]}, "messages has the roles user, user"),
    (
        "ms_swift",
        {"messages": [{"role": "user", "content": "<image>"}], "positive_messages": [USER]},
        "messages has 1 tags <image> and 0 images",
    ),
    (
        "ms_swift",
        {"messages": USER, "positive_messages": [USER], "positive_images": [[], []]},
        "positive_images has 2 entries, positive_messages has 1",
    ),
    ("ms_swift", {"messages": USER, "positive_messages": [USER], "label": -0.5}, "label is -0.5"),
    ("ms_swift", {"messages": USER, "positive_messages": [USER], "videos": ["a.mp4"]}, "Give the list of its frames"),
    ("nemo", {"pos_doc": "a"}, "there is no 'query' and no 'question'"),
    ("nemo", {"query": "q", "question": "q", "pos_doc": "a"}, "'query' and 'question'. Write one of them"),
    ("qwen3_vl", {"instruction": "i"}, "the row has no text, image or video"),
    ("qwen3_vl", {"text": "a", "video": "a.mp4"}, "video is 'a.mp4'. Give the list of its frames"),
    ("qwen3_vl_rerank", {"query": {"text": "q"}, "documents": [{}]}, r"documents\[0\] has no text"),
    ("qwen3_vl_rerank", {"query": {"txt": "q"}, "documents": [{"text": "a"}]}, "query has an unknown key 'txt'"),
    ("colpali", {"query": "q", "pos_target": {"image": "a.png", "alt": "x"}}, "pos_target has an unknown key 'alt'"),
    ("colpali", {"query": "q", "pos_target": []}, "pos_target is"),
    (
        "blockrank",
        {"query": "q", "documents": [{"doc_id": "1", "text": "a"}], "answer_ids": ["2"]},
        "answer_ids has '2', which is no doc_id of the list",
    ),
    (
        "blockrank",
        {"query": "q", "documents": [{"doc_id": "1", "text": "a"}] * 2, "answer_ids": ["1"]},
        "an id stands twice",
    ),
    ("sentence_transformers", {"anchor": "q"}, "1 column beside labels"),
    ("sentence_transformers", {"anchor": "q", "positive": ["a"]}, "positive is a list. .* sentence_transformers_list"),
    ("sentence_transformers", {"anchor": "q", "positive": {"img": "a"}}, "positive has an unknown key 'img'"),
    ("sentence_transformers", {"anchor": "q", "positive": 3}, "positive is 3"),
    ("sentence_transformers", {"anchor": "q", "positive": "a", "label": -1}, "label is -1. Scale similarities"),
    ("sentence_transformers", {"anchor": "q", "positive": "a", "score": "1"}, "score is '1'. Give a finite number"),
    ("sentence_transformers", {"anchor": "q", "positive": "a", "label": [1, 2]}, "label has 2 numbers"),
    ("sentence_transformers", {"anchor": "q", "positive": "a", "label": 1, "score": 1}, "the labels label and score"),
    ("sentence_transformers_list", {"query": "q", "docs": ["a"], "labels": [1, 0]}, "labels has 2 entries, docs has 1"),
    ("sentence_transformers_list", {"query": "q", "docs": [], "labels": []}, r"docs is \[\]"),
]


@pytest.mark.parametrize(("name", "row", "said"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_row_is_named_with_its_line_and_field_and_the_next_one_is_read(name, row, said, tmp_path):
    good = EXAMPLES[name][0]["a.jsonl"]
    path = place({"a.jsonl": [row, *good]}, tmp_path)
    bad, *rest = whole(name, path)
    with pytest.raises(RecordError, match=said) as error:
        if isinstance(bad, RecordError):
            raise bad
        check(bad)
    assert str(error.value).startswith(f"{path}:1: ")
    assert len(rest) == len(good) and not any(isinstance(one, RecordError) for one in rest)


DAMAGED = [  # format, what a file has instead, what is said
    ("tevatron", "corpus.jsonl", [{"docid": "d1", "text": "a"}], r"train.jsonl:1: negative_document_ids\[0\] is 'd2'"),
    ("tevatron", "corpus.jsonl", [{"docid": "d1", "text": "a"}] * 2, "corpus.jsonl:2: a second document 'd1'"),
    ("tevatron", "corpus.jsonl", [{"docid": 1, "text": "a"}], "corpus.jsonl:1: docid is 1"),
    ("trove", "qrels.jsonl", [{"qid": "q1", "docid": ["d1"], "score": [1, 2]}], "score has 2 entries, docid has 1"),
    ("trove", "qrels.jsonl", [{"qid": "q1", "docid": "d1", "score": -1}], "qrels.jsonl:1: score is -1"),
    ("trove", "qrels.jsonl", [{"qid": "q9", "docid": "d1", "score": 1}], "query 'q9' is not in queries.jsonl"),
    (
        "trove",
        "qrels.jsonl",
        [{"qid": "q1", "docid": "d9", "score": 1}],
        "the document is 'd9', which the corpus lacks",
    ),
    ("beir", "qrels/train.tsv", ["q1\td1\tx"], "train.tsv:1: the score is 'x'"),
    ("beir", "qrels/train.tsv", ["q1\td1\t1", "q1\td1\t1"], "the document 'd1' is judged twice"),
    ("beir", "queries.jsonl", [{"_id": "q1", "text": "q"}] * 2, "queries.jsonl:2: a second query 'q1'"),
    ("trec_qrels", "a.txt", ["q1 0 d1"], "a.txt:1: 3 columns. Write 4"),
    ("trec_qrels", "a.txt", ["q1 0 d1 1", "q1 0 d1 2"], "a.txt:2: 'd1' once more for query 'q1'"),
    ("trec_qrels", "a.txt", ["q1 0 d1 high"], "a.txt:1: the grade is 'high'"),
    ("trec_run", "a.txt", ["q1 Q0 d1 1 nan x"], "a.txt:1: the score is 'nan'"),
    ("trec_run", "a.txt", ["q1 Q0 d1 1.5 1 x"], "a.txt:1: the rank is 1.5"),
    ("nemo_corpus", "files/train.parquet", [{"id": "d1", "text": "a"}], r"data\[0\]: neg_doc\[0\].id is 'd2'"),
    ("nemo_corpus", "files/train.parquet", [{"id": "d1", "text": "a"}] * 2, "a second document 'd1'"),
]


@pytest.mark.parametrize(("name", "file", "content", "said"), DAMAGED, ids=lambda value: str(value)[:20])
def test_files_that_do_not_fit_together_are_named(name, file, content, said, tmp_path):
    path = place(EXAMPLES[name][0] | {file: content}, tmp_path)
    errors = [one for one in whole(name, path) if isinstance(one, RecordError)]
    assert any(re.search(said, str(error)) for error in errors), errors


def test_what_is_no_corpus_of_nemo_is_refused(tmp_path):
    files = EXAMPLES["nemo_corpus"][0]
    for changed, said in (
        ({"train.json": {"corpus": [], "data": []}}, "'corpus' names no folder"),
        ({"train.json": {"corpus": [{"path": "./files"}], "dat": []}}, "an unknown key 'dat'; did you mean 'data'"),
        ({"files/merlin_metadata.json": {"class": "TextQADataset"}}, "there is no 'corpus_id'"),
        ({"files/train.parquet": [{"id": "d1", "text": "a", "image": b"x"}]}, "has the columns id, text, image"),
    ):
        with pytest.raises(ConfigError, match=said):
            whole("nemo_corpus", place(files | changed, tmp_path / said[:9].strip("'")))


def test_a_file_that_is_not_utf_8_or_ends_early_says_where(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"query": "q", "pos": ["a\xff"]}\n{"query": "q", "pos": ["a"]}\n')
    bad, good = whole("flag_embedding", tmp_path / "a.jsonl")
    assert str(bad).startswith(f"{tmp_path}/a.jsonl:1: not UTF-8") and good["query"] == "q"
    (tmp_path / "run").write_bytes(b"q1 Q0 d\xff 1 1 x\nq1 Q0 d 1 1 x\n")
    bad, good = whole("trec_run", tmp_path / "run")
    assert str(bad).startswith(f"{tmp_path}/run:1: not UTF-8") and good["id"] == "q1"
    packed = gzip.compress(b'{"query": "q", "pos": ["a"]}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(ConfigError, match="a.jsonl.gz: not a readable .gz file"):
        whole("flag_embedding", tmp_path / "a.jsonl.gz")


WRITES = [  # format, records that it says it holds, what is said when it cannot write them after all
    ("tevatron", [{"query": "q", "documents": [pos("a")], "id": "1"}] * 2, "f:2: a second record with the id '1'"),
    (
        "tevatron",
        [{"query": "q", "documents": [pos("a", id="d")]}, {"query": "r", "documents": [pos("b", id="d")]}],
        "f:2: the document 'd' is another one here",
    ),
    ("beir", [{"query": "q", "documents": [pos("a", id="d\t1")]}], r"f:1: the id 'd\\t1' in a table"),
    ("trec_qrels", [{"id": "q 1", "documents": [{"id": "d"}]}], "f:1: 'q 1' in a line of TREC"),
    ("flag_embedding", [{"query": "q", "documents": [pos("a")], "meta": {"pos": 1}}], "f:1: 'meta' has 'pos'"),
    ("vlm2vec", [{"query": "a <|image_1|>", "documents": [pos("a")]}], "has <|image_1|>"),
    ("ms_swift", [{"query": "a <image>", "documents": [pos("a")]}], "f:1:"),
    (
        "sentence_transformers",
        [{"query": "q", "documents": [pos("a")]}, {"query": "q", "documents": [pos("a"), neg("b")]}],
        "f:2: gives the columns anchor, positive, negative; the first record gave anchor, positive",
    ),
    ("blockrank", [{"query": "q", "documents": [pos("a"), pos("a")]}], r"f:1: documents\[1\] is the document"),
]


@pytest.mark.parametrize(("name", "records", "said"), WRITES, ids=lambda value: value if isinstance(value, str) else "")
def test_what_cannot_be_written_after_all_is_named(name, records, said, tmp_path):
    with pytest.raises(RecordError, match=said):
        write(name, tmp_path / "out", records)


def test_files_that_are_spelled_in_another_way_come_back_as_they_were(tmp_path):
    """And a record that was changed on the way says what it says now."""
    rows = [
        {"question": "q", "pos_doc": "a", "neg_doc": None},
        {"question": "q", "pos_doc": ["a"]},
    ]
    path = place({"a.jsonl": rows}, tmp_path)
    records = whole("nemo", path)
    write("nemo", tmp_path / "b.jsonl", records)
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == rows
    records[0]["query"] = "another"
    write("nemo", tmp_path / "c.jsonl", records[:1])
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {"query": "another", "pos_doc": ["a"], "neg_doc": []}
    write("flag_embedding", tmp_path / "d.jsonl", records[1:])
    assert json.loads((tmp_path / "d.jsonl").read_text()) == {"query": "q", "pos": ["a"], "neg": []}


def test_every_format_has_an_example():
    assert set(EXAMPLES) == set(WRITABLE)
