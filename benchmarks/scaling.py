"""What a training step costs as the batch grows: seconds a pair (goal: within 15 %) and memory (goal: within 10 %).

    python -m benchmarks.scaling --json [--only 128 512]

Our trainer as in `benchmarks.train`, float32, one token budget for all batch sizes, so that a larger batch is more
chunks of the same size. Each size runs in processes of its own, in turn. `ours` is pairs a second; `ratio_to_limit`
compares it with the fastest of all sizes: 1 everywhere where cost is linear. A row meets its goal where that is at
least 1 / 1.15 (in all rows: the largest of seconds a pair is at most 1.15 times the smallest) and its peak memory is at
most 10 % above the smallest.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace

from benchmarks._common import DATA, Row, environment, own_peak_mb, parser, set_up, show
from benchmarks.train import CASES, ours, step_clock

SIZES = (128, 256, 512, 1024, 2048)
LINEAR, FLAT = 1.15, 1.10


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=2)
    options.add_argument("--steps", type=int, default=1, help="counted steps a run (default 1)")
    options.add_argument("--only", nargs="+", type=int, default=list(SIZES), metavar="BATCH", help="batch sizes")
    options.add_argument("--worker", type=int, metavar="BATCH", help="used by the benchmark itself")
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    if arguments.worker:
        print(json.dumps(_worker(arguments.worker, arguments.steps)))
        return
    runs: dict[int, list[dict[str, float]]] = {batch: [] for batch in arguments.only}
    for turn in range(arguments.rounds):
        for batch in arguments.only if turn % 2 else reversed(arguments.only):
            runs[batch].append(_run(batch, arguments.steps, threads))
    show(_rows(runs), arguments.json)


def _rows(runs: dict[int, list[dict[str, float]]]) -> list[Row]:
    speed = {batch: statistics.median(run["pairs_per_second"] for run in found) for batch, found in runs.items()}
    peak = {batch: int(statistics.median(run["peak_mb"] for run in found)) for batch, found in runs.items()}
    fastest = max(speed.values())
    return [
        Row(
            f"step_{batch}",
            "pairs/s",
            round(speed[batch], 2),
            limit=round(fastest, 2),
            ratio_to_limit=round(speed[batch] / fastest, 3),
            goal_to_limit=round(1 / LINEAR, 3),
            peak_mb_ours=peak[batch],
            meets=fastest <= LINEAR * speed[batch] and peak[batch] <= FLAT * min(peak.values()),
            details={"environment": environment()},
        )
        for batch in runs
    ]


def _run(batch: int, steps: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.scaling", "--threads", str(threads), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--worker", str(batch)], check=True, stdout=subprocess.PIPE, text=True, cwd=DATA.parent
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _worker(batch: int, steps: int) -> dict[str, float]:
    """Speed of the median step, the first left out, and peak memory of the process."""
    case = replace(CASES["text_1024"], batch=batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ours(case, str(case.budget), batch, steps + 1, folder)
        clock = step_clock()
        trainer.add_callback(clock)
        trainer.train()
    return {"pairs_per_second": batch / statistics.median(clock.seconds[1:]), "peak_mb": own_peak_mb()}


if __name__ == "__main__":
    main()
