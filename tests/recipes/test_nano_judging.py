"""What a judge of the nano learns from, and that the recipe's own steps make a reranker that loads."""

import itertools
import random

import numpy as np
import pytest

from mmembed import Reranker
from mmembed.data.records import write_records
from recipes import build_nano_judge
from recipes.nano import judging
from recipes.nano.data import Pair, Passage


def sentence(group, passage, number):
    return f"Sentence {number} of passage {passage} in article {group} says something of its own."


PASSAGES = [
    Passage(tuple(sentence(group, passage, number) for number in range(5)), "prose", f"article {group}")
    for group in range(4)
    for passage in range(10)
]
PAIRS = [Pair(f"query {n // 2}", f"document {n}", f"set {n % 4 // 2}", str(n)) for n in range(80)]


def drawn(examples, count=60):
    """(query, relevant document, others) of each example."""
    for example in itertools.islice(examples, count):
        (query,), (relevant, *others) = example.query, example.documents
        assert relevant.relevance == 1 and all(other.relevance == 0 for other in others) and len(others) == 7
        yield query.text, relevant.content[0].text, [other.content[0].text for other in others]


def test_a_copy_is_among_seven_other_sentences():
    for query, relevant, others in drawn(judging.copies(PASSAGES, random.Random(0))):
        assert query == relevant and len({query, *others}) == 8


@pytest.mark.parametrize("kept", [0.0, 1.0])
@pytest.mark.parametrize("near", [0.0, 1.0])
def test_cloze_asks_for_the_sentences_around_a_sentence(kept, near):
    settings = {"characters": 150, "kept": kept, "near": near}
    articles = []
    for query, relevant, others in drawn(judging.cloze(PASSAGES, random.Random(0), **settings)):
        (passage,) = (one for one in PASSAGES if query in one.sentences)
        text = " ".join(passage.sentences)
        assert (query in relevant) == bool(kept)
        parts = relevant.split(query) if kept else [relevant]
        assert all(part.strip() in text or part.strip() in text.replace(f"{query} ", "") for part in parts)
        assert 150 <= len(relevant) < 300
        assert not any(query in other for other in others)
        articles += [f"in {passage.group} " in other for other in others]
    assert all(articles) if near else 0.1 < np.mean(articles) < 0.4


def test_keywords_are_some_words_of_a_sentence_that_one_document_holds():
    lengths = set()
    settings = {"characters": 150, "near": 0.5}
    for query, relevant, others in drawn(judging.keywords(PASSAGES, random.Random(0), **settings)):
        asked = query.split()
        holds = [one for passage in PASSAGES for one in passage.sentences if one in relevant]
        assert any(in_order(asked, one.split()) for one in holds) and relevant not in others
        lengths.add(len(asked))
    assert lengths == set(range(3, 9))


def in_order(words, sentence):
    """Whether the words stand in the sentence in this order."""
    rest = iter(sentence)
    return all(word in rest for word in words)


def test_questions_have_no_second_answer_among_the_others():
    for query, relevant, others in drawn(judging.questions(PAIRS, random.Random(0))):
        answers = {pair.document for pair in PAIRS if pair.query == query}
        sources = {pair.source for pair in PAIRS if pair.document in (relevant, *others)}
        assert relevant in answers and not answers & set(others) and len(sources) == 1


def test_parts_are_mixed_by_weight_and_each_goes_on_where_it_was():
    parts = [(3.0, iter(range(300))), (1.0, iter(range(1000, 1300)))]
    found = list(itertools.islice(judging.mixed(parts, random.Random(0)), 200))
    low, high = ([one for one in found if (one < 500) == wanted] for wanted in (True, False))
    assert low == list(range(len(low))) and high == list(range(1000, 1000 + len(high))) and 120 < len(low) < 180


def test_equal_seeds_draw_equal_records():
    first, second = (list(drawn(judging.questions(PAIRS, random.Random(3)))) for _ in range(2))
    assert first == second != list(drawn(judging.questions(PAIRS, random.Random(4))))


@pytest.mark.slow
def test_stages_go_on_from_each_other_and_the_packaged_adapter_scores_as_the_trained_one(tmp_path):
    examples = judging.copies(PASSAGES, random.Random(0))
    start = "mmembed-nano"
    for stage in ("first", "second"):
        write_records(tmp_path / f"{stage}.jsonl", itertools.islice(examples, 16))
        settings = {"model.name_or_path": start, "training.output_dir": tmp_path / stage, "training.max_steps": 2}
        settings["data.train"] = f"[{{path: {tmp_path / stage}.jsonl}}]"
        build_nano_judge.train(settings | build_nano_judge.lengths(48, 32), processes=1)
        start = str(tmp_path / stage)
    build_nano_judge.package(tmp_path / "second", tmp_path / "out")
    pairs = [(PASSAGES[0].sentences[0], one) for one in PASSAGES[0].sentences]
    first, trained, packaged = (
        Reranker.from_pretrained(tmp_path / name, dtype="float32").score(pairs, scale="logit")
        for name in ("first", "second", "out")
    )
    assert np.abs(trained - packaged).max() < 0.02 < np.abs(trained - first).max()
    halves = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("second", "out")]
    assert halves[1] < 0.55 * halves[0]
