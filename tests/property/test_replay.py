"""Replay: earlier sources get exactly their share of batches, new ones are seen whole; nothing is left to chance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.config import build_config
from mmembed.data.mixing import new_share, shares
from mmembed.errors import ConfigError
from mmembed.training.batches import plan_batches


class Rows:
    """A source of so many records that share nothing."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size

    def keys(self) -> np.ndarray:
        return np.arange(2 * self.size).reshape(-1, 2)


def plan(
    sizes: list[int], replay: list[float | None], rank: int = 0, world: int = 1, seed: int = 0, rows: int = 4
) -> Any:
    sources = [
        {"path": f"{number}", **({} if share is None else {"replay": share})} for number, share in enumerate(replay)
    ]
    config = build_config({"data": {"train": sources, "mixing": "proportional"}})
    args: Any = SimpleNamespace(
        per_device_train_batch_size=rows, seed=seed, data_seed=None, max_steps=-1, gradient_accumulation_steps=1
    )
    given_sources: Any = [Rows(str(number), size) for number, size in enumerate(sizes)]
    return plan_batches(config, given_sources, args, world, rank)


@settings(max_examples=40, deadline=None)
@given(
    new=st.lists(st.integers(8, 400), min_size=1, max_size=3),
    old=st.lists(st.tuples(st.integers(8, 100), st.floats(0.02, 0.3)), min_size=1, max_size=3),
    seed=st.integers(0, 10),
    epoch=st.integers(0, 3),
)
def test_shares_are_exact_and_every_process_agrees(new, old, seed, epoch) -> None:
    sizes, replay = [*new, *(size for size, _ in old)], [None] * len(new) + [share for _, share in old]
    ranks = [plan(sizes, replay, rank, 2, seed) for rank in range(2)]
    drawn = []
    for one in ranks:
        one.set_epoch(epoch)
        drawn.append(list(one))
        assert drawn[-1] == list(one), "asked again, the same: a resumed run goes on with it"
    total = len(drawn[0])
    of_source = [[batch[0][0] for batch in batches] for batches in drawn]
    assert of_source[0] == of_source[1]
    for source, share in enumerate(replay):
        count = of_source[0].count(source)
        if share is not None:
            assert count == 1 or abs(count - share * total) < 1, (source, share, count, total)
    whole = sum(size // 8 for size in new)
    seen = sum(of_source[0].count(source) for source in range(len(new)))
    assert abs(seen - whole) <= len(replay), "new sources are seen as often as without replay"


def test_an_epoch_grows_by_what_is_replayed() -> None:
    """100 batches of new records are 80 % of an epoch of 125: each new record once, the 40 old ones more than once."""
    made = plan([400, 40], [None, 0.2])
    assert made.batches_per_source == (100, 25)
    draws = [draw for batch in made for draw in batch]
    assert sorted(row for source, row, _ in draws if source == 0) == list(range(400))
    assert {visit for source, _, visit in draws if source == 1} == {0, 1, 2}


def test_the_rule_divides_what_is_left() -> None:
    found = shares("temperature", [100, 400, 50], [1, 1, 1], [None, None, None], 0.5, [None, None, 0.25])
    assert found == pytest.approx([0.25, 0.5, 0.25])
    assert new_share([None, 0.25, None, 0.15]) == pytest.approx(0.6)
    without = shares("temperature", [100, 400], [1, 1], [None, None], 0.5, [None, None])
    assert without == shares("temperature", [100, 400], [1, 1], [None, None])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "a"}, {"path": "b", "replay": 0.1, "weight": 2}]}, "weight 2 has no effect beside replay"),
        ({"train": [{"path": "a", "replay": 0.1}]}, "none is new"),
        ({"train": [{"path": "a"}, {"path": "b", "replay": 0.6}, {"path": "c", "replay": 0.5}]}, "adds up to 1.1"),
        ({"train": [{"path": "a"}, {"path": "b", "replay": 0.1}], "mixing": "round_robin"}, "'round_robin' . replay"),
        ({"train": [{"path": "a"}], "dev": [{"path": "b", "replay": 0.1}]}, "replay acts in training only"),
        ({"train": [{"path": "a"}, {"path": "b", "replay": 1.5}]}, "replay: found 1.5"),
    ],
)
def test_what_cannot_act_is_refused(data, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({"data": data})
