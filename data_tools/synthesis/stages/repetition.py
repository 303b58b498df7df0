"""Texts that repeat themselves or are no prose: the rules of Gopher (MassiveText, arXiv 2112.11446, appendix A.1).

Repetition, of table A1: the share of lines and of paragraphs that stood before (0.30), and of their characters (0.20);
the share of characters in the most frequent 2-, 3- and 4-gram of words (0.20, 0.18, 0.16), and in 5- to 10-grams that
stood before (0.15 down to 0.10). Quality: words of 3 to 10 characters on average, # and ... for at most a tenth of the
words, a letter in 80 % of the words, at most 90 % of the lines bullets and at most 30 % ending in an ellipsis.

Ours: an n-gram counts as frequent where it stands twice; characters are those of words; of scripts without blanks each
character is a word and the mean length is not judged; paragraphs are not judged apart where they are the lines. Gopher
left texts below 50 words out; here they pass, but for those in which one word is most of the text. Of 1,676 passages of
Wikipedia (squad-en) 6 are left out, of 470 Python functions (mbpp) 53 and of 274 recipes 44, nearly all by the rules of
quality: switch those off for code, tables and lists. Cost: 1.5 ms for 120 words, no memory.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from data_tools.synthesis.sides import Fault, Side, check_sides, sifted
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage, Trimmed
from data_tools.synthesis.templates import text_of
from mmembed.data.words import split_words
from mmembed.errors import ConfigError
from mmembed.registry import Positive

TOP = {2: 0.20, 3: 0.18, 4: 0.16}  # n: share of characters, table A1
REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
UNITS, UNIT_CHARACTERS = 0.30, 0.20  # of lines and paragraphs
MEAN_LENGTH = (3.0, 10.0)
SYMBOLS, LETTERS, BULLETS, ELLIPSES = 0.1, 0.8, 0.9, 0.3
FLOOD, FLOOD_WORDS = 0.5, 8  # of a short text: the share of one word, from so many words on
_SYMBOL = re.compile(r"#|\.\.\.|…")
_BULLET = ("•", "‣", "▶", "◦", "■", "□", "-", "*")


class Repetition(SetStage):
    """Leaves out texts that break Gopher's rules.

    Args:
        sides: whose texts are judged; None judges those that the items have.
        min_words: of a text that all rules are about.
        quality: judge besides repetition whether it is prose.
    """

    name: ClassVar[str] = "repetition"

    def __init__(self, sides: Sequence[Side] | None = None, min_words: Positive = 50, quality: bool = True) -> None:
        if sides == ():
            raise ConfigError(f"{self.name}.sides: is empty; leave it out, or give [query, document]")
        self.sides, self.min_words, self.quality = sides, min_words, quality

    def gives(self, kind: Kind) -> Kind:
        check_sides(self.name, kind, self.sides or ())
        return kind

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        def verdict(side: Side, content: Any) -> Fault | None:
            return self.fault(text_of(content)) if self.sides is None or side in self.sides else None

        for item in items:
            yield from sifted(item, verdict)

    def fault(self, text: str) -> Fault | None:
        """The first rule that a text breaks."""
        found = [word.text for word in split_words(text)]
        if len(found) < self.min_words:
            most = max(Counter(map(str.casefold, found)).values(), default=0)
            flooded = len(found) >= FLOOD_WORDS and most > FLOOD * len(found)
            return Fault("one word is most of it", f"{most} of {len(found)} words") if flooded else None
        return _repetition(text, found) or (_quality(text, found) if self.quality else None)


def _repetition(text: str, found: Sequence[str]) -> Fault | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [one.strip() for one in re.split(r"\n\s*\n", text) if one.strip()]
    for what, units in (("lines", lines), ("paragraphs", paragraphs)):
        again = _again(units)
        if len(again) > UNITS * len(units):
            return Fault(f"repeated {what}", f"{len(again)} of {len(units)}")
        if sum(map(len, again)) > UNIT_CHARACTERS * len(text):
            return Fault(f"repeated {what}", f"{sum(map(len, again))} of {len(text)} characters")
    lengths = [len(word) for word in found]
    for n, most in TOP.items():
        share, gram = _top_share(found, lengths, n)
        if share > most:
            return Fault(f"a frequent {n}-gram", f"{share:.0%} are {gram!r}")
    for n, most in REPEATED.items():
        share = _repeated_share(found, lengths, n)
        if share > most:
            return Fault(f"repeated {n}-grams", f"{share:.0%} of the characters")
    return None


def _quality(text: str, found: Sequence[str]) -> Fault | None:
    spaced = len(text.split()) > len(found) / 2
    mean = sum(map(len, found)) / len(found)
    if spaced and not MEAN_LENGTH[0] <= mean <= MEAN_LENGTH[1]:
        return Fault("length of words", f"{mean:.1f} characters on average")
    symbols = len(_SYMBOL.findall(text))
    if symbols > SYMBOLS * len(found):
        return Fault("symbols", f"{symbols} of # and ... in {len(found)} words")
    letters = sum(any(letter.isalpha() for letter in word) for word in found)
    if letters < LETTERS * len(found):
        return Fault("few words with letters", f"{letters} of {len(found)}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    bullets = sum(line.startswith(_BULLET) for line in lines)
    if bullets > BULLETS * len(lines):
        return Fault("bullets", f"{bullets} of {len(lines)} lines")
    ellipses = sum(line.endswith(("...", "…")) for line in lines)
    if ellipses > ELLIPSES * len(lines):
        return Fault("ellipses", f"{ellipses} of {len(lines)} lines")
    return None


def _again(units: Sequence[str]) -> list[str]:
    """Those that stood before."""
    return [unit for unit, count in Counter(units).items() for _ in range(count - 1)]


def _top_share(found: Sequence[str], lengths: Sequence[int], n: int) -> tuple[float, str]:
    """The share of characters in the n-gram that stands most often, the longest of those; it, joined."""
    grams = Counter(tuple(found[at : at + n]) for at in range(len(found) - n + 1))
    count, _, gram = max(((count, sum(map(len, one)), one) for one, count in grams.items()), default=(0, 0, ()))
    if count < 2:
        return 0.0, ""
    return _covered(found, lengths, {gram}, n, first=True), " ".join(gram)


def _repeated_share(found: Sequence[str], lengths: Sequence[int], n: int) -> float:
    """The share of characters in n-grams that stood before, each character once."""
    grams = Counter(tuple(found[at : at + n]) for at in range(len(found) - n + 1))
    return _covered(found, lengths, {one for one, count in grams.items() if count > 1}, n, first=False)


def _covered(found: Sequence[str], lengths: Sequence[int], grams: set[Any], n: int, first: bool) -> float:
    """The share of characters in these n-grams; of each its first place counts, or only the further ones."""
    if not grams:
        return 0.0
    inside, seen = [False] * len(found), set[Any]()
    for at in range(len(found) - n + 1):
        gram = tuple(found[at : at + n])
        if gram in grams and (first or gram in seen):
            inside[at : at + n] = [True] * n
        seen.add(gram)
    return sum(length for length, one in zip(lengths, inside, strict=True) if one) / sum(lengths)
