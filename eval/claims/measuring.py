"""Measures one trained arm on tasks of the local benchmark, in a process of its own.

    python -m eval.claims.measuring --model runs/x/embedder --tasks squad-en --vectors squad-en --output scores.json

mteb scores what it scores; the tasks of `--vectors` are encoded once more for two numbers of ours: `pooled_auc` and
`centroid_distance`, how far apart the mean unit vectors of queries and documents are (the gap of two modalities).
The tasks of `--by-query` give their nDCG@10 query by query. Vectors cut to `--dims` are tasks of their own,
`squad-en@64`; texts are encoded once for all of it.

With `--first-stages bm25=bm25 ours=FOLDER` the model is a reranker: it ranks the `--depth` best documents that each
of them found, and those scores are of `squad-en@bm25`; what the candidates themselves give is kept as `first_stage`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval import run
from eval.files import DATA, write_json
from eval.models import load
from eval.mteb_adapter import Encodes
from eval.mteb_tasks import build_task
from eval.rerank import numbers
from eval.scoring import score
from eval.stages import find, judge
from eval.tasks.local import available, select
from eval.vectors import Compared, compared, ndcg_by_query
from mmembed import metrics
from mmembed.arguments import Parser
from mmembed.content import Content, Role, Text
from mmembed.diagnostics import modality_gap
from mmembed.errors import MmembedError
from mmembed.quantize import truncate, unit_rows


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        write_json(options.output, reranked(options) if options.first_stages else measured(options))
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.claims.measuring", description="Measure one arm of a claim.")
    parser.add_argument("--model", required=True, help="folder of an embedder")
    parser.add_argument("--tasks", nargs="+", required=True, help="names or globs of the local benchmark")
    parser.add_argument("--vectors", nargs="*", default=[], help="of the tasks, those with metrics of vectors")
    parser.add_argument(
        "--by-query", nargs="*", default=[], help="of the tasks, those whose queries are kept one by one"
    )
    parser.add_argument("--dims", nargs="*", type=int, default=[], help="measured again with cut vectors")
    parser.add_argument("--first-stages", nargs="*", default=[], metavar="NAME=MODEL",
                        help="what finds what a reranker ranks: bm25, mmembed-nano, a folder")  # fmt: skip
    parser.add_argument("--depth", type=int, default=20, help="candidates a query (default 20)")
    parser.add_argument("--data-root", default=str(DATA), help="data sets")
    parser.add_argument("--instructions", default="never", choices=["auto", "always", "never"])
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a JSON file: `scores`, task -> name -> number, and `by_query`, task -> numbers",
    )
    return parser.parse_args(arguments)


def measured(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """`scores`: task, or task@dim -> every number of it; `by_query`: task, or task@dim -> nDCG@10 of each query."""
    rows = select(available(Path(options.data_root)), options.tasks)
    given = run.parse(
        [
            *("--model", options.model, "--no-baselines", "--data-root", options.data_root),
            *("--vision-cache", "auto", "--instructions", options.instructions, "--tasks", *options.tasks),
        ]
    )
    model = load(options.model, given, [row.name for row in rows])
    encoder = model.runner.embedder = Remembering(model.runner.embedder)
    scores: dict[str, dict[str, float]] = {}
    by_query: dict[str, list[float]] = {}
    for encoder.dim in (None, *options.dims):
        model.runner.size = None  # vectors of another length come now
        for row in rows:
            name = row.name if encoder.dim is None else f"{row.name}@{encoder.dim}"
            task = build_task(row, Path(options.data_root), given.split)
            task.load_data()
            numbers = dict(score(model, task, row, split=given.split).numbers)
            if row.name in {*options.vectors, *options.by_query}:
                found = compared(model.runner, task, row, given.split)
            if row.name in options.vectors:
                numbers |= of_vectors(found)
            if row.name in options.by_query:
                by_query[name] = [
                    round(number, 5) for number in ndcg_by_query(found.similarity, found.relevance).tolist()
                ]
            scores[name] = {key: float(value) for key, value in numbers.items() if key != "interval"}
            print(f"{name}: {scores[name]['main']:.4f}", flush=True)
    return {"scores": scores, "by_query": by_query}


def reranked(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """`scores` and `first_stage`: task@name -> numbers; `candidates`: task@name -> a digest of what was ranked."""
    rows = select(available(Path(options.data_root)), options.tasks)
    named = dict(one.split("=", 1) for one in options.first_stages)
    common = ["--no-baselines", "--data-root", options.data_root, "--instructions", options.instructions]
    given, tasks = run.parse(["--model", options.model, *common, "--tasks", *options.tasks]), [row.name for row in rows]
    reranker = load(options.model, given, tasks)
    result: dict[str, dict[str, Any]] = {"scores": {}, "first_stage": {}, "candidates": {}}
    for stage, model in named.items():
        first = load(model, given, tasks)
        for row in rows:
            name = f"{row.name}@{stage}"
            task: Any = build_task(row, Path(options.data_root), given.split)
            task.load_data()
            qrels = task.dataset["default"][given.split]["relevant_docs"]
            found = find(first.runner, task, given.split, options.depth)
            ranked = judge(reranker.runner, task, given.split, found)
            result["first_stage"][name], result["scores"][name] = (numbers(one, qrels)[0] for one in (found, ranked))
            result["candidates"][name] = digest({query: sorted(found[query]) for query in sorted(found)})
            before, after = (result[key][name]["ndcg_at_10"] for key in ("first_stage", "scores"))
            print(f"{name}: {before:.4f} -> {after:.4f}", flush=True)
    return result


def digest(value: Any) -> str:
    """Of what JSON can hold, 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class Remembering:
    """An embedder that encodes equal texts once, and cuts their vectors to `dim`. Pictures are encoded every time."""

    def __init__(self, embedder: Encodes, dim: int | None = None) -> None:
        self.embedder, self.dim = embedder, dim
        self.similarity = embedder.similarity
        self._known: dict[tuple[Role, str | None], dict[Content, Any]] = {}

    def encode(self, contents: Sequence[Any], *, role: Role, instruction: str | None) -> Any:
        """(N, dim) vectors, or a list of (T, dim) of a multi-vector model."""
        known = self._known.setdefault((role, instruction), {})
        texts = all(isinstance(part, Text) for content in contents for part in content)
        new = list(dict.fromkeys(content for content in contents if content not in known)) if texts else list(contents)
        vectors = self.embedder.encode(new, role=role, instruction=instruction) if new else []
        if texts:
            known.update(zip(new, vectors, strict=True))
            vectors = [known[content] for content in contents]
        if isinstance(vectors[0], np.ndarray) and vectors[0].ndim == 1:
            vectors = np.stack(vectors)
        if self.dim is None:
            return vectors
        return (
            truncate(vectors, self.dim)
            if isinstance(vectors, np.ndarray)
            else [truncate(each, self.dim) for each in vectors]
        )


def of_vectors(found: Compared) -> dict[str, float]:
    """`pooled_auc`, and `centroid_distance` of unit vectors."""
    sides = [torch.from_numpy(unit_rows(side)) for side in (found.queries, found.documents)]
    return {
        "pooled_auc": metrics.pooled_auc(found.similarity, found.relevance),
        "centroid_distance": float(modality_gap(*sides)),
    }


if __name__ == "__main__":
    sys.exit(main())
