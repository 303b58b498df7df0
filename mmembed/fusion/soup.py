"""A greedy soup: of several models those whose mean is best, judged on data that none of them was trained on.

Model soups (Wortsman et al., arXiv 2203.05482, section 2): models are sorted by their validation score; one after the
other joins the soup if the mean with it scores no lower than without. The soup is never worse than the best model, on
the data that judged. Cost: 2 K - 1 evaluations of K models, one whole model on disk at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from mmembed.benchmark_run import main_scores, run_benchmark
from mmembed.errors import MmembedError
from mmembed.fusion.fuse import fuse


@dataclass(frozen=True)
class Greedy:
    """What a greedy selection did.

    Attributes:
        order: the models by their own score, the best first; equal ones in the order given.
        chosen: those of the soup, in that order.
        alone: the score of each model.
        tried: of every other model in that order, the score of the soup with it.
    """

    order: list[int]
    chosen: list[int]
    alone: list[float]
    tried: list[float]

    @property
    def score(self) -> float:
        """Of the soup."""
        best = self.alone[self.order[0]]
        for model, score in zip(self.order[1:], self.tried, strict=True):
            best = score if model in self.chosen else best
        return best


def select(count: int, score: Callable[[Sequence[int]], float]) -> Greedy:
    """Chooses of `count` models, by a function that scores the mean of some of them (higher is better)."""
    alone = [score([model]) for model in range(count)]
    order = sorted(range(count), key=lambda model: -alone[model])
    chosen, best, tried = order[:1], alone[order[0]], list[float]()
    for model in order[1:]:
        tried.append(score([*chosen, model]))
        if tried[-1] >= best:
            chosen, best = [*chosen, model], tried[-1]
    return Greedy(order, chosen, alone, tried)


def greedy_soup(
    models: Sequence[str | Path],
    output: str | Path,
    options: Sequence[str],
    *,
    first: str | None = None,
    report: Callable[[str], None] = lambda line: None,
    **writing: Any,
) -> dict[str, Any]:
    """Writes the greedy soup of some models.

    Args:
        options: of `eval.run`, which scores: `--tasks`, `--benchmark`, `--split`, ... The score is the mean of the
            tasks' main scores.
        first: of rerankers, the model whose finds they order.
        report: is told of each score.
        writing: of `fuse`: base, dtype, max_shard_size.

    Returns:
        What `fusion.json` says; its `greedy` has the scores.

    Raises:
        MmembedError: a model cannot be fused or scored, or not all models were scored on the same tasks.
    """
    if len(models) < 2:
        raise MmembedError(f"--greedy: found {len(models)} model; give at least two to choose from")
    tasks: set[str] = set()
    with tempfile.TemporaryDirectory(prefix="mmembed-soup-") as scratch:
        soup = Path(scratch) / "soup"

        def score(members: Sequence[int]) -> float:
            if len(members) > 1:
                fuse([models[member] for member in members], soup, **writing)
            model = soup if len(members) > 1 else Path(models[members[0]])
            scores = main_scores(run_benchmark(model, Path(scratch) / "scores.json", options, first))
            if not scores or (tasks and scores.keys() != tasks):
                raise MmembedError(
                    f"{model}: was scored on {', '.join(sorted(scores)) or 'no task'}"
                    + (f", others on {', '.join(sorted(tasks))}" if tasks else "")
                    + "; name tasks that every model can be scored on"
                )
            tasks.update(scores)
            number = fmean(scores.values())
            report(f"{' + '.join(str(models[member]) for member in members)}: {number:.4f}")
            return number

        found = select(len(models), score)
    told = {"order": found.order, "chosen": found.chosen, "alone": found.alone, "tried": found.tried}
    told |= {"score": found.score, "evaluated": list(options), "first_stage": first, "tasks": sorted(tasks)}
    asked = {"greedy": {"of": [str(model) for model in models], **told}}
    return fuse([models[member] for member in found.chosen], output, record=asked, **writing)
