"""Streams: shared out exactly over processes, workers and shards; the same rows wherever one begins to read."""

import gzip
import json
import pickle
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmembed.config import build_config
from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.content import Text
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.dataset import MixedDataset, RecordDataset
from mmembed.data.mixing import mixing_weights
from mmembed.data.streaming import RecordStream, open_source
from mmembed.errors import ConfigError, RecordError


def record(name, **changes):
    return {"query": f"query {name}", "documents": [{"content": f"document {name}"}], "id": str(name), **changes}


def lines(records):
    return "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records)


def shards(folder, sizes):
    """Files of so many records each; returns all ids."""
    folder.mkdir(exist_ok=True)
    for shard, size in enumerate(sizes):
        (folder / f"{shard}.jsonl").write_text(lines(record(f"{shard}.{row}") for row in range(size)))
    return [f"{shard}.{row}" for shard, size in enumerate(sizes) for row in range(size)]


def stream(path, seed=0, ignored=(), on_bad_record="raise", **options):
    source = SourceConfig(path=str(path), streaming=True, **options)
    return RecordStream(source, seed=seed, ignored=ignored, on_bad_record=on_bad_record)


@st.composite
def cases(draw):
    world, batch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= world * batch))
    return world, batch, sizes, draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(0, 2**40))


@given(cases())
@settings(max_examples=40, deadline=None)
def test_processes_and_workers_share_a_stream_exactly(case):
    """Every record once a pass, no row twice, the same rows for any number of processes, the same number of steps."""
    world, batch, sizes, buffer, workers, seed = case
    with tempfile.TemporaryDirectory() as folder:
        ids = shards(Path(folder), sizes)
        whole = stream(folder, seed, shuffle_buffer=buffer)
        whole.least = world * batch
        steps = -(-2 * len(ids) // (world * batch))  # two passes and what is left of a batch
        found = {}
        for rank in range(world):
            plan = BatchPlan([None], [1.0], batch, seed, world, rank, batches=steps)
            batches = list(plan)
            assert len(batches) == len(plan) == steps
            for worker in range(workers):  # a worker has a copy of its own, and every so many-th batch
                own = MixedDataset([pickle.loads(pickle.dumps(whole))])
                for draw in (draw for one in batches[worker::workers] for draw in one):
                    assert draw[1] not in found
                    found[draw[1]] = own[draw]
    rows = [found[position] for position in range(steps * world * batch)]
    assert len(found) == len(rows)
    for number in (0, 1):
        one_pass = rows[number * len(ids) : (number + 1) * len(ids)]
        assert Counter(row.id for row in one_pass) == Counter(ids)
        assert {row.visit for row in one_pass} == {number}


@given(cases(), st.integers(0, 40))
@settings(max_examples=30, deadline=None)
def test_a_stream_goes_on_anywhere(case, start):
    _, _, sizes, buffer, _, seed = case
    with tempfile.TemporaryDirectory() as folder:
        shards(Path(folder), sizes)
        first, later = (stream(folder, seed, shuffle_buffer=buffer) for _ in range(2))
        rows = [first[position] for position in range(start + 20)]
        assert [later[position] for position in range(start, start + 20)] == rows[start:]
        assert first[3] == rows[3]  # going back
        length = sum(sizes)
        far = 7 * length + start
        assert later[far] == first[far]  # over whole passes


def test_the_buffer_shuffles_and_is_bounded(tmp_path):
    (tmp_path / "r.jsonl").write_text(lines(record(row) for row in range(500)))
    for buffer in (1, 20):
        shuffled = stream(tmp_path / "r.jsonl", shuffle_buffer=buffer)
        rows = [int(shuffled[position].id) for position in range(500)]
        assert all(row <= position + buffer for position, row in enumerate(rows))
        moved = sum(abs(row - position) for position, row in enumerate(rows)) / 500
        assert moved < 1.1 if buffer == 1 else moved > 5
    orders = {tuple(stream(tmp_path / "r.jsonl", seed)[row].id for row in range(9)) for seed in range(3)}
    assert len(orders) == 3


def test_compressed_shards_and_parquet_are_the_same_records(tmp_path):
    text = lines(record(row) for row in range(5)).encode()
    (tmp_path / "a.jsonl").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(text)
    columns = {"query": [f"query {row}" for row in range(5)], "document": [f"document {row}" for row in range(5)]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"):
        streamed = stream(tmp_path / name, format="parquet" if name == "a.parquet" else "jsonl")
        assert {streamed[row].query for row in range(5)} == {(Text(f"query {row}"),) for row in range(5)}
    stored = RecordDataset(SourceConfig(path="a.jsonl.gz"), cache_dir=tmp_path / "cache", root=tmp_path)
    assert [row.id for row in map(stored.__getitem__, range(5))] == list("01234")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(ConfigError, match=r"cut.jsonl.gz: not a readable .gz file"):
        stream(tmp_path / "cut.jsonl.gz")


def test_bad_records_are_skipped_alike_by_all_processes(tmp_path):
    """Also by one that would not have read them: who skips what decides the position of all later records."""
    records = [record(row) for row in range(8)]
    records[2:2] = ["not JSON", record("bad", documents=[{"content": "n", "relevance": 0}])]
    (tmp_path / "r.jsonl").write_text(lines(records))
    with pytest.raises(RecordError, match=r"r.jsonl:3: not valid JSON"):
        stream(tmp_path / "r.jsonl")
    one, other = (stream(tmp_path / "r.jsonl", on_bad_record="skip", shuffle_buffer=3) for _ in range(2))
    rows = {position: one[position].id for position in range(0, 8, 2)}
    rows |= {position: other[position].id for position in range(1, 8, 2)}
    assert sorted(rows.values()) == list("01234567")
    assert other.skipped == {"not JSON": 1, "no positive": 1}


def test_what_a_stream_cannot_give_is_said(tmp_path):
    late = record("late", documents=[{"content": "d", "score": 0.5}])
    (tmp_path / "r.jsonl").write_text(lines([*(record(row) for row in range(1000)), late]))
    found = stream(tmp_path / "r.jsonl", shuffle_buffer=1)
    assert found.fields == set() and found.size is None and found.keys() is None
    with pytest.raises(RecordError, match=r"r.jsonl:1001: carries 'score', which none of the first 1,000 records"):
        found[1000]
    assert stream(tmp_path / "r.jsonl", ignored=["score"], shuffle_buffer=1)[1000].id == "late"
    found.least = 1002
    with pytest.raises(ConfigError, match="has 1001 rows, one batch takes 1002"):
        stream_of = stream(tmp_path / "r.jsonl", ignored=["score"])
        stream_of.least = 1002
        stream_of[1001]
    with pytest.raises(ConfigError, match="format 'beir' needs all of its files at once"):
        stream(tmp_path, format="beir")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no usable record"):
        stream(tmp_path / "empty")
    with pytest.raises(ConfigError, match="a stream has no length"):
        BatchPlan([None, 50], batch_size=4)
    with pytest.raises(ConfigError, match="give it a weight"):
        mixing_weights([None, 50], [None, None])
    assert mixing_weights([None, 50, 50], [2.0, None, None]) == [0.5, 0.25, 0.25]


@pytest.mark.parametrize(
    ("source", "training", "named"),
    [
        ({"streaming": True}, {}, "set training.max_steps"),
        ({"streaming": True, "max_examples": 3}, {"max_steps": 5}, "'max_examples' has no effect with 'streaming'"),
        ({"shuffle_buffer": 3}, {}, "'shuffle_buffer' has no effect without 'streaming'"),
    ],
)
def test_what_cannot_go_with_a_stream_is_refused(source, training, named):
    with pytest.raises(ConfigError, match=named):
        build_config({"data": {"train": [{"path": "r.jsonl", **source}]}, "training": training})
    both = [{"path": "a.jsonl", "streaming": True}, {"path": "b.jsonl"}]
    with pytest.raises(ConfigError, match="a stream beside others needs a weight"):
        build_config({"data": {"train": both}, "training": {"max_steps": 5}})
    with pytest.raises(ConfigError, match="dev sources are ranked as a whole"):
        build_config({"data": {"dev": both}, "training": {"max_steps": 5}})


def test_streams_mix_with_other_sources_by_weight(tmp_path):
    shards(tmp_path / "s", [7, 6])
    (tmp_path / "r.jsonl").write_text(lines(record(row) for row in range(10)))
    config = DataConfig(root=str(tmp_path))
    sources = [SourceConfig(path="s", streaming=True, weight=1.0), SourceConfig(path="r.jsonl")]
    data = [open_source(source, config) for source in sources]
    weights = mixing_weights([source.size for source in data], [1.0, None])
    plan = BatchPlan([source.size for source in data], weights, 2, batches=12, names=["s", "r.jsonl"])
    mixed = MixedDataset(data)
    batches = [[mixed[draw] for draw in batch] for batch in plan]
    assert plan.batches_per_source == (6, 6)
    assert all(len({row.source for row in batch}) == 1 for batch in batches)
    streamed = [row.id for batch in batches for row in batch if row.source == "s"]
    assert len(set(streamed)) == len(streamed) == 12


def test_forked_workers_do_not_go_on_in_the_file_that_the_parent_opened(tmp_path):
    """The batch report reads the first batch in the parent; more workers than that begin behind it."""
    shards(tmp_path / "many", [400])
    plan = BatchPlan([None], [1.0], 8, 0, 1, 0, batches=30)
    rows = MixedDataset([stream(tmp_path / "many", shuffle_buffer=20)])
    expected = [[rows[draw].id for draw in batch] for batch in plan]
    again = MixedDataset([stream(tmp_path / "many", shuffle_buffer=20)])
    first = [again[draw].id for draw in next(iter(plan))]
    loader = DataLoader(
        again,
        batch_sampler=plan,
        num_workers=3,
        multiprocessing_context="fork",
        collate_fn=lambda examples: [one.id for one in examples],
    )
    assert first == expected[0] and list(loader) == expected


def test_other_records_of_the_same_size_are_other_records(tmp_path):
    shards(tmp_path / "one", [5])
    before = stream(tmp_path / "one").digest()
    assert stream(tmp_path / "one").digest() == before
    file = tmp_path / "one" / "0.jsonl"
    file.write_text(file.read_text().replace("query 0.3", "quern 0.3"))
    assert stream(tmp_path / "one").digest() != before
