"""What an objective costs beside its matrix product: forward and backward of every registered loss and objective.

    python -m benchmarks.objectives --json                     # 4,096 queries, 32,768 documents of 1,024 numbers
    python -m benchmarks.objectives --queries 512 --documents 4096 --only infonce dcl
    python -m benchmarks.objectives --device cuda --json

    ours    the objective on vectors of a batch, C / Q documents a query, with its masks, and the backward
    limit   the matrix product of queries and documents and its backward, which is what any objective over all scores
            must do; an objective over pairs alone does less

Vectors are random around a common direction, so that no score is an outlier; the first document of a query is its
positive, the second is a worse one for list-wise losses, and all have a teacher's score where those are read; pairs are
of 64 classes in turn, and objectives that mix or cluster what they remember have one step behind them. Time is
wall time of alternating runs; memory is that of a fresh process (on CUDA: what torch allocated at most). Goals: the
InfoNCE family at most 3 times the limit, nothing above 8 GB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._common import Row, compare, own_peak_mb, parser, set_up, show

if TYPE_CHECKING:
    from mmembed.data.labels import BatchLabels

INFONCE_FAMILY = ("contrastive", "infonce", "decoupled_softmax", "dcl", "dclw", "multicsr")
GOAL_TO_LIMIT = round(1 / 3, 3)
MOST_MB = 8 * 1024
CLASSES = tuple(map(str, range(64)))


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--queries", type=int, default=4096, help="Q (default 4096)")
    options.add_argument("--documents", type=int, default=32768, help="C, a multiple of Q (default 32768)")
    options.add_argument("--size", type=int, default=1024, help="E (default 1024)")
    options.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options.add_argument("--only", nargs="+", default=[], metavar="NAME", help="losses and objectives (default: all)")
    options.add_argument("--peak", metavar="NAME", help="run this one once and print the peak memory in MB")
    arguments = options.parse_args()
    set_up(arguments.threads)
    setting = (arguments.queries, arguments.documents, arguments.size, arguments.device)
    if arguments.peak:
        runs = contenders(arguments.peak, *setting)
        runs["ours"]()
        print(peak_mb(arguments.device))
        return
    rows = []
    for name in arguments.only or names():
        try:
            row = measure(name, setting, arguments.rounds, arguments.threads)
        except (subprocess.CalledProcessError, RuntimeError) as error:
            raise SystemExit(f"objectives: {name} did not run: {error}") from None
        print(json.dumps(vars(row)), file=sys.stderr, flush=True)  # hours of runs can be followed
        rows.append(row)
    show(rows, arguments.json)


def names() -> list[str]:
    """Every loss as an objective, and every objective that is none and compares one vector an input."""
    from mmembed.losses import LOSSES
    from mmembed.objectives import OBJECTIVES

    compared = {name: one for name, one in OBJECTIVES.classes().items() if one.compares}
    of_one_vector = {name for name, one in compared.items() if one.many_vectors is not True}
    return sorted({*LOSSES.classes(), *of_one_vector} - {"contrastive"})  # which is infonce


def measure(name: str, setting: tuple[int, int, int, str], rounds: int, threads: int | None) -> Row:
    queries, documents, size, device = setting
    flags = ["--queries", queries, "--documents", documents, "--size", size, "--device", device, "--peak", name]
    flags += [] if threads is None else ["--threads", threads]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.objectives", *map(str, flags)], check=True, stdout=subprocess.PIPE, text=True
    )
    peak = int(done.stdout.strip().splitlines()[-1])
    goal = GOAL_TO_LIMIT if name in INFONCE_FAMILY else None
    row = compare(
        f"{name}_{queries}x{documents}x{size}_{device}",
        "steps/s",
        1,
        contenders(name, *setting),
        rounds,
        peer_name=None,
        goal_to_limit=goal,
        peak_mb={"ours": peak},
    )
    row.meets = row.meets and peak <= MOST_MB
    return row


def contenders(name: str, queries: int, documents: int, size: int, device: str) -> dict[str, Callable[[], object]]:
    """`ours` and `limit`, each a forward and a backward."""
    import torch

    from mmembed.embeddings import Embeddings
    from mmembed.objectives import build_objective
    from mmembed.objectives.aligned import Aligned

    with tempfile.TemporaryDirectory() as folder:
        objective = build_objective(block_of(name, queries, Path(folder)), embedding_size=size).to(device)
    graded = "relevance" in objective.reads and name not in INFONCE_FAMILY
    positives = objective.positives_needed if isinstance(objective, Aligned) else 1
    labels = labels_of(queries, documents, positives, graded)
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(size, generator=draw)
    q, d = (
        (common + torch.randn(count, size, generator=draw)).to(device).requires_grad_()
        for count in (queries, documents)
    )

    taught = Embeddings(q.detach()), Embeddings(d.detach())  # what a teacher gives in the first step
    labels = replace(labels, taught=taught).to(device)
    if name in ("mochi", "proto_clip"):
        objective.remember(objective.gather(Embeddings(q), Embeddings(d), labels))
        objective.commit()

    def ours() -> float:
        loss, _ = objective(Embeddings(q), Embeddings(d), labels)
        return finish(loss)

    def limit() -> float:
        return finish((q @ d.T).sum())

    def finish(loss: torch.Tensor) -> float:
        loss.backward()
        q.grad = d.grad = None
        return loss.item()

    return {"ours": ours, "limit": limit}


def block_of(name: str, queries: int, folder: Path) -> dict[str, Any]:
    """What the objective is built from: defaults, and what it cannot do without; files of it are put into `folder`."""
    import numpy as np

    options: dict[str, Any] = {}
    if name == "hydra":
        options = {"classes": list(CLASSES)}
    if name == "proto_clip":  # one batch is an episode
        options = {"episode": queries, "prototypes": max(2, queries // 16)}
    if name == "soft_labels":
        np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(len(CLASSES), 384)).astype("float32"))
        (folder / "items.jsonl").write_text("".join(json.dumps({"id": label}) + "\n" for label in CLASSES))
        options = {"vectors": str(folder)}
    return {"type": name, **options}


def labels_of(queries: int, documents: int, positives: int, graded: bool) -> BatchLabels:
    """`documents / queries` documents a query: the first ones positive, one more a little where grades are read."""
    import torch

    from mmembed.data.labels import BatchLabels, label_keys

    group = documents // queries
    if group < 2 or group * queries != documents:
        raise SystemExit(f"objectives: {documents} documents are no multiple, twice or more, of {queries} queries")
    keys = torch.arange(documents).view(-1, 1).expand(-1, 2)
    relevant = [1.0] * positives + [0.5] if graded else [1.0] * positives
    grades = torch.tensor((relevant + [0.0] * group)[:group])
    return BatchLabels(
        owner=torch.arange(queries).repeat_interleave(group),
        relevance=grades.repeat(queries),
        document_keys=keys,
        query_keys=torch.arange(documents, documents + queries),
        positive_keys=keys.view(queries, group, 2)[:, : len(relevant)],
        source="random",
        scores=torch.rand(documents, generator=torch.Generator().manual_seed(1)),
        label_keys=label_keys([[(CLASSES[query % len(CLASSES)],)] for query in range(queries)]),
    )


def peak_mb(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else own_peak_mb()


if __name__ == "__main__":
    main()
