"""`python -m data_tools.convert`: what it writes, what it refuses and says, and that an output is whole or is not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest
from formats import WRITABLE

from data_tools.convert import main
from mmembed.content import Image
from mmembed.data.holding import LOSABLE
from mmembed.media import MediaStore

ROOT = Path(__file__).resolve().parents[2]


def lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def doc(content, **more):
    return {"content": content, **more}


GRADED = {
    "query": "q",
    "documents": [doc("a", relevance=2, id="d1", title="T"), doc("b", relevance=0, id="d2", score=0.5)],
    "id": "q1",
}


def test_shipped_data_goes_through_four_formats_and_comes_back(tmp_path, capsys):
    """BEIR, Tevatron, BlockRank, Trove: what is left are the same judgements of the same texts."""
    first = tmp_path / "a"
    assert run(ROOT / "data" / "mbpp", first, "--to", "tevatron", "--drop", "unjudged,title,relevance") == 0
    assert "looks like beir" in capsys.readouterr().err
    assert run(first, tmp_path / "b.jsonl.gz", "--to", "blockrank") == 2
    assert "a document without a query: blockrank cannot hold that" in capsys.readouterr().err
    assert run(first, tmp_path / "b.jsonl.gz", "--to", "blockrank", "--drop", "unjudged") == 0
    assert run(tmp_path / "b.jsonl.gz", tmp_path / "c", "--to", "trove") == 0
    assert run(tmp_path / "c", tmp_path / "d", "--to", "beir") == 0
    assert "looks like trove" in capsys.readouterr().err
    source, back = ROOT / "data" / "mbpp", tmp_path / "d"
    qrels = (source / "qrels" / "train.tsv").read_text().splitlines()
    assert sorted((back / "qrels" / "train.tsv").read_text().splitlines()) == sorted(qrels)
    texts = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in rows_of(source / "corpus.jsonl")}
    assert all(texts[row["_id"]] == row["text"].strip() for row in rows_of(back / "corpus.jsonl"))
    asked = {row["_id"]: row for row in rows_of(source / "queries.jsonl")}
    assert all(asked[row["_id"]] == row for row in rows_of(back / "queries.jsonl"))


def test_what_would_be_lost_is_refused_with_its_place_and_dropped_where_that_is_allowed(tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", GRADED)
    out = tmp_path / "out.jsonl"
    assert run(path, out, "--to", "flag_embedding") == 2
    said = capsys.readouterr().err
    assert f"{path}:1: " in said and "flag_embedding cannot hold that" in said
    assert "documents[0].relevance 2" in said and "documents[0].title" in said
    assert "To leave it out say --drop id,title,documents.id,relevance" in said
    assert not out.exists() and os.listdir(tmp_path) == ["a.jsonl"]
    assert run(path, out, "--to", "flag_embedding", "--drop", "id,documents.id,title,relevance") == 0
    assert rows_of(out) == [{"query": "q", "pos": ["T a"], "neg": ["b"], "neg_scores": [0.5]}]
    assert "dropped: " in (said := capsys.readouterr().out) and "relevance (1 records)" in said


@pytest.mark.parametrize(
    ("record", "target", "drop", "row"),
    [
        (
            {"query": "q", "documents": [doc({"image": "a.png", "text": "x"}), doc("b", relevance=0)]},
            "flag_embedding",
            "image",
            {"query": "q", "pos": ["x"], "neg": ["b"]},
        ),
        (
            {"query": ["see", {"text": "this"}], "documents": [doc("a")]},
            "flag_embedding",
            "order",
            {"query": "see\nthis", "pos": ["a"], "neg": []},
        ),
        (
            {"query": "q", "documents": [doc("a"), doc("b"), doc("c", relevance=0), doc("d", relevance=0)]},
            "llm2vec",
            "positives,negatives",
            {"query": "q", "positive": "a", "negative": "c"},
        ),
        (
            {"query": {"images": ["a.png", "b.png"], "text": "x"}, "documents": [doc("a")]},
            "sentence_transformers",
            "pictures",
            {"anchor": {"image": "a.png", "text": "x"}, "positive": "a"},
        ),
        (
            {"query": "q", "documents": [doc("a", score=1), doc("b", relevance=0)]},
            "sentence_transformers",
            "score",
            {"anchor": "q", "positive": "a", "negative": "b"},
        ),
        (
            {"query": {"audio": "s.wav", "sampling_rate": 16000}, "documents": [doc("a")]},
            "sentence_transformers",
            "sampling_rate",
            {"anchor": {"audio": "s.wav"}, "positive": "a"},
        ),
        (
            {"query": "q", "documents": [doc("a", relevance=0.8)], "task": "sts"},
            "ms_swift",
            None,
            {
                "messages": [{"role": "user", "content": "q"}],
                "positive_messages": [[{"role": "user", "content": "a"}]],
                "negative_messages": [],
                "label": 0.8,
            },
        ),
        (
            {"query": "q", "documents": [doc("a")]},
            "qwen3_vl",
            "documents",
            {"text": "q"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_left_after_a_drop(record, target, drop, row, tmp_path, capsys):
    path = lines(tmp_path / "a.jsonl", record)
    out = tmp_path / "out.jsonl"
    if drop is not None:
        assert run(path, out, "--from", "jsonl", "--to", target) == 2
        assert f"--drop {drop}" in capsys.readouterr().err
    assert run(path, out, "--from", "jsonl", "--to", target, *(["--drop", drop] if drop else [])) == 0
    assert rows_of(out) == [row]


def test_columns_have_as_many_negatives_as_is_asked(tmp_path, capsys):
    several = [doc("a"), *(doc(text, relevance=0) for text in "bcd")]
    records = [{"query": "q", "documents": several[:4]}, {"query": "r", "documents": several[:3]}]
    path, out = lines(tmp_path / "a.jsonl", *records), tmp_path / "out.jsonl"
    assert run(path, out, "--to", "sentence_transformers") == 2
    assert f"{path}:2: gives the columns anchor, positive, negative_1, negative_2; the first" in capsys.readouterr().err
    fixed = ("--to", "sentence_transformers", "--to-options", "negatives=2")
    assert run(path, out, *fixed) == 2
    assert f"{path}:1: 3 negatives: " in capsys.readouterr().err
    assert run(path, out, *fixed, "--drop", "negatives") == 0
    assert [list(row.values()) for row in rows_of(out)] == [["q", "a", "b", "c"], ["r", "a", "b", "c"]]
    lines(path, {"query": "q", "documents": several[:2]})
    assert run(path, tmp_path / "b.jsonl", *fixed, "--drop", "negatives") == 2
    assert f"{path}:1: 1 negative, and sentence_transformers needs 2" in capsys.readouterr().err


def test_ids_of_trec_say_their_texts_are_elsewhere(tmp_path, capsys):
    (tmp_path / "run.txt").write_text("q1 Q0 d1 1 2.5 bm25\n")
    lines(tmp_path / "queries.jsonl", {"_id": "q1", "text": "asked"})
    lines(tmp_path / "corpus.jsonl", {"_id": "d1", "text": "found"})
    (tmp_path / "qrels.txt").write_text("q1 0 d1 3\n")
    arguments = (tmp_path / "run.txt", tmp_path / "out.jsonl", "--from", "trec_run", "--to", "jsonl")
    assert run(*arguments) == 2
    assert "ids without texts, which jsonl needs" in capsys.readouterr().err
    files = ["queries=queries.jsonl", "corpus=corpus.jsonl", "qrels=qrels.txt"]
    assert run(*arguments, "--options", *files) == 0
    (record,) = rows_of(tmp_path / "out.jsonl")
    (document,) = record["documents"]
    assert (record["query"], document["content"], document["relevance"], document["score"]) == (
        "asked",
        "found",
        3,
        2.5,
    )
    assert run(tmp_path / "out.jsonl", tmp_path / "again.txt", "--to", "trec_run") == 2
    assert "--drop content,relevance" in capsys.readouterr().err
    assert run(tmp_path / "out.jsonl", tmp_path / "again.txt", "--to", "trec_run", "--drop", "relevance,content") == 0
    assert (tmp_path / "again.txt").read_text() == (tmp_path / "run.txt").read_text()


def test_ids_are_made_where_there_are_texts_and_asked_for_where_there_are_none(tmp_path, capsys):
    record = {"query": "q", "documents": [doc("a"), doc("b", relevance=0)]}
    path = lines(tmp_path / "a.jsonl", record, record | {"query": "r"})
    assert run(path, tmp_path / "run", "--to", "trec_qrels", "--drop", "content") == 2
    assert f"{path}:1: there is no 'id', which trec_qrels needs. Convert to beir first" in capsys.readouterr().err
    assert run(path, tmp_path / "beir", "--to", "beir") == 0
    assert run(tmp_path / "beir", tmp_path / "qrels", "--to", "trec_qrels", "--drop", "content,meta") == 0
    found = [line.split() for line in (tmp_path / "qrels").read_text().splitlines()]
    assert [(query, grade) for query, _, _, grade in found] == [("q1", "1"), ("q1", "0"), ("q2", "1"), ("q2", "0")]
    assert found[0][2] == found[2][2] != found[1][2] == found[3][2]  # equal documents are one


def test_paths_of_pictures_still_mean_the_same_from_another_folder(tmp_path, capsys):
    (tmp_path / "set" / "below").mkdir(parents=True)
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "set" / "below" / "a.png")
    record = {"query": "q", "documents": [doc({"image": "below/a.png"}), doc({"image": "https://x.org/a.png"})]}
    path = lines(tmp_path / "set" / "a.jsonl", record)
    for output, image in (
        (tmp_path / "set" / "same.jsonl", "below/a.png"),
        (tmp_path / "set" / "below" / "b.jsonl", "a.png"),
        (tmp_path / "other" / "c.jsonl", str(tmp_path / "set" / "below" / "a.png")),
    ):
        assert run(path, output, "--to", "colpali") == 0
        (row,) = rows_of(output)
        assert row["pos_target"] == [{"image": image}, {"image": "https://x.org/a.png"}]
        assert MediaStore(output.parent, also=[tmp_path]).size(Image(image)) == (8, 8)
    assert f"set data.media_root={tmp_path}/set/below" in capsys.readouterr().out
    assert run(path, tmp_path / "d.jsonl", "--to", "colpali", "--media", "keep") == 0
    assert rows_of(tmp_path / "d.jsonl")[0]["pos_target"][0] == {"image": "below/a.png"}
    (tmp_path / "set" / "below" / "a.jsonl").write_text(path.read_text())
    arguments = (tmp_path / "set" / "below" / "a.jsonl", tmp_path / "e.jsonl", "--to", "colpali")
    assert run(*arguments, "--media-root", tmp_path / "set") == 0
    assert rows_of(tmp_path / "e.jsonl")[0]["pos_target"][0] == {"image": "set/below/a.png"}


def test_pictures_go_into_a_table_and_come_out_of_one(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"a picture")
    path = lines(tmp_path / "a.jsonl", {"query": "q", "documents": [doc({"image": "a.png"})]})
    assert run(path, tmp_path / "beir", "--to", "beir") == 0
    (row,) = rows_of(tmp_path / "beir" / "corpus.jsonl")
    assert row["image"] == "a.png" and row["text"] == ""
    assert MediaStore(tmp_path / "beir").read(Image("images.parquet#a.png")) == b"a picture"
    drop = "id,documents.id"
    assert run(tmp_path / "beir", tmp_path / "beir" / "c.jsonl", "--to", "colpali", "--drop", drop) == 0
    assert rows_of(tmp_path / "beir" / "c.jsonl")[0]["pos_target"] == {"image": "images.parquet#a.png"}
    lines(path, {"query": "q", "documents": [doc({"image": "../secret.png"})]})
    (tmp_path.parent / "secret.png").write_bytes(b"x")
    assert run(path, tmp_path / "beir2", "--to", "beir") == 2
    assert "points outside the media folders" in capsys.readouterr().err
    assert not (tmp_path / "beir2").exists()


def test_a_check_names_every_bad_line_and_counts_kinds(tmp_path, capsys):
    good = {"query": "q", "pos": ["a"]}
    path = lines(tmp_path / "a.jsonl", good, {"query": "q"}, good | {"pos": []}, good | {"neg": ["a"]}, good)
    with path.open("ab") as file:
        file.write(b'{"query": "\xff"}\n{broken\n')
    assert run("--check", path) == 1
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0].rpartition(":")[2] for line in said[:-1]] == ["2", "3", "4", "6", "7"]
    assert said[-1].startswith(f"{path}: 2 good records of format flag_embedding; bad: ")
    for kind in ("1 missing field", "1 bad field", "1 positive and negative", "1 not UTF-8", "1 not JSON"):
        assert kind in said[-1]
    lines(path, good, good)
    assert run("--check", path, "--from", "flag_embedding") == 0
    assert capsys.readouterr().out == f"{path}: 2 good records of format flag_embedding\n"
    lines(path, good | {"prompt": "Find it"})
    assert run("--check", path, "--to", "llm2vec") == 1
    assert "1 not held: instruction" in capsys.readouterr().out


def test_bad_records_are_left_out_where_that_is_asked(tmp_path, capsys):
    path = lines(
        tmp_path / "a.jsonl", {"query": "q", "pos": ["a"]}, {"query": "", "pos": ["a"]}, {"query": "r", "pos": ["b"]}
    )
    out = tmp_path / "out.jsonl"
    assert run(path, out, "--to", "nemo") == 2
    assert f"{path}:2: query is ''" in capsys.readouterr().err and not out.exists()
    assert run(path, out, "--to", "nemo", "--on-bad-record", "skip") == 0
    said = capsys.readouterr()
    assert f"left out: {path}:2" in said.err and "2 records; bad: 1 bad field" in said.out
    assert [row["query"] for row in rows_of(out)] == ["q", "r"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.jsonl", "b.jsonl", "--to", "tevatronn"], "there is no 'tevatronn'; did you mean 'tevatron'?"),
        (["a.jsonl", "b.jsonl", "--from", "flagembedding", "--to", "nemo"], "did you mean 'flag_embedding'?"),
        (["a.jsonl", "b.jsonl", "--to", "pairs"], "'pairs' is only read; written are beir, "),
        (
            ["a.jsonl", "b.jsonl", "--to", "nemo", "--drop", "titel"],
            "--drop: there is no 'titel'; did you mean 'title'?",
        ),
        (
            ["a.jsonl", "b.jsonl", "--to", "nemo", "--drop", "meta"],
            "nemo holds 'meta'; what it may lose is instruction",
        ),
        (["a.jsonl", "b.jsonl", "--to", "nemo", "--options", "splt=dev"], "flag_embedding: unknown option 'splt'"),
        (["a.jsonl", "b.jsonl", "--to", "trove", "--to-options", "grouped=maybe"], "trove.grouped: found 'maybe'"),
        (["a.jsonl", "b.jsonl", "--to", "nemo", "--options", "split"], "option 'split': write key=value"),
        (["a.jsonl", "a.jsonl", "--to", "nemo"], "is the input; name another output"),
        (["a.jsonl", "there.jsonl", "--to", "nemo"], "is there already; name another output, or replace it"),
        ([], "name the input, or --list the formats"),
        (["a.jsonl"], "name the output and its format (--to), or --check the input"),
        (["a.jsonl", "b.jsonl", "--check"], "output: --check writes nothing"),
        (["a.jsonl", "--check", "--drop", "id"], "they are about the output's format"),
        (["missing.jsonl", "b.jsonl", "--to", "nemo"], "missing.jsonl: there is no such file or folder"),
        (["odd.jsonl", "b.jsonl", "--to", "nemo"], "whose first line has 'x': looks like no format"),
        (["empty.jsonl", "b.jsonl", "--from", "nemo", "--to", "nemo"], "no record could be converted"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_refusals(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines(Path("a.jsonl"), {"query": "q", "pos": ["a"]})
    lines(Path("there.jsonl"), {"query": "q", "pos": ["a"]})
    lines(Path("odd.jsonl"), {"x": 1})
    Path("empty.jsonl").touch()
    assert run(*arguments) == 2
    assert said in capsys.readouterr().err
    assert sorted(os.listdir()) == ["a.jsonl", "empty.jsonl", "odd.jsonl", "there.jsonl"]


def test_an_output_is_replaced_only_when_that_is_said_and_the_new_one_is_whole(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"query": "q", "pos": ["a"]})
    out = tmp_path / "out"
    assert run(path, out, "--to", "tevatron") == 0
    (out / "old").touch()
    lines(path, {"query": "q", "pos": ["a"]}, {"query": "q"})
    assert run(path, out, "--to", "tevatron", "--overwrite") == 2
    assert (out / "old").exists()
    lines(path, {"query": "r", "pos": ["a"]})
    assert run(path, out, "--to", "tevatron", "--overwrite") == 0
    assert sorted(one.name for one in out.iterdir()) == ["corpus.jsonl", "train.jsonl"]
    assert rows_of(out / "train.jsonl")[0]["query_text"] == "r"


DETECTED = {name for name in WRITABLE if name != "ms_swift_reranker"}


@pytest.mark.parametrize("name", WRITABLE)
def test_a_format_is_found_out(name, tmp_path, capsys):
    from formats import place

    from tests.unit.test_converters import EXAMPLES

    path = place(EXAMPLES[name][0], tmp_path)
    assert run("--check", path) == 0
    assert f"looks like {name}\n" in capsys.readouterr().err


def test_two_formats_that_a_file_may_be_are_listed(tmp_path, capsys):
    for name in ("corpus", "queries", "qrels", "train"):
        lines(tmp_path / f"{name}.jsonl", {"_id": "1"})
    assert run("--check", tmp_path) == 2
    assert "may be tevatron, trove; say which with --from" in capsys.readouterr().err


def test_a_stopped_command_leaves_nothing(tmp_path):
    """SIGTERM while it writes; the exit status is that of Ctrl-C."""
    path = lines(tmp_path / "a.jsonl", *({"query": f"q{n}", "pos": ["a" * 200]} for n in range(60_000)))
    command = [sys.executable, "-m", "data_tools.convert", str(path), str(tmp_path / "out"), "--to", "tevatron"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) as process:
        while not list(tmp_path.glob(".out.writing-*/out/corpus.jsonl")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
        assert b"stopped; nothing was written" in process.stderr.read()
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_memory_does_not_follow_the_file(tmp_path):
    """Ten times the file, the same memory (of a format whose records lie in the rows)."""
    peaks = []
    for count in (1_000, 10_000):
        path = lines(tmp_path / f"{count}.jsonl", *({"query": f"q{n}", "pos": ["a" * 4000]} for n in range(count)))
        code = (
            "import sys; from data_tools.convert import main; "
            f"assert main(['{path}', '{tmp_path}/out{count}', '--from', 'flag_embedding', '--to', 'nemo']) == 0; "
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.splitlines()[-1]))
    assert peaks[1] < peaks[0] + 8_000  # kB; the second file has 36 MB more


def test_the_table_of_the_docs_is_what_the_formats_say(capsys):
    assert run("--list") == 0
    table = capsys.readouterr().out
    assert table in (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == len(WRITABLE) + 2


def test_the_measured_table_of_the_docs_is_what_was_measured():
    results = json.loads((ROOT / "benchmarks" / "results" / "convert.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert row["meets"] and row["details"]["round trip equal"]
    assert {row["details"]["format"] for row in results["rows"]} == set(WRITABLE)
    for name in WRITABLE:
        rows = [row for row in results["rows"] if row["details"]["format"] == name]
        count = sum(row["details"]["records"] for row in rows)
        speeds = [row["ours"] for row in rows]
        assert f"| `{name}` | {count:,} | yes | {min(speeds):.1f} to {max(speeds):.1f} |" in text


def test_every_name_of_drop_is_of_some_use():
    """Each is lost by one format at least and held by another, and none is unknown."""
    lost = {name: cls.holds.losable() for name, cls in WRITABLE.items()}
    for name in LOSABLE:
        assert any(name in names for names in lost.values()), name
        assert any(name not in names for names in lost.values()), name
