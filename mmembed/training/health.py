"""Health monitors: what a step's vectors and gradients look like, and what to do where they look ill.

Contrastive training fails quietly: the loss sinks while all vectors become one, or stands at the value of guessing.
The numbers come from what a step has anyway (the gathered vectors, the labels, the gradients) in the steps that are
logged, without a gradient and without a random number, so a run's trajectory is the same with them. At most `ROWS`
vectors are looked at, which bounds the cost (docs/guide.md, health).

`judge` is a pure function of the log: the same findings are printed while training and shown in the run's report.
Thresholds, and why there:
- effective rank below 2 (with 8 candidates or more): the batch lies on a line; healthy ones use tens of directions;
- uniformity above -0.1: mean squared distance below .05, a cosine of .97 between any two contents;
- positives less than .005 more similar than negatives: below the rounding of bfloat16 vectors (2^-8);
- loss within 2 % of that of equal scores in five logs: nothing is told apart;
- three documents of ten repeated: that share of the in-batch negatives is masked or false;
- a gradient that is exactly 0, or not a number, never is an accident; but a loss scaler (fp16) finds its scale by
  gradients that overflow, whose steps it drops, so there it takes five logs.
The first three must hold in two logs in a row and not in a run's first log: a decoder that was never trained to embed
begins with nearly equal vectors, and leaves them within a few steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmembed.data.collate import Batch
from mmembed.diagnostics import alignment, duplicate_rate, effective_rank, modality_gap, uniformity
from mmembed.embeddings import Embeddings
from mmembed.objectives import View

ROWS = 512  # vectors that are looked at: their distances are 130,000 numbers
RANK, UNIFORMITY, GAP, CHANCE, DUPLICATES = 2.0, -0.1, 0.005, 0.02, 0.3
FEWEST = 8  # candidates for which a low rank means something
STUCK = 5  # logs in a row
RECENT = 4 * STUCK  # entries of a log, evaluations among them, that tell what is ill now
NORM, SCALE = "grad_norm_", "loss_scale"


@dataclass(frozen=True)
class Finding:
    """Something ill, at a step of the log."""

    step: int
    kind: str
    message: str


@torch.no_grad()
def look_at(view: View, queries: Embeddings, documents: Embeddings, batch: Batch) -> dict[str, float]:
    """The numbers of one batch.

    Args:
        view: of the objective: local queries, candidates of all processes.
        queries, documents: of this process, as `batch` has them.
    """
    mine, candidates = _directions(view.queries), _directions(view.candidates)  # (Q, E), (C, E)
    positive, negative = view.valid & (view.relevance > 0), view.valid & (view.relevance <= 0)
    rows, columns = positive.nonzero(as_tuple=True)  # (P,) each
    found = {f"masked_{reason}": share for reason, share in view.masked.items()}
    if len(candidates) > 1:  # none where no query of the batch has what the objective compares
        some = _spread(candidates)
        found |= {
            "score_gap": _mean(view.similarities, positive) - _mean(view.similarities, negative),
            "alignment": alignment(mine[rows], candidates[columns]),
            "uniformity": uniformity(some),
            "effective_rank": effective_rank(some),
        }
    if view.chance is not None:
        found["loss_at_chance"] = view.chance
    if batch.labels.in_batch:
        found["duplicate_rate"] = torch.tensor(duplicate_rate(batch.labels.document_keys[:, 0]))
    gap = _modality_gap(queries, documents, batch)
    if gap is not None:
        found["modality_gap"] = gap
    return {name: float(value) for name, value in found.items()}


def norm_of(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """The norm of the gradients that parameters hold; None where they hold none."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else None


@torch.no_grad()
def gradient_norms(
    parts: Mapping[str, Sequence[nn.Parameter]],
    scale: float = 1.0,
    norm: Callable[[Sequence[nn.Parameter]], Tensor | None] = norm_of,
) -> dict[str, float]:
    """Part -> norm of its gradient, before clipping. A part that the batch did not reach (a vision tower by texts) is
    left out.

    Args:
        scale: what a loss scaler has multiplied the gradients by.
        norm: of parameters, `Engine.norm`; None for those that the batch did not reach.
    """
    norms = {part: norm(parameters) for part, parameters in parts.items()}
    return {NORM + part: float(found) / scale for part, found in norms.items() if found is not None}


def parts_of(
    parameters: Iterable[tuple[str, nn.Parameter]], towers: Mapping[str, str], adapter: bool
) -> dict[str, Any]:
    """Trained parameters by part: adapter (or the towers of a full fine-tuning), pooling, objective.

    Args:
        parameters: (name, parameter) pairs. towers: name -> tower.
        adapter: whether the backbone is trained through one.
    """
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            tower = towers[name]
            part = tower if tower in ("pooling", "objective") or not adapter else "adapter"
            parts.setdefault(part, []).append(parameter)
    return parts


def judge(history: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is ill in a trainer's log, each kind where it begins.

    Args:
        history: `log_history` of the trainer's state; entries without a loss are passed over.
    """
    logs = [entry for entry in history if "loss" in entry]
    findings: list[Finding] = []
    before: set[str] = set()
    for place, entry in enumerate(logs):
        ill = dict(_ills(logs[max(0, place + 1 - STUCK) : place + 1], first=place < 2))
        findings += [Finding(int(entry["step"]), kind, message) for kind, message in ill.items() if kind not in before]
        before = set(ill)
    return findings


def _ills(logs: Sequence[Mapping[str, Any]], first: bool) -> Iterable[tuple[str, str]]:
    """(kind, message) of what is ill at the last of these logs. `first`: the run's first log is one of the last two."""
    last = logs[-1]
    for name in last:
        if name == "grad_norm" or name.startswith(NORM):
            yield from _ill_gradient(name, logs)
    for name in ("loss", "effective_rank"):
        if not math.isfinite(float(last.get(name, 0.0))):
            yield (
                "not a number",
                f"{name} is not a number: the run has diverged. Lower training.learning_rate (divide it by ten) and "
                "start from the last checkpoint before; look for broken records if it happens at the first step",
            )
    if not first:
        yield from _collapse(logs)
    if _stuck(logs):
        yield (
            "loss at chance",
            f"the loss has been that of equal scores ({last['loss_at_chance']:.3f}) in {STUCK} logs: nothing is told "
            "apart. Raise training.learning_rate, lower objective.temperature, or look at the pairs: are queries and "
            "positives of one record really related?",
        )
    if last.get("duplicate_rate", 0.0) > DUPLICATES:
        yield (
            "duplicates",
            f"{last['duplicate_rate']:.0%} of the documents of a batch repeat another one: they are masked where "
            "objective.mask_duplicates is on, false negatives where it is off, and no use either way. Remove "
            "duplicates, or set in_batch_negatives: false for sources whose documents are class names",
        )


def _ill_gradient(name: str, logs: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    part, value = name.removeprefix(NORM) if name.startswith(NORM) else "all", float(logs[-1][name])
    if not math.isfinite(value):
        if SCALE in logs[-1] and not _overflows(name, logs):
            return
        yield (
            f"gradient of {part}",
            f"the gradient of {part} parameters is not finite ({value}): lower training.learning_rate, set "
            "training.max_grad_norm (1.0), or train in bf16 instead of fp16",
        )
    elif value == 0.0:
        yield (
            f"gradient of {part}",
            f"the gradient of {part} parameters is exactly 0: nothing tells them what to "
            "change. Equal scores everywhere, saturated weights (lower training.learning_rate, go back to an earlier "
            "checkpoint), or a source without negatives: look at the batch report",
        )


def _overflows(name: str, logs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a gradient overflowed in STUCK logs: a loss scaler has no scale for it."""
    return len(logs) == STUCK and not any(math.isfinite(float(log.get(name, 0.0))) for log in logs)


def _collapse(logs: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str]]:
    remedy = (
        "Lower training.learning_rate (the usual cause), raise objective.temperature if it is below .02, enlarge the "
        "batch, and go back to a checkpoint before step {step}"
    ).format(step=logs[-1]["step"])
    last = logs[-1]
    if _twice(logs, lambda log: _candidates(log) >= FEWEST and log.get("effective_rank", RANK) < RANK):
        yield "rank collapse", f"vectors use {last['effective_rank']:.1f} directions: they lie on a line. {remedy}"
    if _twice(logs, lambda log: log.get("uniformity", -1.0) > UNIFORMITY):
        yield "collapse", f"all vectors are nearly one point (uniformity {last['uniformity']:.3f}). {remedy}"
    if _twice(logs, lambda log: abs(log.get("score_gap", 1.0)) < GAP):
        yield (
            "no gap",
            f"positives are no more similar than negatives (gap {last['score_gap']:.4f}). {remedy}; where it was so "
            "from the start, the pairs may be unrelated",
        )


def _candidates(log: Mapping[str, Any]) -> float:
    """That a query meets, or graded pairs that are compared."""
    return float(max(log.get("negatives", 0.0) + 1, log.get("pairs", 0.0)))


def _twice(logs: Sequence[Mapping[str, Any]], ill: Any) -> bool:
    return ill(logs[-1]) and ill(logs[-2])


def _stuck(logs: Sequence[Mapping[str, Any]]) -> bool:
    recent = [log for log in logs[-STUCK:] if log.get("loss_at_chance", 0.0) > 0]
    return len(recent) == STUCK and all(
        abs(log["loss"] - log["loss_at_chance"]) <= CHANCE * log["loss_at_chance"] for log in recent
    )


def _directions(embeddings: Embeddings) -> Tensor:
    """(N, E) unit vectors; several vectors an input stand as their mean."""
    vectors, mask, *_ = embeddings
    if mask is not None:
        vectors = (vectors * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return functional.normalize(vectors.float(), dim=-1)


def _spread(vectors: Tensor) -> Tensor:
    """At most ROWS of them, evenly."""
    return vectors[:: -(-len(vectors) // ROWS)]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values[mask].mean() if bool(mask.any()) else torch.tensor(float("nan"))


def _modality_gap(queries: Embeddings, documents: Embeddings, batch: Batch) -> Tensor | None:
    """Between inputs with and without pictures or sounds; None where the batch holds one kind."""
    pictured = torch.zeros(int(batch.place.max()) + 1, dtype=torch.bool)
    for chunk in batch.chunks:
        pictured[chunk.index] = torch.tensor([any(row.media) for row in chunk.rows])
    vectors = torch.cat([_directions(queries), _directions(documents)])  # (Q + D, E)
    kind = pictured[batch.place].to(vectors.device)
    if bool(kind.all()) or not bool(kind.any()):
        return None
    return modality_gap(vectors[kind], vectors[~kind])
