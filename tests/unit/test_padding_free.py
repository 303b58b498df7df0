"""The benchmark of packed texts runs anywhere in a tiny shape, so that it is right the first time on a GPU."""

import json
import os
import sys

import pytest
import torch

from benchmarks import padding_free
from benchmarks._common import QWEN3


@pytest.fixture
def settings_restored(monkeypatch):
    """What `set_up` changes in the process."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_runs(settings_restored, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["padding_free", "--json", "--tiny", "--rounds", "1", "--threads", "1"])
    padding_free.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["name"] for row in rows] == [
        "encode_causal",
        "step_causal",
        "encode_bidirectional",
        "step_bidirectional",
    ]
    for row in rows:
        assert row["ours"] > 0 and row["peer"] > 0 and row["ratio_to_peer"] > 0
        padding = int(row["peer_name"].removeprefix("padded, ").removesuffix("% padding"))
        assert padding > 100  # 24 texts of skewed lengths in one batch


def test_different_vectors_are_no_benchmark(settings_restored, monkeypatch):
    """As a kernel that is wrong on some machine would give."""
    model, preprocessor = padding_free.build(
        {**QWEN3, **padding_free.TINY}, "causal", torch.device("cpu"), torch.float32
    )
    monkeypatch.setattr("mmembed.backbones.packed._one_by_one", lambda packed, query, *rest: query.transpose(1, 2))
    with pytest.raises(SystemExit, match="vectors differ"):
        padding_free.measure_encode("causal", model, preprocessor, 24, 4096, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_without_a_gpu_it_says_so(settings_restored, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["padding_free"])
    with pytest.raises(SystemExit, match="--tiny"):
        padding_free.main()
