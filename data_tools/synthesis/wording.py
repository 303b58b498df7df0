"""What stages ask of texts that a model wrote."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from data_tools.synthesis.stages import Unusable
from mmembed.data.words import search_words
from mmembed.errors import ConfigError, nearest

_QUOTES = {'"': '"', "'": "'", "“": "”", "«": "»", "„": "“", "「": "」"}
WITHOUT_BLANKS = 2  # characters of a word in texts without blanks between words
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish", "de": "German",
    "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay", "nb": "Norwegian",
    "nl": "Dutch", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak",
    "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai",
    "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip


def language_name(code: str | None) -> str:
    """As a prompt says it; empty of None. Raises ConfigError for a code that is not known."""
    if code is not None and code not in LANGUAGES:
        raise ConfigError(f"language '{code}': {nearest(code, LANGUAGES)}")
    return "" if code is None else LANGUAGES[code]


def words(text: str) -> int:
    """How many words a text has; of scripts without blanks two characters count as one."""
    dense = sum(unicodedata.east_asian_width(one) in "WF" or "\u0e00" <= one <= "\u0e7f" for one in text)
    return len(text.split()) if dense * 2 < len(text) else -(-dense // WITHOUT_BLANKS)


def check_words(text: str, least: int, most: int) -> None:
    """Raises Unusable where a text is shorter or longer."""
    count = words(text)
    if count < least:
        raise Unusable("too short", f"{count} words: {text[:100]}")
    if count > most:
        raise Unusable("too long", f"{count} words: {text[:100]}")


def check_distinct(texts: Sequence[str]) -> None:
    """Raises Unusable where two texts are the same but for case and blanks."""
    plain = [" ".join(text.casefold().split()) for text in texts]
    for place, text in enumerate(plain):
        if text in plain[:place]:
            raise Unusable("copies", texts[place][:100])


def unquoted(text: str) -> str:
    """A text on one line, without the quotation marks that a model put around the whole of it.

    >>> unquoted('"A red bus\\nwaits."')
    'A red bus waits.'
    """
    line = " ".join(text.split())
    closing = _QUOTES.get(line[:1])
    whole = closing is not None and len(line) > 2 and line[-1] == closing and closing not in line[1:-1]
    return line[1:-1].strip() if whole else line


def filler(name: str, count: int) -> str:
    """A text of so many words, for the samples of answers; the name is the first of them.

    >>> filler("number 1", 3)
    'number-1 words words'
    """
    return " ".join(["-".join(name.split()), *["words"] * (count - 1)])


def copies_run(text: str, source: str, count: int) -> bool:
    """Whether a text repeats so many words of a source in their order; case and punctuation do not matter."""
    ours, theirs = search_words(text), search_words(source)
    runs = {tuple(theirs[start : start + count]) for start in range(len(theirs) - count + 1)}
    return any(tuple(ours[start : start + count]) in runs for start in range(len(ours) - count + 1))


def shortened(text: str, most: int) -> str:
    """A text of at most so many characters, cut between words where it has blanks."""
    if len(text) <= most:
        return text
    cut = text[: most + 1]
    return (cut[: cut.rfind(" ")] if " " in cut[most // 2 :] else text[:most]).rstrip()
