"""How long a user waits before anything happens: `import mmembed` (goal 0.3 s) and `mmembed --help` (goal 0.6 s).

    python -m benchmarks.startup --json

Each run is a fresh process; the unit is seconds, so lower is better, and `limit` is a Python that does nothing.
"""

from __future__ import annotations

import statistics
import subprocess
import sys

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
    medians = {name: round(statistics.median(times), 4) for name, times in seconds.items()}
    rows = [
        Row(f"{name}, goal {goal} s", "s", medians[name], limit=medians["nothing"], meets=medians[name] < goal)
        for name, (_, goal) in CASES.items()
    ]
    show(rows, arguments.json)


def _run(command: list[str]) -> None:
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
