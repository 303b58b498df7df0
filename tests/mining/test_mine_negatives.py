"""The command, in this process, on made-up texts: what it writes, what it keeps, what it refuses."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import yaml

from data_tools.command import OwnKeys, only_one, own_keys
from data_tools.mine_negatives import main
from data_tools.mining.retrievers import RETRIEVERS, Item
from data_tools.mining.settings import MiningConfig, _check_blocks, load_mining
from mmembed.errors import ConfigError, MmembedError
from tests.mining.conftest import read_lines, write_lines

ROOT = Path(__file__).parents[2]


def run(file, *overrides):
    return main(["--config", str(file), *overrides])


def refused(capsys, file, *overrides):
    capsys.readouterr()
    assert run(file, *overrides) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    return error[error.index("error:") :]


def encoded(folder, ids, vectors, texts=None, **changes):
    """A folder as `mmembed encode` writes it."""
    folder.mkdir()
    np.save(folder / "vectors.npy", np.asarray(vectors, np.float32))
    write_lines(
        folder / "items.jsonl",
        [{"id": one, **({"text": texts[row]} if texts else {})} for row, one in enumerate(ids)],
    )
    settings = {"model": "m", "size": np.shape(vectors)[1], "count": len(ids), **changes}
    (folder / "encoding.json").write_text(json.dumps(settings))
    return str(folder)


def precomputed(tmp_path, queries=None, corpus=None, dim=8, **changes):
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(30, dim)) if queries is None else queries
    corpus = rng.normal(size=(90, 8)) if corpus is None else corpus
    return {
        "type": "vectors",
        "queries": encoded(tmp_path / "q.enc", [f"q{row}" for row in range(30)], queries),
        "corpus": encoded(
            tmp_path / "c.enc",
            [*(f"p{row}" for row in range(30)), *(f"d{row}" for row in range(60))],
            corpus,
            **changes,
        ),
    }


# What is written ------------------------------------------------------------------------------------------------------


def test_records_have_their_negatives_and_everything_they_had(mining, tmp_path, texts, capsys):
    before = read_lines(texts / "train.jsonl")
    before[3]["documents"].append({"content": "a negative that a person gave", "relevance": 0, "id": "n3"})
    before[4]["instruction"] = "Find it."
    write_lines(texts / "train.jsonl", before)
    assert run(mining()) == 0
    after = read_lines(tmp_path / "out" / "train.jsonl")
    corpus = {row["id"]: row["text"] for row in read_lines(texts / "corpus.jsonl")}
    corpus |= {document["id"]: document["content"] for record in before for document in record["documents"]}
    for old, new in zip(before, after, strict=True):
        own = len(old["documents"])
        assert [one["id"] for one in new["documents"][:own]] == [one["id"] for one in old["documents"]]
        mined = new["documents"][own:]
        assert len(mined) == 3 and all(one["relevance"] == 0 for one in mined)
        assert all(corpus[one["id"]] == one["content"] for one in mined)
        assert len({one["id"] for one in new["documents"]}) == len(new["documents"])
        assert new.get("instruction") == old.get("instruction") and new["query"] == old["query"]
    assert "data.train=" in capsys.readouterr().out


def test_negatives_are_those_of_the_definition(mining, tmp_path):
    """Cosines, percent of positive and the best three, written again with numpy."""
    retriever = precomputed(tmp_path)
    rules = [{"type": "percent_of_positive", "percent": 5}]
    assert run(mining(retriever=retriever, rules=rules, search={"depth": 60})) == 0
    unit = [np.load(tmp_path / f"{name}.enc" / "vectors.npy") for name in ("q", "c")]
    queries, corpus = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in unit)
    ids = [json.loads(line)["id"] for line in (tmp_path / "c.enc" / "items.jsonl").read_text().splitlines()]
    for row, record in enumerate(read_lines(tmp_path / "out" / "train.jsonl")):
        scores = corpus @ queries[row]
        positive = scores[ids.index(f"p{row}")]
        order = [one for one in np.argsort(-scores) if ids[one] != f"p{row}"][:60]
        wanted = [ids[one] for one in order if scores[one] <= positive - abs(positive) * 0.05][:3]
        assert [one["id"] for one in record["documents"][1:]] == wanted


@pytest.mark.parametrize("index", ["exact", "flat"])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "int8"])
def test_every_index_and_precision(mining, tmp_path, index, precision):
    search = {"depth": 10, "index": index, "precision": precision, "queries": 7}
    assert run(mining(retriever=precomputed(tmp_path), search=search)) == 0
    assert all(len(one["documents"]) == 4 for one in read_lines(tmp_path / "out" / "train.jsonl"))


def test_equal_queries_share_their_positives_and_copies_are_one(mining, tmp_path, texts):
    records = read_lines(texts / "train.jsonl")
    same = dict(records[0], id="again", documents=[{"content": "engine letter 0 other", "id": "other"}])
    write_lines(texts / "train.jsonl", [*records, same])
    corpus = read_lines(texts / "corpus.jsonl")
    copy = {"id": "copy", "text": records[0]["documents"][0]["content"].upper() + " "}
    itself = {"id": "itself", "text": records[1]["query"]}
    write_lines(texts / "corpus.jsonl", [copy, itself, *corpus])
    assert run(mining(negatives=8)) == 0
    written = read_lines(tmp_path / "out" / "train.jsonl")
    chosen = {row: {one["id"] for one in record["documents"][1:]} for row, record in enumerate(written)}
    assert not {"copy", "p0", "other"} & (chosen[0] | chosen[30]) and chosen[0] == chosen[30]
    assert "itself" not in chosen[1] and any("itself" in one for row, one in chosen.items() if row != 1)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]
    assert report["duplicates"]["examples"] == [
        {"id": "copy", "equal_to": "p0", "where": f"{texts / 'corpus.jsonl'}:1"}
    ]


def test_a_document_that_shows_the_picture_of_its_query_is_no_negative(mining, tmp_path, texts):
    from data_tools.mining.collection import collect

    for row in range(3):
        PIL.Image.new("RGB", (40, 40), (80 * row, 0, 0)).save(texts / f"{row}.png")
    records = [
        {"query": {"image": f"{row}.png"}, "documents": [{"content": f"the colour {row}", "id": f"p{row}"}]}
        for row in range(3)
    ]
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", [{"id": f"c{row}", "image": f"{row}.png", "text": "seen"} for row in range(3)])
    config = load_mining(mining(retriever="mmembed"))
    folder = tmp_path / "work"
    folder.mkdir()
    found, _ = collect(config, config.sources[0], folder)
    assert found.positives.tolist() == [[0], [1], [2]] and found.barred.tolist() == [[3], [4], [5]]


@pytest.mark.parametrize("scores", ["retriever", "teacher"])
def test_scores_of_all_documents(mining, tmp_path, texts, scores):
    records = read_lines(texts / "train.jsonl")
    records[2]["documents"].append({"content": "engine letter", "relevance": 0, "id": "n"})
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", [{"id": f"d{row}", "text": f"cup {row}"} for row in range(40)])
    vectors = precomputed(tmp_path, corpus=np.random.default_rng(1).normal(size=(90, 8)))
    items = tmp_path / "c.enc" / "items.jsonl"
    rows = [*read_lines(items)[:30], {"id": "n"}, *read_lines(items)[30:89]]
    write_lines(items, rows)
    teacher = {"teacher": {"type": "embedder", "retriever": vectors}} if scores == "teacher" else {}
    rules = [{"type": "rank_window", "first": 10}, "random_fill"]  # nothing that was found: all are filled
    assert run(mining(scores=scores, rules=rules, **teacher)) == 0
    written = [document for one in read_lines(tmp_path / "out" / "train.jsonl") for document in one["documents"]]
    assert len(written) == 30 * 4 + 1 and all(isinstance(one["score"], float) for one in written)


# What is kept ---------------------------------------------------------------------------------------------------------


def test_other_rules_choose_again_without_encoding_and_one_more_record_costs_its_shard(
    mining, tmp_path, texts, monkeypatch
):
    from data_tools.mining.retrievers.vectors import Vectors

    encode, seen = Vectors.encode, []
    monkeypatch.setattr(
        Vectors, "encode", lambda self, items, role: seen.append((role, len(items))) or encode(self, items, role)
    )
    retriever = precomputed(tmp_path)
    assert run(mining(retriever=retriever, shard=20)) == 0
    assert seen == [
        ("query", 20),
        ("query", 10),
        ("document", 20),
        ("document", 20),
        ("document", 20),
        ("document", 20),
        ("document", 10),
    ]
    first = (tmp_path / "out" / "train.jsonl").read_bytes()
    seen.clear()
    assert run(mining(retriever=retriever, shard=20, rules=["random"], seed=5)) == 0
    assert seen == [] and (tmp_path / "out" / "train.jsonl").read_bytes() != first
    assert run(mining(retriever=retriever, shard=20)) == 0
    assert seen == [] and (tmp_path / "out" / "train.jsonl").read_bytes() == first
    write_lines(texts / "train.jsonl", read_lines(texts / "train.jsonl")[:29])
    assert run(mining(retriever=retriever, shard=20)) == 0
    assert ("query", 9) in seen and ("query", 20) not in seen


def test_a_model_that_is_another_is_named_and_replaced_only_when_told(mining, tmp_path, capsys):
    assert run(mining()) == 0
    error = refused(capsys, mining(retriever={"type": "bm25", "k1": 2.0}))
    assert "another retriever (bm25; now" in error and "overwrite: true" in error
    assert run(mining(retriever={"type": "bm25", "k1": 2.0}), "overwrite=true") == 0
    assert run(mining(retriever={"type": "bm25", "k1": 2.0})) == 0


@pytest.mark.parametrize("name", ["retriever", "teacher"])
def test_a_model_that_computed_nothing_leaves_the_folder_free(mining, tmp_path, capsys, name):
    """A typo in the first run; and one under `overwrite`, which would have replaced shards and did not get there."""
    changes = {"retriever": precomputed(tmp_path)}
    wrong = {"type": "mmembed", "model": "runs/ther is none"}
    typo = {"retriever": wrong} if name == "retriever" else {"teacher": {"type": "embedder", "retriever": wrong}}
    right = changes if name == "retriever" else {**changes, "teacher": {"type": "embedder", "retriever": "mmembed"}}
    assert "ther is none" in refused(capsys, mining(**{**changes, **typo}))
    assert run(mining(**right)) == 0
    assert "ther is none" in refused(capsys, mining(**{**changes, **typo}), "overwrite=true")
    assert run(mining(**right)) == 0
    error = refused(capsys, mining(**{**changes, **typo}))
    assert f"was computed by another {name} (" in error and "ther is none" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda one: one.name)
def test_a_stop_says_that_the_same_command_goes_on(mining, tmp_path, number):
    file = mining(retriever=precomputed(tmp_path))
    code = """
import runpy, sys
from data_tools.mining.retrievers.vectors import Vectors
def wait(self, items, role):
    import time
    print("encoding", flush=True)
    time.sleep(60)
Vectors.encode = wait
sys.argv = ["mine_negatives", *sys.argv[1:]]
runpy.run_module("data_tools.mine_negatives", run_name="__main__")
"""
    started = subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(file)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout.readline() == "encoding\n"
        started.send_signal(number)
        _, error = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 130
    assert error.endswith("\nstopped; the same command goes on\n") and "Traceback" not in error
    assert run(file) == 0


def test_progress_in_a_log_file_is_a_line_every_half_a_minute(mining, tmp_path, texts, capsys, monkeypatch):
    """Bars of records and corpora have a total, and draw as often as the others."""
    from tqdm import tqdm

    shown = []

    class Noted(tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            shown.append((self.desc, self.total, self.mininterval))

    monkeypatch.setattr("mmembed.progress.tqdm", Noted)
    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    assert run(mining(retriever=precomputed(tmp_path))) == 0
    totals = {what: total for what, total, _ in shown}
    assert totals["read train.jsonl"] == 30 and totals["read corpus.jsonl"] == 60
    assert f"reading {texts / 'train.jsonl'}" in totals
    assert {seconds for *_, seconds in shown} == {30.0} and len(shown) == 7


def test_two_processes_on_one_folder(mining, tmp_path, capsys):
    out = tmp_path / "out"
    hold = f"""
import pathlib, time
from data_tools.command import only_one
with only_one(pathlib.Path({str(out)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        error = refused(capsys, mining())
        assert f"process {holder.pid} on " in error and "choose another output" in error
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (out / ".owner").exists()
        assert run(mining()) == 0
    finally:
        holder.kill()
        holder.wait()


@contextmanager
def tmpfs(folder):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"a file system can be mounted by root alone: {mounted.stderr.decode().strip()}")
    try:
        subprocess.run(["mount", "-o", "remount,size=256k", str(folder)], check=True)
        yield lambda: subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def file_size_limit(folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [tmpfs, file_size_limit], ids=lambda limit: limit.__name__)
def test_a_full_disk_keeps_what_is_complete(mining, tmp_path, capsys, limit, monkeypatch):
    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    retriever = precomputed(tmp_path, np.ones((30, 1024)), np.random.default_rng(0).normal(size=(90, 1024)))
    file = mining(retriever=retriever, shard=10, output=str(tmp_path / "out"))
    with limit(tmp_path / "out") as resize:
        error = refused(capsys, file)
        assert "cannot be written" in error and "the same command goes on" in error
        complete = len((tmp_path / "out/work/train/retriever-queries.done").read_text().splitlines()) - 1
        assert complete >= 2
        resize()
        assert run(file) == 0
        assert len(read_lines(tmp_path / "out" / "train.jsonl")) == 30


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["negativs=3"], "unknown key 'negativs'; did you mean 'negatives'"),
        (["search.deph=3"], r"unknown key 'search.deph'; did you mean 'depth'\? \(in 'search'\)"),
        (["sources.0.formatt=beir"], "did you mean 'format'"),
        (["retriever=bm52"], "there is no 'bm52'; did you mean 'bm25'"),
        (["retriever.k2=1"], "unknown option 'k2'"),
        (["retriever.k1=0"], "found 0"),
        (["rules.0=top"], "did you mean 'top_k'"),
        (["rules=[saha]"], "'saha' makes clusters of pairs, not negatives"),
        (["rules=[owner_similarity]"], "'owner_similarity' compares vectors of queries; retriever 'bm25' has none"),
        (["rules=[top_k, random]"], "'top_k' and 'random' both pick"),
        (["rules=[cluster_diverse]"], "reads clusters; set clusters"),
        (["retriever=mmembed", "clusters=5"], "clusters: no rule reads them"),
        (["retriever=mmembed", "rules=[mcl]", "earlier=[runs/a]"], "earlier: its clusters are joined.*set clusters"),
        (["retriever=mmembed", "clusters=5", "earlier=[runs/a]"], "clusters: no rule reads them; .* or mcl"),
        (
            ["retriever=mmembed", "clusters=5", "rules=[mcl]", "earlier=[runs/a, runs/../runs/a/]"],
            "earlier: 'runs/a' is there twice",
        ),
        (
            ["retriever=mmembed", "clusters=5", "rules=[mcl]", "output=runs/a", "earlier=[runs/b, runs/./a]"],
            "earlier: 'runs/./a' is the output of this run",
        ),
        (["search.precision=int8"], "search.precision has no effect with retriever 'bm25'"),
        (["retriever=mmembed", "search.index=hnsw", "search.options={probes: 3}"], "index 'hnsw' has no 'probes'"),
        (["negatives=11"], "negatives 11 is above search.depth 10"),
        (["rescore=chosen"], "no effect without 'teacher'"),
        (["scores=teacher"], "there is no teacher"),
        (["teacher={type: embedder, retriever: bm25}"], "'bm25' has no vectors"),
        (["sources=[]"], "sources: found"),
        (["retriever={type: openai, url: localhost, model: m}"], "give an http or https address"),
        (["sources=[{path: a}, {path: a.jsonl}]"], "would be written to 'a.jsonl'"),
        (["rules=top"], r"rules: found 'top'; write a list: \[top\]"),
        (["rules={type: top_k}"], r"rules: found {'type': 'top_k'}; write a list: \[{...}\]"),
        (["sources.0.corpus=a.jsonl"], r"sources.0.corpus: found 'a.jsonl'; write a list: \[a.jsonl\]"),
        (["rules=[{type: percent_of_positive, percent: 500}]"], "percent: found 500"),
        (["retriever=mmembed", "search.device=gpu"], "search.device 'gpu': device: 'gpu' is not there; known: cpu"),
        (["retriever=mmembed", "search.device=cuda:70"], "search.device 'cuda:70': device: .* is not there"),
        (["retriever=mmembed", "search.device=mps", "search.index=flat"], "search.device 'mps': "),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_read(mining, capsys, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_mining(mining(), overrides)


def test_the_config_of_the_documentation_is_read():
    texts = re.findall(r"```yaml\n(output: .*?)```", (ROOT / "docs" / "mining.md").read_text(), flags=re.S)
    (ROOT / "data" / "squad-en" / "corpus.jsonl").stat()
    whole, *excerpts = map(yaml.safe_load, texts)
    assert all(set(tree) <= set(MiningConfig.model_fields) for tree in (whole, *excerpts))
    _check_blocks(MiningConfig.model_validate(whole))


def test_files_and_data_that_are_not_there(mining, capsys):
    assert "there is no such file" in refused(capsys, "nowhere.yaml")
    assert "check the path" in refused(capsys, mining(), "sources.0.path=nowhere.jsonl")
    assert "corpus: there is no" in refused(capsys, mining(), "sources.0.corpus=[nowhere.jsonl]")


def test_advice_names_keys_of_this_command(mining, texts, capsys, tmp_path):
    error = refused(capsys, mining(), "sources.0.path=nowhere.jsonl")
    assert "check the path, or set root" in error
    records = read_lines(texts / "train.jsonl")
    PIL.Image.new("RGB", (40, 40)).save(texts / "0.png")
    PIL.Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    records[3]["query"] = {"image": "0.png"}
    write_lines(texts / "train.jsonl", records)
    file = mining(retriever="mmembed")
    error = refused(capsys, file, "media_limits.max_pixels_decoded=99")
    assert "raise media_limits.max_pixels_decoded. To go on without such records set on_bad_record: skip" in error
    records[3]["query"] = {"image": "../1.png"}
    write_lines(texts / "train.jsonl", records)
    error = refused(capsys, file)
    assert "or set media_root to a folder that holds all media" in error
    warning = logging.LogRecord("x", logging.WARNING, "x.py", 1, "skipped %s", ("a; set data.on_bad_record: x",), None)
    assert OwnKeys("%(message)s").format(warning) == "skipped a; set on_bad_record: x"
    assert own_keys("look into /data.root and my/data.root") == "look into /data.root and my/data.root"


def test_the_path_of_a_picture_stands_there_once(mining, texts, capsys):
    records = read_lines(texts / "train.jsonl")
    records[3]["query"] = {"image": "none.png"}
    write_lines(texts / "train.jsonl", records)
    error = refused(capsys, mining(retriever="mmembed"))
    assert "there is no such file" in error and error.count(str(texts / "none.png")) == 1
    write_lines(texts / "train.jsonl", records[:3])
    (texts / "pictures").mkdir()
    (texts / "pictures" / "bad.png").write_bytes(b"no")
    error = refused(capsys, mining(retriever="mmembed"), "sources.0.corpus=[pictures]")
    assert "not a readable image" in error and error.count(str(texts / "pictures" / "bad.png")) == 1


def test_too_many_clusters_name_the_source_before_anything_is_encoded(mining, tmp_path, capsys):
    changes = {"retriever": precomputed(tmp_path), "clusters": 500, "rules": ["cluster_diverse"]}
    assert "'train.jsonl': clusters 500 of 90 documents; give fewer" in refused(capsys, mining(**changes))
    assert not list((tmp_path / "out" / "work").rglob("*.rows"))


def test_a_teacher_reads_what_its_embedder_reads(mining, texts, capsys):
    from data_tools.mining.teachers import TEACHERS

    sounds = {"type": "vectors", "queries": "a", "corpus": "b"}
    for retriever in ("mmembed", {"type": "sentence_transformers", "model": "x"}, sounds):
        teacher = TEACHERS.build({"type": "embedder", "retriever": retriever})
        assert teacher.reads == RETRIEVERS.build(retriever).reads
    assert "audio" not in TEACHERS.build("embedder").reads and "audio" in teacher.reads


def test_a_corpus_smaller_than_the_depth(mining, capsys):
    error = refused(capsys, mining(search={"depth": 95}))
    assert "search.depth 95 of a corpus of 90 documents, of which a query has 89" in error
    assert "set search.depth=89" in error


def test_queries_without_positives_are_an_error_or_counted(mining, tmp_path, texts, capsys):
    records = read_lines(texts / "train.jsonl")
    records[7]["documents"][0]["relevance"] = 0
    write_lines(texts / "train.jsonl", records)
    assert f"{texts / 'train.jsonl'}:8: no document has a relevance above 0" in refused(capsys, mining())
    assert run(mining(), "on_bad_record=skip") == 0
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == 29
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["sources"][0]["skipped"] == {"no positive": 1}


def test_graded_pairs_are_refused(mining, texts, capsys):
    records = [dict(one, task="sts") for one in read_lines(texts / "train.jsonl")]
    write_lines(texts / "train.jsonl", records)
    assert "train.jsonl:1: an STS record" in refused(capsys, mining())
    assert run(mining(), "sources.0.task=retrieval") == 0


@pytest.mark.parametrize("side", ["record", "corpus"])
@pytest.mark.parametrize("damage", ["missing", "no image", "truncated in the middle"])
def test_an_unreadable_image_in_the_middle_of_a_shard(mining, tmp_path, texts, capsys, side, damage, family_folder):
    rng = np.random.default_rng(0)
    for row in range(12):
        PIL.Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)).save(texts / f"{row}.png")
    records = [{"query": f"q {row}", "documents": [{"content": {"image": f"{row}.png"}}]} for row in range(6)]
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", [{"id": f"c{row}", "image": f"{row}.png"} for row in range(6, 12)])
    bad, where = (texts / "3.png", "train.jsonl:4") if side == "record" else (texts / "9.png", "corpus.jsonl:4")
    encoded = bad.read_bytes()
    if damage == "missing":
        bad.unlink()
    else:
        middle = len(encoded) // 2
        bad.write_bytes(b"no" if damage == "no image" else encoded[:middle] + bytes(64) + encoded[middle + 64 :])
    retriever = {"type": "mmembed", "model": str(family_folder("qwen3_vl"))}
    file = mining(retriever=retriever, search={"depth": 4}, negatives=2, shard=4)
    error = refused(capsys, file)
    assert where in error and bad.name in error and "on_bad_record: skip" in error
    assert run(file, "on_bad_record=skip") == 0
    assert len(read_lines(tmp_path / "out" / "train.jsonl")) == (5 if side == "record" else 6)
    (skipped,) = json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]["skipped"].values()
    assert skipped == 1
    assert bad.name not in (tmp_path / "out" / "train.jsonl").read_text()


def test_vectors_of_another_model_or_size_and_nan(mining, tmp_path, capsys):
    for changes, message in (
        ({"model": "other"}, "was encoded with model m, .* with other"),
        ({"size": 12}, "was encoded with size 8, .* with 12"),
    ):
        for folder in tmp_path.glob("*.enc"):
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
        with pytest.raises(MmembedError, match=message):
            RETRIEVERS.build(precomputed(tmp_path, **changes)).fingerprint()
    broken = np.load(tmp_path / "c.enc" / "vectors.npy")
    broken[17, 3] = np.nan
    np.save(tmp_path / "c.enc" / "vectors.npy", broken)
    (tmp_path / "c.enc" / "encoding.json").write_text(json.dumps({"model": "m", "size": 8, "count": 90}))
    retriever = {"type": "vectors", "queries": str(tmp_path / "q.enc"), "corpus": str(tmp_path / "c.enc")}
    error = refused(capsys, mining(retriever=retriever))
    assert "train.jsonl:18 (p17): the retriever gives NaN" in error


def test_vectors_of_other_records(mining, tmp_path, texts, capsys):
    retriever = precomputed(tmp_path)
    items = tmp_path / "q.enc" / "items.jsonl"
    write_lines(items, [{"id": f"q{row}", "text": f"text {row}"} for row in range(30)])
    error = refused(capsys, mining(retriever=retriever))
    assert "train.jsonl:1 (q0): row 0 of" in error and "has this id and another text" in error
    write_lines(items, [{"id": f"x{row}"} for row in range(30)])
    assert "no vector in" in refused(capsys, mining(retriever=retriever), "overwrite=true")


def test_pictures_and_a_retriever_of_words(mining, texts, capsys):
    PIL.Image.new("RGB", (40, 40)).save(texts / "0.png")
    records = read_lines(texts / "train.jsonl")
    records[5]["documents"][0]["content"] = {"image": "0.png"}
    write_lines(texts / "train.jsonl", records)
    error = refused(capsys, mining())
    assert "retriever 'bm25' reads text; corpus of 'train.jsonl' have image (first at" in error and "jsonl:6)" in error


# Retrievers -----------------------------------------------------------------------------------------------------------


def test_bm25_is_lucenes():
    import bm25s

    from data_tools.mining.retrievers.bm25 import Bm25
    from mmembed.data.words import search_words

    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, 30))) for _ in range(50)]
    ours, theirs = Bm25(k1=1.2, b=0.75), bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    ours.index([Item(text, None, None, "") for text in texts])
    theirs.index([search_words(text) for text in texts], show_progress=False)
    query = Item("a c c z", None, None, "")
    wanted = theirs.get_scores(["a", "c", "c"])
    assert ours.scores(query) == pytest.approx(wanted, abs=1e-5)
    rows = np.array([[4, -1, 9]])
    hits, own = ours.search([query], 7, rows)
    assert hits.scores[0] == pytest.approx(np.sort(wanted)[::-1][:7], abs=1e-5)
    assert own[0][[0, 2]] == pytest.approx(wanted[[4, 9]], abs=1e-5) and np.isnan(own[0][1])


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), only_one(tmp_path / "o"):
        raise RuntimeError
    with only_one(tmp_path / "o"):
        time.sleep(0)
    assert os.path.exists(tmp_path / "o" / ".lock")
