"""What every objective promises, asked of each that is registered: a new file is picked up by itself.

What an objective computes is tested beside it, in tests/unit and tests/golden. One that looks at no vectors promises
nothing about them: `captioning`, whose tests are in tests/equivalence/test_captioning.py. Those of rerankers read
logits of pairs: tests/unit/test_ranking_losses.py asks the same of them.
"""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from safetensors.torch import load, save

from mmembed.data.labels import BatchLabels, label_keys, label_values
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError
from mmembed.objectives import OBJECTIVES, Objective, build_objective
from mmembed.objectives.aligned import Aligned
from mmembed.training.gradcache import contrastive_step
from tests.contract.options import CLASSES, block
from tests.equivalence.toy import SIZE, ToyEncoder, gradients, make_batch, relative, teaching
from tests.runs import in_two_processes

Vectors = tuple[Embeddings, Embeddings]
OF_VECTORS = {name: cls for name, cls in OBJECTIVES.classes().items() if cls.compares and not cls.judges}
BLOCKS: dict[str, dict[str, object]] = {name: block(name) for name in OF_VECTORS}
for cls in OF_VECTORS.values():  # those that can have a teacher, both ways
    if "momentum" in inspect.signature(cls).parameters:
        taught = inspect.signature(cls).parameters["momentum"].default is None
        name = f"{cls.name} {'with' if taught else 'without'} a teacher"
        BLOCKS[name] = {"type": cls.name, "momentum": 0.9 if taught else None}
NAMES = list(BLOCKS)
QUERIES, POSITIVES, GROUP = 8, 3, 5
NO_NEGATIVES = {"alignment", "mlcd", "mochi", "pairs", "proto_clip", "prototypes", "rafa", "uniformity"}
NO_NEGATIVES |= {"tcl with a teacher"}  # the augmentations of other pairs are
MANY = [name for name, cls in OBJECTIVES.classes().items() if cls.many_vectors]


def build(name: str, **options: object) -> Objective:
    return build_objective({**BLOCKS[name], **options}, SIZE, depth=2)


def labels(empty: bool = False, twins: bool = False, taught: Vectors | None = None) -> BatchLabels:
    """Three positives and two negatives a query, the classes in turn. `empty`: query 5 has no positive; `twins`: the
    first positives of the queries 0 and 1 are one content; `taught`: what a teacher makes of them (any vectors)."""
    keys = torch.arange(QUERIES * GROUP).view(QUERIES, GROUP) + 100
    if twins:
        keys[1, 0] = keys[0, 0]
    relevance = torch.tensor([1.0] * POSITIVES + [0.0] * (GROUP - POSITIVES)).repeat(QUERIES, 1)
    if empty:
        relevance[5] = 0
    both = keys.unsqueeze(-1).expand(-1, -1, 2)  # (Q, G, 2)
    return BatchLabels(
        owner=torch.arange(QUERIES).repeat_interleave(GROUP),
        relevance=relevance.flatten(),
        document_keys=both.flatten(0, 1),
        query_keys=torch.arange(QUERIES),
        positive_keys=both[:, :POSITIVES],
        source="letters",
        label_keys=label_keys([[(CLASSES[query % len(CLASSES)],)] for query in range(QUERIES)]),
        label_values=label_values([[(CLASSES[query % len(CLASSES)],)] for query in range(QUERIES)]),
        taught=taught or teachers(),
    )


def teachers(size: int = SIZE) -> Vectors:
    """Their first `size` dimensions."""
    queries, documents = (Embeddings(one.vectors.detach()[..., :size]) for one in vectors(seed=1))
    return queries, documents


def vectors(name: str = "contrastive", seed: int = 0) -> Vectors:
    """One vector an input, or three of which one is padding, as the objective compares them."""
    generator = torch.Generator().manual_seed(seed)
    if name in MANY:
        both = [torch.randn(n, 3, SIZE, generator=generator).requires_grad_() for n in (QUERIES, QUERIES * GROUP)]
        mask = torch.tensor([True, True, False])
        return Embeddings(both[0], mask.expand(QUERIES, -1)), Embeddings(both[1], mask.expand(QUERIES * GROUP, -1))
    queries, documents = (torch.randn(n, SIZE, generator=generator) for n in (QUERIES, QUERIES * GROUP))
    return Embeddings(queries.requires_grad_()), Embeddings(documents.requires_grad_())


def step(objective: Objective, queries: Embeddings, documents: Embeddings, of: BatchLabels) -> torch.Tensor:
    """Loss of a step, which the objective then remembers."""
    gathered = objective.gather(queries, documents, of)
    loss, _ = objective.compare(gathered)
    objective.remember(gathered)
    objective.commit()
    return loss


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_what_goes_in(name: str) -> None:
    objective, (queries, documents) = build(name), vectors(name)
    step(objective, queries, documents, labels())  # a queue is full only then
    loss, metrics = objective(queries, documents, labels())
    assert loss.shape == () and torch.isfinite(loss)
    assert metrics and all(value.shape == () and not value.requires_grad for value in metrics.values())
    loss.backward()
    learned = [("queries", queries.vectors), ("documents", documents.vectors), *objective.named_parameters()]
    for what, tensor in learned:
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all() and tensor.grad.any(), what
    assert objective.similarity_of(queries, documents).shape == (QUERIES, QUERIES * GROUP)
    assert objective.reads <= {"relevance", "score", "labels"}


@pytest.mark.parametrize("name", NAMES)
def test_the_monitors_see_it(name: str) -> None:
    objective, (queries, documents) = build(name), vectors(name)
    view = objective.view(objective.gather(queries, documents, labels()))
    assert (
        view.similarities.shape == view.relevance.shape == view.valid.shape == (QUERIES, len(view.candidates.vectors))
    )
    assert (view.valid & (view.relevance > 0)).any(1).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_finite_under_autocast(name: str) -> None:
    objective, (queries, documents) = build(name), vectors(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = objective(queries, documents, labels())
    loss.backward()
    plain, _ = build(name)(queries, documents, labels())
    assert loss.item() == pytest.approx(plain.item(), rel=0.05)
    for tensor in (queries.vectors, documents.vectors, *objective.parameters()):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_its_parameters_may_have_16_bits(name: str, dtype: torch.dtype) -> None:
    """DeepSpeed casts all parameters of the trained module, the objective's with the model's; not buffers."""
    objective, plain = build(name), build(name)
    for parameter in objective.parameters():
        parameter.data = parameter.data.to(dtype)
    for one in (objective, plain):
        step(one, *vectors(name), labels())
    queries, documents = vectors(name)
    loss, _ = objective(queries, documents, labels())
    assert loss.item() == pytest.approx(plain(*vectors(name), labels())[0].item(), rel=0.03)
    loss.backward()
    for tensor in (queries.vectors, documents.vectors, *objective.parameters()):
        assert torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MANY and isinstance(build(name), Aligned)])
def test_vectors_of_16_bits_are_compared_in_32(name: str) -> None:
    of_16 = [Embeddings(side.vectors.detach().bfloat16()) for side in vectors(name)]
    of_32 = [Embeddings(side.vectors.float()) for side in of_16]
    (loss, _), (exact, _) = (build(name)(*sides, labels()) for sides in (of_16, of_32))
    assert torch.equal(loss, exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_query_without_a_positive_does_no_harm(name: str) -> None:
    objective, (queries, documents) = build(name), vectors(name)
    loss = step(objective, queries, documents, labels(empty=True))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.vectors.grad).all() and torch.isfinite(documents.vectors.grad).all()
    if isinstance(objective, Aligned):  # elsewhere other queries' documents may repel it
        assert not queries.vectors.grad[5].any()


@pytest.mark.parametrize("name", NAMES)
def test_equal_vectors_do_no_harm(name: str) -> None:
    """Collapse, where distances are 0, determinants and variances too."""
    objective, (queries, documents) = build(name), vectors(name)
    with torch.no_grad():
        queries.vectors.fill_(1.0)
        documents.vectors.fill_(1.0)
    loss = step(objective, queries, documents, labels())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(queries.vectors.grad).all() and torch.isfinite(documents.vectors.grad).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*MANY, "metrix")])  # it attracts mixtures
def test_the_same_content_is_no_negative(name: str) -> None:
    """Two queries share a positive (with vectors that differ, to see whose gradient is whose): the first is pushed away
    from the one beside the second only where the labels do not tell.

    The first query and the two positives are near each other, in three directions; all else is far away.
    """
    queries, documents = (one.vectors.detach() for one in vectors())
    axes = torch.eye(SIZE)
    queries, documents = queries - 4 * axes[0], documents - 4 * axes[0]
    queries[0], documents[0], documents[GROUP] = axes[0], axes[0] + axes[1], axes[0] + axes[2]
    pushed = []
    alike = Embeddings(queries), Embeddings(documents)
    for of in (labels(twins=True, taught=alike), labels(taught=alike)):
        moved = queries.clone().requires_grad_()
        build(name)(Embeddings(moved), Embeddings(documents.clone().requires_grad_()), of)[0].backward()
        pushed.append((moved.grad[0] @ axes[2]).item())
    told, untold = pushed
    assert told <= untold + 1e-7 if name in NO_NEGATIVES else told < untold - 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_cut_to_nested_dimensions(name: str) -> None:
    """What matryoshka asks of it: the loss of truncated embeddings, gathered once."""
    (queries, documents), sizes = vectors(name), (SIZE, 2)
    whole = build(name, matryoshka={"dims": list(sizes)})
    cut = [
        build(name)(queries.truncate(slice(n)), documents.truncate(slice(n)), labels(taught=teachers(n)))[0]
        for n in sizes
    ]
    torch.testing.assert_close(step(whole, queries, documents, labels()), sum(cut))
    assert torch.isfinite(step(whole, queries, documents, labels()))  # with what it remembers of the first step


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_nested_over_layers(name: str) -> None:
    """The sum over layers (and prefixes) of what it says of each; a memory of several layers' vectors is refused."""
    both = vectors(name)
    lower = [one._replace(vectors=one.vectors.detach().flip(-1).requires_grad_()) for one in both]
    nested = {"layers": [1, -1], "layer_weights": [0.5, 1.0], "kl_weight": 0, "dims": [SIZE, 2]}
    if any(buffer.is_floating_point() for buffer in build(name).buffers()):
        with pytest.raises(ConfigError, match=f"'{name.split()[0]}' remembers"):
            build(name, matryoshka=nested)
        return
    of_layer = [build(name, matryoshka={"dims": [SIZE, 2]})(*sides, labels())[0] for sides in (lower, both)]
    given = [one._replace(layers={1: under.vectors}) for one, under in zip(both, lower, strict=True)]
    taught = tuple(one._replace(layers={1: one.vectors}) for one in teachers())
    loss = step(build(name, matryoshka=nested), *given, labels(taught=taught))
    torch.testing.assert_close(loss, 0.5 * of_layer[0] + of_layer[1])
    loss.backward()
    assert all(one.vectors.grad.any() for one in (*both, *lower))


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_from_its_tensors(name: str) -> None:
    """As the trainer writes them: parameters and memory."""
    first, again, (queries, documents) = build(name), build(name), vectors(name)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)
    step(first, queries, documents, labels())
    again.load_state_dict(load(save(first.state_dict())))
    later = queries._replace(vectors=queries.vectors.roll(1, 0)), documents, labels()
    assert torch.equal(step(first, *later), step(again, *later))
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_taken_again_leaves_no_trace(name: str) -> None:
    """A comparison, or a step that ran out of memory, changes no memory."""
    objective, (queries, documents) = build(name), vectors(name)
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    gathered = objective.gather(queries, documents, labels())
    objective.compare(gathered)
    objective.remember(gathered)
    objective.forget()
    objective.commit()
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    step(objective, queries, documents, labels())
    changed = {key for key, value in objective.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key, _ in objective.named_buffers()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("keep_tokens", [0, 40])
def test_chunks_give_the_gradient_of_the_whole(name: str, keep_tokens: int) -> None:
    found = []
    for chunk_tokens, keep in ((10**6, None), (30, keep_tokens)):
        encoder, objective = ToyEncoder(multi_vector=name in MANY).double(), build(name).double()
        batch = make_batch(QUERIES, GROUP, chunk_tokens, positives=POSITIVES)
        teacher = teaching(encoder, objective)
        for _ in range(2):
            loss, _ = contrastive_step(encoder, objective, batch, keep, teacher=teacher)
            objective.commit()
        found.append((loss, gradients(encoder, objective)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert relative(found[1][1], found[0][1]) < 1e-9


@pytest.fixture(scope="module")
def of_two_processes() -> dict[str, list[float]]:
    return json.loads(in_two_processes("tests.contract.two_processes").stdout.strip().splitlines()[-1])


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_the_gradient_of_one(name: str, of_two_processes) -> None:
    """Loss, gradient and memory after two steps; where nothing is gathered, those of one process with a share each."""
    loss, gradient, memory = of_two_processes[name]
    assert max(loss, gradient, memory) < 1e-9
