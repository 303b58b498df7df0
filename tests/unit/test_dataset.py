"""RecordDataset: read once, mapped after, strict or counting; the shipped slice reads whole."""

import functools
import http.server
import io
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import soundfile

from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.content import Image, Task, Text
from mmembed.data.dataset import MixedDataset, RecordDataset, _code, media_store
from mmembed.data.formats.beir import Beir
from mmembed.data.formats.jsonl import JsonLines
from mmembed.data.streaming import open_source
from mmembed.errors import ConfigError, RecordError
from mmembed.media import MediaStore

SLICE = Path(__file__).parents[2] / "data"


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )


def record(query="q", **changes):
    return {"query": query, "documents": [{"content": "d"}], **changes}


def build(tmp_path, source=None, media=None, **arguments):
    source = source or SourceConfig(path="r.jsonl")
    return RecordDataset(source, media, cache_dir=tmp_path / "cache", root=tmp_path, **arguments)


def test_examples_carry_the_sources_settings(tmp_path):
    write(tmp_path / "r.jsonl", record(), record(instruction="own", id="7"))
    source = SourceConfig(path="r.jsonl", name="mine", instruction="find", task=Task.RERANKING)
    data = build(tmp_path, source)
    assert len(data) == 2
    assert data[0].query == (Text("q"),)
    assert [example.instruction for example in data] == ["find", "own"]
    assert {example.task for example in data} == data.tasks == {Task.RERANKING}
    assert data[-1].id == "7"
    assert data[0].source == "mine"
    assert data[0].where == f"{tmp_path / 'r.jsonl'}:1"
    with pytest.raises(IndexError):
        data[2]


def test_raise_names_the_line_and_skip_counts_the_reasons(tmp_path):
    (tmp_path / "t.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    buffer = io.BytesIO()
    PIL.Image.effect_noise((50, 50), 90).save(buffer, "PNG")
    damaged = bytearray(buffer.getvalue())
    damaged[200:300] = bytes(100)  # header and end are as they should be
    (tmp_path / "damaged.png").write_bytes(damaged)
    bad = [
        "{",
        record(""),
        record(task="x"),
        record({"image": "no.png"}),
        record({"image": "../../etc/passwd"}),
        record({"image": "https://x.org/a.png"}),
        record({"image": "t.png"}),
        record({"video": ["no.png"]}),
        record({"image": "damaged.png"}),
    ]
    write(tmp_path / "r.jsonl", record(), *bad, record())
    media = MediaStore(tmp_path)
    with pytest.raises(RecordError, match=r"r\.jsonl:2: not valid JSON"):
        build(tmp_path, media=media)
    data = build(tmp_path, media=media, on_bad_record="skip")
    assert len(data) == 2
    assert data.skipped == {
        "not JSON": 1,
        "empty text": 1,
        "unknown task": 1,
        "image missing": 2,
        "image outside the media folders": 1,
        "image URL": 1,
        "image unreadable": 1,
        "image truncated or damaged": 1,
    }
    again = build(tmp_path, media=media, on_bad_record="skip")  # from the cache
    assert again.skipped == data.skipped
    write(tmp_path / "r.jsonl", *bad)
    with pytest.raises(ConfigError, match="no usable record"):
        build(tmp_path, media=media, on_bad_record="skip")


@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "streamed"])
def test_ignored_media_are_taken_out_of_the_records(tmp_path, streaming):
    """The option that the error about unused fields names lets such data be trained on, as what is left of them."""
    mixed = {"image": "no-such.png", "text": "caption", "audio": "said.wav", "sampling_rate": 16000}
    write(
        tmp_path / "r.jsonl",
        record(mixed, instruction="own"),
        record([{"video": ["no-such.png"]}, "text"], documents=[{"content": {"images": ["no-such.png"], "text": "d"}}]),
        record(),
    )

    def read(**data):
        source = SourceConfig(path="r.jsonl", streaming=streaming)
        config = DataConfig(root=str(tmp_path), train=[source], **data)
        found = open_source(source, config, media_store(config))
        return found, sorted((found[row] for row in range(3)), key=lambda example: example.where)

    found, examples = read(ignore_fields=["image", "video", "audio"])
    assert found.fields == {"instruction"}
    assert [example.query for example in examples] == [(Text("caption"),), (Text("text"),), (Text("q"),)]
    assert examples[1].documents[0].content == (Text("d"),)
    (tmp_path / "no-such.png").write_bytes(b"")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "no-such.png")
    soundfile.write(tmp_path / "said.wav", [0.0] * 1600, 16000)
    assert read()[0].fields == {"instruction", "image", "video", "audio"}, "the cache follows the option"
    assert read(ignore_fields=["audio"])[0].fields == {"instruction", "image", "video"}


@pytest.mark.parametrize("bad", [record({"audio": "a.wav", "sampling_rate": 8000}), record([{"audio": "a.wav"}])])
def test_a_record_that_ignoring_media_leaves_empty_is_a_bad_one(tmp_path, bad):
    bad = [bad, record(documents=[{"content": "d"}, {"content": {"audio": "a.wav"}}])]
    write(tmp_path / "r.jsonl", record(), *bad)
    with pytest.raises(RecordError, match=r"r\.jsonl:2: query holds nothing but audio, .*data\.ignore_fields.*skip"):
        build(tmp_path, ignored=["audio"])
    data = build(tmp_path, ignored=["audio", "score"], on_bad_record="skip")
    assert (len(data), data.skipped) == (1, {"only ignored media": 2})


def test_media_limits_of_the_config_reach_the_pictures(tmp_path):
    """Each limit that a message names is raised where the message says, and then the picture is taken."""
    (tmp_path / "served").mkdir()
    PIL.Image.effect_noise((50, 50), 90).save(tmp_path / "served" / "a.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.png"

    def read(picture, **limits):
        write(tmp_path / "r.jsonl", record({"image": picture}))
        config = DataConfig(root=str(tmp_path), train=[SourceConfig(path="r.jsonl")], media_limits=limits)
        return build(tmp_path, config.train[0], media_store(config))

    cases = [
        (url, {}, "allow_urls", True),
        ("served/a.png", {"max_bytes": 100}, "max_bytes", 10_000),
        ("served/a.png", {"max_pixels_decoded": 100}, "max_pixels_decoded", 2_500),
    ]
    for picture, limits, key, value in cases:
        with pytest.raises(RecordError, match=rf"data\.media_limits\.{key} \(--{key.replace('_', '-')} of a command"):
            read(picture, **limits)
        assert read(picture, **{key: value}).fields == {"image"}
    server.shutdown()


def test_the_cache_follows_the_file_and_the_settings(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, record("one"))
    assert build(tmp_path)[0].query == (Text("one"),)
    (entry,) = (tmp_path / "cache" / "records").glob("*/records.arrow")
    stamp = entry.stat().st_mtime_ns
    build(tmp_path)
    assert entry.stat().st_mtime_ns == stamp
    write(path, record("two"))
    os.utime(path, ns=(1, 1))
    assert build(tmp_path)[0].query == (Text("two"),)
    assert build(tmp_path, SourceConfig(path="r.jsonl", instruction="i"))[0].instruction == "i"


def test_the_mapped_file_is_one_of_datasets(tmp_path):
    """Written and read through pyarrow alone, it is what `datasets` maps, too."""
    from datasets import Dataset

    write(tmp_path / "r.jsonl", record("a"), record("b"))
    data = build(tmp_path)
    (entry,) = (tmp_path / "cache" / "records").glob("*/records.arrow")
    table = Dataset.from_file(str(entry))
    assert table.column_names == ["record", "where", "query_key", "positive_key"] and len(table) == len(data) == 2
    assert [json.loads(row)["query"] for row in table["record"]] == ["a", "b"]


def test_the_cache_follows_the_pictures_and_the_code_that_reads_them(tmp_path, monkeypatch):
    """A picture that was good when it was checked and is broken now is found again, not trusted."""
    PIL.Image.effect_noise((50, 50), 90).save(tmp_path / "a.png")
    write(tmp_path / "r.jsonl", record(), record({"image": "a.png"}))
    media = MediaStore(tmp_path)
    assert len(build(tmp_path, media=media)) == 2
    (entry,) = (tmp_path / "cache" / "records").glob("*/records.arrow")
    stamp = entry.stat().st_mtime_ns
    build(tmp_path, media=media)
    assert entry.stat().st_mtime_ns == stamp
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(RecordError, match=r"r\.jsonl:2"):
        build(tmp_path, media=MediaStore(tmp_path))
    (tmp_path / "a.png").unlink()
    assert len(build(tmp_path, media=MediaStore(tmp_path), on_bad_record="skip")) == 1
    PIL.Image.effect_noise((50, 50), 90).save(tmp_path / "a.png")
    assert len(build(tmp_path, media=MediaStore(tmp_path), on_bad_record="skip")) == 2  # it came back

    class Other(JsonLines):
        """Reads as the other does, by other code."""

    kinds = [_code(kind) for kind in (JsonLines, JsonLines, Beir)]
    assert kinds[0] == kinds[1] != kinds[2]
    assert _code(Other) != kinds[0]


def test_relative_media_start_at_the_media_root_else_at_the_record_file(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "pictures").mkdir()
    for folder in ("set", "pictures"):
        PIL.Image.new("RGB", (3 if folder == "set" else 5, 2)).save(tmp_path / folder / "a.png")
    write(tmp_path / "set" / "r.jsonl", record({"image": "a.png"}), record([{"text": "x"}, {"image": "a.png"}]))
    source = SourceConfig(path="set/r.jsonl")
    for media_root, width in ((None, 3), (tmp_path / "pictures", 5)):
        media = media_store(DataConfig(root=str(tmp_path), media_root=media_root and str(media_root), train=(source,)))
        for example in build(tmp_path, source, media):
            image = next(part for part in example.query if isinstance(part, Image))
            assert media.size(image) == (width, 2)


def test_fields_say_what_the_data_carries(tmp_path):
    document = {"content": "d", "relevance": 2, "score": 0.5}
    rows = [record({"image": "a.png"}, instruction="i", documents=[document, {"content": "n", "relevance": 0}])]
    write(tmp_path / "r.jsonl", record())
    assert build(tmp_path).fields == set()
    write(tmp_path / "r.jsonl", *rows)
    assert build(tmp_path).fields == {"image", "instruction", "score", "relevance", "negatives"}


def test_labels_that_the_ids_of_positives_tell_are_no_field_of_their_own(tmp_path):
    """Whoever trains on a source of classes without reading labels leaves nothing unused."""
    told = record("q", documents=[{"content": "d", "id": "hotel"}], labels=["hotel"])
    for rows, fields in (
        ([told], {"classes"}),
        ([record("q", labels=["hotel"])], {"labels"}),
        ([{**told, "labels": [["hotel", "book"]]}], {"labels"}),
        ([{**told, "labels": ["hotel", "greeting"]}], {"labels"}),
        ([told, record("q 2", labels=["taxi"])], {"classes", "labels"}),
    ):
        write(tmp_path / "r.jsonl", *rows)
        assert build(tmp_path).fields == fields
        assert build(tmp_path)[0].labels


def test_keys_are_equal_exactly_where_queries_or_positives_are(tmp_path):
    by_id = [{"content": "other words", "id": "x"}]
    write(
        tmp_path / "r.jsonl",
        record("a", documents=[{"content": "n", "relevance": 0}, {"content": "p"}]),
        record("a", documents=[{"content": "p"}]),
        record("b", documents=by_id),
        record("c", documents=[{"content": "p", "id": "x"}]),
    )
    queries, positives = build(tmp_path).keys().T
    assert (queries[0] == queries[1]) and len(set(queries.tolist())) == 3
    assert positives[0] == positives[1] != positives[2] == positives[3]


def test_max_examples_is_a_fixed_sample_of_the_whole_file(tmp_path):
    write(tmp_path / "r.jsonl", *[record(str(i)) for i in range(1000)])
    source = SourceConfig(path="r.jsonl", max_examples=50)
    data = build(tmp_path, source)
    chosen = [int(example.query[0].text) for example in data]
    assert len(data) == len(set(chosen)) == 50
    assert chosen == sorted(chosen) == [int(example.query[0].text) for example in build(tmp_path, source)]
    assert min(chosen) < 200 and max(chosen) > 800
    assert data.keys().shape == (50, 2)


def test_datasets_travel_to_workers_and_mix(tmp_path):
    write(tmp_path / "r.jsonl", record("a"), record("b"))
    data = build(tmp_path)
    mixed = pickle.loads(pickle.dumps(MixedDataset([data, data])))
    assert len(mixed) == 4
    assert mixed[1, 0, 0] == data[0]
    assert mixed[1, 0, 3].visit == 3


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'no\.jsonl': there is no"):
        build(tmp_path, SourceConfig(path="no.jsonl"))
    write(tmp_path / "r.jsonl", record())
    with pytest.raises(ConfigError, match="did you mean 'jsonl'"):
        build(tmp_path, SourceConfig(path="r.jsonl", format="json"))


SLICE_SOURCES = [
    SourceConfig(path="squad-en", format="beir"),
    SourceConfig(path="dbpedia-entity", format="beir", options={"split": "dev"}),
    SourceConfig(path="story-pages", format="beir", options={"lang": ["en"]}),
    SourceConfig(path="recipes", format="beir"),
    SourceConfig(path="stsb-en", format="pairs"),
    SourceConfig(path="banking77", format="labelled", options={"negatives": 2}),
    SourceConfig(path="clothing", format="labelled"),
]


@pytest.mark.parametrize("source", SLICE_SOURCES, ids=lambda source: source.path)
def test_the_shipped_slice_reads_without_a_bad_record(tmp_path, source):
    media = media_store(DataConfig(root=str(SLICE), train=(source,)))
    data = RecordDataset(source, media, cache_dir=tmp_path, root=SLICE)
    assert data.skipped == {}
    for row in np.linspace(0, len(data) - 1, 5).astype(int).tolist():
        for part in (*data[row].query, *data[row].documents[0].content):
            if isinstance(part, Image):
                assert media.open(part).size == media.size(part)


def test_the_shipped_slice_is_small_and_every_set_names_its_licence():
    files = [path for path in SLICE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25_000_000
    for folder in {path.parent for path in files if path.suffix == ".parquet" or path.name == "train.jsonl"}:
        assert "## Licence" in (folder / "README.md").read_text(encoding="utf-8")
    for qrels in SLICE.rglob("*.tsv"):
        known = [
            {json.loads(line)["_id"] for line in (qrels.parents[1] / name).open(encoding="utf-8")}
            for name in ("queries.jsonl", "corpus.jsonl")
        ]
        for line in qrels.read_text(encoding="utf-8").splitlines()[1:]:
            query, document, _ = line.split("\t")
            assert query in known[0] and document in known[1]


FULL_DISK = """
import resource, signal, sys
from mmembed.config.blocks import SourceConfig
from mmembed.data.dataset import RecordDataset
from mmembed.errors import CacheError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited[1]))
try:
    RecordDataset(SourceConfig(path=sys.argv[1]), cache_dir=sys.argv[2])
except CacheError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
print(len(RecordDataset(SourceConfig(path=sys.argv[1]), cache_dir=sys.argv[2])))
"""


def test_a_full_disk_is_named_with_the_cache_and_the_remedy(tmp_path):
    """The operating system refuses to write past a number of bytes a file; later there is room again."""
    rows = [record(f"query {i}", documents=[{"content": "a passage " * 20}]) for i in range(500)]
    write(tmp_path / "rows.jsonl", *rows)
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "rows.jsonl"), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, length = done.stdout.splitlines()
    assert refused.startswith(f"refused: {tmp_path / 'cache' / 'records'}: ")
    assert "File too large" in refused and "MMEMBED_CACHE" in refused
    assert length == "500"
    assert not list((tmp_path / "cache" / "records").glob(".*"))


MEASURE = """
import re, sys, time
from pathlib import Path
from mmembed.config.blocks import SourceConfig
from mmembed.data.dataset import RecordDataset
import pyarrow
def held(key):  # MB; anonymous memory: mapped file pages are the system's to take back
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before_peak, before = held("VmHWM"), held("RssAnon")
start = time.perf_counter()
data = RecordDataset(SourceConfig(path=sys.argv[1]), cache_dir=sys.argv[2])
seconds, peak = time.perf_counter() - start, held("VmHWM")
assert all(data[i].id == str(i) for i in range(0, len(data), 37))
print(len(data), peak - before_peak, held("RssAnon") - before, seconds)
"""


@pytest.mark.slow
def test_a_large_file_is_built_and_read_in_bounded_memory(tmp_path):
    path, rows = tmp_path / "large.jsonl", 300_000
    document = "some words that make a passage of a usual length " * 10
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            file.write(json.dumps(record(f"query {i}", documents=[{"content": f"{i} {document}"}], id=str(i))) + "\n")
    assert path.stat().st_size > 150_000_000
    command = [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count, building_mb, held_mb, _ = (float(value) for value in output.split())
    assert count == rows
    assert building_mb < 60
    assert held_mb < 40
