"""A whole `eval.run`, again with its cache, and killed and started again: seconds, and whether the numbers are equal.

    python -m benchmarks.evaluate --json
    python -m benchmarks.evaluate --data-root DATA --model runs/demo/embedder --kills 5

Each is a fresh process, imports and loading included. `ours` of the first row is the second run with a cache, `peer`
the first one, so the ratio (goal 20) is what the cache saves; what was estimated before the start stands beside what
the first run took. The second row is a run that is killed by SIGKILL so many times, each time a drawn share of the
first run's seconds after its start, and started again until it ends: its scores have to be those of the first run.
There is no peer: mteb keeps finished tasks and no vectors, and knows nothing of a cost beforehand.
"""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, parser, show

GOAL = 20.0
SEED = 0


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="mmembed-nano", help="an embedder (default: the packaged one)")
    options.add_argument("--data-root", type=Path, default=DATA, help="local data sets (default: the shipped ones)")
    options.add_argument("--tasks", nargs="+", metavar="NAME", help="default: all that the data root holds")
    options.add_argument("--kills", type=int, default=5, help="of the run that is killed (default 5)")
    options.set_defaults(rounds=1)
    arguments = options.parse_args()
    flags = ["--model", arguments.model, "--no-baselines", "--data-root", str(arguments.data_root)]
    flags += ["--tasks", *arguments.tasks] if arguments.tasks else []
    with tempfile.TemporaryDirectory() as work:
        show(rows_of(flags, Path(work), arguments.kills), arguments.json)


def rows_of(flags: list[str], work: Path, kills: int) -> list[Row]:
    """Both rows."""
    first, said = timed(flags, work / "cache", work / "first.json")
    second, _ = timed(flags, work / "cache", work / "second.json")
    whole, again = scores(work / "first.json"), scores(work / "second.json")
    details: dict[str, Any] = {"tasks": len(whole), "equal": whole == again, "estimated": estimated(said)}
    ratio = first / second
    saved = Row("second run with a cache", "s", round(second, 1), round(first, 1), "first run",
                ratio_to_peer=round(ratio, 1), goal_to_peer=GOAL, meets=ratio >= GOAL and whole == again,
                details=details)  # fmt: skip
    lives = killed(flags, work / "killed", work / "killed.json", kills, first)
    resumed = scores(work / "killed.json")
    apart = max((abs(resumed[key] - whole[key]) for key in whole), default=0.0) if resumed.keys() == whole.keys() else 1
    went = Row(f"killed {kills} times", "s", round(sum(lives), 1), round(first, 1), "uninterrupted",
               ratio_to_peer=round(first / sum(lives), 3), meets=apart < 1e-6,
               details={"lives": [round(life, 1) for life in lives], "largest_difference": apart})  # fmt: skip
    return [saved, went]


def command(flags: list[str], cache: Path, output: Path) -> list[str]:
    return [sys.executable, "-m", "eval.run", *flags, "--cache", str(cache), "--output", str(output)]


def timed(flags: list[str], cache: Path, output: Path) -> tuple[float, str]:
    started = time.perf_counter()
    done = subprocess.run(command(flags, cache, output), check=True, capture_output=True, text=True)
    return time.perf_counter() - started, done.stdout


def killed(flags: list[str], cache: Path, output: Path, kills: int, whole: float) -> list[float]:
    """Seconds of each life of a run that is killed and started again until it ends."""
    drawn, lives = random.Random(SEED), []
    for _ in range(kills):
        started = time.perf_counter()
        process = subprocess.Popen(command(flags, cache, output), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(drawn.uniform(0.1, 0.5) * whole)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        lives.append(time.perf_counter() - started)
    return [*lives, timed(flags, cache, output)[0]]


def scores(file: Path) -> dict[str, float]:
    """Every number of every task."""
    tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
    return {f"{task} {name}": value for task, entry in tasks.items() for score in entry["scores"].values() if score
            for name, value in score.items() if isinstance(value, float) and name != "seconds"}  # fmt: skip


def estimated(said: str) -> str | None:
    """What the run said of its time before the start."""
    found = re.search(r"^to compute with .*: about (.+)$", said, re.MULTILINE)
    return found[1] if found else None


if __name__ == "__main__":
    main()
