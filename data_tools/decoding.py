"""Draws the tokens of a batch, row by row, as each row's request says; `transformers.generate` does the rest.

Of a row's logits in float64: the tokens that the schema's grammar cannot go on with are taken out, then the softmax at
the row's temperature, the smallest set of tokens that holds `top_p`, and one number of the row's own random generator,
which falls on a token of the cumulated probabilities. So no row sees the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_tools.generators import Finish, Sampling


@dataclass
class Row:
    """A request while it is answered.

    limit: tokens that it may have.
    generator: of its random numbers.
    matcher: llguidance's, of its schema.
    """

    sampling: Sampling
    limit: int
    generator: torch.Generator
    matcher: Any = None
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Finish | None = None


class Drawing:
    """Leaves each row one token to choose: a logits processor.

    Args:
        ends: tokens that end an answer.
        decode: tokens -> text.
    """

    def __init__(self, rows: Sequence[Row], ends: Sequence[int], decode: Callable[[list[int]], str]) -> None:
        self.rows, self.ends, self.decode = rows, list(ends), decode

    def __call__(self, input_ids: Tensor, scores: Any) -> Tensor:
        left = torch.full_like(scores, -torch.inf)  # (B, V)
        logits = scores.double().cpu()  # (B, V)
        for number, row in enumerate(self.rows):
            left[number, self.ends[0] if row.finish else self._next(row, logits[number])] = 0.0
        return left

    def _next(self, row: Row, logits: Tensor) -> int:
        """Draws a token of (V,) logits, and sees what it means for the row."""
        if row.matcher is not None:
            bits = np.frombuffer(row.matcher.compute_bitmask(), np.uint8)
            allowed = torch.from_numpy(np.unpackbits(bits, bitorder="little", count=len(logits)))
            logits = logits.masked_fill(allowed == 0, -torch.inf)
        token = draw(logits, row.sampling, row.generator)
        row.tokens.append(token)
        row.finish = self._finish(row, token)
        return token

    def _finish(self, row: Row, token: int) -> Finish | None:
        """Whether the row has ended with this token, and how; then it has its text."""
        if row.matcher is not None and token not in self.ends:
            row.matcher.consume_token(token)
        ended = token in self.ends or (row.matcher is not None and row.matcher.is_stopped())
        if not (row.sampling.stop or ended or len(row.tokens) == row.limit):
            return None
        row.text = self.decode(row.tokens)
        places = [place for stop in row.sampling.stop if (place := row.text.find(stop)) >= 0]
        if places:
            row.text = row.text[: min(places)]
        if places or ended:
            return "stop"
        return "length" if len(row.tokens) == row.limit else None


class Ended:
    """A stopping criterion: which rows have ended; all of them, once `stopped` is true."""

    def __init__(self, rows: Sequence[Row], stopped: Callable[[], bool]) -> None:
        self.rows, self.stopped = rows, stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        ended = [row.finish is not None or self.stopped() for row in self.rows]
        return torch.tensor(ended, device=input_ids.device)  # (B,)


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token of (V,) logits in float64."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    likely = torch.softmax(logits / sampling.temperature, dim=0)
    if sampling.top_p < 1:
        ordered, tokens = torch.sort(likely, descending=True, stable=True)
        likely[tokens[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0.0  # likelier ones hold top_p already
    cumulated = likely.cumsum(0)
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * cumulated[-1]
    return min(int(torch.searchsorted(cumulated, drawn, right=True)), int(likely.nonzero()[-1]))
