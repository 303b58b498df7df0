"""SimCSE's pairs: a text and itself, encoded twice with different dropout masks.

L_i = -log( e^{cos(f(x_i, z), f(x_i, z')) / tau} / sum_j e^{cos(f(x_i, z), f(x_j, z')) / tau} )

with z and z' the masks of the two passes; tau .05 in the paper. The two sides are two inputs of a batch, each with its
own mask, which is why nothing of them is computed once for both (`PairMaker.apart`), and why a model without dropout is
refused: its two vectors would be one. A LoRA adapter begins as the zero matrix, so in the first step the sides are
equal and only the negatives teach; they part as the adapter grows.

Source: Gao et al., arXiv 2104.08821, section 3. BERT has dropout .1 in all layers; decoders have none, and
`adapter.dropout` acts on the adapter alone. Cost: nothing.

When: single sentences are to be compared (STS) and the model has dropout; the plainest baseline. Dropout of
a small adapter hardly parts the sides (docs/log.md).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from mmembed.content import Text
from mmembed.data.pair_base import Pair, PairMaker


class Dropout(PairMaker):
    """The document twice, told apart by dropout (unsupervised SimCSE); the model needs some.

    >>> pair = Dropout().draw("a red bus", np.random.default_rng(0))
    >>> pair.query == pair.positive == (Text("a red bus"),)
    True
    """

    name: ClassVar[str] = "dropout"
    apart: ClassVar[bool] = True
    by_dropout: ClassVar[bool] = True

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        return Pair((Text(text),), (Text(text),))
