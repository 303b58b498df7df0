"""How long planning the batches of ten million records takes (goal 60 s), and in how much memory (goal 1,000 MB).

    python -m benchmarks.plan_scale --json

Each round is a fresh process that builds a BatchPlan with keys as mined data have them and asks for the first batch of
1,024 rows; one row of the table is the rest of the epoch. The unit is seconds, so lower is better. `limit` sorts both
columns of keys and draws one random order, in the same process: less does not find equal keys.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import numpy as np

from benchmarks._common import DATA, Row, own_peak_mb, parser, show
from mmembed.data.batch_plan import BatchPlan

ROWS, BATCH = 10_000_000, 1024
GOAL_SECONDS, GOAL_MB = 60, 1000


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=3)
    options.add_argument("--rows", type=int, default=ROWS, help=f"records (default {ROWS:,})")
    options.add_argument("--one", action="store_true", help="one round in this process, as JSON")
    arguments = options.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.rows)))
        return
    command = [sys.executable, "-m", "benchmarks.plan_scale", "--one", "--rows", str(arguments.rows)]
    runs = [
        json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=DATA.parent).stdout)
        for _ in range(arguments.rounds)
    ]
    seconds = {key: round(statistics.median(run[key] for run in runs), 3) for key in ("plan", "epoch", "limit")}
    peak = max(run["peak_mb"] for run in runs)
    name, fits = f"{arguments.rows:,} records", peak < GOAL_MB
    show(
        [
            Row(
                f"plan of {name}, goal {GOAL_SECONDS} s and {GOAL_MB:,} MB",
                "s",
                seconds["plan"],
                limit=seconds["limit"],
                ratio_to_limit=round(seconds["limit"] / seconds["plan"], 3),
                peak_mb_ours=peak,
                meets=fits and seconds["plan"] < GOAL_SECONDS,
            ),
            Row(f"all batches of an epoch of {name}", "s", seconds["epoch"], peak_mb_ours=peak),
        ],
        arguments.json,
    )


def measure(rows: int) -> dict[str, float]:
    """Seconds of each part, and the peak memory of this process."""
    keys = mined_keys(rows)
    start = time.perf_counter()
    plan = BatchPlan([rows], batch_size=BATCH, keys=[keys])
    first = next(iter(plan))
    planned = time.perf_counter()
    batches = sum(1 for _ in plan)
    finished = time.perf_counter()
    if len(first) != BATCH or batches != rows // BATCH:
        raise SystemExit(f"plan_scale: {batches} batches, the first of {len(first)} rows")
    peak = own_peak_mb()
    del plan, first
    again = time.perf_counter()
    for column in keys.T:
        np.argsort(column)
    np.random.default_rng(0).permutation(rows)
    limit = time.perf_counter() - again
    return {"plan": planned - start, "epoch": finished - planned, "limit": limit, "peak_mb": peak}


def mined_keys(rows: int, seed: int = 0) -> np.ndarray:
    """(rows, 2) hashes: a query in ten occurs twice, documents are shared unevenly, 1 to some hundred records each."""
    draw = np.random.default_rng(seed)
    keys = np.empty((rows, 2), dtype=np.int64)
    span = np.iinfo(np.int64)
    keys[:, 0] = draw.integers(span.min, span.max, rows)
    keys[: rows // 20, 0] = keys[rows // 20 : 2 * (rows // 20), 0]
    documents = draw.integers(span.min, span.max, max(1, rows // 3))
    for start in range(0, rows, 2**20):  # in parts: the benchmark's own memory must not be the peak
        part = keys[start : start + 2**20, 1]
        part[:] = documents[(draw.random(len(part)) ** 3 * len(documents)).astype(np.int64)]
    return keys


if __name__ == "__main__":
    main()
