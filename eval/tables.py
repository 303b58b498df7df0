"""Numbers and tables of reports, as text."""

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float | None) -> str:
    """Three decimals, a dash for what is not there."""
    return "–" if value is None else f"{value:.3f}"


def reach(scored: Mapping[str, Any]) -> str:
    """Half the width of a score's interval, as ±; nothing where it has none."""
    bounds = scored.get("interval")
    return "" if not bounds else f" ±{(bounds[1] - bounds[0]) / 2:.3f}"


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns in plain text below a head; `left` of them stand left, the others right."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [
        "  ".join(
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first line is the head; the first column stands left, the others right.

    >>> print(markdown_table([["task", "score"], ["a|b", "0.1"]]))
    | task | score |
    |---|---:|
    | a\\|b | 0.1 |
    """
    rows = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([rows[0], "|---|" + "---:|" * (len(lines[0]) - 1), *rows[1:]])
