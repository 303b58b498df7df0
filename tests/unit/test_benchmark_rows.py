"""Benchmarks that compare no speeds print the rows of all others: ratios are better higher, goals in the same terms."""

import json
from dataclasses import asdict

import pytest

from benchmarks import equivalence, startup
from benchmarks._common import Row, show, told
from benchmarks.equivalence import Cell


def test_rows_of_startup_have_their_ratio_and_goal():
    seconds = {"import_mmembed": [0.04, 0.05, 0.09], "mmembed_help": [0.8, 0.9, 0.7], "nothing": [0.02, 0.02, 0.03]}
    fast, slow = startup.rows_of(seconds)
    assert (fast.ours, fast.limit, fast.ratio_to_limit) == (0.05, 0.02, pytest.approx(0.4))
    assert fast.goal_to_limit == pytest.approx(0.02 / 0.3, abs=1e-3)
    for row, meets in ((fast, True), (slow, False)):
        assert row.meets is meets is (row.ratio_to_limit >= row.goal_to_limit)


def test_rows_of_the_equivalence_table(capsys):
    cells = {
        ("one process", "LoRA", equivalence.LARGE, 1): Cell(),
        ("one process", "LoRA", equivalence.SMALL, 1): Cell(2e-6, 3e-5),
        ("DDP", "LoRA", equivalence.LARGE, 1): Cell(0.0, 0.0),
        ("ZeRO-3", "QLoRA", equivalence.LARGE, 1): Cell(refused="not with 4 bits"),
        ("FSDP2", "full", equivalence.SMALL, 2): Cell(3e-4, 1e-5),
    }
    show(equivalence.rows_of(cells, 1e-4), as_json=True)
    chunked, same, apart = json.loads(capsys.readouterr().out)["rows"]
    assert chunked["name"] == "one process, LoRA, small chunks, accumulation 1"
    assert (chunked["ours"], chunked["limit"], chunked["ratio_to_limit"]) == (3e-5, 1e-4, 3.33)
    assert same["ours"] == 0 and same["ratio_to_limit"] is None and same["meets"]
    assert apart["ours"] == 3e-4 and apart["ratio_to_limit"] < apart["goal_to_limit"] and not apart["meets"]


def test_a_row_is_told_when_it_is_there_beside_the_object_of_the_end(capsys):
    row = told(Row("one", "texts/s", 2.0, 1.0, "a peer", ratio_to_peer=2.0))
    show([row], as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] == [json.loads(said.err)] == [asdict(row)]
