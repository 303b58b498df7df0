"""k-means, the prototypes of ProtoCLIP, and the command that labels records with their clusters (MLCD)."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional

from data_tools import cluster as command
from mmembed.clustering import BLOCK, kmeans, means, nearest
from mmembed.data.records import parse_record
from mmembed.embeddings import Embeddings
from mmembed.objectives import build_objective
from mmembed.objectives.proto_clip import against_prototypes
from tests.unit.test_objective_memory import batch, step


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# k-means --------------------------------------------------------------------------------------------------------------


def test_kmeans_against_scipy() -> None:
    vq = pytest.importorskip("scipy.cluster.vq")
    vectors = torch.randn(200, 5, generator=seeded(0), dtype=torch.float64)
    first = vectors[torch.randperm(200, generator=seeded(3))[:7]]
    expected, of = vq.kmeans2(vectors.numpy(), first.numpy(), iter=50, minit="matrix")
    centres = kmeans(vectors, 7, seeded(3), iterations=50)
    torch.testing.assert_close(centres, torch.from_numpy(expected))
    assert nearest(vectors, centres)[0].flatten().tolist() == of.tolist()


def test_nearest_against_loops(monkeypatch) -> None:
    monkeypatch.setattr("mmembed.clustering.BLOCK", 8)  # blocks of two rows
    vectors, centres = torch.randn(7, 3, generator=seeded(0)), torch.randn(4, 3, generator=seeded(1))
    numbers, distances = nearest(vectors, centres, 2)
    expected = (vectors[:, None] - centres[None]).square().sum(-1).sort(1)
    assert numbers.equal(expected.indices[:, :2])
    torch.testing.assert_close(distances, expected.values[:, :2])
    assert BLOCK > 8


def test_a_cluster_without_rows_takes_the_farthest() -> None:
    """Two of three first centres are the same point: one is left over, and goes where it is needed."""
    vectors = torch.tensor([[0.0], [0.0], [0.0], [1.0], [9.0]])
    for seed in range(8):
        centres = kmeans(vectors, 3, seeded(seed))
        assert sorted(centres.flatten().tolist()) == [0.0, 1.0, 9.0]


def test_means_of_clusters(monkeypatch) -> None:
    monkeypatch.setattr("mmembed.clustering.BLOCK", 8)
    vectors, of = torch.arange(12.0).view(6, 2), torch.tensor([0, 2, 2, 0, 2, 2])
    found, sizes = means(vectors, of, 4)
    assert sizes.tolist() == [2, 0, 4, 0]
    assert found.tolist() == [[3, 4], [0, 0], [6, 7], [0, 0]]


def test_more_centres_than_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match="3 centres of 2 vectors"):
        kmeans(torch.zeros(2, 1), 3, seeded(0))


# Prototypes -----------------------------------------------------------------------------------------------------------


def proto_clip(**options):
    block = {"type": "proto_clip", "prototypes": 3, "episode": 10, "head_size": 4, **options}
    return build_objective(block, 8)


def pairs_of(seed: int, queries: int = 5):
    return batch(queries=queries, negatives=0, seed=seed)


def test_there_is_nothing_to_learn_in_the_first_episode() -> None:
    objective = proto_clip()
    losses = [step(objective, pairs_of(seed))[0].item() for seed in range(5)]
    assert losses[:2] == [0, 0] and all(loss > 0 for loss in losses[2:])
    assert int(objective.seen) == 25


@pytest.mark.parametrize("back_translation", [True, False])
@pytest.mark.parametrize("teacher_temperature", [None, 0.5])
def test_proto_clip_against_loops(back_translation: bool, teacher_temperature) -> None:
    options = {"back_translation": back_translation, "teacher_temperature": teacher_temperature}
    objective = proto_clip(**options).double()
    of_steps = [[Embeddings(one.vectors.double()) for one in pairs_of(seed)[:2]] for seed in range(3)]
    labels = pairs_of(0)[2]

    def project(side: int, vectors: torch.Tensor) -> torch.Tensor:
        return functional.normalize(vectors @ objective.heads[side], dim=1)

    for queries, documents in of_steps[:2]:
        step(objective, (queries, documents, labels))
    memory = [torch.cat([project(side, of[side].vectors) for of in of_steps[:2]]) for side in (0, 1)]
    clusters = [nearest(memory[side], objective.centres[side])[0].flatten() for side in (0, 1)]
    for side in (0, 1):  # k-means stands still: a centre is the mean of its members
        for k in range(3):
            torch.testing.assert_close(objective.centres[side, k], memory[side][clusters[side] == k].mean(0))
    losses = []
    for student, teacher in ((0, 1), (1, 0)):
        targets = objective.centres[teacher]
        if back_translation:
            targets = torch.stack([memory[student][clusters[teacher] == k].mean(0) for k in range(3)])
        now = [project(side, of_steps[2][side].vectors) for side in (0, 1)]
        for vector, of_teacher in zip(now[student], now[teacher], strict=True):
            distances = [(of_teacher - centre).square().sum() for centre in objective.centres[teacher]]
            label = int(torch.stack(distances).argmin())
            shares = torch.stack([vector @ target for target in targets]).div(0.07).log_softmax(0)
            wanted = functional.one_hot(torch.tensor(label), 3).double()
            if teacher_temperature is not None:
                wanted = (objective.centres[teacher] @ objective.centres[teacher][label] / 0.5).softmax(0)
            losses.append(-(wanted * shares).sum())
    loss, metrics = objective(*of_steps[2], labels)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-9)
    assert metrics["prototypes"] == 3 and 0 <= metrics["prototype_accuracy"] <= 1


def test_hard_targets_are_the_limit_of_soft_ones() -> None:
    scores, centres = torch.randn(4, 3, generator=seeded(0)), torch.eye(3)
    labels = torch.tensor([0, 2, 1, 1])
    soft, hard = (against_prototypes(scores, centres, labels, one) for one in (1e-3, None))
    torch.testing.assert_close(soft, hard)


def test_an_episode_begins_anew_and_forgets_the_one_before() -> None:
    objective = proto_clip()
    for seed in range(4):
        step(objective, pairs_of(seed))
    centres = objective.centres.clone()
    step(objective, pairs_of(4))
    assert torch.equal(objective.centres, centres)  # in the middle of an episode
    again = proto_clip()
    again.load_state_dict(objective.state_dict())
    for one in (objective, again):
        step(one, pairs_of(5))
    assert not torch.equal(objective.centres, centres)
    assert torch.equal(objective.centres, again.centres)  # as a resumed run
    last = [
        objective.state_dict()["memory"],
        torch.stack([_vectors(objective, seed) for seed in (4, 5)], 1).flatten(1, 2),
    ]
    torch.testing.assert_close(*last)


def _vectors(objective, seed: int) -> torch.Tensor:
    """(2, N, d), as the memory keeps them."""
    return objective.news(objective.gather(*pairs_of(seed)))


def test_a_batch_larger_than_an_episode_is_one() -> None:
    objective = proto_clip()
    loss, _ = step(objective, pairs_of(0, queries=25))
    assert loss == 0 and int(objective.seen) == 25 and (objective.sizes.sum(1) == 10).all()
    assert step(objective, pairs_of(1))[0] > 0


def test_pairs_of_one_cluster_learn_to_be_told_apart() -> None:
    """Two kinds of pairs whose sides share nothing: each side tells the kind of the other after some steps."""
    kinds = torch.arange(20) % 2
    sides = [functional.one_hot(4 * side + kinds, 8).float() for side in (0, 1)]
    noise = [0.1 * torch.randn(20, 8, generator=seeded(side)) for side in (0, 1)]
    of = [Embeddings(side + one) for side, one in zip(sides, noise, strict=True)]
    labels = pairs_of(0, queries=20)[2]
    objective = proto_clip(prototypes=2, episode=20)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.5)
    for _ in range(20):
        optimizer.zero_grad()
        loss, metrics = step(objective, (*of, labels))
        loss.backward()
        optimizer.step()
    assert metrics["prototype_accuracy"] == 1


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    """Twelve records about two things, one with a label of its own."""
    words = ["a red bus in the rain", "bread with butter"]
    lines = [
        {"query": f"{words[i % 2]} {i}", "documents": [{"content": f"{words[i % 2]}, number {i}", "id": f"d{i}"}]}
        for i in range(12)
    ]
    lines[0] |= {"labels": ["of its own"], "id": "first", "instruction": "find it"}
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("side", ["query", "positive"])
def test_records_get_their_nearest_clusters(source, tmp_path, side, capsys) -> None:
    output = tmp_path / "clustered.jsonl"
    flags = ["--source", str(source), "--clusters", "4", "--labels", "2", "--side", side, "--output", str(output)]
    assert command.main(flags) == 0
    assert "12 records, 4 clusters" in capsys.readouterr().out
    before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in (source, output))
    for old, new in zip(before, after, strict=True):
        assert len(set(new["labels"])) == 2 and set(new["labels"]) <= set("0123")
        assert {**old, "labels": new["labels"]} == new
        assert parse_record(new, "x:1").labels == tuple((label,) for label in new["labels"])
    nearest_of = [new["labels"][0] for new in after]
    assert not set(nearest_of[::2]) & set(nearest_of[1::2])  # buses and bread
    assert command.main(flags) == 2 and "exists already" in capsys.readouterr().err
    kept = output.read_text()
    assert command.main([*flags, "--overwrite"]) == 0 and output.read_text() == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clusters", "13"], "12 records cannot make 13 clusters"),
        (["--clusters", "1", "--labels", "1"], "--labels 1 of --clusters 1"),
        (["--clusters", "8", "--labels", "8"], "--labels 8 of --clusters 8"),
        (["--clusters", "2", "--labels", "1", "--options", "split=dev"], "--options 'split=dev': give a JSON mapping"),
        (["--clusters", "2", "--labels", "1", "--format", "jsnl"], "did you mean 'jsonl'"),
    ],
)
def test_commands_that_cannot_be_are_refused_and_write_nothing(source, tmp_path, flags, message, capsys) -> None:
    output = tmp_path / "clustered.jsonl"
    assert command.main(["--source", str(source), "--output", str(output), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()
