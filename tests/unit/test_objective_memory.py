"""What objectives remember, and what those over vectors refuse."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from mmembed.config import build_config
from mmembed.data.labels import BatchLabels
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import build_objective
from mmembed.objectives.aligned import meet, same_content
from mmembed.objectives.global_local import of_parts
from mmembed.objectives.memory import KeyedRows, Queue
from mmembed.objectives.prototypes import balanced, discrimination
from mmembed.objectives.whitened import whiten
from mmembed.training.preflight import _check_objective, preflight
from tests.contract.options import block as block_of


def batch(queries: int = 5, positives: int = 1, negatives: int = 1, size: int = 8, seed: int = 3):
    group = positives + negatives
    generator = torch.Generator().manual_seed(seed)
    keys = (torch.arange(queries * group) + 1000).view(queries, group, 1).expand(-1, -1, 2)
    labels = BatchLabels(
        owner=torch.arange(queries).repeat_interleave(group),
        relevance=torch.tensor([1.0] * positives + [0.0] * negatives).repeat(queries),
        document_keys=keys.flatten(0, 1),
        query_keys=torch.arange(queries),
        positive_keys=keys[:, :positives],
        source="letters",
    )
    vectors = [Embeddings(torch.randn(n, size, generator=generator)) for n in (queries, queries * group)]
    return *vectors, labels


def step(objective, of):
    gathered = objective.gather(*of)
    loss, metrics = objective.compare(gathered)
    objective.remember(gathered)
    objective.commit()
    return loss, metrics


def test_rows_come_back_by_key_and_twice_put_are_averaged() -> None:
    table = KeyedRows(2)
    table.put(torch.tensor([7, -3, 7]), torch.tensor([[1.0, 0], [5, 5], [3, 2]]))
    rows, known = table.find(torch.tensor([-3, 4, 7]))
    assert rows.tolist() == [[5, 5], [0, 0], [2, 1]] and known.tolist() == [True, False, True]
    table.put(torch.tensor([4, 7]), torch.tensor([[9.0, 9], [8, 8]]))
    assert table.find(torch.tensor([-3, 4, 7]))[0].tolist() == [[5, 5], [9, 9], [8, 8]]
    again = KeyedRows(2)
    again.put(torch.tensor([1]), torch.ones(1, 2))
    again.load_state_dict(table.state_dict())
    assert again.find(torch.tensor([1, -3, 4, 7]))[0].tolist() == [[0, 0], [5, 5], [9, 9], [8, 8]]


def test_a_table_stays_in_32_bits_where_an_engine_halves_the_module() -> None:
    assert KeyedRows(2).bfloat16().rows.dtype == torch.float32
    assert KeyedRows(2).double().rows.dtype == torch.float64


def test_a_queue_keeps_the_last_ones() -> None:
    queue = Queue(4, 1)
    for start in (1, 4, 6):  # 1 2 3, 4 5, 6 ... 11
        numbers = torch.arange(start, start + {1: 3, 4: 2, 6: 6}[start])
        queue.put(numbers[:, None].float(), numbers[:, None].expand(-1, 2))
        kept = sorted(queue.read(1)[1][:, 0].tolist())
        assert kept == {1: [1, 2, 3], 4: [2, 3, 4, 5], 6: [8, 9, 10, 11]}[start]
        assert queue.vectors[:4, 0].long().tolist() == queue.keys[:, 0].tolist()


def test_queued_positives_of_the_query_do_not_count() -> None:
    """The same batch again: of each query all but its own positive are negatives from the queue."""
    of = batch(queries=3)
    objective = build_objective({"type": "negative_queue", "size": 16, "in_batch": False, "temperature": 1.0}, 8)
    assert step(objective, of)[0] == 0  # nothing is in the queue
    loss, metrics = step(objective, of)
    queries, documents, _ = of
    scores = functional.normalize(queries.vectors, dim=1) @ functional.normalize(documents.vectors[::2], dim=1).T
    torch.testing.assert_close(loss, functional.cross_entropy(scores, torch.arange(3)))
    assert metrics["queued"] == 3


def test_mixtures_begin_with_a_full_queue_and_follow_from_the_seed() -> None:
    """They are harder than what they are made of, so the loss is higher than the queue's alone."""
    block = {"type": "mochi", "size": 10, "hardest": 4, "mixtures": 6, "query_mixtures": 3}
    mixing, plain, other = (
        build_objective({**block, **more}, 8) for more in ({}, {"mixtures": 0, "query_mixtures": 0}, {"seed": 1})
    )
    found = [[step(one, batch(seed=seed))[0].item() for seed in range(4)] for one in (mixing, plain, other)]
    assert found[0][:2] == found[1][:2] == found[2][:2]  # the queue holds ten after the second step
    assert all(more > less for more, less in zip(found[0][2:], found[1][2:], strict=True))
    assert found[0][2:] != found[2][2:]


def test_known_positives_in_the_queue_do_not_mix() -> None:
    """A queue of nothing but the query's own positive: no negative is left, and no mixture."""
    queries, documents, labels = batch(queries=1, negatives=0)
    objective = build_objective({"type": "mochi", "size": 3, "hardest": 2}, 8)
    objective.queue.put(documents.vectors.expand(3, -1), labels.document_keys.expand(3, -1))
    assert objective(queries, documents, labels)[0] == 0


@pytest.mark.parametrize("hardest", [None, 2, 99])
def test_metrix_against_loops(hardest) -> None:
    """Pairs that share a positive are no match to mix with; of the others the nearest `hardest` are mixed."""
    queries, documents, labels = batch(negatives=0)
    keys = labels.document_keys.clone()
    keys[1] = keys[0]
    twins = replace(labels, document_keys=keys, positive_keys=keys.unsqueeze(1))
    objective = build_objective({"type": "metrix", "margin": 1.0, "hardest": hardest}, 8)
    share = torch.rand(3, generator=torch.Generator().manual_seed(0)).median().item()
    q, p = (functional.normalize(one.vectors, dim=1) for one in (queries, documents))
    losses = []
    for i in range(5):
        others = [j for j in range(5) if i != j and {i, j} != {0, 1}]
        for j in sorted(others, key=lambda j: -float(q[i] @ p[j]))[:hardest]:
            mixed = functional.normalize(share * p[i] + (1 - share) * p[j], dim=0)
            distance = (q[i] - mixed).norm().item()
            losses.append(share * distance + (1 - share) * max(0.0, 1.0 - distance))
    assert objective(queries, documents, twins)[0].item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    first = step(objective, (queries, documents, twins))[0]
    assert step(objective, (queries, documents, twins))[0] != first  # another share


def test_temperatures_follow_the_content_not_the_place() -> None:
    objective = build_objective({"type": "isogclr", "temperature": 0.1})
    queries, documents, labels = batch(queries=4, negatives=0)
    step(objective, (queries, documents, labels))
    order = torch.tensor([2, 0, 3, 1])
    moved = replace(
        labels,
        document_keys=labels.document_keys[order],
        query_keys=labels.query_keys[order],
        positive_keys=labels.positive_keys[order],
    )
    shuffled = objective(queries.rows(order), documents.rows(order), moved)
    straight = objective(queries, documents, labels)
    torch.testing.assert_close(shuffled[0], straight[0])
    assert straight[1]["seen_before"] == 1
    fresh, _ = build_objective({"type": "isogclr", "temperature": 0.1})(queries, documents, labels)
    assert not torch.isclose(straight[0], fresh)


def test_random_numbers_follow_from_seed_and_step() -> None:
    for name in ("rafa", "whitened"):
        of, losses = batch(queries=9), []
        for seed in (0, 0, 1):
            objective = build_objective({"type": name, "seed": seed})
            losses.append([step(objective, of)[0].item() for _ in range(2)])
        assert losses[0] == losses[1] != losses[2]
        assert losses[0][0] != losses[0][1]


def test_whitened_groups_have_the_identity_as_covariance() -> None:
    vectors = torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ torch.diag(
        torch.arange(1.0, 11).double()
    )
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    white = whiten(vectors, 4, order)[:, order]  # groups of 4, 4 and 2
    for group in white.split(4, dim=1):
        torch.testing.assert_close(group.T @ group / 50, torch.eye(group.shape[1], dtype=torch.float64))


def test_codes_are_balanced() -> None:
    scores = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0, 0, 0, 0])
    codes = balanced(scores, iterations=100)
    torch.testing.assert_close(codes.sum(1), torch.ones(40))
    torch.testing.assert_close(codes.sum(0), torch.full((4,), 10.0))


def test_discrimination_against_loops() -> None:
    scores = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    positive = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]]).bool()
    expected = []
    for row, chosen in zip(scores.tolist(), positive.tolist(), strict=True):
        push = sum(torch.tensor(s).double().exp() for s, one in zip(row, chosen, strict=True) if not one)
        pull = sum(torch.tensor(-s).double().exp() for s, one in zip(row, chosen, strict=True) if one)
        expected.append((1 + push).log() + (1 + pull).log())
    torch.testing.assert_close(discrimination(scores, positive), torch.stack(expected))


def test_prototypes_separate_what_swapping_agrees_on() -> None:
    """Two clusters of pairs: after some steps each prototype holds one."""
    generator = torch.Generator().manual_seed(0)
    which = torch.arange(20) % 2
    near = functional.one_hot(which, 8).float()
    queries, documents = (Embeddings(near + 0.1 * torch.randn(20, 8, generator=generator)) for _ in range(2))
    labels = batch(queries=20, negatives=0)[2]
    for target, more in (("swapped", {}), ("multi_label", {"labels": 1})):
        objective = build_objective({"type": "prototypes", "prototypes": 2, "target": target, **more}, 8)
        optimizer = torch.optim.SGD(objective.parameters(), lr=1.0)
        for _ in range(50):
            optimizer.zero_grad()
            objective(queries, documents, labels)[0].backward()
            optimizer.step()
        nearest = (queries.vectors @ functional.normalize(objective.prototypes, dim=1).T).argmax(1)
        assert (nearest == which).all() or (nearest == 1 - which).all(), target


def test_parts_of_the_same_content_are_no_negatives() -> None:
    means, vectors = torch.eye(2), torch.eye(2).unsqueeze(1)
    mask, alike = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, 2, dtype=torch.bool)
    assert of_parts(means, vectors, mask, alike, 1.0) == 0


@pytest.mark.parametrize(
    ("block", "of", "message"),
    [
        ("whitened", {}, "'whitened': source 'letters' gives 5 pairs a batch, it needs 7"),
        ("cwcl", {"queries": 1}, "'cwcl': source 'letters' gives 1 pairs a batch, it needs 2"),
        ("global_local", {}, "'global_local' compares an input with its vectors: use pooling 'multi_vector'"),
    ],
)
def test_too_little_is_refused_with_source_and_objective(block, of, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)(*batch(**of))


@pytest.mark.parametrize("name", ["cwcl", "gram", "negclip", "isogclr", "negative_queue", "mochi", "metrix"])
def test_sources_without_in_batch_negatives_are_refused(name) -> None:
    """In a batch, and before one is made."""
    queries, documents, labels = batch(positives=2)
    with pytest.raises(ConfigError, match=f"'{name}'.*'letters' has in_batch_negatives: false"):
        build_objective(name)(queries, documents, replace(labels, in_batch=False))
    source = SimpleNamespace(name="letters", source=SimpleNamespace(in_batch_negatives=False))
    with pytest.raises(ConfigError, match=f"'{name}'.*'letters' has in_batch_negatives: false"):
        build_objective(["uniformity", name]).check([source])


@pytest.mark.parametrize("name", ["negative_queue", "mochi", "proto_clip", "tcl"])
def test_whole_vectors_are_kept_also_where_no_dim_is_the_full_size(name) -> None:
    """Under matryoshka: the memory is that of the objective alone, and acts."""
    block, of = block_of(name), batch(queries=8, positives=3, negatives=0)
    whole, cut = build_objective(block, 8), build_objective({**block, "matryoshka": {"dims": [4, 2]}}, 8)
    empty = {key: value.clone() for key, value in whole.state_dict().items()}
    step(whole, of)
    first, _ = step(cut, of)
    kept = cut.objective.state_dict()
    for key, _ in whole.named_buffers():
        torch.testing.assert_close(kept[key], whole.state_dict()[key])
        assert not torch.equal(kept[key], empty[key])
    again, _ = step(cut, of)
    assert again.item() != first.item() and torch.isfinite(again)


def test_supcon_and_prototypes_take_classes() -> None:
    """Classification data: no in-batch negatives, documents that stand for a class."""
    queries, documents, labels = batch()
    labels = replace(labels, in_batch=False)
    for name in ("supcon", "prototypes"):
        assert torch.isfinite(build_objective(name, 8)(queries, documents, labels)[0])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"type": "isogclr", "temperature": 2.0},
            "isogclr.temperature: 2.0 is not between lowest 0.005 and highest 1.0",
        ),
        ({"type": "gram", "modalities": 2}, "gram.modalities: found 2"),
        ({"type": "prototypes", "target": "multi_label", "labels": 64}, "prototypes.labels: 64 of 64 prototypes"),
        ({"type": "mochi", "size": 8, "hardest": 9}, "mochi.hardest: 9 of a queue of 8"),
        ({"type": "metrix", "margin": 0}, "metrix.margin: found 0"),
        (
            {"type": "contrastive_gap", "contrastive": 0, "uniform": 0, "cross_uniform": 0, "align": 0},
            "all weights are 0",
        ),
        ({"type": "amcl", "embedding_size": 4}, "unknown option 'embedding_size'"),
    ],
)
def test_options_out_of_range(block, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_objective(block)


def test_queries_with_too_few_views_are_left_out_and_counted() -> None:
    queries, documents, labels = batch(queries=4, positives=2)
    relevance = labels.relevance.clone()
    relevance[1] = 0  # the first query has one positive
    loss, metrics = build_objective("gram")(queries, documents, replace(labels, relevance=relevance))
    rest = replace(
        labels,
        owner=labels.owner[3:] - 1,
        relevance=labels.relevance[3:],
        document_keys=labels.document_keys[3:],
        query_keys=labels.query_keys[1:],
        positive_keys=labels.positive_keys[1:],
    )
    alone, _ = build_objective("gram")(Embeddings(queries.vectors[1:]), Embeddings(documents.vectors[3:]), rest)
    torch.testing.assert_close(loss, alone)
    assert metrics["left_out"] == 0.25


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"objective": ["infonce", "gram"]},
            "'gram' compares a query with 2 positives: set data.positives_per_qu",
        ),
        ({"objective": "global_local"}, "'global_local' [+] pooling 'mean': .* use pooling 'multi_vector'"),
        (
            {"objective": {"type": "alignment", "matryoshka": {"dims": [4]}}, "pooling": "multi_vector"},
            "'alignment' [+] pooling 'multi_vector': it compares one vector an input",
        ),
    ],
)
def test_a_config_that_gives_too_little_is_refused_before_data_are_read(block, message) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(build_config(block))


@pytest.mark.parametrize("name", ["margin_mse", "dse"])
def test_dot_products_of_unit_vectors_are_not_compared_with_a_teachers_scores(name) -> None:
    """`normalize: true` is the model's default, and dot products are those of the losses' papers."""
    with pytest.raises(ConfigError, match=f"'{name}' [+] normalize: true: .*Set normalize: false.*similarity: cosine"):
        preflight(build_config({"objective": name}))
    plain = {"type": "contrastive", "loss": name}
    for objective in (name, plain, ["infonce", name], {"by_task": {"retrieval": [name]}}):
        built = build_objective(objective)
        with pytest.raises(ConfigError, match=f"'{name}' [+] normalize: true"):
            _check_objective(build_config({"objective": objective, "normalize": True}), built)
        _check_objective(build_config({"objective": objective, "normalize": False}), built)
    cosines = {"type": name, "similarity": "cosine"}
    _check_objective(build_config({"objective": cosines}), build_objective(cosines))


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_tcl_of_several_vectors_is_that_of_their_means(momentum) -> None:
    queries, documents, labels = batch(queries=4, positives=3, negatives=0)
    generator = torch.Generator().manual_seed(9)
    several = []
    for side in (queries, documents):
        parts = torch.randn(len(side.vectors), 3, 8, generator=generator)
        several.append(Embeddings(parts, torch.tensor([True, True, False]).expand(len(parts), -1)))
    means = []
    for side in several:
        rows = [sum(vector / vector.norm() for vector in parts[:2]) for parts in side.vectors]
        means.append(Embeddings(torch.stack(rows)))
    block = {"type": "tcl", "size": 8, "momentum": momentum}
    taught = [replace(labels, taught=None if momentum is None else tuple(sides)) for sides in (several, means)]
    of_many, of_means = build_objective(block, 8), build_objective(block, 8)
    for _ in range(2):  # with what the queues hold of the first step
        found, _ = step(of_many, (*several, taught[0]))
        expected, _ = step(of_means, (*means, taught[1]))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_many.similarity_of(*several), of_means.similarity_of(*means))


def test_all_terms_of_tcl_stand_in_one_list() -> None:
    *_, labels = batch(queries=4, positives=3, negatives=0)
    mask = torch.tensor([True, True, False])
    parts = [torch.randn(n, 3, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in (4, 12)]
    several = [Embeddings(one, mask.expand(len(one), -1)) for one in parts]
    objective = [{"type": "tcl", "size": 8, "weight": 2 / 3}, {"type": "global_local", "weight": 1 / 3}]
    config = build_config(
        {"objective": objective, "pooling": "multi_vector", "data": {"positives_per_query": 3, "train_group_size": 3}}
    )
    whole = build_objective(config.objective, 8)
    _check_objective(config, whole)
    loss, _ = step(whole, (*several, labels))
    local, _ = build_objective("global_local")(*several, labels)
    others, _ = build_objective({"type": "tcl", "size": 8}, 8)(*several, labels)
    torch.testing.assert_close(loss, 1 / 3 * local + 2 / 3 * others)
    loss.backward()
    for one in parts:
        assert one.grad[:, :2].any() and not one.grad[:, 2].any()
    whole.view(whole.gather(*several, labels))


@pytest.mark.parametrize("seed", range(4))
def test_who_is_the_same_against_loops(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(0, 40, (9,), generator=generator)
    views, known = (torch.randint(0, 40, (9, count, 2), generator=generator) for count in (2, 3))
    expected = torch.zeros(9, 9, dtype=torch.bool)
    for i in range(9):
        contents = {int(queries[i]), *views[i, :, 0].tolist(), *known[i, :, 0].tolist()}
        ids = {*views[i, :, 1].tolist(), *known[i, :, 1].tolist()}
        for j in range(9):
            shared = contents & {int(queries[j]), *views[j, :, 0].tolist()} or ids & set(views[j, :, 1].tolist())
            expected[i, j] |= bool(shared)
            expected[j, i] |= bool(shared)
    assert same_content(queries, views, known).equal(expected)
    assert not expected.all()


def test_nobody_meets_nothing() -> None:
    assert meet(torch.zeros(3, 2).long(), torch.zeros(0, 1).long()).shape == (3, 0)
    assert meet(torch.zeros(0, 2).long(), torch.zeros(4, 1).long()).shape == (0, 4)
