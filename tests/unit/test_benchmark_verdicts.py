"""What the benchmarks call met: on numbers and folders written by hand."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import equivalence, scaling


@pytest.mark.parametrize(("slowest", "meets"), [(88.0, True), (86.0, False)])
def test_scaling_compares_the_slowest_size_with_the_fastest(slowest, meets):
    """The median hid that sizes on both of its sides were 1.15 apart each."""
    speeds = {128: 100.0, 512: 93.0, 2048: slowest}
    rows = scaling._rows({batch: [{"pairs_per_second": one, "peak_mb": 500.0}] for batch, one in speeds.items()})
    assert [row.meets for row in rows] == [True, True, meets]


def run_of(folder, small, loss=1.0):
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": loss}]}))
    save_file({"large": torch.tensor([1.0]), "small": torch.tensor([small])}, folder / "model.safetensors")
    return folder


def test_a_small_tensor_does_not_hide_behind_a_large_one(tmp_path):
    before = run_of(tmp_path / "before", 0.0)
    save_file({"large": torch.tensor([0.0]), "small": torch.tensor([0.0])}, before / "model.safetensors")
    reference = run_of(tmp_path / "reference", 0.01)
    assert equivalence.compare(before, reference, reference).weight == 0
    apart = equivalence.compare(before, reference, run_of(tmp_path / "apart", 0.02))
    assert apart.weight == pytest.approx(1.0)  # all of its change, though .01 of the largest
    broken = equivalence.compare(before, reference, run_of(tmp_path / "broken", float("nan")))
    assert not broken.weight <= 1e9


def test_a_refusal_counts_where_it_is_by_design():
    cells = {
        ("ZeRO-3", "QLoRA", equivalence.LARGE, 1): equivalence.Cell(refused="packed bytes"),
        ("FSDP2", "QLoRA", equivalence.LARGE, 1): equivalence.Cell(refused="no reason"),
    }
    (row,) = equivalence.rows_of(cells, 1e-4)
    assert row.name.startswith("FSDP2") and not row.meets
