"""The golden table: each value of tests/golden/losses.json beside what this library computes, gradients with it.

python -m tools.golden_table                          # print it; exit status 1 when one fails
python -m tools.golden_table --write docs/golden.md   # and write the page

The values were computed outside this repository; the cases are those of the tests (`tests/golden/case.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.golden.case import GRADIENT, LOSS, Case, Compared, every_case, uncovered

PAGE = Path(__file__).resolve().parent.parent / "docs" / "golden.md"
ABOUT = """# Golden values

Values that were computed outside this repository (`from` in `tests/golden/losses.json` says by which code or equation),
beside what this library computes for the same inputs, in 64 bits. An entry passes when the loss, the norm of the
gradient at each input that the file has one for, and every other number on the way differ by no more than the
tolerance. Written by `python -m tools.golden_table --write docs/golden.md`; the tests run the same cases
(`tests/golden/case.py`).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, metavar="PAGE", help="default: docs/golden.md")
    options = parser.parse_args(arguments)
    page, failed = table(every_case())
    print(page, end="")
    if options.write is not None:
        options.write.write_text(page, encoding="utf-8")
    return int(failed > 0)


def table(cases: Sequence[Case]) -> tuple[str, int]:
    """The page, and how many cases fail."""
    found = [(case, case.compare()) for case in cases]
    failed = sum(not all(one.agrees for one in compared) for _, compared in found)
    numbers = sum(len(one.got) for _, compared in found for one in compared)
    missing = uncovered()
    return "\n".join(
        [
            ABOUT,
            f"{len(found) - failed} of {len(found)} cases pass, with {numbers} numbers.\n",
            "| slug | entry | computed by | expected | got | tolerance | gradient checked at | pass |",
            "|---|---|---|---|---|---|---|---|",
            *(row(case, compared) for case, compared in found),
            f"\n## Not covered\n\n{len(missing)} entries of the file have no case.\n",
            "| slug | entry | why |",
            "|---|---|---|",
            *(f"| {slug} | {name} | {why or '**nobody says why**'} |" for slug, name, why in missing),
            "",
        ]
    ), failed


def row(case: Case, compared: Sequence[Compared]) -> str:
    (loss,) = (one for one in compared if one.what == LOSS)
    checked = [one.what.removeprefix(GRADIENT) for one in compared if one.what.startswith(GRADIENT)]
    none = "the file has none" if case.trains else "none goes through it"
    ills = [one.what for one in compared if not one.agrees]
    verdict = "yes" if not ills else f"**no**: {', '.join(ills)}"
    values = f"{loss.expected[0]:.9f} | {loss.got[0]:.9f} | {loss.tolerance:.0e}"
    return f"| {case.slug} | {case.entry['name']} | {case.by} | {values} | {', '.join(checked) or none} | {verdict} |"


if __name__ == "__main__":
    sys.exit(main())
