"""How long a user waits before anything happens: `import mmembed` (goal 0.3 s) and `mmembed --help` (goal 0.6 s).

    python -m benchmarks.startup --json

Each run is a fresh process. `limit` is a Python that does nothing: its seconds as a part of ours are `ratio_to_limit`,
and as a part of the goal `goal_to_limit`. The unit is seconds, so lower is better; a ratio is better higher, as ever.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks._common import Row, alternate, parser, show

CASES = {  # name -> (arguments of python, goal in seconds)
    "import_mmembed": (["-c", "import mmembed"], 0.3),
    "mmembed_help": (["-m", "mmembed", "--help"], 0.6),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=11)
    arguments = options.parse_args()
    runs = {name: (lambda command=command: _run(command)) for name, (command, _) in CASES.items()}
    seconds = alternate({**runs, "nothing": lambda: _run(["-c", "pass"])}, arguments.rounds)
    show(rows_of(seconds), arguments.json)


def rows_of(seconds: Mapping[str, Sequence[float]]) -> list[Row]:
    """A row a case.

    Args:
        seconds: of each round, by case, and of `nothing`.
    """
    limit = statistics.median(seconds["nothing"])
    rows = []
    for name, (_, goal) in CASES.items():
        ours = statistics.median(seconds[name])
        ratio = statistics.median(other / own for other, own in zip(seconds["nothing"], seconds[name], strict=True))
        row = Row(f"{name}, goal {goal} s", "s", round(ours, 4), limit=round(limit, 4), meets=ours < goal)
        rows.append(replace(row, ratio_to_limit=round(ratio, 3), goal_to_limit=round(limit / goal, 3)))
    return rows


def _run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
