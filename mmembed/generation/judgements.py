"""A reason and its verdict as text: the reason, and in the last line one of two words. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence


def write_judgement(rationale: str, relevant: bool, words: Sequence[str] = ("yes", "no")) -> str:
    """
    >>> write_judgement("It names a bus.", True)
    'It names a bus.\\nyes'
    """
    return f"{rationale.strip()}\n{words[0] if relevant else words[1]}"


def read_judgement(text: str, words: Sequence[str] = ("yes", "no")) -> tuple[str, bool | None]:
    """The reason, and whether the document is relevant; None where the last line is neither word.

    >>> read_judgement("It names a bus.\\n**Yes.**")
    ('It names a bus.', True)
    """
    reason, _, last = text.strip().rpartition("\n")
    said = last.strip().strip(".!\"'*").lower()
    for word, relevant in zip(words, (True, False), strict=True):
        if said == word.strip().lower():
            return reason.strip(), relevant
    return text.strip(), None
