"""Pairs that do not belong together: linear separation and small loss, which have to agree.

After LSA (Albert et al., arXiv 2407.05528): a small-loss detector is right about most samples, a linear separator of
frozen features, trained on what the loss says, sees what the loss does not, and each misses others; LSA trains on what
one and then the other calls clean, so only what both call noise is never trained on. That is what is left out here.

    loss       l(q, p) = -log softmax over p and other documents of cos / temperature (the contrastive loss itself); two
               Gaussians over all losses, and a pair is noise where the higher one has P > 0.95 (as LSA and DivideMix)
    linear     logistic regression on [q * p, |q - p|], trained on the verdicts of the loss; a pair is judged by one
               that was not trained on it (five folds, as in confident learning, arXiv 1911.00068)

Two departures: LSA takes the loss of the network in training, we that of a frozen embedder; and two Gaussians find two
groups where there is one, so a loss counts as noise only where it is as high as those of pairs that are surely wrong,
each query with a random document (the lowest 5 % of them apart). Measured on 2,000 pairs of squad-en, of which some got
another's passage, with all-MiniLM-L6-v2 (P precision, R recall of what is left out):

    wrong pairs              20 %             5 %              2 %              none
    two Gaussians alone      P .954  R .975   P .829  R .920   P .685  R .925   368 right ones left out
    as it is                 P .982  R .958   P .948  R .910   P .919  R .850     6
    drop: loss               P .975  R .975   P .933  R .970   P .841  R .925     6

So against random partners the separator buys precision with recall; with mmembed-nano at 20 % it is P .961, R .912.

Cost: each distinct content is encoded once, in shards that a kill leaves there; then a product of each query with
`others` documents, and separators trained on at most 20,000 pairs. Memory: 170 bytes a distinct content, 40 a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from data_tools.synthesis.encoding import Rows, encoder_of, unit
from data_tools.synthesis.sides import Fault, is_positive, without
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from mmembed.errors import MmembedError
from mmembed.registry import Above0, Below1, Positive

BLOCK = 4096  # pairs whose losses or features are in memory together
FOLDS = 5
SAMPLE = 20_000  # pairs that separators are trained on
FEW = 10  # noisy pairs: fewer train no separator
_REGULARISED = 0.1  # C of the logistic regressions
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


class Noise(SetStage):
    """Leaves out positives that do not belong to their query.

    Args:
        embedder: block of a retriever with vectors, as in mining.
        drop: what both detectors call noise, what one of them does, or what either does.
        temperature: of the loss.
        others: documents, drawn from those of the items, that a loss compares with.
        sure: probability of the group of high losses from which a pair is noise.
        apart: share of surely wrong pairs, the lowest in loss, that a loss may equal without being noise; None asks
            only for the two groups.
    """

    name: ClassVar[str] = "noise"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        embedder: str | dict[str, Any],
        drop: Literal["both", "loss", "linear", "either"] = "both",
        temperature: Above0 = 0.05,
        others: Positive = 1024,
        sure: Below1 = 0.95,
        apart: Below1 | None = 0.05,
    ) -> None:
        self.encoder = encoder_of(embedder, self.name)
        self.encoder.fingerprint()  # the model is there
        self.drop, self.temperature, self.others, self.sure, self.apart = drop, temperature, others, sure, apart

    def fingerprint(self) -> Any:
        return self.encoder.fingerprint()

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        if not len(items):
            return
        queries = Rows(items, "query", context.media, self.encoder.reads)
        documents = Rows(items, "document", context.media, self.encoder.reads)
        pairs = _Pairs(items, queries, documents)
        pairs.vectors = queries.vectors(self.encoder, context), documents.vectors(self.encoder, context)
        seed = context.random("noise").getrandbits(32)
        losses, wrong = self._losses(pairs, np.random.default_rng(seed))
        by_loss = self._high(losses, wrong, seed)
        by_line = self._separated(pairs, by_loss, seed, context)
        noisy = {"both": by_loss & by_line, "loss": by_loss, "linear": by_line, "either": by_loss | by_line}[self.drop]
        context.notes["pairs that the loss calls noise"] += int(by_loss.sum())
        context.notes["pairs that the separator calls noise"] += int(by_line.sum())
        at = 0
        for record in items:
            faults: list[Fault | None] = []
            for document in record["documents"]:
                judged = is_positive(document)
                bad = judged and bool(noisy[at])
                faults.append(Fault("does not belong to its query", f"loss {losses[at]:.3f}") if bad else None)
                at += judged
            yield from without(record, faults)

    def _losses(self, pairs: _Pairs, generator: np.random.Generator) -> tuple[Floats, Floats]:
        """(P,) of the pairs; and of surely wrong ones, each query with a document drawn for it."""
        asked, pool = pairs.vectors
        drawn = np.sort(generator.choice(len(pool), min(self.others, len(pool)), replace=False))  # (M,)
        if len(drawn) < 2:
            raise MmembedError(f"{self.name}: one document in all records tells nothing; give more records")
        against = unit(pool[drawn])  # (M, E)
        losses, wrong = np.empty(len(pairs), np.float32), [np.empty(0, np.float32)]
        for start in range(0, len(pairs), BLOCK):
            span = slice(start, min(start + BLOCK, len(pairs)))
            left, right = unit(asked[pairs.queries[span]]), unit(pool[pairs.documents[span]])  # (B, E)
            own = (left * right).sum(axis=1) / self.temperature  # (B,)
            scores = left @ against.T / self.temperature  # (B, M)
            known = np.zeros(scores.shape, np.bool_)  # (B, M)
            for column in pairs.positives[span].T:
                known |= drawn == column[:, None]
            rest = np.logaddexp.reduce(np.where(known, -np.inf, scores), axis=1)
            losses[span] = np.logaddexp(own, rest) - own
            place = generator.integers(0, len(drawn), len(own))
            rows = np.arange(len(own))
            wrong.append((np.logaddexp(own, rest) - scores[rows, place])[~known[rows, place]])
        return losses, np.concatenate(wrong)

    def _high(self, losses: Floats, wrong: Floats, seed: int) -> Bools:
        """(P,) which losses are of the higher of two groups, and as high as those of wrong pairs."""
        try:
            from sklearn.mixture import GaussianMixture
        except ImportError as error:
            raise MmembedError(f"noise needs scikit-learn ({error}); pip install 'mmembed[data]'") from None
        if len(losses) < 2 or not len(wrong) or np.ptp(losses) == 0:
            return np.zeros(len(losses), np.bool_)
        scaled = ((losses - losses.min()) / np.ptp(losses)).astype(np.float64)[:, None]  # (P, 1)
        mixture = GaussianMixture(2, tol=1e-4, reg_covar=5e-4, random_state=seed).fit(scaled)
        noisy = mixture.predict_proba(scaled)[:, int(mixture.means_[:, 0].argmax())] > self.sure
        if self.apart is not None:
            noisy &= losses >= np.quantile(wrong, self.apart)
        return np.asarray(noisy, np.bool_)

    def _separated(self, pairs: _Pairs, by_loss: Bools, seed: int, context: Context) -> Bools:
        """(P,) what separators say that were trained on the other folds."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        if min(by_loss.sum(), (~by_loss).sum()) < FEW:
            context.notes["too few pairs to train a separator: the loss decides alone"] += 1
            return by_loss
        generator = np.random.default_rng(seed)
        fold = generator.permutation(len(pairs)) % FOLDS
        sample = np.sort(generator.choice(len(pairs), min(SAMPLE, len(pairs)), replace=False))
        noisy = np.zeros(len(pairs), np.bool_)
        for number in range(FOLDS):
            train = sample[fold[sample] != number]
            if len(set(by_loss[train].tolist())) < 2:
                noisy[fold == number] = by_loss[fold == number]
                continue
            regression = LogisticRegression(C=_REGULARISED, class_weight="balanced", max_iter=1000)
            model = make_pipeline(StandardScaler(), regression).fit(pairs.features(train), by_loss[train])
            rest = np.flatnonzero(fold == number)
            for start in range(0, len(rest), BLOCK):
                part = rest[start : start + BLOCK]
                noisy[part] = model.predict(pairs.features(part))
        return noisy


class _Pairs:
    """Each query with each of its positives.

    Attributes:
        queries, documents: (P,) rows.
        positives: (P, W) rows of all positives of the pair's record, -1 behind the last.
        vectors: of queries and documents.
    """

    vectors: tuple[Floats, Floats]

    def __init__(self, items: Items, queries: Rows, documents: Rows) -> None:
        own: list[NDArray[np.int64]] = []
        for place, record in enumerate(items):
            own.append(documents[place][[is_positive(one) for one in record["documents"]]])
        counts = np.array([len(rows) for rows in own])
        self.queries, self.documents = np.repeat(queries.rows, counts), np.concatenate(own)
        padded = np.full((len(own), int(counts.max())), -1, np.int64)
        padded[np.arange(padded.shape[1]) < counts[:, None]] = self.documents
        self.positives = np.repeat(padded, counts, axis=0)

    def __len__(self) -> int:
        return len(self.documents)

    def features(self, places: NDArray[np.int64]) -> Floats:
        """(n, 2 E) of some pairs."""
        asked, pool = self.vectors
        left, right = unit(asked[self.queries[places]]), unit(pool[self.documents[places]])
        return np.concatenate([left * right, np.abs(left - right)], axis=1)
