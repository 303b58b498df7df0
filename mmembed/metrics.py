"""Ranking and correlation metrics on arrays.

Everything about a ranking is in two arrays: `ranked`, the relevance of each query's documents in ranked order, and
`judged`, the relevance of all its judged documents (what a perfect ranking could have found). Each metric is one
function of these that returns a value per query, so that means, confidence intervals and paired tests stay possible.
Numbers agree with trec_eval (so with mteb): linear gain, a document is relevant when its relevance is above 0, a query
without a relevant document counts 0. `gain="exponential"` (2^relevance - 1) is the other convention in use, equal for
binary relevance.

Cost: sorting each row, O(Q C log C); numpy only.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmembed.errors import MmembedError

Floats = NDArray[np.float64]
Gain = Literal["linear", "exponential"]
Run = Mapping[str, Mapping[str, float]]  # query id -> document id -> score
Qrels = Mapping[str, Mapping[str, float]]  # query id -> document id -> relevance


def ndcg_at_k(ranked: ArrayLike, judged: ArrayLike, k: int, gain: Gain = "linear") -> Floats:
    """Normalised discounted cumulative gain (Järvelin and Kekäläinen 2002, as in trec_eval's ndcg_cut).

    Args:
        ranked: (Q, K) relevance in ranked order, 0 for unjudged documents and for padding.
        judged: (Q, R) relevance of every judged document, any order, padded with 0.
        k: the cut.
        gain: `linear` counts the relevance itself, `exponential` counts 2^relevance - 1.

    Returns:
        (Q,) values in [0, 1].
    """
    ideal = -np.sort(-_gains(judged, gain), axis=1)
    best = _discounted_sum(ideal, k)  # (Q,)
    found = _discounted_sum(_gains(ranked, gain), k)  # (Q,)
    return _ratio(found, best)


def recall_at_k(ranked: ArrayLike, judged: ArrayLike, k: int) -> Floats:
    """(Q,) share of the relevant documents that stand among the first k."""
    return _ratio(_relevant(ranked)[:, :k].sum(1), _relevant(judged).sum(1))


def precision_at_k(ranked: ArrayLike, k: int) -> Floats:
    """(Q,) share of relevant documents among the first k; a shorter ranking is still divided by k."""
    return _ratio(_relevant(ranked)[:, :k].sum(1), np.full(len(_rows(ranked)), k))


def hit_at_k(ranked: ArrayLike, k: int) -> Floats:
    """(Q,) 1 where a relevant document stands among the first k. At k = 1: is the first answer right."""
    return np.asarray(_relevant(ranked)[:, :k].any(1), dtype=np.float64)


def reciprocal_rank_at_k(ranked: ArrayLike, k: int) -> Floats:
    """(Q,) one over the rank of the first relevant document, 0 if it is beyond k. Its mean is MRR@k."""
    relevant = _relevant(ranked)[:, :k]
    if relevant.shape[1] == 0:
        return np.zeros(len(relevant))
    return np.asarray(np.where(relevant.any(1), 1.0 / (relevant.argmax(1) + 1), 0.0))


def average_precision_at_k(ranked: ArrayLike, judged: ArrayLike, k: int) -> Floats:
    """(Q,) mean over **all** relevant documents of the precision at their rank, 0 beyond k (trec_eval's map_cut)."""
    relevant = _relevant(ranked)[:, :k]  # (Q, min(k, K))
    precision = relevant.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    return _ratio((precision * relevant).sum(1), _relevant(judged).sum(1))


def pairwise_accuracy(scores: ArrayLike, relevance: ArrayLike, valid: ArrayLike | None = None) -> Floats:
    """(Q,) share of a query's document pairs with different relevance that the scores put in the right order.

    Equal scores count one half; a query without such a pair is NaN (there is nothing to get right). Chance is 0.5
    whatever the pool looks like, which nDCG on pools of four candidates is not.

    Args:
        scores, relevance: (Q, C); valid: (Q, C) bool, which columns are candidates of the query.
    """
    values, labels, mask = _matrices(scores, relevance, valid)
    out = np.full(len(values), np.nan)
    for row in range(len(values)):
        score, label = values[row, mask[row]], labels[row, mask[row]]
        ordered = label[:, None] > label[None, :]  # (n, n) pairs (better, worse)
        if ordered.any():
            difference = (score[:, None] - score[None, :])[ordered]
            out[row] = ((difference > 0) + 0.5 * (difference == 0)).mean()
    return out


def pooled_auc(scores: ArrayLike, relevance: ArrayLike, k: int = 500, valid: ArrayLike | None = None) -> float:
    """Area under one ROC curve of all queries together: can one threshold on the score serve every query?

    The pool holds every positive (relevance above 0) and the k best-scored others of every query, as in the
    Mann-Whitney loss's paper (arXiv 2510.00137, with k = 500). Unlike an area by query it sees scores that are shifted
    from query to query. Equal scores count one half. NaN without a positive or without another document.

    Args:
        scores, relevance: (Q, C); valid: (Q, C) bool, which columns are candidates of the query.

    Raises:
        MmembedError: k below 1, shapes differ, or a score is NaN.
    """
    found, wrong = pool(scores, relevance, k, valid)
    if not len(found) or not len(wrong):
        return float("nan")
    ranks = average_ranks(np.concatenate([found, wrong]))[: len(found)]
    return float((ranks.sum() - len(found) * (len(found) + 1) / 2) / (len(found) * len(wrong)))


def pool(
    scores: ArrayLike, relevance: ArrayLike, k: int = 500, valid: ArrayLike | None = None
) -> tuple[Floats, Floats]:
    """(P,) scores of every positive and (N,) of the k best others of every query. See `pooled_auc`."""
    if k < 1:
        raise MmembedError(f"pooled_auc: k is {k}; give the number of other documents a query, 1 or more")
    values, labels, mask = _matrices(scores, relevance, valid)
    positive = mask & (labels > 0)  # (Q, C)
    others = -np.sort(-np.where(mask & ~positive, values, -np.inf), axis=1)[:, :k]  # (Q, min(k, C))
    kept = np.arange(others.shape[1]) < (mask & ~positive).sum(1, keepdims=True)
    return values[positive], others[kept]


@dataclass(frozen=True)
class Calibration:
    """How often pairs of a probability are relevant, in B equal bins from 0 to 1; a bin holds its upper edge.

    Attributes:
        count: (B,) pairs. probability: (B,) their mean probability. relevant: (B,) the share that is relevant; both NaN
            where there is no pair.
    """

    count: NDArray[np.int64]
    probability: Floats
    relevant: Floats

    @property
    def error(self) -> float:
        """Expected calibration error, the mean distance of the two over all pairs (Guo et al., arXiv 1706.04599, eq.
        3); NaN without a pair."""
        if not self.count.sum():
            return float("nan")
        return float((np.nan_to_num(np.abs(self.probability - self.relevant)) * self.count).sum() / self.count.sum())


def calibration(probabilities: ArrayLike, relevance: ArrayLike, bins: int = 10) -> Calibration:
    """Whether probabilities of being relevant can be taken as such.

    Args:
        probabilities: (N,) from 0 to 1. relevance: (N,), above 0 is relevant. bins: B.

    Raises:
        MmembedError: shapes differ, a value is no probability, or bins is below 1.
    """
    values, relevant = np.asarray(probabilities, dtype=np.float64), np.asarray(relevance, dtype=np.float64) > 0
    if values.shape != relevant.shape or values.ndim != 1:
        raise MmembedError(f"calibration: shapes {values.shape} and {relevant.shape}; give two series of one length")
    if bins < 1 or not ((values >= 0) & (values <= 1)).all():
        raise MmembedError("calibration: give probabilities from 0 to 1, and 1 bin or more")
    places = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], values)  # (N,)
    count = np.bincount(places, minlength=bins)  # (B,)
    with np.errstate(invalid="ignore"):
        return Calibration(
            count,
            np.bincount(places, weights=values, minlength=bins) / count,
            np.bincount(places, weights=relevant, minlength=bins) / count,
        )


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two (N,) series, equal values sharing their mean rank. NaN if one is constant."""
    return pearson(average_ranks(a), average_ranks(b))


def pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Pearson's correlation of two (N,) series. NaN if one is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise MmembedError(f"correlation: shapes {x.shape} and {y.shape}; give two series of one length")
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / scale, -1.0, 1.0)) if scale > 0 else float("nan")


def average_ranks(values: ArrayLike) -> Floats:
    """(N,) ranks from 1 for the smallest; equal values share the mean of their ranks."""
    array = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = counts.cumsum()  # (U,) rank of the last member of each group of equal values
    return ((2 * last - counts + 1) / 2)[inverse]


def rank_by_score(scores: ArrayLike, relevance: ArrayLike, valid: ArrayLike | None = None) -> tuple[Floats, Floats]:
    """Turns a score matrix into (`ranked`, `judged`).

    Equal scores keep the order of their columns; columns sorted by document id, descending, give trec_eval's order.

    Args:
        scores: (Q, C) higher is better. relevance: (Q, C), 0 where unjudged. valid: (Q, C) bool, which columns are
            candidates of the query (all by default); the others rank last and count 0, in `judged` too.

    Raises:
        MmembedError: shapes differ, or a score is NaN (a NaN would be ranked somewhere, silently).
    """
    values, labels, mask = _matrices(scores, relevance, valid)
    labels = np.where(mask, labels, 0.0)
    order = np.argsort(-np.where(mask, values, -np.inf), axis=1, kind="stable")  # (Q, C)
    # A candidate scored -inf and a column that is no candidate sort alike; both stand at the end.
    return np.take_along_axis(labels, order, axis=1), labels


def rank_run(run: Run, qrels: Qrels) -> tuple[Floats, Floats]:
    """Turns a run and its judgements into (`ranked`, `judged`), one row a query of `run`, in its order.

    Ties are broken as trec_eval does: by document id, descending.
    """
    rows = [sorted(documents.items(), key=lambda item: (item[1], item[0]), reverse=True) for documents in run.values()]
    judgements = [qrels.get(query, {}) for query in run]
    labels = [[judged.get(document, 0.0) for document, _ in row] for row, judged in zip(rows, judgements, strict=True)]
    return _pad(labels), _pad([list(judged.values()) for judged in judgements])


def retrieval_metrics(ranked: ArrayLike, judged: ArrayLike, ks: Iterable[int] = (1, 10, 100)) -> dict[str, float]:
    """Means over queries, named as in mteb: `ndcg_at_10`, `recall_at_10`, `map_at_10`, `mrr_at_10`, `hit_rate_at_10`.

    Args:
        ranked, judged: as in `ndcg_at_k`. ks: the cuts.
    """
    metrics: dict[str, float] = {}
    for k in ks:
        metrics[f"ndcg_at_{k}"] = float(ndcg_at_k(ranked, judged, k).mean())
        metrics[f"recall_at_{k}"] = float(recall_at_k(ranked, judged, k).mean())
        metrics[f"map_at_{k}"] = float(average_precision_at_k(ranked, judged, k).mean())
        metrics[f"mrr_at_{k}"] = float(reciprocal_rank_at_k(ranked, k).mean())
        metrics[f"hit_rate_at_{k}"] = float(hit_at_k(ranked, k).mean())
    return metrics


def _gains(relevance: ArrayLike, gain: Gain) -> Floats:
    values = np.maximum(_rows(relevance), 0.0)
    if gain == "linear":
        return values
    if gain == "exponential":
        return np.exp2(values) - 1.0
    raise MmembedError(f"ndcg: there is no gain '{gain}'; known: exponential, linear")


def _discounted_sum(gains: Floats, k: int) -> Floats:
    cut = gains[:, :k]  # (Q, min(k, K))
    total: Floats = cut @ (1.0 / np.log2(np.arange(2, cut.shape[1] + 2)))  # (Q,)
    return total


def _ratio(part: ArrayLike, whole: ArrayLike) -> Floats:
    """(Q,) part / whole, 0 where there is no whole."""
    above, below = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    out = np.zeros_like(above)
    np.divide(above, below, out=out, where=below > 0)
    return out


def _relevant(relevance: ArrayLike) -> NDArray[np.bool_]:
    return _rows(relevance) > 0


def _rows(relevance: ArrayLike) -> Floats:
    values = np.asarray(relevance, dtype=np.float64)
    if values.ndim != 2:
        raise MmembedError(f"metrics: relevance has shape {values.shape}; give one row a query, (Q, K)")
    return values


def _matrices(scores: ArrayLike, relevance: ArrayLike, valid: ArrayLike | None) -> tuple[Floats, Floats, NDArray[Any]]:
    values, labels = np.asarray(scores, dtype=np.float64), np.asarray(relevance, dtype=np.float64)
    mask = np.ones(values.shape, dtype=bool) if valid is None else np.asarray(valid, dtype=bool)
    if not (values.ndim == 2 and values.shape == labels.shape == mask.shape):
        raise MmembedError(
            f"metrics: scores {values.shape}, relevance {labels.shape} and valid {mask.shape} differ; "
            "give three matrices (Q, C)"
        )
    if np.isnan(values[mask]).any():
        raise MmembedError("metrics: a score is NaN; the model gave vectors that are not numbers")
    return values, labels, mask


def _pad(rows: list[list[float]]) -> Floats:
    padded = np.zeros((len(rows), max(map(len, rows), default=0)))
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
