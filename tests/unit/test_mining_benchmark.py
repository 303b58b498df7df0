"""The benchmark of mining: contenders that disagree stop it, and its rows say what was measured."""

import json
import os

import numpy as np
import pytest

from benchmarks import mining
from mmembed.inference import cpu
from mmembed.search import Hits


def test_rows_of_a_small_run(monkeypatch, capsys, tmp_path):
    pytest.importorskip("faiss")
    import mmembed.backbones.torchvision_shim  # noqa: F401

    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(mining, "peak_mb_of", lambda module, arguments: 7)
    only = ["--only", "search", "semantic", "mine", "curve"]
    sizes = ["--queries", "100", "--documents", "700", "--curve", "700", "900", "--folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["mining", "--json", "--rounds", "1", "--threads", "1", *only, *sizes])
    mining.main()
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    names = ["search", "semantic", "mine", "mine_faiss", "curve"]
    assert list(rows) == [f"{one}_100x700x256" for one in names] + ["curve_100x900x256"]
    for row in rows.values():
        assert row["ours"] > 0 and row["peak_mb_ours"] == 7 and row["details"]["threads"] == 1
    assert rows["search_100x700x256"]["limit"] > 0
    assert rows["mine_100x700x256"]["goal_to_peer"] == 3.0
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_whole_processes_mine_the_same_and_say_what_their_imports_take(monkeypatch, capsys, tmp_path):
    pytest.importorskip("faiss")
    import mmembed.backbones.torchvision_shim  # noqa: F401

    pytest.importorskip("sentence_transformers")
    sizes = ["--queries", "100", "--documents", "700", "--folder", str(tmp_path)]
    monkeypatch.setattr(
        "sys.argv", ["mining", "--json", "--rounds", "1", "--threads", "1", "--only", "command", *sizes]
    )
    mining.main()
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["command_100x700x256", "command_faiss_100x700x256"]
    for row in rows.values():
        assert row["goal_to_peer"] == 3.0 and min(row["peak_mb_ours"], row["peak_mb_peer"]) > 100
        said = row["details"]
        assert min(said["import_seconds"].values()) > 0 and "ratio_without_imports" in said
    assert not list(tmp_path.iterdir())


def test_files_of_either_command_are_compared(tmp_path):
    ours, peer = tmp_path / "ours.jsonl", tmp_path / "peer.jsonl"
    documents = [{"content": "p"}, {"content": "n", "relevance": 0.0}]
    mining.write_lines(ours, [{"query": "q", "documents": documents}])
    mining.write_lines(peer, [{"anchor": "q", "positive": "p", "negative_1": "n"}])
    mining.check("command", ours, peer)
    mining.write_lines(peer, [{"anchor": "q", "positive": "p", "negative_1": "m"}])
    with pytest.raises(SystemExit, match="command: 1 records and 1, 0.00% of the records"):
        mining.check("command", ours, peer)
    with pytest.raises(SystemExit, match="ended with status 3: no"):
        mining.process(["-c", "import sys; print('no', file=sys.stderr); sys.exit(3)"], 1)


def test_contenders_that_find_other_rows_stop_it():
    scores = np.linspace(1, 0, 20, dtype=np.float32).reshape(2, 10)
    same = Hits(scores, np.arange(20).reshape(2, 10))
    mining.check("search", same, same)
    with pytest.raises(SystemExit, match="0.00% of the rows"):
        mining.check("search", same, Hits(scores, same.indices + 1))
    with pytest.raises(SystemExit, match="scores differ by 0.1"):
        mining.check("search", same, Hits(scores + np.float32(0.1), same.indices))
    with pytest.raises(SystemExit, match="50.00% of the records"):
        mining.check("mine", [1, 2], [1, 3])


def test_memory_above_the_start_is_seen():
    with mining.sampled() as peak:
        held = np.ones(40 << 18)  # 80 MB
        mining.threading.Event().wait(0.05)
        del held
    assert 70 << 10 <= peak[0] <= 120 << 10


@pytest.mark.parametrize(
    ("found", "flags", "wanted"),
    [
        ("Prescott", "avx2 avx512_f", "SkylakeX"),  # a processor that OpenBLAS does not know
        ("Prescott", "avx2", "Haswell"),
        ("Zen", "avx2 avx512_f", "Zen"),
        ("unknown", "avx2 avx512_f", "unknown"),
    ],
)
def test_faiss_is_given_the_kernels_that_its_processor_has(found, flags, wanted, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")
    monkeypatch.setattr(cpu, "cpu_capabilities", lambda: dict.fromkeys(flags.split(), True))
    monkeypatch.setattr(mining, "openblas_core", lambda: os.environ["OPENBLAS_CORETYPE"] or found)
    assert mining.choose_openblas() == wanted


def test_the_core_is_the_one_that_faiss_loads(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert mining.openblas_core() in ("Haswell", "unknown")  # where the package links another library
