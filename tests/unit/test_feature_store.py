"""The store of image features: what comes back, what other processes and kills leave, how it ends when it is full."""

import logging
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed import feature_store
from mmembed.errors import CacheError
from mmembed.feature_store import RECORD_BYTES, FeatureStore

ROOT = Path(__file__).parents[2]
GB = 10**9


def key(number):
    return number.to_bytes(16, "little")


def entry(number, dtype=torch.float32):
    return {"pooled": torch.full((3, 4), number, dtype=dtype), "grid": torch.tensor([1, number, 2])}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[name].dtype == expected[name].dtype and torch.equal(found[name], expected[name]) for name in expected
    )


def test_what_goes_in_comes_out(tmp_path):
    store = FeatureStore(tmp_path / "model", GB)
    for number, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        store.put(key(number), entry(number, dtype))
        assert same(store.get(key(number)), entry(number, dtype))
    store.put(key(0), entry(9))  # the first stays
    again = FeatureStore(tmp_path / "model", GB)
    assert len(store) == len(again) == 3
    assert same(again.get(key(0)), entry(0))
    assert again.get(key(7)) is None
    assert same(pickle.loads(pickle.dumps(store)).get(key(1)), entry(1, torch.bfloat16))


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 6), min_size=1, max_size=4), cut=st.integers(0, 3 * RECORD_BYTES))
def test_an_index_cut_anywhere_loses_its_last_entries_only(tmp_path_factory, counts, cut):
    folder = tmp_path_factory.mktemp("store") / "model"
    for writer, count in enumerate(counts):
        store = FeatureStore(folder, GB)
        for number in range(count):
            store.put(key(100 * writer + number), entry(number))
    indices = sorted(folder.glob("*.index"))
    lost = 0
    if indices:
        size = indices[0].stat().st_size
        os.truncate(indices[0], max(0, size - cut))
        lost = size // RECORD_BYTES - max(0, size - cut) // RECORD_BYTES
    found = FeatureStore(folder, GB)
    assert len(found) == sum(counts) - lost
    for writer, count in enumerate(counts):
        for number in range(count):
            features = found.get(key(100 * writer + number))
            assert features is None or same(features, entry(number))


def test_damaged_features_are_a_miss(tmp_path, caplog):
    FeatureStore(tmp_path / "model", GB).put(key(1), entry(1))
    (file,) = (tmp_path / "model").glob("*.features")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = FeatureStore(tmp_path / "model", GB)
    assert store.get(key(1)) is None
    assert "damaged" in caplog.text
    store.put(key(1), entry(1))
    assert same(store.get(key(1)), entry(1))
    file.unlink()
    assert FeatureStore(tmp_path / "model", GB).get(key(2)) is None


WRITER = """
import os, signal, sys, torch
from mmembed.feature_store import FeatureStore
store = FeatureStore(sys.argv[1], 10**9)
for number in range(int(sys.argv[2]), int(sys.argv[3])):
    store.put(number.to_bytes(16, "little"), {"pooled": torch.full((200, 100), number)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_add_at_once_and_are_killed(tmp_path):
    """Their ranges overlap. A store that was open before them sees what they added."""
    folder = tmp_path / "model"
    before = FeatureStore(folder, GB)
    command = [sys.executable, "-c", WRITER, str(folder)]
    running = [subprocess.Popen([*command, str(start), str(start + 60)], cwd=ROOT) for start in (0, 40)]
    assert [process.wait(timeout=120) for process in running] == [-signal.SIGKILL] * 2
    for store in (FeatureStore(folder, GB), before):
        store.refresh()
        assert len(store) == 100
        for number in range(100):
            assert torch.equal(store.get(key(number))["pooled"], torch.full((200, 100), number))


def test_a_miss_looks_for_what_others_added(tmp_path, monkeypatch):
    mine, other = FeatureStore(tmp_path / "model", GB), FeatureStore(tmp_path / "model", GB)
    other.put(key(1), entry(1))
    assert mine.get(key(1)) is None  # looked a moment ago
    monkeypatch.setattr(feature_store, "REFRESH_SECONDS", 0)
    assert same(mine.get(key(1)), entry(1))


def test_the_limit_counts_the_stores_of_other_models(tmp_path, caplog):
    FeatureStore(tmp_path / "one", GB).put(key(1), {"pooled": torch.zeros(1000)})
    store = FeatureStore(tmp_path / "two", 7000)
    assert 4000 < store.bytes_used < 4500
    caplog.set_level(logging.WARNING)
    store.put(key(2), {"pooled": torch.zeros(1000)})
    assert len(store) == 0 and "7e-06 GB are used" in caplog.text
    store.put(key(3), {"pooled": torch.zeros(1)})
    assert len(store) == 0 and len(caplog.records) == 1


FULL = """
import resource, signal, sys, torch
from mmembed.feature_store import FeatureStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
store = FeatureStore(sys.argv[1], 10**9)
for number in range(4):
    store.put(number.to_bytes(16, "little"), {"pooled": torch.full((1000,), float(number))})
print(len(store), [None if (found := store.get(number.to_bytes(16, "little"))) is None else found["pooled"][-1].item()
                   for number in range(4)])
"""


def test_a_full_disk_ends_adding(tmp_path):
    """The limit on a file's size stands for the disk: a write takes a part, the next one nothing."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "model")], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "2 [0.0, 1.0, None, None]", done.stderr
    assert "free disk space" in done.stderr and "Going on without" in done.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    (file,) = (tmp_path / "model").glob("*.features")
    assert file.stat().st_size < 10_000  # the half entry is gone
    assert len(FeatureStore(tmp_path / "model", GB)) == 2


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="name another folder"):
        FeatureStore(tmp_path / "file" / "model", GB)
