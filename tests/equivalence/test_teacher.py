"""Steps with a teacher against slow ones: a copied key encoder, plain autograd, loops over pairs."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from mmembed.embeddings import Embeddings
from mmembed.errors import CheckpointError, ConfigError
from mmembed.objectives import build_objective
from mmembed.training.gradcache import Workers, contrastive_step
from mmembed.training.teacher import Teacher, teacher_of
from tests.equivalence.toy import SIZE, ToyEncoder, gradients, make_batch, relative, teaching

QUERIES, GROUP, STEPS, HELD, TEMPERATURE, RATE = 4, 2, 6, 10, 0.2, 0.5


def sides(encoder, batch):
    """Unit vectors of queries and positives of an undivided batch."""
    (chunk,) = batch.chunks
    vectors = functional.normalize(encoder(chunk).rows(chunk.index.argsort()).vectors, dim=1)
    placed = vectors[batch.place]
    return placed[:QUERIES], placed[QUERIES::GROUP]


def with_other_contents(batch, step):
    """Nothing in it is known from another step."""
    labels = batch.labels
    keys = {name: getattr(labels, name) + 10**6 * step for name in ("query_keys", "document_keys", "positive_keys")}
    return replace(batch, labels=replace(labels, **keys))


def slow_step(encoder, keys, queue, batch, in_batch):
    """The loss of MoCo (in_batch: of ESimCSE), one exponential at a time; the queue, a list, takes the new keys."""
    queries, positives = sides(encoder, batch)
    with torch.no_grad():
        of_keys = sides(keys, batch)[1]
    if not in_batch:
        positives = of_keys
    losses = []
    for i, query in enumerate(queries):
        others = [positives[j] for j in range(QUERIES) if j != i] if in_batch else []
        candidates = [positives[i], *others, *queue[-HELD:]]
        exponentials = [((query @ one) / TEMPERATURE).exp() for one in candidates]
        losses.append(-(exponentials[0] / sum(exponentials)).log())
    queue += list(of_keys)
    return sum(losses) / QUERIES


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("momentum", [0.7, 1.0])
def test_steps_are_those_of_a_copied_key_encoder(in_batch: bool, momentum: float) -> None:
    """With dropout in the student, none in the teacher, and the same random numbers for the student."""
    student, slow = ToyEncoder(dropout=0.3).double(), ToyEncoder(dropout=0.3).double()
    keys = copy.deepcopy(slow).eval()
    block = {"type": "negative_queue", "size": HELD, "in_batch": in_batch, "momentum": momentum}
    objective = build_objective({**block, "temperature": TEMPERATURE}, SIZE).double()
    teacher = teacher_of(student, objective)
    teaches = teaching(student, objective, teacher)
    optimizers = [torch.optim.SGD(one.parameters(), lr=RATE) for one in (student, slow)]
    queue, seen = [], []
    for step in range(STEPS):
        batch = with_other_contents(make_batch(QUERIES, GROUP, 10**6, seed=step), step)
        torch.manual_seed(step)
        found, _ = contrastive_step(student, objective, batch, None, teacher=teaches)
        objective.commit()
        torch.manual_seed(step)
        expected = slow_step(slow, keys, queue, batch, in_batch)
        if expected.requires_grad:
            expected.backward()
        torch.testing.assert_close(found, expected.detach())
        assert relative(gradients(student), gradients(slow)) < 1e-9 or not gradients(slow).any()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        teacher.follow()
        for slowly, now in zip(keys.parameters(), slow.parameters(), strict=True):
            slowly.data = momentum * slowly.data + (1 - momentum) * now.data
        seen.append(expected.item())
    held, _ = objective.queue.read(SIZE)
    assert held.shape == (HELD, SIZE)
    order = (torch.arange(HELD) + len(queue)) % HELD  # the oldest row is where the next one goes
    torch.testing.assert_close(held[order], torch.stack(queue[-HELD:]))
    with teacher.in_place():
        for name, parameter in student.named_parameters():
            torch.testing.assert_close(parameter, dict(keys.named_parameters())[name])
    assert min(abs(a - b) for a, b in pairwise(seen[1:])) > 1e-6
    start = dict(ToyEncoder().double().named_parameters())
    moved = [not torch.equal(one, start[name]) for name, one in keys.named_parameters() if "unused" not in name]
    assert all(moved) if momentum < 1 else not any(moved)


def test_the_frozen_start_teaches_hycd() -> None:
    """The gradient of the third step is that towards the similarities of the first weights."""
    student, objective = ToyEncoder(), build_objective("hycd")
    start, teacher = copy.deepcopy(student), teacher_of(student, objective)
    teaches = teaching(student, objective, teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=5.0)
    for step in range(3):
        batch = make_batch(QUERIES, GROUP, 10**6, seed=step)
        optimizer.zero_grad()
        found, _ = contrastive_step(student, objective, batch, None, teacher=teaches)
        optimizer.step()
        teacher.follow()
        if step == 1:
            before = copy.deepcopy(student)
    (x, y), (frozen_x, frozen_y) = sides(before, batch), sides(start, batch)
    scores, theirs = x @ y.T, (frozen_x @ frozen_y.T).detach()
    target = [0.5 * torch.eye(QUERIES) + 0.5 * of.softmax(1) for of in (theirs, theirs.T)]
    expected = sum(
        functional.kl_div(ours.log_softmax(1), goal, reduction="batchmean")
        for ours, goal in zip((scores, scores.T), target, strict=True)
    )
    torch.testing.assert_close(found, expected.detach() / 2)
    own = build_objective({"type": "hycd", "momentum": None})
    assert abs(contrastive_step(before, own, batch, None)[0] - found) > 1e-4


def test_tcl_with_a_momentum_encoder_against_loops() -> None:
    """The second of two steps, so that the queues hold the teacher's vectors of the first."""
    size, alpha, temperature = 5, 0.3, 0.2
    block = {"type": "tcl", "momentum": 0.9, "alpha": alpha, "temperature": temperature, "size": 8}
    objective, draw = build_objective(block, size).double(), torch.Generator().manual_seed(0)

    def vectors(count):
        return functional.normalize(torch.randn(count, size, generator=draw, dtype=torch.float64), dim=1)

    primed = ()
    for step in range(2):
        labels = with_other_contents(make_batch(QUERIES, 3, 10**6, positives=3), step).labels
        mine, taught = ([vectors(QUERIES), vectors(3 * QUERIES)] for _ in range(2))
        labels = replace(labels, taught=tuple(map(Embeddings, taught)))
        earlier = primed  # of queries, of positives
        primed = taught[1][1::3], taught[1][2::3]
        gathered = objective.gather(*map(Embeddings, mine), labels)
        found, _ = objective.compare(gathered)
        objective.remember(gathered)
        objective.commit()
    sides, total = (mine[0], mine[1][::3]), 0.0
    for side, own, other in ((0, 0, 1), (1, 1, 0)):
        for i in range(QUERIES):
            for keys, soft in ((own, False), (other, True)):
                candidates = [*primed[keys], *earlier[keys]]
                scores = torch.stack([sides[side][i] @ one for one in candidates]) / temperature
                target = torch.zeros(len(candidates), dtype=torch.float64)
                target[i] = 1
                if soft:
                    theirs = torch.stack([primed[own][i] @ one for one in candidates]) / temperature
                    target = (1 - alpha) * target + alpha * theirs.exp() / theirs.exp().sum()
                total -= (target * (scores - scores.exp().sum().log())).sum() / QUERIES / 4
    torch.testing.assert_close(found, total)


def test_degla_keeps_all_vectors_near_the_teachers() -> None:
    draw, labels = torch.Generator().manual_seed(0), make_batch(QUERIES, 3, 10**6).labels
    mine, theirs = ([torch.randn(n * QUERIES, SIZE, generator=draw) for n in (1, 3)] for _ in range(2))
    labels = replace(labels, taught=tuple(map(Embeddings, theirs)))
    near, far = (
        build_objective({"type": "degla", "distillation": weight})(*map(Embeddings, mine), labels)[0]
        for weight in (0.0, 0.5)
    )
    distances = [
        (ours / ours.norm() - its / its.norm()).square().sum()
        for side, other in zip(mine, theirs, strict=True)
        for ours, its in zip(side, other, strict=True)
    ]
    torch.testing.assert_close(far - near, 0.5 * sum(distances))


def test_each_layer_is_taught_by_its_own() -> None:
    """A part of a list on a lower layer, and both layers side by side."""
    draw, labels = torch.Generator().manual_seed(0), make_batch(QUERIES, 1, 10**6).labels

    def layered():
        last, lower = (torch.randn(QUERIES, SIZE, generator=draw) for _ in range(2))
        return Embeddings(last, None, {1: lower})

    sides, taught = ((layered(), layered()) for _ in range(2))

    def loss(block, layer=None):
        of_layer = [[one.at(layer) for one in pair] for pair in (sides, taught)]
        return build_objective(block, SIZE, depth=2)(*of_layer[0], replace(labels, taught=tuple(of_layer[1])))[0]

    last, lower = loss("hycd"), loss("hycd", 1)
    assert abs(last - lower) > 1e-3
    parts = ["infonce", {"type": "hycd", "layer": 1}]
    torch.testing.assert_close(loss(parts), loss("infonce") + lower)
    nested = {"type": "hycd", "matryoshka": {"layers": [1, -1], "kl_weight": 0}}
    torch.testing.assert_close(loss(nested), last + lower)


@pytest.mark.parametrize(("chunk_tokens", "keep", "workers"), [(30, 0, 1), (30, None, 1), (15, 40, 1), (30, None, 3)])
def test_chunks_and_threads_give_the_step_of_the_whole(chunk_tokens, keep, workers) -> None:
    found = []
    for tokens, kept, threads in ((10**6, None, 1), (chunk_tokens, keep, workers)):
        encoder = ToyEncoder()
        objective = build_objective(
            [{"type": "hycd", "momentum": 0.6}, {"type": "negative_queue", "size": 8, "momentum": 0.6}], SIZE
        )
        teacher = teacher_of(encoder, objective)
        teaches = teaching(encoder, objective, teacher)
        beside = Workers(threads, list(encoder.parameters())) if threads > 1 else None
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1.0)
        for step in range(3):
            optimizer.zero_grad()
            batch = make_batch(6, 3, tokens, seed=step)
            loss, _ = contrastive_step(encoder, objective, batch, kept, workers=beside, teacher=teaches)
            objective.commit()
            optimizer.step()
            teacher.follow()
        found.append((loss, gradients(encoder), objective.state_dict()["objectives.1.queue.vectors"]))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    assert relative(found[1][1], found[0][1]) < 1e-5
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-5, atol=1e-6)


def test_only_batches_of_its_objective_are_taught() -> None:
    calls = []

    class Counting(Teacher):
        def in_place(self):
            calls.append(1)
            return super().in_place()

    encoder = ToyEncoder()
    objective = build_objective({"by_task": {"retrieval": "infonce", "sts": "pearson"}})
    with_teacher = build_objective({"by_task": {"retrieval": "hycd", "sts": "pearson"}})
    teaches = teaching(encoder, with_teacher, Counting(encoder, 1.0))
    contrastive_step(encoder, objective, make_batch(6, 3, 10**6), None, teacher=teaches)
    contrastive_step(encoder, with_teacher, make_batch(6, 3, 10**6, graded=True), None, teacher=teaches)
    assert not calls
    contrastive_step(encoder, with_teacher, make_batch(6, 3, 10**6), None, teacher=teaches)
    assert calls == [1]


def test_a_step_without_the_teacher_that_it_needs_is_refused() -> None:
    with pytest.raises(ConfigError, match="'hycd' learns from a teacher .momentum 1., and the labels of the batch"):
        contrastive_step(ToyEncoder(), build_objective("hycd"), make_batch(4, 2, 10**6), None)


def test_the_students_weights_are_back_after_an_error() -> None:
    encoder = ToyEncoder()
    teacher = Teacher(encoder, 0.5)
    teacher.begin()
    with torch.no_grad():
        encoder.layer.weight.add_(1.0)
    student, optimizer = encoder.layer.weight.clone(), torch.optim.SGD(encoder.parameters(), lr=1.0)
    with pytest.raises(RuntimeError, match="no memory"), teacher.in_place():
        assert not torch.equal(encoder.layer.weight, student) and not encoder.training
        raise RuntimeError("no memory")
    assert torch.equal(encoder.layer.weight, student) and encoder.training
    encoder.layer.weight.grad = torch.ones_like(student)
    optimizer.step()
    torch.testing.assert_close(encoder.layer.weight, student - 1)


def test_an_autocast_around_both_models_keeps_them_apart() -> None:
    encoder, (chunk,) = ToyEncoder(), make_batch(4, 2, 10**6).chunks
    teacher = Teacher(encoder, 0.5)
    teacher.begin()
    with torch.no_grad():
        encoder.layer.weight.add_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = encoder(chunk).vectors
        with teacher.in_place(), torch.no_grad():
            taught = encoder(chunk).vectors
        after = encoder(chunk).vectors
    assert torch.equal(before, after) and after.requires_grad
    assert not torch.allclose(taught, before, atol=1e-2)


def test_only_what_is_trained_is_held_and_in_32_bits() -> None:
    encoder = ToyEncoder().bfloat16()
    encoder.table.requires_grad_(False)
    encoder.unused.requires_grad_(False)
    teacher = Teacher(encoder, 0.999)
    assert teacher.size == 4 * (SIZE * SIZE + SIZE)
    teacher.begin()
    start = encoder.layer.weight.detach().float()
    with torch.no_grad():
        encoder.layer.weight.add_(1.0)
    for _ in range(10):
        teacher.follow()
    moved = 1 - 0.999**10
    expected = start * (1 - moved) + encoder.layer.weight.float() * moved
    torch.testing.assert_close(teacher._values["layer.weight"], expected, atol=1e-6, rtol=1e-6)
    with teacher.in_place():
        assert encoder.layer.weight.dtype == torch.bfloat16
        assert torch.equal(encoder.layer.weight, expected.bfloat16())


def test_it_comes_back_from_its_file(tmp_path) -> None:
    first, again = Teacher(ToyEncoder().bfloat16(), 0.9), Teacher(ToyEncoder().bfloat16(), 0.9)
    with pytest.raises(CheckpointError, match=r"holds no teacher.safetensors, so it is of a run without a teacher"):
        first.load(tmp_path)
    first.begin()
    with torch.no_grad():
        first.model.layer.weight.add_(1.0)
    first.follow()
    first.save(tmp_path)
    again.load(tmp_path)
    again.begin()  # has weights
    assert all(torch.equal(value, again._values[name]) for name, value in first._values.items())
    other = ToyEncoder()
    other.layer = torch.nn.Linear(SIZE, 3)
    with pytest.raises(CheckpointError, match="'layer.weight' is"):
        Teacher(other, 0.9).load(tmp_path)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (["hycd", "degla"], "'hycd' has momentum 1 and 'degla' 0.9996, but a run holds one teacher"),
        ({"by_source": {"a": "hycd", "b": ["rafa", "degla"]}}, "'a' has momentum 1 and 'b' 0.9996"),
        ({"type": "negative_queue", "momentum": 0.0}, "negative_queue.momentum: found 0.0"),
        ({"type": "hycd", "momentum": 1.1}, "hycd.momentum: found 1.1"),
        ({"type": "degla", "momentum": None, "distillation": 0.1}, "degla.distillation: 0.1 has no teacher"),
        ({"type": "tcl", "alpha": 0.4}, "tcl.alpha: 0.4 is the share of a momentum encoder"),
    ],
)
def test_what_cannot_be_taught(block, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


@pytest.mark.parametrize(
    ("block", "momentum"),
    [
        ("hycd", 1.0),
        ("degla", 0.9996),
        ("negative_queue", None),
        ("tcl", None),
        ("contrastive", None),
        (["rafa", "hycd", {"type": "negative_queue", "momentum": 1}], 1.0),
        ({"type": "degla", "momentum": 0.99, "matryoshka": {"dims": [4]}}, 0.99),
        ({"by_task": {"sts": "pearson", "retrieval": "hycd"}}, 1.0),
    ],
)
def test_which_teacher_a_run_needs(block, momentum) -> None:
    objective = build_objective(block)
    assert objective.teacher_momentum == momentum
    assert (teacher_of(ToyEncoder(), objective) is None) == (momentum is None)
