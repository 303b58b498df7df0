"""Languages of texts against sentences that people translated, and against texts that have none."""

import doctest
import json
from collections import defaultdict
from pathlib import Path

import pytest

from data_tools import languages
from data_tools.languages import SURE, UNDETERMINED, identify, known_languages

DATA = Path("data")


def _texts() -> dict[str, list[str]]:
    """language -> sentences of stories, and questions, that people wrote or translated."""
    found = defaultdict(list)
    for line in (DATA / "story-pages/queries.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["lang"]].append(row["text"])
    for folder in (DATA / "xquad").iterdir():
        for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines() if folder.is_dir() else ():
            found[folder.name].append(json.loads(line)["text"])
    return {language: [text for text in texts if len(text) >= 40][:60] for language, texts in found.items()}


def test_sentences_are_of_the_language_that_people_wrote_them_in() -> None:
    texts = _texts()
    assert len(texts) >= 5
    assert known_languages() >= set(texts)
    flat = [(language, text) for language, found in texts.items() for text in found]
    guesses = identify([text for _, text in flat])
    sure = [(language, code) for (language, _), (code, confidence) in zip(flat, guesses, strict=True)
            if confidence >= SURE]  # fmt: skip
    assert len(sure) > 0.8 * len(flat)
    assert sum(language == code for language, code in sure) / len(sure) > 0.98


@pytest.mark.parametrize("text", ["", "   ", "12345 67", "ok", "}{;"])
def test_a_text_without_a_language_is_undetermined(text: str) -> None:
    assert identify([text])[0][0] == UNDETERMINED


def test_only_the_beginning_of_a_text_is_read() -> None:
    english = "The people of the village gathered at the river every morning. " * 20
    assert identify([english])[0] == identify([english + "Der Fluss war lang und breit. " * 500])[0]


def test_the_examples_of_the_docstring() -> None:
    assert doctest.testmod(languages).failed == 0
