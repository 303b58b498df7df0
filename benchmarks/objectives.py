"""What an objective costs beside its matrix product: forward and backward of every registered loss and objective.

    python -m benchmarks.objectives --json                     # 4,096 queries, 32,768 documents of 1,024 numbers
    python -m benchmarks.objectives --queries 512 --documents 4096 --only infonce dcl
    python -m benchmarks.objectives --keep rows.json --missing --threads 1 --rounds 1    # go on where a run was stopped
    python -m benchmarks.objectives --device cuda --json

    ours    the objective on vectors of a batch, C / Q documents a query, with its masks, and the backward
    limit   a matrix product and its backward, of the size that `details.limit` names

The batch is the same for all: Q queries and C documents. What of it is compared is the objective's nature, and a row
says it in `details.shape`:

    scores          every query with every document; the limit is their product, which any loss over all scores must do
    pairs           Q queries with their positives, terms over vectors and the methods with prototypes and queues among
                    them; the limit is the product of these, (Q, E) and (E, Q)
    graded pairs    each query with its own documents, C pairs in one row, whose golds are all different (the most work
                    that a loss which compares golds can have); the limit is that of scores
    global_local    Q inputs of C / Q vectors a side, whose products with Q means have the size of the scores
    captioning      Q predicted tokens and a trained vocabulary of C; the limit is the product of these

A row's name has the sizes that took part: queries x documents x numbers, pairs having a document for each positive of a
query; and `+M` where pairs are also compared with M vectors of the objective's own: a queue, prototypes, drawn classes.

Vectors are random around a common direction, so that no score is an outlier; the first document of a query is its
positive, the second is a worse one for list-wise losses, and all have a teacher's score where those are read; pairs are
of 64 classes in turn, and an objective over pairs has one step behind it, so that memories hold something.

A row is measured in a process of its own: both contenders at an eighth of the size first, then in turn, `ours` first,
after which the peak memory is read (on CUDA: what torch allocated at most). On a busy machine `--clock processor` takes
processor seconds for wall time, which with one thread are nearly what a quiet one would show (`details.clock`). A row
that does not run is a row with `details.error` that does not meet its goals; the others go on, and the exit status is
1. On a CPU no row may hold more than 12 GB. Goals: the InfoNCE family at most 3 times the limit, nothing above 8 GB.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks._common import DATA, Row, compare, environment, own_peak_mb, parser, set_up, show, told

if TYPE_CHECKING:
    from torch import Tensor

    from mmembed.data.labels import BatchLabels
    from mmembed.objectives import Objective

INFONCE_FAMILY = ("contrastive", "infonce", "decoupled_softmax", "dcl", "dclw", "multicsr")
GOAL_TO_LIMIT = round(1 / 3, 3)
MOST_MB = 8 * 1024
HELD = MOST_MB * 2**20 * 3 // 2  # bytes that a row may take before it counts as failed
UNIT = "queries/s"
CLASSES = tuple(map(str, range(64)))
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Setting:
    """Q queries, C documents, E numbers."""

    queries: int
    documents: int
    size: int
    device: str = "cpu"

    @property
    def group(self) -> int:
        """Documents a query."""
        return self.documents // self.queries

    def part(self, share: int) -> Setting:
        """The same with a `share`-th of queries and documents, with 32 queries at least."""
        queries = min(self.queries, max(32, self.queries // share))
        return replace(self, queries=queries, documents=queries * self.group)


@dataclass(frozen=True)
class Timing:
    """How a row is timed; `clock` is a name of CLOCKS."""

    rounds: int
    threads: int | None = None
    clock: str = "wall"

    @property
    def flags(self) -> list[str]:
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return ["--rounds", str(self.rounds), "--clock", self.clock, *threads]


@dataclass(frozen=True)
class Contest:
    """`ours` and `limit`, each a forward and a backward; what is compared, and what the limit is the product of."""

    runs: dict[str, Callable[[], object]]
    shape: str
    limit: str


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--queries", type=int, default=4096, help="Q (default 4096)")
    options.add_argument("--documents", type=int, default=32768, help="C, a multiple of Q (default 32768)")
    options.add_argument("--size", type=int, default=1024, help="E (default 1024)")
    options.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options.add_argument("--only", nargs="+", default=[], metavar="NAME", help="losses and objectives (default: all)")
    options.add_argument(
        "--keep", type=Path, metavar="FILE", help="write each row there as it is measured, over one of its name"
    )
    options.add_argument("--missing", action="store_true", help="leave out what FILE has a row of that ran")
    options.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="processor: on a busy machine, with one thread"
    )
    options.add_argument("--alone", metavar="NAME", help="measure this one in this process and print its row")
    arguments = options.parse_args()
    setting = Setting(arguments.queries, arguments.documents, arguments.size, arguments.device)
    if setting.group < 2 or setting.group * setting.queries != setting.documents:
        raise SystemExit(
            f"objectives: {setting.documents} documents are no multiple, twice or more, of {setting.queries} queries"
        )
    timing = Timing(arguments.rounds, arguments.threads, arguments.clock)
    if timing.clock == "processor" and (timing.threads != 1 or setting.device != "cpu"):
        raise SystemExit("objectives: --clock processor is the time of one thread of a CPU; add --threads 1")
    if arguments.missing and arguments.keep is None:
        raise SystemExit("objectives: --missing has no effect without --keep FILE")
    if arguments.alone:
        print(json.dumps(asdict(measure(arguments.alone, setting, timing))))
        return
    there = kept(arguments.keep) if arguments.missing else {}
    ran = {name for name, row in there.items() if "error" not in row["details"]}
    rows = []
    for name in arguments.only or names():
        if row_name(name, setting) in ran:
            continue
        row = told(measured_apart(name, setting, timing))
        if arguments.keep is not None:
            keep(row, arguments.keep)
        rows.append(row)
    show(rows, arguments.json)
    if any("error" in row.details for row in rows):
        raise SystemExit(1)


def names() -> list[str]:
    """Every loss as an objective, and every objective."""
    from mmembed.losses import LOSSES
    from mmembed.objectives import OBJECTIVES

    return sorted({*LOSSES.classes(), *OBJECTIVES.classes()})


def row_name(name: str, setting: Setting) -> str:
    from mmembed.errors import ConfigError

    documents, own = setting.documents, 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            objective = built(name, replace(setting, device="cpu"), Path(folder))
        documents, own = documents_of(objective, setting), own_vectors(objective)[0]
    except ConfigError:
        pass  # the row will say why there is no such objective
    sizes = f"{setting.queries}x{documents}{f'+{own}' if own else ''}x{setting.size}"
    return f"{name}_{sizes}_{setting.device}"


def documents_of(objective: Objective, setting: Setting) -> int:
    """How many documents the objective reads."""
    return setting.queries * objective.positives_needed if of_pairs(objective) else setting.documents


def of_pairs(objective: Objective) -> bool:
    """Whether it compares pairs and terms over their vectors, not every query with every document."""
    from mmembed.objectives.aligned import Aligned

    return isinstance(objective, Aligned) and not objective.takes_negatives


def own_vectors(objective: Objective) -> tuple[int, str]:
    """How many vectors of its own the objective compares pairs with, and what they are; 0 where it has none."""
    from mmembed.objectives.mlcd import MLCD
    from mmembed.objectives.mochi import MoCHi
    from mmembed.objectives.negative_queue import NegativeQueue
    from mmembed.objectives.proto_clip import ProtoCLIP
    from mmembed.objectives.prototypes import Prototypes
    from mmembed.objectives.tcl import TCL

    if isinstance(objective, MLCD):
        drawn = max(round(objective.sampled * objective.clusters), len(CLASSES))  # those of the batch are among them
        return drawn, f"{drawn:,} of {objective.clusters:,} classes"
    if isinstance(objective, NegativeQueue | MoCHi):
        queued = len(objective.queue.vectors)
        return queued, f"a queue of {queued:,}"
    if isinstance(objective, TCL):
        queued = len(objective.of_queries.vectors)
        return 2 * queued, f"two queues of {queued:,}"
    if isinstance(objective, Prototypes | ProtoCLIP):
        count = len(objective.prototypes) if isinstance(objective, Prototypes) else objective.sizes.shape[1]
        return count, f"{count:,} prototypes"
    return 0, ""


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file by name; none where there is no file."""
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return {row["name"]: row for row in rows}


def keep(row: Row, path: Path) -> None:
    """Writes the row into the file, at once or not at all, in the order of names."""
    rows = {**kept(path), row.name: asdict(row)}
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps({"rows": [rows[name] for name in sorted(rows)]}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def measured_apart(name: str, setting: Setting, timing: Timing) -> Row:
    """The row as a fresh process measures it, or one that says why there is none."""
    flags = ["--queries", setting.queries, "--documents", setting.documents, "--size", setting.size]
    flags += ["--device", setting.device, *timing.flags]
    command = [sys.executable, "-m", "benchmarks.objectives", "--alone", name, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=DATA.parent)
    if done.returncode == 0:
        return Row(**json.loads(done.stdout.splitlines()[-1]))
    print(done.stderr, file=sys.stderr, end="")
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit status {done.returncode}"
    details = {"error": f"{how}: {said[-1]}", "environment": environment()}
    return Row(row_name(name, setting), UNIT, None, goal_to_limit=goal(name), meets=False, details=details)


def goal(name: str) -> float | None:
    return GOAL_TO_LIMIT if name in INFONCE_FAMILY else None


def measure(name: str, setting: Setting, timing: Timing) -> Row:
    """The row, in this process: nothing may have been run in it before."""
    if setting.device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (HELD, HELD))
    set_up(timing.threads)
    for run in contest(name, setting.part(8)).runs.values():
        run()
    contenders = contest(name, setting)
    peaks: dict[str, int] = {}

    def ours() -> None:
        contenders.runs["ours"]()
        peaks.setdefault("ours", peak_mb(setting.device))

    row = compare(
        row_name(name, setting),
        UNIT,
        setting.queries,
        {**contenders.runs, "ours": ours},
        timing.rounds,
        peer_name=None,
        goal_to_limit=goal(name),
        warm_up=False,
        clock=CLOCKS[timing.clock],
    )
    row.peak_mb_ours = peaks["ours"]
    row.meets = row.meets and row.peak_mb_ours <= MOST_MB
    said = {"shape": contenders.shape, "limit": contenders.limit, "clock": timing.clock, "rounds": timing.rounds}
    row.details = {**said, "environment": environment()}
    return row


def contest(name: str, setting: Setting) -> Contest:
    """What is timed, on this device."""
    import torch

    from mmembed.embeddings import Embeddings
    from mmembed.objectives.aligned import Aligned

    with tempfile.TemporaryDirectory() as folder:
        objective = built(name, setting, Path(folder))
    draw = torch.Generator().manual_seed(0)
    common = torch.randn(setting.size, generator=draw)
    q, d = (
        (common + torch.randn(count, setting.size, generator=draw)).to(setting.device).requires_grad_()
        for count in (setting.queries, setting.documents)
    )
    labels = labels_of(name, objective, setting)
    labels = replace(labels, taught=(Embeddings(q.detach()), Embeddings(d.detach()))).to(setting.device)
    inputs, shape, compared = inputs_of(objective, q, d)
    left, right = (side.detach().requires_grad_() for side in compared)
    if isinstance(objective, Aligned):
        objective.remember(objective.gather(*inputs(), labels))
        objective.commit()

    def ours() -> float:
        loss, _ = objective(*inputs(), labels)
        return finish(loss, q, d)

    def limit() -> float:
        return finish((left @ right.T).sum(), left, right)

    def finish(loss: Tensor, *leaves: Tensor) -> float:
        loss.backward()
        for leaf in leaves:
            leaf.grad = None
        return loss.item()

    return Contest({"ours": ours, "limit": limit}, shape, f"the product of {len(left):,} and {len(right):,} vectors")


def built(name: str, setting: Setting, folder: Path) -> Objective:
    """The objective with its defaults and what it cannot do without; files of it are put into `folder`."""
    import numpy as np

    from mmembed.objectives import OBJECTIVES, build_objective

    options: dict[str, Any] = {}
    if name == "hydra":
        options = {"classes": list(CLASSES)}
    if name == "proto_clip":  # one batch is an episode
        options = {"episode": setting.queries, "prototypes": max(2, setting.queries // 16)}
    if name == "soft_labels":
        np.save(folder / "vectors.npy", np.random.default_rng(0).normal(size=(len(CLASSES), 384)).astype("float32"))
        (folder / "items.jsonl").write_text("".join(json.dumps({"id": label}) + "\n" for label in CLASSES))
        options = {"vectors": str(folder)}
    if name in ("captioning", "answer", "router_balance"):  # stand in a list only
        return OBJECTIVES.build(name).to(setting.device)
    return build_objective({"type": name, **options}, embedding_size=setting.size).to(setting.device)


def inputs_of(
    objective: Objective, q: Tensor, d: Tensor
) -> tuple[Callable[[], tuple[Any, Any]], str, tuple[Tensor, Tensor]]:
    """What makes the embeddings of queries and documents, what of them is compared, and what the limit multiplies."""
    import torch

    from mmembed.backbones.output_embedding import token_losses
    from mmembed.embeddings import Embeddings
    from mmembed.objectives.pairs import GradedPairs

    queries, documents = len(q), len(d)
    group = documents // queries
    if objective.routes:
        size = q.shape[1] // 2

        def routed() -> tuple[Embeddings, Embeddings]:
            of_queries, of_documents = (Embeddings(one, routing=one.abs()) for one in (q, d))
            return of_queries, of_documents

        return routed, f"{queries + documents:,} inputs, {size:,} experts", (q, q)
    if not objective.compares:
        targets = torch.arange(queries, device=q.device) * group
        one_each = torch.ones(queries, dtype=torch.long, device=q.device)

        def told() -> tuple[Embeddings, Embeddings]:
            return Embeddings(q), Embeddings(q, nll=token_losses(q, d, targets), predicted=one_each)

        return told, f"{queries:,} predicted tokens, a vocabulary of {documents:,}", (q, d)
    if objective.many_vectors:
        mask = torch.ones(queries, group, dtype=torch.bool, device=q.device)

        def parts() -> tuple[Embeddings, Embeddings]:
            several = Embeddings(d.unflatten(0, (queries, group)), mask)  # (N, T, E)
            return several, several

        return parts, f"{queries:,} pairs of {group} vectors a side", (q, d)

    def vectors() -> tuple[Embeddings, Embeddings]:
        return Embeddings(q), Embeddings(d)

    if isinstance(objective, GradedPairs):
        return vectors, f"{documents:,} graded pairs in one row", (q, d)
    if of_pairs(objective):
        positives, (own, what) = objective.positives_needed, own_vectors(objective)
        shape = f"{queries:,} pairs" if positives == 1 else f"{queries:,} queries with {positives} positives each"
        return vectors, f"{shape}, {what}" if own else shape, (q, d[::group])
    return vectors, f"{queries:,} queries with {documents:,} documents", (q, d)


def labels_of(name: str, objective: Objective, setting: Setting) -> BatchLabels:
    """`group` documents a query (one of an objective of many vectors): the first ones positive, one more a little where
    grades are read; all different golds where pairs are graded."""
    import torch

    from mmembed.data.labels import BatchLabels, label_keys, label_values
    from mmembed.objectives.pairs import GradedPairs

    queries, group = setting.queries, 1 if objective.many_vectors else setting.group
    documents = queries * group
    keys = torch.arange(documents).view(-1, 1).expand(-1, 2)
    positives = objective.positives_needed
    graded = "relevance" in objective.reads and name not in INFONCE_FAMILY
    relevant = [1.0] * positives + [0.5] if graded else [1.0] * positives
    relevance = torch.tensor((relevant + [0.0] * group)[:group]).repeat(queries)
    draw = torch.Generator().manual_seed(1)
    if isinstance(objective, GradedPairs):
        relevance = torch.randperm(documents, generator=draw) / documents
    return BatchLabels(
        owner=torch.arange(queries).repeat_interleave(group),
        relevance=relevance,
        document_keys=keys,
        query_keys=torch.arange(documents, documents + queries),
        positive_keys=keys.view(queries, group, 2)[:, : len(relevant)],
        source="random",
        scores=torch.rand(documents, generator=draw),
        label_keys=label_keys([[(CLASSES[query % len(CLASSES)],)] for query in range(queries)]),
        label_values=label_values([[(CLASSES[query % len(CLASSES)],)] for query in range(queries)]),
    )


def peak_mb(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() // 2**20 if device == "cuda" else own_peak_mb()


if __name__ == "__main__":
    main()
