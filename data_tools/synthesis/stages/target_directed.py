"""Items that bring the data nearer to a target: GOT-D (arXiv 2405.02774), gradients of optimal transport.

    OT(mu, nu)    = min over couplings P of  sum P |x_i - y_j|^2 + reg KL(P | mu nu)    mu: all items, nu: the target
    gradient_i    = f_i - mean of f_j over j != i,    f: the dual potential of mu

More weight on an item, taken evenly from all others, changes the distance at the rate of its gradient (calibrated as in
LAVA, arXiv 2305.00054); the items with the lowest go on. With all items for the data a model has seen, these are those
that move it most towards the target, which is not the same as those next to it: where the data has enough of a kind
already, more of it brings nothing. Vectors are of length 1.

The paper takes the pre-training data's own proxy for mu; here it is what there is, the items. `reg` is a share of the
mean distance. POT solves it.

Cost: each distinct content is encoded once, in shards that a kill leaves there. 8,000 items and 1,000 of the target
take 30 steps, 1 s and 200 MB; above 67 million distances they are computed anew in each step, 60 times as slow, in
blocks of constant memory. Besides, a vector in float64 an item, and 170 bytes a distinct content.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.encoding import Rows, encoder_of, in_shards, seen
from data_tools.synthesis.evaluation_sets import EvaluationSet, Opened
from data_tools.synthesis.sides import SIDES_OF, Side, check_sides, is_positive
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, kind_of
from mmembed.content import Role
from mmembed.errors import ConfigError, MmembedError
from mmembed.registry import Above0, Positive

TOLERANCE = 1e-6  # of the marginals, in sum
STEPS = 1000
DENSE = 1 << 26  # distances that are kept in memory: above, they are computed anew in each step
MOST = 4.0  # distance of vectors of length 1
EXPONENT = 600.0  # of float64, with room: above, the logarithms are summed instead
_BLOCK = 1 << 22  # distances in memory together
Doubles = NDArray[np.float64]


class TargetDirected(SetStage):
    """Keeps the items that move the data towards a target.

    Args:
        embedder: block of a retriever with vectors, as in mining.
        target: path of a set, or {path, split}: a BEIR folder, a file of records or of contents, a folder of pictures.
        share: of the items that go on. count: how many, in its place.
        side: what is compared: queries, or documents (of a record the mean of its positives). None takes queries where
            there are some.
        max_target: of the target's entries, a sample.
        reg: of the transport, a share of the mean distance.
    """

    name: ClassVar[str] = "target_directed"

    def __init__(
        self,
        below_root: Callable[[str], Path],
        embedder: str | dict[str, Any],
        target: str | EvaluationSet,
        share: Above0 | None = None,
        count: Positive | None = None,
        side: Side | None = None,
        max_target: Positive = 2000,
        reg: Above0 = 0.05,
    ) -> None:
        if (share is None) == (count is None):
            raise ConfigError(f"{self.name}: give one of share and count")
        if share is not None and share > 1:
            raise ConfigError(f"{self.name}.share: found {share}; give a share, at most 1")
        self.encoder, self.target = encoder_of(embedder, self.name), Opened(self.name, target, below_root)
        self.encoder.fingerprint()  # the model is there
        self.share, self.count, self.side, self.max_target, self.reg = share, count, side, max_target, reg

    def gives(self, kind: Kind) -> Kind:
        check_sides(self.name, kind, () if self.side is None else (self.side,))
        return kind

    def fingerprint(self) -> Any:
        return [self.encoder.fingerprint(), self.target.stamps()]

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        if not len(items):
            return
        side = self.side or SIDES_OF[kind_of(next(iter(items)))][0]
        own, target = self._of_items(items, side, context), self._of_target(side, context)
        gradients, steps = calibrated_gradients(own, target, self.reg)
        context.notes["entries of the target"], context.notes["steps of Sinkhorn's algorithm"] = len(target), steps
        count = min(len(items), self.count or max(1, round((self.share or 1.0) * len(items))))
        kept = np.zeros(len(items), np.bool_)
        kept[np.argsort(gradients, kind="stable")[:count]] = True
        for place, item in enumerate(items):
            yield item if kept[place] else Dropped(item, "brings nothing nearer", f"gradient {gradients[place]:.4g}")

    def _of_items(self, items: Items, side: Side, context: Context) -> Doubles:
        """(n, E) of length 1."""
        rows = Rows(items, side, context.media, self.encoder.reads)
        vectors = rows.vectors(self.encoder, context)  # (N, E)
        found = np.empty((len(items), vectors.shape[1]))
        for place, item in enumerate(items):
            own = unit(vectors[rows[place]])
            if side == "document" and "documents" in item:
                own = own[[is_positive(one) for one in item["documents"]]]
            found[place] = own.mean(axis=0)
        return unit(found)

    def _of_target(self, side: Side, context: Context) -> Doubles:
        """(m, E) of length 1, of a sample of the distinct contents."""
        from data_tools.mining.retrievers import Item as Entry

        media = self.target.media(context.media.limits)
        distinct: dict[bytes, Entry] = {}
        for entry in self.target:
            if entry.side in (None, side):
                one = Entry(entry.content, None, entry.id, self.target.name)
                distinct.setdefault(seen(one, media, self.encoder.reads), one)
        if not distinct:
            raise ConfigError(f"{self.name}.target: {self.target.path} has no {side}; set side, or another target")
        keys = list(distinct)
        chosen = context.random("target").sample(range(len(keys)), min(self.max_target, len(keys)))
        left = [keys[place] for place in sorted(chosen)]
        role: Role = side
        return unit(
            in_shards(
                context,
                "target-vectors",
                np.frombuffer(b"".join(left), "V16"),
                (distinct[key] for key in left),
                lambda part: self.encoder.encode(part, role),
                lambda: self.encoder.load(media),
            )
        )


def calibrated_gradients(own: Doubles, target: Doubles, reg: float) -> tuple[Doubles, int]:
    """(n,) how fast the transport's cost grows with the weight of each of n points, and the steps that it took.

    Args:
        own: (n, E) points of equal weight, of length 1. target: (m, E).
        reg: of the entropy, a share of the mean squared distance.

    Raises:
        MmembedError: the algorithm has not converged.
    """
    try:
        import ot
    except ImportError as error:
        raise MmembedError(f"target_directed needs POT ({error}); pip install 'mmembed[data]'") from None
    mean = (own**2).sum(axis=1).mean() + (target**2).sum(axis=1).mean() - 2 * own.mean(axis=0) @ target.mean(axis=0)
    strength = max(reg * mean, np.finfo(np.float64).tiny)
    options = {"stopThr": TOLERANCE, "log": True, "warn": False}
    if len(own) * len(target) <= DENSE and MOST / strength < EXPONENT:
        even = [np.full(len(points), 1 / len(points)) for points in (own, target)]
        _, log = ot.sinkhorn(*even, ot.dist(own, target), strength, numItermax=STEPS, **options)
        scaling = np.log(log["u"])
    else:
        blocks = max(1, _BLOCK // len(target)), max(1, _BLOCK // len(own))
        scaling, _, log = ot.bregman.empirical_sinkhorn(
            own, target, strength, numIterMax=STEPS, isLazy=True, batchSize=blocks, **options
        )
    if log["err"][-1] > TOLERANCE:
        raise MmembedError(
            f"target_directed: the transport has not converged in {STEPS} steps (off by {log['err'][-1]:.1e}); "
            "raise reg"
        )
    potential = strength * np.asarray(scaling)  # up to a constant, which calibration takes out
    count = max(2, len(own))
    return (potential - potential.mean()) * count / (count - 1), log["niter"] + 1


def unit(vectors: NDArray[Any]) -> Doubles:
    """(n, E) of length 1."""
    wide = np.asarray(vectors, np.float64)
    return np.asarray(wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), np.finfo(np.float64).tiny))
