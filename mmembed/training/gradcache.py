"""One contrastive step in bounded memory, with the gradient of the undivided batch (GradCache, arXiv 2101.06983).

A contrastive loss couples all inputs of a batch only through their vectors, a language-model loss through one sum an
input. So: (1) encode chunk by chunk, (2) compute the objective on these and its gradient with respect to them, (3) send
that gradient back through each chunk.
Here a chunk keeps its graph after (1) as long as `keep_tokens` allow, and only the others are encoded a second time in
(3), with the random state of their first time, so dropout repeats. A batch that fits is encoded once: no extra cost;
one that does not fit costs up to a third more, in the memory of `keep_tokens` or of one chunk, whichever is larger.

A reranker's loss couples only the documents of a query. Where the objective says so (`separable`), the chunks that hold
all documents of their queries go forward and back at once, one such part after the other: no second pass, and no graph
but that of one part. Parts larger than `keep_tokens` that are several chunks go as above.

On a CPU, chunks of a narrow model that draws no random numbers are computed beside each other (`Workers`), and their
gradients added in the order of the chunks: the result does not depend on which thread was faster.

Where the objective learns from a teacher, the chunks go through that one first, without gradients and before any graph
is alive: the teacher's weights stand in the student's module meanwhile (`mmembed.training.teacher`).

Gradients are reduced over processes once a step, after the last chunk: chunks may differ in number and in modality
between processes, a parameter that one process did not use counts as zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmembed.data.collate import Batch, Chunk
from mmembed.embeddings import Embeddings
from mmembed.errors import MmembedError
from mmembed.objectives import Objective, View
from mmembed.objectives.gather import world
from mmembed.threads import beside_each_other
from mmembed.training.heap import give_back, giving_back

BUCKET = 32 * 2**20  # gradient values reduced at once: large enough for bandwidth, small enough to be no memory
Encode = Callable[[Chunk], Embeddings]
Backward = Callable[[list[Tensor], list[Tensor], bool], None]
Observe = Callable[[View, Embeddings, Embeddings], None]
Teacher = Callable[[], AbstractContextManager[Encode]]
Guard = Callable[[], AbstractContextManager[None]]
Learned = tuple[list[nn.Parameter], list[Tensor]]  # parameters of the objective and their gradients


@dataclass(frozen=True)
class RandomState:
    """The generators that dropout draws from: the CPU's, and the current device's (CUDA, MPS, ...)."""

    cpu: Tensor
    device: Tensor | None

    @classmethod
    def capture(cls) -> RandomState:
        module = _device_module()
        return cls(torch.get_rng_state(), None if module is None else module.get_rng_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            _device_module().set_rng_state(self.device)


@dataclass(frozen=True)
class Workers:
    """Threads that compute chunks beside each other, and the trainable parameters whose gradients they bring back."""

    count: int
    parameters: list[nn.Parameter]


def contrastive_step(
    encode: Encode,
    objective: Objective,
    batch: Batch,
    keep_tokens: int | None,
    scale: float = 1.0,
    backward: Backward | None = None,
    rounds: int | None = None,
    workers: Workers | None = None,
    guard: Guard = nullcontext,
    observe: Observe | None = None,
    teacher: Teacher | None = None,
    may_overflow: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds the gradient of `scale * objective(batch)` to the parameters of the model and of the objective.

    What the objective remembers of the batch is staged; call `objective.commit()` when the optimizer steps.

    Args:
        encode: a chunk -> its embeddings; draws randomness from torch's default generators only.
        keep_tokens: padded tokens whose graphs are kept between the passes; None keeps all, 0 none.
        scale: of the gradient (1 / accumulation steps, times a loss scale); not of the returned loss.
        backward: (outputs, their gradients, last) -> None, sends gradients back; `last` is true once, at the end.
            torch.autograd.backward if None.
        rounds: run so many forwards a pass and backwards, repeating the last chunk without effect: for engines whose
            forward and backward are collectives (ZeRO-2, ZeRO-3, FSDP2), where processes must not run different
            numbers. Only the graph of the last forward is kept then, if any.
        workers: compute chunks beside each other; `encode` must draw no random numbers then, and neither `backward` nor
            `rounds` can be given.
        guard: entered around each pass over the chunks, where no process waits for another: `Halving.guard` lets all
            processes know when one ran out of memory.
        observe: (the objective's view, local queries, local documents) -> None, called without gradients.
        teacher: entered around a pass over the chunks, gives what encodes with the teacher's weights; that draws no
            random numbers and runs no collective. Needed where the objective has a `teacher_momentum` for this batch.
        may_overflow: go on with vectors or a loss that are not finite: float16, whose loss scale skips such steps.

    Returns:
        The detached local loss and the objective's metrics.

    Raises:
        MmembedError: vectors or the loss are not finite; names source and objective.
    """
    count = len(batch.chunks)
    chunks = [*batch.chunks, *[batch.chunks[-1]] * max(0, (rounds or 0) - count)]
    if rounds is None:
        kept_from = first_kept(chunks, keep_tokens)
    else:
        kept_from = len(chunks) - int(keep_tokens is None or keep_tokens > 0)
    own = objective.part_for(batch.labels.source, batch.labels.task)
    if teacher is not None and own.teacher_momentum is not None:
        batch = _taught(teacher, batch, workers, guard)
    left, done = list(range(count)), dict[int, Embeddings]()
    if own.separable and rounds is None:
        parts, left, kept_from = whole_parts(batch, keep_tokens)
        done = _part_by_part(
            encode, objective, batch, parts, keep_tokens, scale, backward, workers, guard, may_overflow
        )
        chunks = [batch.chunks[number] for number in left]
    outputs, states = _first_pass(encode, chunks, kept_from, workers, guard)
    on_heap = kept_from > 0 and outputs[0].vectors.device.type == "cpu"
    if on_heap:
        give_back()
    found = done | dict(zip(left, outputs, strict=False))  # without what `rounds` repeat
    in_order = [found[number] for number in range(count)]
    loss, metrics, gradients, learned = _compare(objective, batch, in_order, scale, observe, may_overflow)
    gradients = [gradients[number] for number in left]
    if on_heap:
        give_back()
    if workers is not None:
        _add(*learned)
        _second_pass_beside(encode, chunks, kept_from, outputs, gradients, workers)
    else:
        back = backward or _plain_backward
        _second_pass(encode, chunks, kept_from, outputs, states, gradients, learned, back, rounds is not None, guard)
    return loss, metrics


def _first_pass(
    encode: Encode, chunks: Sequence[Chunk], kept_from: int, workers: Workers | None, guard: Guard
) -> tuple[list[Embeddings], list[RandomState]]:
    """The embeddings of each chunk, with a graph from `kept_from` on, and the random states before the others."""
    states: list[RandomState] = []

    def forward(number: int) -> Embeddings:
        with torch.set_grad_enabled(number >= kept_from):
            return encode(chunks[number])

    with guard():
        if workers is not None:  # of threads of a CPU
            return list(giving_back(beside_each_other(range(len(chunks)), forward, workers.count))), states
        outputs = []
        for number in range(len(chunks)):  # always in this order: dropout does not depend on what is kept
            if number < kept_from:
                states.append(RandomState.capture())
            outputs.append(forward(number))
    return outputs, states


def _taught(teacher: Teacher, batch: Batch, workers: Workers | None, guard: Guard) -> Batch:
    """The batch, its labels with the teacher's vectors."""
    with teacher() as encode:
        outputs, _ = _first_pass(encode, batch.chunks, len(batch.chunks), workers, guard)
    vectors = _assemble(batch, outputs)
    place = batch.place.to(vectors.vectors.device)
    taught = vectors.rows(place[: batch.n_queries]), vectors.rows(place[batch.n_queries :])
    return replace(batch, labels=replace(batch.labels, taught=taught))


def _part_by_part(
    encode: Encode,
    objective: Objective,
    batch: Batch,
    parts: Sequence[Sequence[int]],
    keep_tokens: int | None,
    scale: float,
    backward: Backward | None,
    workers: Workers | None,
    guard: Guard,
    may_overflow: bool,
) -> dict[int, Embeddings]:
    """Sends each part forward and back; returns the embeddings of its chunks, without a graph.

    Its gradient is that of the whole objective, with zeros for the embeddings of other parts: a query's loss does not
    look at those.
    """

    def forward(part: Sequence[int]) -> tuple[dict[int, Embeddings], list[Tensor], list[Tensor]]:
        with torch.enable_grad():
            outputs = {number: encode(batch.chunks[number]) for number in part}
        gradients = _gradient_of(objective, batch, outputs, scale, may_overflow)
        tensors = [one for output in outputs.values() for one in output.tensors]
        return {number: _detached(output) for number, output in outputs.items()}, tensors, gradients

    done: dict[int, Embeddings] = {}
    with guard():
        if workers is None:
            for part in parts:
                outputs, tensors, gradients = forward(part)
                (backward or _plain_backward)(tensors, gradients, False)
                done |= outputs
            return done
        trained = workers.parameters

        def both(part: Sequence[int]) -> tuple[dict[int, Embeddings], Sequence[Tensor | None]]:
            outputs, tensors, gradients = forward(part)
            tensors, gradients = _trained(tensors, gradients)
            found = torch.autograd.grad(tensors, trained, gradients, allow_unused=True) if tensors else []
            return outputs, found

        largest = max((sum(batch.chunks[one].padded_tokens for one in part) for part in parts), default=1)
        fitting = len(parts) if keep_tokens is None else max(1, keep_tokens // largest)
        for outputs, of_part in giving_back(beside_each_other(parts, both, min(workers.count, fitting))):
            _add(trained, of_part)
            done |= outputs
    return done


def _detached(output: Embeddings) -> Embeddings:
    return output.with_tensors([one.detach() for one in output.tensors])


def _gradient_of(
    objective: Objective, batch: Batch, outputs: Mapping[int, Embeddings], scale: float, may_overflow: bool
) -> list[Tensor]:
    """Gradients of `scale * loss` with respect to the embeddings of some chunks; those of others count as zeros."""
    cut = {
        number: output.with_tensors([one.detach().requires_grad_() for one in output.tensors])
        for number, output in outputs.items()
    }
    leaves = [leaf for output in cut.values() for leaf in output.tensors]
    known = next(iter(cut.values())).vectors  # (B, L)
    vectors = _assemble(
        batch,
        [
            cut[number] if number in cut else Embeddings(known.new_zeros(len(chunk.rows), *known.shape[1:]))
            for number, chunk in enumerate(batch.chunks)
        ],
    )
    if not may_overflow:
        _check_finite(vectors.vectors, "vectors", objective, batch)
    loss, _ = objective.compare(_gathered(objective, batch, vectors))
    return list(torch.autograd.grad(loss * scale, leaves, allow_unused=True, materialize_grads=True))


def _gathered(objective: Objective, batch: Batch, vectors: Embeddings) -> Any:
    place = batch.place.to(vectors.vectors.device)
    queries, documents = vectors.rows(place[: batch.n_queries]), vectors.rows(place[batch.n_queries :])
    return objective.gather(queries, documents, batch.labels.to(place.device))


def _compare(
    objective: Objective,
    batch: Batch,
    outputs: Sequence[Embeddings],
    scale: float,
    observe: Observe | None,
    may_overflow: bool,
) -> tuple[Tensor, dict[str, Tensor], list[list[Tensor]], Learned]:
    """Detached loss, metrics, gradients of `scale * loss`: of what `Embeddings.tensors` says of each chunk, and of the
    objective's parameters.

    The objective stages its news here and not after the second pass, which needs the memory of the pairs' matrices.
    """
    cut = [output.with_tensors([one.detach().requires_grad_() for one in output.tensors]) for output in outputs]
    leaves = [leaf for output in cut for leaf in output.tensors]
    vectors = _assemble(batch, cut)
    if not may_overflow:
        _check_finite(vectors.vectors, "vectors", objective, batch)
    gathered = _gathered(objective, batch, vectors)
    loss, metrics = objective.compare(gathered)
    if not may_overflow:
        _check_finite(loss, "loss", objective, batch)
    if observe is not None:
        with torch.no_grad():
            place = batch.place.to(leaves[0].device)
            queries, documents = vectors.rows(place[: batch.n_queries]), vectors.rows(place[batch.n_queries :])
            observe(objective.view(gathered), queries, documents)
    learned = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    # an objective of the positives alone does not touch the negatives' vectors
    found = torch.autograd.grad(loss * scale, [*leaves, *learned], allow_unused=True, materialize_grads=True)
    of_leaves = iter(found)
    of_chunks = [[next(of_leaves) for _ in output.tensors] for output in cut]
    objective.remember(gathered)
    return loss.detach(), metrics, of_chunks, (learned, list(of_leaves))


def _check_finite(values: Tensor, what: str, objective: Objective, batch: Batch) -> None:
    """Raises MmembedError: weights after this step would be NaN, and those of all later ones."""
    if bool(values.isfinite().all()):
        return
    source = batch.labels.source
    title = objective.part_for(source, batch.labels.task).title
    raise MmembedError(
        f"source '{source}', objective '{title}': the {what} of a batch {'are' if what == 'vectors' else 'is'} not "
        "finite (NaN or infinite). Where it happens at the first step, look at the weights and the data; where later, "
        "the run has diverged: go on from an earlier checkpoint with a tenth of training.learning_rate"
    )


def _second_pass(
    encode: Encode,
    chunks: Sequence[Chunk],
    kept_from: int,
    outputs: list[Embeddings],
    states: Sequence[RandomState],
    gradients: Sequence[list[Tensor]],
    learned: Learned,
    backward: Backward,
    in_rounds: bool,
    guard: Guard,
) -> None:
    """Sends the gradients back, chunk by chunk; a chunk without a graph is encoded again, with its random state.

    `outputs` lose their graphs as they are used. `in_rounds`: all processes run as many backwards (`rounds`).
    """
    parameters, of_learned = learned
    after = RandomState.capture()
    order = _backward_order(kept_from, len(chunks))
    with guard():
        for number in order:
            last = number == order[-1]
            output, outputs[number] = outputs[number].tensors, Embeddings(outputs[number].vectors.detach())
            if number < kept_from:
                states[number].restore()
                output = encode(chunks[number]).tensors
            gradient = gradients[number] if number < len(gradients) else [torch.zeros_like(one) for one in output]
            if last or in_rounds:
                # ZeRO-3 adds to the gradient of the step before where a parameter gets none in the first backward
                backward([*output, *parameters], [*gradient, *of_learned], last)
                of_learned = [torch.zeros_like(of_one) for of_one in of_learned]
            else:
                backward(output, gradient, last)
    after.restore()


def _second_pass_beside(
    encode: Encode,
    chunks: Sequence[Chunk],
    kept_from: int,
    outputs: list[Embeddings],
    gradients: Sequence[list[Tensor]],
    workers: Workers,
) -> None:
    """As `_second_pass`, by threads; gradients are added in the order of the chunks."""

    def back(number: int) -> Sequence[Tensor | None]:
        output, outputs[number] = outputs[number].tensors, Embeddings(outputs[number].vectors.detach())
        if number < kept_from:
            output = encode(chunks[number]).tensors
        output, gradient = _trained(output, gradients[number])
        return torch.autograd.grad(output, workers.parameters, gradient, allow_unused=True) if output else []

    order = _backward_order(kept_from, len(chunks))
    for of_chunk in giving_back(beside_each_other(order, back, workers.count)):
        _add(workers.parameters, of_chunk)


def _backward_order(kept_from: int, count: int) -> list[int]:
    """Kept graphs first: then their memory is free."""
    return [*range(kept_from, count), *range(kept_from)]


def _add(parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=False):  # none at all where a chunk has no graph
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Averages gradients over processes, in place. A parameter that no process used keeps no gradient."""
    size = world()[1]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if size == 1 or not trained:
        return
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
    used = used.to(trained[0].device)
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    gradients = []
    for parameter, is_used in zip(trained, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    for bucket in _buckets(gradients):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= size
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _device_module() -> Any:
    """`torch.cuda`, `torch.mps`, ...; None on a machine without an accelerator."""
    device = torch.accelerator.current_accelerator(check_available=True)
    return None if device is None else torch.get_device_module(device)


def first_kept(chunks: Sequence[Chunk], keep_tokens: int | None) -> int:
    """Chunks from here on keep their graph: the last ones, so that what follows finds them in the cache.

    `keep_tokens`: as in `contrastive_step`.
    """
    first = len(chunks)
    tokens = 0
    while first > 0:
        tokens += chunks[first - 1].padded_tokens
        if keep_tokens is not None and tokens > keep_tokens:
            break
        first -= 1
    return first


def whole_parts(batch: Batch, keep_tokens: int | None) -> tuple[list[list[int]], list[int], int]:
    """How a batch goes through the model where no query's loss looks at those of others.

    A part is the chunks that hold some queries and all of their documents, and none of others'. It goes forward and
    back at once if it is one chunk or fits `keep_tokens`.

    Returns:
        Such parts, numbers of chunks each; the other chunks, at least one of them; and where among these the graphs
        that are kept begin. The last part is among the others where there would be none: the whole loss is its end.
    """
    parts = _parts(batch)
    tokens = [sum(batch.chunks[number].padded_tokens for number in part) for part in parts]
    whole = [
        part
        for part, size in zip(parts, tokens, strict=True)
        if len(part) == 1 or keep_tokens is None or size <= keep_tokens
    ]
    left = sorted(number for part in parts if part not in whole for number in part)
    if not left:
        return whole[:-1], whole[-1], 0
    return whole, left, first_kept([batch.chunks[number] for number in left], keep_tokens)


def _parts(batch: Batch) -> list[list[int]]:
    """Numbers of the chunks that are bound together by queries that stand in several of them; in their order."""
    chunk_of = torch.empty(sum(len(chunk.rows) for chunk in batch.chunks), dtype=torch.long)  # of each distinct input
    for number, chunk in enumerate(batch.chunks):
        chunk_of[chunk.index] = number
    root = list(range(len(batch.chunks)))

    def find(number: int) -> int:
        while root[number] != number:
            number = root[number]
        return number

    first: dict[int, int] = {}
    owners = [*range(batch.n_queries), *batch.labels.owner.tolist()]  # of queries and documents
    for query, number in zip(owners, chunk_of[batch.place].tolist(), strict=True):
        a, b = sorted((find(first.setdefault(query, number)), find(number)))
        root[b] = a
    parts: dict[int, list[int]] = {}
    for number in range(len(batch.chunks)):
        parts.setdefault(find(number), []).append(number)
    return list(parts.values())


def _assemble(batch: Batch, parts: list[Embeddings]) -> Embeddings:
    """Embeddings of the chunks -> of all distinct inputs, in their order, sequences padded to the longest."""
    order = torch.cat([chunk.index for chunk in batch.chunks]).argsort().to(parts[0].vectors.device)
    return Embeddings.concatenate(parts).rows(order)


def _plain_backward(outputs: list[Tensor], gradients: list[Tensor], last: bool) -> None:
    torch.autograd.backward(*_trained(outputs, gradients))


def _trained(outputs: list[Tensor], gradients: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Those that have a graph."""
    pairs = [(output, grad) for output, grad in zip(outputs, gradients, strict=True) if output.requires_grad]
    return [output for output, _ in pairs], [gradient for _, gradient in pairs]


def _buckets(gradients: list[Tensor]) -> Iterable[list[Tensor]]:
    """Lists of at most BUCKET values of one dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        for gradient in same:
            if bucket and sum(item.numel() for item in bucket) + gradient.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(gradient)
        yield bucket
