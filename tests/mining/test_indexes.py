"""FAISS indexes of the command: built once, loaded after a kill, built anew where they cannot be used."""

import signal
import subprocess
import sys

import numpy as np
import pytest

from mmembed.search import FaissIndex
from tests.mining.test_mine_negatives import ROOT, file_size_limit, precomputed, run

KILLED_BEFORE_THE_SEARCH = """
import os, signal, sys
from data_tools.mine_negatives import main
from mmembed.search import FaissIndex
FaissIndex.top_k = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""
SEARCH = {"ivf": {"lists": 6, "probes": 2}, "hnsw": {"links": 4, "effort": 16}}


@pytest.fixture
def built(monkeypatch):
    """The kinds of the indexes that were built in this process."""
    pytest.importorskip("faiss")
    build, kinds = FaissIndex._build, []
    monkeypatch.setattr(FaissIndex, "_build", lambda self: kinds.append(self.kind) or build(self))
    return kinds


@pytest.fixture
def file(mining, tmp_path):
    """file(index, ...) -> a config that searches in this index; everything else is always the same."""
    retriever = precomputed(tmp_path)

    def write(index, options=None, **changes):
        search = {"depth": 10, "index": index, "options": options or SEARCH.get(index, {}), "queries": 7}
        return mining(retriever=retriever, search=search, **changes)

    return write


def records(tmp_path, name="out"):
    return (tmp_path / name / "train.jsonl").read_bytes()


def kept(tmp_path):
    return sorted((tmp_path / "out" / "work" / "train").glob("*index*"))


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
def test_killed_between_index_and_search(file, tmp_path, built, index):
    command = [sys.executable, "-c", KILLED_BEFORE_THE_SEARCH, "--config", str(file(index))]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "train.jsonl").exists() and len(kept(tmp_path)) == 1
    assert run(file(index)) == 0 and built == []
    assert run(file(index, output=str(tmp_path / "whole"))) == 0 and built == [index]
    assert records(tmp_path) == records(tmp_path, "whole")


def test_an_index_serves_another_depth_and_other_probes_but_no_other_options(file, tmp_path, built):
    assert run(file("ivf")) == 0 and built == ["ivf"]
    (first,) = kept(tmp_path)
    few = records(tmp_path)
    assert run(file("ivf"), "search.depth=12") == 0 and built == ["ivf"]
    assert run(file("ivf", {"lists": 6, "probes": 6})) == 0 and built == ["ivf"]
    assert kept(tmp_path) == [first] and records(tmp_path) != few
    assert run(file("flat")) == 0 and records(tmp_path) != few and built == ["ivf", "flat"]
    assert run(file("ivf", {"lists": 5})) == 0 and built == ["ivf", "flat", "ivf"]
    (second,) = kept(tmp_path)
    assert second != first
    half = second.with_name(f".{first.name}.writing-host-1")
    half.write_bytes(b"")
    assert run(file("hnsw")) == 0 and len(kept(tmp_path)) == 1 and not half.exists()


@pytest.mark.parametrize("length", [0, 1000, -1])
def test_a_broken_file_is_built_again(file, tmp_path, built, caplog, length):
    assert run(file("hnsw")) == 0
    (index,) = kept(tmp_path)
    whole, mined = index.read_bytes(), records(tmp_path)
    index.write_bytes(whole[:length])
    (tmp_path / "out" / "work" / "train" / "found.done").unlink()
    assert run(file("hnsw")) == 0 and built == ["hnsw", "hnsw"]
    assert "'train.jsonl': the index that was kept cannot be used: faiss: " in caplog.text
    assert index.read_bytes() == whole and records(tmp_path) == mined


def test_an_index_that_does_not_fit_on_the_disk_is_used_all_the_same(mining, tmp_path, built, caplog):
    wide = np.random.default_rng(0).normal(size=(120, 1024))
    file = mining(retriever=precomputed(tmp_path, wide[:30], wide[30:]), search={"depth": 10, "index": "hnsw"})
    assert run(file) == 0
    mined = records(tmp_path)
    for name in (kept(tmp_path)[0].name, "found.done"):
        (tmp_path / "out" / "work" / "train" / name).unlink()
    with file_size_limit(tmp_path):
        assert run(file) == 0
    assert "the index is not kept ([Errno 27] File too large)" in caplog.text
    assert kept(tmp_path) == [] and records(tmp_path) == mined
