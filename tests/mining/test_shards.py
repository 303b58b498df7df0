"""What a killed process leaves is continued: whole shards stay, torn and changed ones are computed again."""

import json

import numpy as np
import pytest

from data_tools.files import digest
from mmembed.errors import MmembedError
from mmembed.shards import Shards

ROWS, SIZE = 25, 10
KEYS = ["a", "b", "c"]


def values(number, add=0.0):
    return np.full((5 if number == 2 else 10, 4), number + add, np.float32)


def opened(folder, keys=KEYS):
    return Shards(folder, "x", ROWS, SIZE, keys)


def missing(shards):
    return [number for number, _ in shards.missing()]


def test_shards_written_in_any_order_are_the_array(tmp_path):
    for number in (2, 0, 1):
        opened(tmp_path).write(number, values(number))
    shards = opened(tmp_path)
    assert missing(shards) == [] and shards.complete == ROWS
    assert shards.open()[:, 0].tolist() == [0] * 10 + [1] * 10 + [2] * 5
    assert shards.read(2).shape == (5, 4)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_torn_line_is_no_shard(tmp_path, cut):
    shards = opened(tmp_path)
    for number in (0, 1):
        shards.write(number, values(number))
    journal = tmp_path / "x.done"
    journal.write_bytes(journal.read_bytes()[:-cut])
    shards = opened(tmp_path)
    assert missing(shards) == [1, 2]
    shards.write(1, values(1))
    shards.write(2, values(2))
    assert opened(tmp_path).open()[10:20].tolist() == values(1).tolist()


def test_rows_that_are_gone_are_computed_again(tmp_path):
    shards = opened(tmp_path)
    for number in range(3):
        shards.write(number, values(number))
    rows = tmp_path / "x.rows"
    rows.write_bytes(rows.read_bytes()[:-1])
    assert missing(opened(tmp_path)) == [2]


def test_a_shard_with_another_key_loses_its_line_before_its_rows_change(tmp_path):
    """A, then half of B, then A again: the half-written rows do not pass for A."""
    shards = opened(tmp_path)
    for number in range(3):
        shards.write(number, values(number))
    changed = opened(tmp_path, ["a", "B", "c"])
    assert missing(changed) == [1]
    changed._put(10, values(1, add=0.5)[:3])  # killed in here
    assert missing(opened(tmp_path)) == [1]


def test_all_keys_changed_begins_anew_with_another_width(tmp_path):
    opened(tmp_path).write(0, values(0))
    other = opened(tmp_path, ["x", "y", "z"])
    assert missing(other) == [0, 1, 2]
    other.write(0, np.zeros((10, 7), np.float16))
    assert json.loads((tmp_path / "x.done").read_text().splitlines()[0]) == {"width": 7, "dtype": "<f2"}


def test_another_width_within_is_an_error(tmp_path):
    shards = opened(tmp_path)
    shards.write(0, values(0))
    with pytest.raises(MmembedError, match=r"3 dimensions of float32 behind 4 of float32.*delete"):
        shards.write(1, np.zeros((10, 3), np.float32))


def test_structured_rows(tmp_path):
    kind = np.dtype([("row", "<i8"), ("score", "<f4")])
    table = np.zeros((10, 3), kind)
    table["row"] = np.arange(30).reshape(10, 3)
    Shards(tmp_path, "t", 10, 10, ["a"]).write(0, table)
    assert Shards(tmp_path, "t", 10, 10, ["a"]).read(0)["row"].tolist() == table["row"].tolist()


def test_digest_tells_parts_apart():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest(np.zeros((2, 3))) != digest(np.zeros((3, 2))) != digest(np.zeros((3, 2), np.float32))
