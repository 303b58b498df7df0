"""Measures one trained arm on tasks of the local benchmark, in a process of its own.

    python -m eval.claims.measuring --model runs/x/embedder --tasks squad-en --vectors squad-en --output scores.json

mteb scores what it scores; the tasks of `--vectors` are encoded once more for two numbers of ours: `pooled_auc` and
`centroid_distance`, how far apart the mean unit vectors of queries and documents are (the gap of two modalities).
Vectors cut to `--dims` are tasks of their own, `squad-en@64`.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval import run
from eval.files import write_json
from eval.tasks.local import available, select
from mmembed import metrics
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

BLOCK = 256  # rows a batch of columns


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        write_json(options.output, measured(options))
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.claims.measuring", description="Measure one arm of a claim.")
    parser.add_argument("--model", required=True, help="folder of an embedder")
    parser.add_argument("--tasks", nargs="+", required=True, help="names or globs of the local benchmark")
    parser.add_argument("--vectors", nargs="*", default=[], help="of the tasks, those with metrics of vectors")
    parser.add_argument("--dims", nargs="*", type=int, default=[], help="measured again with cut vectors")
    parser.add_argument("--data-root", default=str(run.REPOSITORY / "data"), help="data sets")
    parser.add_argument("--instructions", default="never", choices=["auto", "always", "never"])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file: task -> name -> number")
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """task, or task@dim -> every number of it."""
    rows = select(available(Path(options.data_root)), options.tasks)
    found: dict[str, dict[str, float]] = {}
    for dim in (None, *options.dims):
        cut = [] if dim is None else ["--truncate-dim", str(dim)]
        given = run.parse(
            [
                *("--model", options.model, "--no-baselines", "--data-root", options.data_root, *cut),
                *("--instructions", options.instructions, "--tasks", *options.tasks),
            ]
        )
        model = run.load(options.model, given, rows)
        for row in rows:
            task = run.build(row, given)
            task.load_data()
            numbers = run.score(model, task, row, given.split)
            if row.name in options.vectors:
                if row.kind != "retrieval":
                    raise ConfigError(f"--vectors {row.name}: a task of kind '{row.kind}' has no corpus; remove it")
                numbers |= of_vectors(model.runner, task, given.split)
            name = row.name if dim is None else f"{row.name}@{dim}"
            found[name] = {key: float(value) for key, value in numbers.items()}
            print(f"{name}: {numbers['main']:.4f}", flush=True)
    return found


def of_vectors(runner: Any, task: Any, split: str) -> dict[str, float]:
    """`pooled_auc` and `centroid_distance` of a retrieval task."""
    queries, documents, scores, relevance = compared(runner, task, split)
    means = [np.mean(side / np.linalg.norm(side, axis=1, keepdims=True), axis=0) for side in (queries, documents)]
    return {
        "pooled_auc": metrics.pooled_auc(scores, relevance),
        "centroid_distance": float(np.linalg.norm(means[0] - means[1])),
    }


def compared(runner: Any, task: Any, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> queries (Q, E), documents (D, E), their similarities (Q, D) and relevance (Q, D)."""
    from mteb.types import PromptType

    data = task.dataset["default"][split]
    sides = []
    for key, side in (("queries", PromptType.query), ("corpus", PromptType.document)):
        batches = data[key].iter(batch_size=BLOCK)
        sides.append(runner.encode(batches, task_metadata=task.metadata, prompt_type=side))
    places = {document: place for place, document in enumerate(data["corpus"]["id"])}
    relevance = np.zeros((len(sides[0]), len(sides[1])))
    for row, query in enumerate(data["queries"]["id"]):
        for document, grade in data["relevant_docs"][query].items():
            if document in places:
                relevance[row, places[document]] = grade
    scores = np.asarray(runner.similarity(*sides))  # (Q, D)
    return sides[0], sides[1], scores, relevance


if __name__ == "__main__":
    sys.exit(main())
