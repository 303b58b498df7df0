"""Groups of similar pairs: what the rules find, and what `data.batch_order` refuses before weights are loaded."""

from __future__ import annotations

import numpy as np
import pytest

from mmembed.config import build_config
from mmembed.errors import ConfigError
from mmembed.mining import MINERS, Candidates
from mmembed.training.batch_order import check_order


def ranked(scores: np.ndarray, depth: int) -> Candidates:
    """Each query's positive is the row of its number."""
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return Candidates.of(rows, np.take_along_axis(scores, rows, 1), np.arange(len(scores))[:, None], len(scores))


def on_a_circle(count: int) -> np.ndarray:
    """(count, count) cosines of points on a circle that stand in a random order."""
    angle = np.random.default_rng(0).permutation(count) * 2 * np.pi / count
    return np.cos(angle[:, None] - angle[None, :]).astype(np.float32)


def spread(scores: np.ndarray, groups: np.ndarray) -> float:
    """Mean similarity of two pairs of a group."""
    same = (groups[:, None] == groups[None, :]) & ~np.eye(len(groups), dtype=bool)
    return float(scores[same].mean())


def test_the_path_goes_to_the_nearest_positive_that_is_left() -> None:
    """By hand, from every start: 0 - 1 - 2 - 3 on a line, 1 nearer to 2 than to 0."""
    place = np.array([0.0, 1.0, 1.9, 2.7])
    scores = -np.abs(place[:, None] - place[None, :]).astype(np.float32)
    walks = {0: {(0, 1), (2, 3)}, 1: {(1, 2), (0, 3)}, 2: {(2, 3), (0, 1)}, 3: {(2, 3), (0, 1)}}
    rule, seen = MINERS.build({"type": "similar", "size": 2, "neighbours": 3}), set()
    for seed in range(20):
        start = int(np.random.default_rng(seed).permutation(4)[0])
        groups = rule.groups(ranked(scores, 4), np.eye(4, dtype=np.float32), np.arange(4), seed)
        seen.add(start)
        assert {tuple(np.flatnonzero(groups == number).tolist()) for number in range(2)} == walks[start]
    assert seen == {0, 1, 2, 3}


def test_b3_links_what_stands_behind_the_best() -> None:
    """Blocks of six alike pairs, each with a twin, its false negative: groups keep to a block."""
    block, twin = np.arange(24) // 6, np.arange(24) // 2
    scores = (block[:, None] == block[None, :]) * 0.5 + (twin[:, None] == twin[None, :]) * 0.4
    scores = (scores + np.random.default_rng(1).random(scores.shape) * 0.01).astype(np.float32)
    rule = MINERS.build({"type": "b3", "size": 3, "skip": 1, "neighbours": 2})
    groups = rule.groups(ranked(scores, 4), np.eye(24, dtype=np.float32), np.arange(24), 0)
    for number in range(int(groups.max()) + 1):
        assert len({*block[groups == number]}) == 1
    near = MINERS.build({"type": "b3", "size": 3, "skip": 0, "neighbours": 1})
    twins = near.groups(ranked(scores, 4), np.eye(24, dtype=np.float32), np.arange(24), 0)
    assert all(twins[2 * one] == twins[2 * one + 1] for one in range(12)), "which is what skip leaves out"


@pytest.mark.parametrize("block", [{"type": "similar", "neighbours": 20}, {"type": "b3", "skip": 2, "neighbours": 12}])
def test_groups_are_much_closer_than_chance(block: dict) -> None:
    scores = on_a_circle(200)
    groups = MINERS.build({**block, "size": 8}).groups(
        ranked(scores, 24), np.eye(200, dtype=np.float32), np.arange(200), 3
    )
    assert spread(scores, groups) > 0.7 > 0.1 > abs(spread(scores, np.random.default_rng(7).permutation(200) // 8))


def run(**data) -> dict:
    return {"data": {"train": [{"path": "a.jsonl"}], **data}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"batch_order": {"size": 4}}, "batch_order: the block has no 'type'"),
        ({"batch_order": "similar", "train": [{"path": "a", "streaming": True}]}, "batch_order .*'a' .streaming"),
        ({"batch_order": "b3", "train": [{"path": "a", "pairs": "random_crops"}]}, "batch_order .*'a' .pairs: .*anew"),
        ({"batch_order": "b3", "train": [{"path": "a", "in_batch_negatives": False}]}, "batch_order has no effect"),
    ],
)
def test_a_config_that_cannot_be_ordered_is_refused(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config({**run(**data), "training": {"max_steps": 2}})


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("simlar", "mining: there is no 'simlar'.*similar"),
        (
            {"type": "top_k"},
            "batch_order: 'top_k' chooses negatives and groups no pairs; take one of b3, saha, similar",
        ),
        ({"type": "b3", "sice": 4}, "mining.b3: unknown option 'sice'.*size"),
        ({"type": "b3", "size": 0}, "mining.b3.size: found 0"),
        ({"type": "b3", "model": 3}, "batch_order.model: found 3"),
    ],
)
def test_a_rule_that_cannot_order_is_refused(block, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_order(build_config(run(batch_order=block)))


def test_a_folder_that_holds_no_embedder_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="batch_order.model: .* holds no embedder"):
        check_order(build_config(run(batch_order={"type": "similar", "model": str(tmp_path)})))
