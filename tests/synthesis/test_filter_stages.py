"""Filters that look at one item: each against counts and rules that are written here anew."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.synthesis.stages import STAGES
from data_tools.synthesis.stages.repetition import REPEATED, TOP, Repetition
from mmembed.data.records import parse_record
from mmembed.errors import ConfigError
from tests.synthesis.filtering import pair

DATA = Path("data")


def test_schema_names_what_a_record_lacks(sift):
    items = [
        pair("good", "q", ("a", 3), ("b", 0), instruction="find"),
        pair("no instruction", "q", ("a", 3), ("b", 0)),
        pair("no negative", "q", ("a", 3), instruction="find"),
        pair("another level", "q", ("a", 2), ("b", 0), instruction="find"),
        pair("many", "q", ("a", 3), ("a1", 3), ("b", 0), instruction="find"),
        pair("copy", "The Query", ("the  query", 3), ("b", 0), instruction="find"),
        pair("copied negative", "q", ("An A", 3), ("an a", 0), ("b", 0), instruction="find"),
        {**pair("unknown", "q", ("a", 3), ("b", 0), instruction="find"), "candidates": []},
    ]
    block = {"type": "schema", "required": ["instruction"], "levels": [3, 0], "min_negatives": 1, "max_positives": 1}
    kept, dropped, trimmed, _ = sift(block, items)
    assert dropped == {
        "no instruction": "no instruction",
        "no negative": "a level is missing",
        "another level": "a level is missing",
        "many": "too many positives",
        "copy": "document: is the query",
        "unknown": "unknown key",
    }
    assert trimmed == [("copied negative", "an a", "a negative that is a positive")]
    for item in kept:
        parse_record(item, "here")
    assert not sift({"type": "schema", "copies": True}, [pair("copy", "same", ("same", 1))])[1]


def test_language_leaves_out_what_is_surely_another_one_and_keeps_short_texts(sift):
    english = "The bus does not run today because of the snow in the mountains."
    german = "Der Bus fährt heute wegen des Schnees in den Bergen leider nicht."
    items = [
        pair("english", english, (english + " So we walk.", 1), (german, 0)),
        pair("german", german, (english, 1)),
        pair("short", "Bus?", (english, 1)),
        pair("german document", english, (german, 1)),
    ]
    kept, dropped, trimmed, _ = sift({"type": "language", "query": ["en"], "document": ["en"]}, items)
    assert [one["id"] for one in kept] == ["english", "short"]
    assert dropped == {"german": "query: another language", "german document": "document: another language"}
    assert trimmed == [("english", german, "another language")]
    assert not sift({"type": "language", "document": ["en"]}, items[1:2])[1]
    with pytest.raises(ConfigError, match="'eng' is no language"):
        STAGES.build({"type": "language", "query": ["eng"]}, below_root=Path)
    with pytest.raises(ConfigError, match="documents have no query"):
        sift({"type": "language", "query": ["en"]}, [{"id": "d", "content": english}], "documents")


def test_language_agrees_with_the_labels_of_translated_questions(sift):
    rows = []
    for language in ("de", "zh"):
        for line in (DATA / "xquad" / language / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:150]:
            row = json.loads(line)
            rows.append({"id": f"{language}-{row['_id']}", "query": row["text"]})
    kept, _, _, _ = sift({"type": "language", "query": ["de"], "min_characters": 0}, rows, "queries")
    german = sum(one["id"].startswith("de") for one in kept)
    assert german >= 0.97 * 150 and len(kept) - german <= 0.03 * 150


@pytest.mark.parametrize("unit", ["words", "characters", "tokens"])
def test_length_counts_as_an_independent_count_does(sift, unit):
    lines = (DATA / "squad-en" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:120]
    items = [{"id": row["_id"], "content": row["text"]} for row in map(json.loads, lines)]
    if unit == "tokens":
        from transformers import AutoTokenizer

        from mmembed.packaged import resolve

        tokenizer = AutoTokenizer.from_pretrained(resolve("mmembed-nano"))
        counts = {one["id"]: len(tokenizer(one["content"], add_special_tokens=False).input_ids) for one in items}
    else:
        counts = {
            one["id"]: len(re.findall(r"\S+", one["content"]) if unit == "words" else one["content"]) for one in items
        }
    least, most = sorted(counts.values())[20], sorted(counts.values())[90]
    block = {"type": "length", "unit": unit, "min_document": least, "max_document": most}
    kept, _, _, _ = sift({**block, **({"tokenizer": "mmembed-nano"} if unit == "tokens" else {})}, items, "documents")
    assert [one["id"] for one in kept] == [name for name, count in counts.items() if least <= count <= most]
    assert 0 < len(kept) < len(items)


def test_ratio_of_lengths_is_of_positives_and_symmetric(sift):
    items = [pair("long", "one two", ("word " * 21, 1)), pair("fine", "one two", ("word " * 20, 1), ("word " * 90, 0)),
             pair("query", "word " * 21, ("one two", 1))]  # fmt: skip
    kept, dropped, _, _ = sift({"type": "length", "max_ratio": 10.0}, items)
    assert [one["id"] for one in kept] == ["fine"] and set(dropped) == {"long", "query"}


@pytest.mark.parametrize(
    "block, error",
    [
        ({"type": "length"}, "has no bound"),
        ({"type": "length", "unit": "tokens", "max_query": 3}, "belong together"),
        ({"type": "length", "min_query": 4, "max_query": 3}, "the least of a query"),
        ({"type": "schema", "required": ["instructions"]}, "did you mean 'instruction'"),
        ({"type": "schema", "min_negatives": 2, "max_negatives": 1}, "above max_negatives"),
        ({"type": "score_gap", "min_positive": 2.0, "max_negative": 3.0}, "lower it"),
        ({"type": "near_duplicates", "threshold": 1.5}, "at most 1"),
        ({"type": "balanced", "cap": 3, "tail": 0.1}, "give one"),
        ({"type": "decontaminate", "against": ["data/no-such-set"]}, "there is no"),
        ({"type": "decontaminate", "against": [{"path": "data/squad-en", "split": "tset"}]}, "it has dev, train"),
        ({"type": "guide_model", "guide": {"type": "cross_encoder", "model": "nowhere"}}, "no folder of a model"),
        ({"type": "noise", "embedder": "bm25"}, "gives no vectors"),
        ({"type": "target_directed", "embedder": "mmembed", "target": "data/squad-en"}, "one of share and count"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_right_are_refused(block, error):
    with pytest.raises(ConfigError, match=error):
        STAGES.build(block, below_root=lambda name: Path(name).absolute())


def brute_top(words, n):
    """Share of characters in the most frequent n-gram, by marking each place of it."""
    places = {}
    for at in range(len(words) - n + 1):
        places.setdefault(" ".join(words[at : at + n]), []).append(at)
    most = max((len(found) for found in places.values()), default=0)
    if most < 2:
        return [0.0]
    size = sum(map(len, words))
    return [sum(len(words[i]) for i in {at + k for at in found for k in range(n)}) / size
            for found in places.values() if len(found) == most]  # fmt: skip


def brute_repeated(words, n):
    marked = set()
    for at in range(len(words) - n + 1):
        if any(words[at : at + n] == words[before : before + n] for before in range(at)):
            marked |= set(range(at, at + n))
    return sum(len(words[i]) for i in marked) / sum(map(len, words))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "gg", "h", "iii", "jjjj", "kkkkk", "lll"]),
        min_size=12,
        max_size=60,
    )
)
def test_rules_of_repetition_are_those_of_a_count_by_brute_force(words):
    fault = Repetition(min_words=1, quality=False).fault(" ".join(words))
    tops = {n: max(brute_top(words, n)) for n in TOP}
    again = {n: brute_repeated(words, n) for n in REPEATED}
    least = {n: min(brute_top(words, n)) for n in TOP}  # of equally frequent ones any may be looked at
    certain = any(least[n] > most for n, most in TOP.items()) or any(again[n] > most for n, most in REPEATED.items())
    possible = certain or any(tops[n] > most for n, most in TOP.items())
    assert (not certain or fault is not None) and (fault is None or possible)


def test_repetition_leaves_wikipedia_and_takes_loops(sift):
    rows = map(json.loads, (DATA / "squad-en" / "corpus.jsonl").read_text(encoding="utf-8").splitlines())
    passages = [{"id": row["_id"], "content": f"{row['title']} {row['text']}"} for row in rows]
    loop = "The red bus is late again and everybody waits for it. "
    bad = [
        {"id": "loop", "content": loop * 12},
        {"id": "flood", "content": "bus " * 20},
        {"id": "lines", "content": "\n".join([loop, f"{loop[::-1]}"] * 6)},
        {"id": "symbols", "content": " ".join(f"word{n} #" for n in range(60))},
        {"id": "numbers", "content": " ".join(str(n * 7919) for n in range(80))},
    ]
    _, dropped, _, _ = sift({"type": "repetition"}, [*passages, *bad], "documents")
    assert {one["id"] for one in bad} <= set(dropped)
    assert len(dropped) - len(bad) == 6 and len(passages) == 1676  # as the module says
    reasons = Counter(dropped.values())
    assert reasons["document: one word is most of it"] == 1


def test_score_gap_is_the_gate_of_multicsr(sift):
    scores = [[4.5, 1], [3, 3], [3.2, 3], [2.9, 0], [5, 3.1]]
    items = [pair(str(n), "q", ("p", 1), ("n", 0)) for n in range(5)]
    for item, both in zip(items, scores, strict=True):
        for document, score in zip(item["documents"], both, strict=True):
            document["score"] = score
    block = {"type": "score_gap", "min_positive": 3.0, "max_negative": 3.0, "drop": "record"}
    assert [one["id"] for one in sift(block, items)[0]] == ["0", "2"]  # the golden value of the shared method cards
    kept, dropped, trimmed, _ = sift({**block, "drop": "documents"}, items)
    assert set(dropped) == {"3"} and {record for record, _, _ in trimmed} == {"1", "4"}
    kept, dropped, _, _ = sift({"type": "score_gap", "min_negatives": 1, "margin": 1.9}, items)
    assert [one["id"] for one in kept] == ["0", "3"] and set(dropped.values()) == {"too few negatives"}
    bare = [pair("bare", "q", ("a", 1))]
    assert sift({"type": "score_gap"}, bare)[1] == {"bare": "no score"}
    assert sift({"type": "score_gap", "missing": "keep"}, bare)[3] == {"records without scores, kept": 1}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=1, max_size=6), st.integers(0, 3))
def test_score_gap_leaves_only_pairs_that_are_apart(documents, margin):
    from data_tools.synthesis.stages.score_gap import ScoreGap

    own = [{"content": str(n), "relevance": float(one[0]), "score": float(one[1])} for n, one in enumerate(documents)]
    record = {"id": "r", "query": "q", "documents": own}
    stage = ScoreGap(margin=float(margin))
    left = [one for one in stage.apply([record], None) if isinstance(one, dict)]
    lowest = min((score for positive, score in documents if positive), default=None)
    wanted = [
        str(n) for n, (positive, score) in enumerate(documents) if positive or lowest is None or lowest - score > margin
    ]
    assert [[one["content"] for one in item["documents"]] for item in left] == [wanted]
