"""A step that runs out of memory is taken again with half the chunks: same gradient, half the activations.

What a batch needs follows from its longest inputs, so a run can go on for hours before the batch comes that does not
fit. Chunking does not change a gradient beyond rounding (it does redraw dropout), so nothing is lost but the time of
one step. All processes halve together: each reports at two points of the step where none waits for another, after the
first pass over the chunks and after the second. Cost there: an all-reduce of one number each; nothing in one process.

Not redone: what fails between these points in several processes (the objective's score matrix), in the optimizer, and
steps whose forward passes are collectives (ZeRO, FSDP): another process waits inside one. Those end with the numbers
and what to change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from mmembed.config.blocks import EmbedderConfig
from mmembed.data.collate import Batch, Chunk, plan_chunks
from mmembed.errors import MmembedError
from mmembed.objectives.gather import world
from mmembed.training.gradcache import RandomState, first_kept

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_MORE_MESSAGES = ("not enough memory", "could not create a memory object", "CUBLAS_STATUS_ALLOC_FAILED")


class OutOfMemory(Exception):
    """Some process ran out of memory, and all processes know."""


@dataclass(frozen=True)
class Budget:
    """Padded tokens a chunk, inputs a chunk (None: no bound), and padded tokens whose graphs are kept (None: all)."""

    chunk_tokens: int
    chunk_rows: int | None
    keep_tokens: int | None

    def halved(self, largest: int, whole: int) -> Budget:
        """Half of what was really used: chunks of `largest` padded tokens, of batches of `whole`."""
        kept = whole if self.keep_tokens is None else min(self.keep_tokens, whole)
        return Budget(max(1, min(self.chunk_tokens, largest) // 2), self.chunk_rows, kept // 2)

    def logged(self) -> dict[str, float]:
        """For the run's log, where a resumed run finds it."""
        return {"chunk_tokens": self.chunk_tokens, "keep_tokens": self.keep_tokens or 0}

    def divide(self, batch: Batch) -> Batch:
        """The same batch, its chunks cut to this size."""
        return replace(batch, chunks=tuple(part for chunk in batch.chunks for part in self._cut(chunk)))

    def _cut(self, chunk: Chunk) -> list[Chunk]:
        shareable = [chunk.shared] * len(chunk.rows) if chunk.shared else None
        parts = plan_chunks(chunk.rows, self.chunk_tokens, self.chunk_rows, chunk.where, shareable, chunk.packed)
        return [replace(part, index=chunk.index[part.index]) for part in parts]

    def divisible(self, batch: Batch) -> bool:
        """Whether a smaller budget would make a difference."""
        cut = any(len(chunk.rows) > 1 and chunk.rows[0].tail is None for chunk in batch.chunks)  # a list is not
        return cut or first_kept(batch.chunks, self.keep_tokens) < len(batch.chunks)


class Halving:
    """Runs a trainer's steps, and runs them again with a halved budget when memory does not suffice.

    Args:
        budget: of the run's config.
        redo: False where forward passes are collectives; running out of memory is an error then.
        remedy: what the error tells to change.
    """

    def __init__(self, budget: Budget, device: torch.device, redo: bool, remedy: str) -> None:
        self.budget, self.configured, self.device, self.redo, self.remedy = budget, budget, device, redo, remedy
        self._batches: list[Batch] = []  # whose gradients this optimizer step holds so far
        self._state: RandomState | None = None

    def resume(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Goes on with the last budget that a trainer's log tells of, so that a resumed run draws the same dropout.

        A config that asks for less by now is obeyed.
        """
        self.budget, self._batches = self.configured, []
        for entry in history:
            if "chunk_tokens" in entry:
                chunk, rows, keep = (
                    self.configured.chunk_tokens,
                    self.configured.chunk_rows,
                    self.configured.keep_tokens,
                )
                logged = entry["keep_tokens"]
                self.budget = Budget(
                    min(chunk, entry["chunk_tokens"]), rows, logged if keep is None else min(keep, logged)
                )

    def run(
        self, batch: Batch, step: Callable[[Batch], Result], forget: Callable[[], None], last: bool
    ) -> tuple[Result, bool]:
        """`step` of a batch, which adds its gradient; on running out of memory `forget` and all of them again.

        Args:
            forget: drops the gradients that this optimizer step has added.
            last: whether an optimizer step follows.

        Returns:
            What `step` returned, and whether the budget was halved.

        Raises:
            MmembedError: it does not fit with one input a chunk and nothing kept, or cannot be redone here.
        """
        if not self._batches:
            self._state = RandomState.capture()
        self._batches.append(batch)
        pending, before = [batch], self.budget
        while True:
            found = ""
            try:
                for one in pending:
                    result = step(one if self.budget == self.configured else self.budget.divide(one))
            except Exception as error:
                if not (isinstance(error, OutOfMemory) or is_out_of_memory(error)):
                    raise
                found = _first_line(error)
                if not self.redo or (world()[1] > 1 and not isinstance(error, OutOfMemory)):
                    raise MmembedError(self._cannot_redo(found)) from None
            if not found:  # outside of the handler: the error's frames held the activations
                self._batches = [] if last else self._batches
                return result, self.budget != before
            forget()  # first, so that what follows finds room on the processor
            clear_device_cache(garbage_collection=True)
            self._halve(found)
            assert self._state is not None
            self._state.restore()
            pending = list(self._batches)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Raises OutOfMemory in all processes where one ran out of memory inside. The block must hold no collective."""
        if not self.redo or world()[1] == 1:  # `run` sees it
            yield
            return
        found = ""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found = _first_line(error)
        if self._most([int(bool(found))])[0]:
            raise OutOfMemory(found or "another process ran out of memory")

    def _halve(self, found: str) -> None:
        batches = self._divided()
        largest = max(chunk.padded_tokens for batch in batches for chunk in batch.chunks)
        whole = max(batch.padded_tokens for batch in batches)
        divisible = any(self.budget.divisible(batch) for batch in batches)
        largest, whole, some = self._most([largest, whole, int(divisible)])
        if not some:
            raise MmembedError(self._too_small(found, batches))
        before, self.budget = self.budget, self.budget.halved(largest, whole)
        logger.warning(
            "out of memory (%s) with chunks of %s padded tokens and %s kept: the step is taken again with %s and %s, "
            "and so are all later ones. The gradient is the same; to save the time lost here set "
            "training.token_budget lower",
            *(found, f"{largest:,}", _number(before.keep_tokens)),
            *(f"{self.budget.chunk_tokens:,}", _number(self.budget.keep_tokens)),
        )

    def _divided(self) -> list[Batch]:
        if self.budget == self.configured:
            return self._batches
        return [self.budget.divide(batch) for batch in self._batches]

    def _most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each over processes."""
        if world()[1] == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def _too_small(self, found: str, batches: Sequence[Batch]) -> str:
        chunk = max((chunk for batch in batches for chunk in batch.chunks), key=lambda chunk: chunk.padded_tokens)
        pictures = sum(len(row.images) for row in chunk.rows)
        of = f" ({chunk.where[0]})" if chunk.where else ""
        return (
            f"out of memory ({found}) even with one input a chunk and no graph kept: the longest input of this batch "
            f"has {chunk.padded_tokens:,} tokens with {pictures} pictures{of}, beside vectors of "
            f"{batches[0].n_queries} queries and {batches[0].n_documents} documents. {self.remedy}"
        )

    def _cannot_redo(self, found: str) -> str:
        reason = (
            "processes that compare their vectors would wait for this one"
            if self.redo
            else "under DeepSpeed and FSDP other processes wait for this one inside the forward pass"
        )
        budget = self.budget
        return (
            f"process {world()[0]}: out of memory ({found}) with chunks of up to {budget.chunk_tokens:,} padded tokens "
            f"and {_number(budget.keep_tokens)} kept. The step cannot be taken again here ({reason}): set "
            f"training.token_budget to half, and start again. {self.remedy}"
        )


def smaller(config: EmbedderConfig) -> str:
    """What would need less memory than a run's config asks for, its own numbers named."""
    lengths, model = config.lengths, config.model
    options = [
        f"lower lengths.document_max_length ({lengths.document_max_length}) or query_max_length "
        f"({lengths.query_max_length})",
        f"lower lengths.max_pixels ({lengths.max_pixels or 'the processor decides'}) where pictures are read",
    ]
    if not model.gradient_checkpointing:
        options.append("set model.gradient_checkpointing: true")
    if config.adapter.type == "none":
        options.append("train an adapter (adapter.type: lora) instead of all weights")
    elif config.adapter.type != "qlora":
        options.append("keep the backbone in 4 bits (adapter.type: qlora)")
    options.append("shard weights and optimizer state over several devices (training.deepspeed)")
    return "What needs less: " + "; ".join(options)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator or the CPU had no memory left: torch's errors, oneDNN's, python's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    return should_reduce_batch_size(error) or any(message in str(error) for message in _MORE_MESSAGES)


def _first_line(error: BaseException) -> str:
    """Of the message, without what torch puts around it."""
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return line[max(0, line.find("DefaultCPUAllocator")) :].partition(" Error code")[0].rstrip(".")


def _number(tokens: int | None) -> str:
    return "all" if tokens is None else f"{tokens:,}"
