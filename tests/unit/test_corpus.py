"""Corpora in shards: every format and kind of source, refusals, a full disk, memory; kills of real processes."""

import json
import os
import signal
import subprocess
import sys
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmembed.errors import MmembedError, RecordError
from mmembed.inference import corpus
from mmembed.inference.corpus import unfinished
from mmembed.inference.encoding import open_collection, read_items
from mmembed.inference.sources import count_entries, read_entries
from mmembed.search import FaissIndex, open_vectors, top_k
from tests.corpora import ROWS, SIZE, Hashing, Wide, encode


def texts(count=ROWS):
    return [f"passage {number}" for number in range(count)]


@pytest.fixture
def lines(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts())))
    return file


def stop_after(monkeypatch, count, error):
    """Encoding ends with an error at the shard after `count`."""
    original, done = corpus.encode_shard, []

    def limited(*arguments):
        if len(done) == count:
            raise error
        done.append(1)
        return original(*arguments)

    monkeypatch.setattr(corpus, "encode_shard", limited)


@pytest.mark.parametrize("format", ["npy", "arrow", "parquet"])
def test_every_format_holds_the_same_vectors_in_order(lines, tmp_path, format):
    done = encode(tmp_path / "out", lines, format=format)
    assert (done.count, done.size, done.format) == (ROWS, SIZE, format)
    expected = np.array([Hashing.vector(text) for text in texts()])
    encoding, vectors = open_collection(tmp_path / "out")
    assert encoding.format == format and vectors.shape == (ROWS, SIZE) and len(vectors) == encoding.count == ROWS
    np.testing.assert_array_equal(vectors[:], expected)
    np.testing.assert_array_equal(vectors[3:12], expected[3:12])
    order = np.array([22, 0, 7, 7, -1])
    np.testing.assert_array_equal(vectors[order], expected[order])
    assert vectors[9:9].shape == (0, SIZE)
    assert [item["id"] for item in read_items(tmp_path / "out", range(ROWS)).values()] == [f"d{n}" for n in range(ROWS)]
    table = json.loads((tmp_path / "out/manifest.json").read_text())["shards"]
    assert [shard["entries"] for shard in table] == [5, 5, 5, 5, 3]
    assert table[1]["digest"] == blake2b(expected[5:10].tobytes(), digest_size=16).hexdigest()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"vectors.npy" if format == "npy" else "vectors", "items.jsonl", "encoding.json", "manifest.json"}
    assert not unfinished(tmp_path / "out").exists()


def test_what_others_read(lines, tmp_path):
    """numpy and pyarrow alone; a shard is a file."""
    for format in ("npy", "arrow", "parquet"):
        encode(tmp_path / format, lines, format=format)
    mapped = np.load(tmp_path / "npy/vectors.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap) and mapped.dtype == np.float32 and mapped.flags.c_contiguous
    raw = np.memmap(tmp_path / "npy/vectors.npy", np.float32, "r", 128, (ROWS, SIZE))
    np.testing.assert_array_equal(raw, mapped)
    table = pq.read_table(tmp_path / "parquet/vectors")
    assert table.schema.field("vector").type == pa.list_(pa.float32(), SIZE)
    assert table["id"].to_pylist() == [f"d{number}" for number in range(ROWS)]
    with pa.memory_map(str(tmp_path / "arrow/vectors/000001.arrow")) as file:
        assert pa.ipc.open_file(file).read_all()["id"].to_pylist() == ["d5", "d6", "d7", "d8", "d9"]


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_search_and_faiss_over_tables(lines, tmp_path, format):
    encode(tmp_path / "npy", lines)
    encode(tmp_path / "out", lines, format=format)
    queries = np.array([Hashing.vector(text) for text in ("a", "passage 7")])
    expected = top_k(queries, open_vectors(tmp_path / "npy"), 6)
    for found in (
        top_k(queries, tmp_path / "out", 6),
        FaissIndex(tmp_path / "out", "flat").top_k(queries, 6),
        FaissIndex(open_vectors(tmp_path / "out"), "hnsw").top_k(queries, 6),
    ):
        np.testing.assert_array_equal(found.indices, expected.indices)
        np.testing.assert_array_equal(found.scores, expected.scores)
    assert expected.indices[1, 0] == 7


def test_tables_of_two_widths_are_refused(lines, tmp_path):
    encode(tmp_path / "out", lines, format="parquet")
    other = pa.table({"id": ["x"], "vector": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(3, np.float32)), 3)})
    pq.write_table(other, tmp_path / "out/vectors/000009.parquet")
    with pytest.raises(MmembedError, match=r"000009.parquet: 3 columns of float32, the first file has 16"):
        open_vectors(tmp_path / "out")[:]
    (tmp_path / "out/vectors/000009.parquet").write_bytes(b"torn")
    with pytest.raises(MmembedError, match="000009.parquet: not a readable table"):
        open_vectors(tmp_path / "out")


# Sources --------------------------------------------------------------------------------------------------------------


def test_parquet_and_folders_are_read_as_lines_are(lines, tmp_path):
    folder = tmp_path / "parts"
    (folder / "b").mkdir(parents=True)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    table = pa.Table.from_pylist([{**row, "title": None, "url": "not read"} for row in rows[10:]])
    pq.write_table(table, folder / "b/more.parquet", row_group_size=4)
    entries = list(read_entries(folder))
    assert [(entry.id, entry.content) for entry in entries] == [(row["id"], row["text"]) for row in rows]
    assert entries[12].where == f"{folder / 'b/more.parquet'}:3" and count_entries(folder) == ROWS
    assert [entry.content for entry in read_entries(folder / "b/more.parquet")] == texts()[10:]
    encode(tmp_path / "folder", folder)
    encode(tmp_path / "file", lines)
    assert (tmp_path / "folder/vectors.npy").read_bytes() == (tmp_path / "file/vectors.npy").read_bytes()


def test_records_in_a_table_and_entries_without_names(tmp_path):
    record = {"query": "q", "id": None, "documents": [{"content": "one", "id": "a"}, {"content": "two", "id": None}]}
    pq.write_table(pa.Table.from_pylist([record, {**record, "id": "r2"}]), tmp_path / "train.parquet")
    assert [entry.id for entry in read_entries(tmp_path / "train.parquet")] == ["a", "0.1", "1.1"]
    assert [entry.id for entry in read_entries(tmp_path / "train.parquet", "query")] == ["0", "r2"]
    parts = tmp_path / "parts"
    parts.mkdir()
    for name in "ab":
        (parts / f"{name}.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    assert [entry.id for entry in read_entries(parts)] == ["0", "1", "2", "3"]


def test_tables_that_cannot_be_read(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": ["1"]}), tmp_path / "other.parquet")
    with pytest.raises(MmembedError, match=r"no column of contents .* among body, id; rename one"):
        list(read_entries(tmp_path / "other.parquet"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(MmembedError, match="not a readable parquet file"):
        list(read_entries(tmp_path / "torn.parquet"))
    pq.write_table(pa.table({"text": ["good", "  "]}), tmp_path / "empty.parquet")
    good, bad = read_entries(tmp_path / "empty.parquet")
    assert good.content == "good" and isinstance(bad, RecordError) and "empty.parquet:2" in str(bad)


def test_an_output_among_the_data_is_refused(lines):
    with pytest.raises(MmembedError, match="would be read as data; choose a folder outside"):
        encode(lines.parent / "out", lines.parent)


def test_pictures_beside_data_are_a_folder_of_pictures(lines, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "red.png")
    assert [entry.id for entry in read_entries(tmp_path)] == ["red.png"]


# Going on -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_what_is_complete_is_not_computed_again(lines, tmp_path, monkeypatch, format):
    encode(tmp_path / "whole", lines, format=format)
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "out", lines, format=format)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    again = Hashing()
    encode(tmp_path / "out", lines, again, format=format)
    assert [one for one in again.seen if one.startswith("passage")] == texts()[10:]
    for file in (tmp_path / "whole").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes(), file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoding": {"precision": "int8"}}, "precision float32, now int8"),
        ({"encoding": {"role": "query"}}, "role document, now query"),
        ({"shard": 7}, "shard rows 5, now 7"),
        ({"format": "arrow"}, "format npy, now arrow"),
        ({"model": "other"}, "model mmembed-nano, now other; other weights"),
        ("source", "another source, or its files have changed"),
    ],
)
def test_something_else_is_refused_until_it_is_told_to(lines, tmp_path, monkeypatch, change, message):
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "out", lines)
    monkeypatch.undo()
    if change == "source":
        lines.write_text(lines.read_text() + '{"text": "one more"}\n')
    options = {} if change == "source" else change
    with pytest.raises(MmembedError, match=message):
        encode(tmp_path / "out", lines, **options)
    if change == "source" or "shard" in change:
        assert encode(tmp_path / "out", lines, overwrite=True, **options).count == ROWS + (change == "source")


def test_another_model_of_the_same_name_is_refused(lines, tmp_path, monkeypatch):
    """As of a name on a hub, or of a worker with other weights."""
    stop_after(monkeypatch, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "out", lines)
    monkeypatch.undo()
    other = Hashing()
    other.vector = lambda content, size: Hashing.vector(f"{content}!", size)
    with pytest.raises(MmembedError, match="gives other vectors than when this was begun"):
        encode(tmp_path / "out", lines, other)


@pytest.mark.parametrize("format", ["npy", "arrow"])
def test_skipped_entries_leave_no_rows(tmp_path, format):
    """Lines that cannot be read, and pictures that cannot be opened, a whole shard of them included."""
    Image.new("RGB", (8, 8)).save(tmp_path / "there.png")
    there, gone = str(tmp_path / "there.png"), str(tmp_path / "gone.png")
    rows = [{"text": "a"}, {"image": gone}, {"text": "b"}, {"txet": "c"}, {"image": gone}, {"image": gone},
            {"image": there}, {"text": "d"}]  # fmt: skip
    source = tmp_path / "mixed.jsonl"
    source.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    with pytest.raises(MmembedError, match=r"mixed.jsonl:4"):
        encode(tmp_path / "out", source)
    assert not unfinished(tmp_path / "out").exists()  # nothing was encoded
    told = []
    options = {"on_bad": "skip", "report": lambda error: told.append(str(error)), "format": format, "shard": 2}
    done = encode(tmp_path / "out", source, **options)
    assert (done.count, done.skipped) == (4, 4) and len(told) == 4
    assert any("mixed.jsonl:2: no such image" in one for one in told)
    expected = np.array([Hashing.vector(content) for content in ("a", "b", {"image": there}, "d")])
    np.testing.assert_array_equal(open_collection(tmp_path / "out")[1][:], expected)
    assert [item["id"] for item in read_items(tmp_path / "out", range(9)).values()] == ["0", "2", "6", "7"]


def test_a_full_disk_loses_nothing(lines, tmp_path):
    """A real limit on the size of files, in a process of its own."""
    program = f"""
import resource, sys
from tests.corpora import Wide, encode
from mmembed.files import disk_errors
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, ({128 + 13 * 512 * 4},) * 2)
try:
    with disk_errors(Path("x")):
        encode({str(tmp_path / "out")!r}, {str(lines)!r}, Wide(), shard=2)
except ValueError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "cannot be written (File too large); what is complete is kept" in said
    again = Wide()
    encode(tmp_path / "out", lines, again, shard=2)
    assert [one for one in again.seen if one.startswith("passage")] == texts()[12:]
    np.testing.assert_array_equal(open_vectors(tmp_path / "out")[:], [Hashing.vector(text, 512) for text in texts()])


def dies_behind(count, output, source):
    """Encodes in a process of its own, which kills itself before the shard after `count`."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    original, calls = corpus.encode_shard, []

    def dying(*arguments):
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(1)
        return original(*arguments)

    corpus.encode_shard = dying
    encode(output, source)
    os._exit(1)


def test_a_killed_process_is_continued(lines, tmp_path):
    """Two real processes die, one after another; the third is this one."""
    encode(tmp_path / "whole", lines)
    assert dies_behind(2, tmp_path / "out", lines) and dies_behind(2, tmp_path / "out", lines)
    last = Hashing()
    encode(tmp_path / "out", lines, last)
    assert [one for one in last.seen if one.startswith("passage")] == texts()[20:]
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file


# Processes ------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import mmembed.inference.corpus as corpus, mmembed.shards as shards
from tests.corpora import encode
moment, count, output, source = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
calls = 0
def dying(function):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
place, name = {"encode": (corpus, "encode_shard"), "write": (os, "pwrite"), "fsync": (os, "fsync"),
               "move": (os, "replace"), "table": (corpus, "write_table"), "never": (os, "nothing")}[moment]
if moment != "never":
    setattr(place, name, dying(getattr(place, name)))
encode(output, source, format="parquet")
"""


@pytest.mark.slow
def test_killed_at_many_moments_the_result_is_that_of_one_process(lines, tmp_path):
    """One output, a process after another, each killed at another moment; no row lost, doubled or moved."""
    encode(tmp_path / "whole", lines, format="parquet")
    moments = [("encode", 1), ("encode", 2), ("write", 1), ("fsync", 3), ("encode", 3), ("table", 2), ("move", 4)]
    statuses = []
    for moment, count in [*moments, ("never", 0)]:
        command = [sys.executable, "-c", KILLED, moment, str(count), str(tmp_path / "out"), str(lines)]
        statuses.append(subprocess.run(command, check=False).returncode)
    assert statuses[-1] == 0 and statuses[:-1].count(-signal.SIGKILL) >= 6
    for file in (tmp_path / "whole").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes(), file


@pytest.mark.slow
def test_the_command_goes_on_after_a_kill(tmp_path, lines, family_folder):
    """The command itself, killed from outside when its first shards are on the disk."""
    model = str(family_folder("qwen3_vl"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mmembed", "encode", str(lines), "--model", model, "--dtype", "float32"]

    def run(output, stop=False):
        started = subprocess.Popen(
            [*command, "--output", str(output), "--shard-rows", "1"], env=environment, stderr=subprocess.DEVNULL
        )
        journal = unfinished(output) / "vectors.done"
        while stop and started.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") > 3:
                started.send_signal(signal.SIGKILL)
                break
        return started.wait()

    assert run(tmp_path / "whole") == 0
    assert run(tmp_path / "out", stop=True) == -signal.SIGKILL and not (tmp_path / "out").exists()
    kept = (unfinished(tmp_path / "out") / "vectors.done").read_bytes().count(b"\n") - 1
    assert 3 <= kept < ROWS
    assert run(tmp_path / "out") == 0
    for name in ("vectors.npy", "items.jsonl", "encoding.json", "manifest.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Ten times the rows, of which 36 MB more are written; peak memory of two processes."""
    peaks = []
    for count in (4_000, 40_000):
        source = tmp_path / f"{count}.jsonl"
        source.write_text("".join(json.dumps({"text": f"passage {number} " * 40}) + "\n" for number in range(count)))
        program = (
            "from tests.corpora import encode;"
            f"encode({str(tmp_path / str(count))!r}, {str(source)!r}, shard=1000);"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # maxrss is the parent's at first
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] - peaks[0] < 12, peaks  # MB; the larger source alone has 24
