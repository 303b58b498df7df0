"""Pairs are a function of seed, visit and document: of nothing else, and of each of these."""

import itertools
import json
import pickle
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mmembed.config.blocks import SourceConfig
from mmembed.content import Example, Text
from mmembed.data.batch_plan import BatchPlan
from mmembed.data.dataset import MixedDataset, RecordDataset
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.data.streaming import RecordStream
from mmembed.data.words import join_words, split_sentences, split_words

PIECES = ["a", "b ", "cd", " ", ". ", "!", "\n", "\t", "'", "東", "京。", "ที่", "นี่ ", "é", "e f g. ", "red bus "]
texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=80).map("".join).filter(str.strip)
SETTINGS = {"representative_words": {"min_count": 1}}
MAKERS = [{"type": name, **SETTINGS.get(name, {})} for name in PAIR_MAKERS.classes()]


def words_of(content):
    (part,) = content
    return [word.text for word in split_words(part.text)]


@given(texts)
@settings(deadline=None)
def test_words_and_sentences_give_the_text_again(text):
    words = split_words(text)
    assert join_words(words) == text.strip()
    assert all(word.text and not any(map(str.isspace, word.text)) for word in words)
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in split_sentences(text))


@given(
    texts,
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.integers(1, 6),
    st.integers(2, 60),
    st.floats(0, 0.9),
    st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_crops_are_parts_of_the_document_within_their_bounds(text, low, high, least, chunk, delete, seed):
    """Without deletion contiguous; with it, the same words in order, at least one."""
    low, high = min(low, high), max(low, high)
    options = {"ratio_min": low, "ratio_max": high, "least_words": least, "chunk_length": max(chunk, 2 * least)}
    whole, dropping = (PAIR_MAKERS.build({"type": "random_crops", **options, "delete": part}) for part in (0.0, delete))
    words = words_of((Text(text),))
    if whole.lacks(text) is not None:
        assert len(words) < 2 * least
        return
    piece = min(len(words), options["chunk_length"])
    pair = whole.draw(text, np.random.default_rng(seed))
    for side in (pair.query, pair.positive):
        found = words_of(side)
        assert any(words[at : at + len(found)] == found for at in range(len(words)))
        assert max(least, int(piece * low)) <= len(found) <= max(least, int(piece * high))
    pair = dropping.draw(text, np.random.default_rng(seed))
    for side in (pair.query, pair.positive):
        found, rest = words_of(side), iter(words)
        assert found and all(word in rest for word in found)  # in order


@given(texts, st.floats(0.01, 1), st.integers(0, 2**32))
@settings(deadline=None)
def test_repetition_adds_words_that_stand_beside_themselves(text, rate, seed):
    maker = PAIR_MAKERS.build({"type": "word_repetition", "rate": rate})
    pair = maker.draw(text, np.random.default_rng(seed))
    before, after = words_of(pair.query), words_of(pair.positive)
    assert len(before) <= len(after) <= len(before) + max(2, int(rate * len(before)))
    runs = [[(word, len(list(same))) for word, same in itertools.groupby(words)] for words in (before, after)]
    for (word, count), (again, more) in zip(*runs, strict=True):
        assert again == word and count <= more <= 2 * count


@given(texts, st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32))
@settings(deadline=None)
def test_neighbours_share_no_sentence(text, window, size, seed):
    maker = PAIR_MAKERS.build({"type": "context_prediction", "window": window, "sentences": size})
    sentences = split_sentences(text)
    if maker.lacks(text) is not None:
        assert len(sentences) < 2 * size
        return
    pair = maker.draw(text, np.random.default_rng(seed))
    runs = [" ".join(sentences[at : at + size]) for at in range(len(sentences) - size + 1)]
    places = [{at for at, run in enumerate(runs) if run == side[0].text} for side in (pair.query, pair.positive)]
    assert any(size <= abs(a - b) < size + window for a in places[0] for b in places[1])


def corpus(folder, count=24):
    """Documents of three sentences, each of its own words."""
    generator = random.Random(0)
    names = [f"{a}{b}" for a in ["bus", "red", "train", "river", "bread", "tower"] for b in "abcd"]
    lines = []
    for _ in range(count):
        sentences = [" ".join(generator.choices(names, k=6)).capitalize() + "." for _ in range(3)]
        lines.append(json.dumps({"text": " ".join(sentences)}))
    Path(folder, "d.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def opened(folder, block, streaming=False, seed=0):
    source = SourceConfig(path="d.jsonl", pairs=block, streaming=streaming)
    if streaming:
        return RecordStream(source, root=folder, seed=seed)
    return RecordDataset(source, cache_dir=Path(folder, "cache"), root=folder)


def shown(example: Example):
    """An example as a value: pictures by their pixels."""
    return repr(
        [
            part.text if isinstance(part, Text) else (part.source.size, part.source.tobytes())
            for content in (example.query, *(document.content for document in example.documents))
            for part in content
        ]
        + [(document.relevance, document.id) for document in example.documents]
    )


@pytest.mark.parametrize("block", MAKERS, ids=lambda block: block["type"])
def test_each_visit_draws_another_pair_and_the_same_one_again(tmp_path, block):
    corpus(tmp_path)
    data = opened(tmp_path, block)
    mixed = MixedDataset([data], seed=5)
    visits = [[shown(mixed[0, row, visit]) for row in range(24)] for visit in (0, 1)]
    assert visits[1] == [shown(MixedDataset([opened(tmp_path, block)], seed=5)[0, row, 1]) for row in range(24)]
    other_seed = [shown(MixedDataset([data], seed=6)[0, row, 0]) for row in range(24)]
    anew = block["type"] != "dropout"  # the model draws there
    for others in (visits[1], other_seed):
        same = sum(a == b for a, b in zip(visits[0], others, strict=True))
        assert same < 12 if anew else same == 24
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "d.jsonl").rename(elsewhere / "d.jsonl")
    moved = MixedDataset([opened(elsewhere, block)], seed=5)
    assert [shown(moved[0, row, 0]) for row in range(24)] == visits[0]


def first(examples):
    return examples


@pytest.mark.parametrize("block", MAKERS, ids=lambda block: block["type"])
def test_processes_and_workers_draw_the_same_pairs(tmp_path, block):
    """Also over the border of an epoch, and from the middle of one."""
    corpus(tmp_path)
    mixed = MixedDataset([opened(tmp_path, block)], seed=3)
    alone = BatchPlan([24], batch_size=8, seed=3)
    for epoch in (0, 1):
        alone.set_epoch(epoch)
        expected = [[shown(mixed[draw]) for draw in draws] for draws in alone]
        halves = []
        for rank in (0, 1):
            plan = BatchPlan([24], batch_size=4, seed=3, world_size=2, rank=rank)
            plan.set_epoch(epoch)
            loader = DataLoader(
                pickle.loads(pickle.dumps(mixed)), batch_sampler=plan, num_workers=2 * rank, collate_fn=first
            )
            halves.append([[shown(example) for example in batch] for batch in loader])
        assert [left + right for left, right in zip(*halves, strict=True)] == expected
        assert [[shown(mixed[draw]) for draw in draws] for draws in list(alone)[1:]] == expected[1:]


@given(st.sampled_from([block for block in MAKERS if not PAIR_MAKERS.get(block["type"]).learns]), st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_a_stream_of_documents_goes_on_anywhere(block, start):
    with tempfile.TemporaryDirectory() as folder:
        corpus(folder)
        rows = MixedDataset([opened(folder, block, streaming=True, seed=4)], seed=4)
        expected = [shown(rows[0, position, 0]) for position in range(start, start + 6)]
        later = MixedDataset([opened(folder, block, streaming=True, seed=4)], seed=4)
        assert [shown(later[0, position, 0]) for position in range(start, start + 6)] == expected
        assert rows[0, start, 0].visit == start // 24
