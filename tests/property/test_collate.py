"""Chunk plans and batches: every input once, under the budget, drawn the same every time."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmembed.config import SourceConfig
from mmembed.content import Document, Example, Image, Task, Text
from mmembed.data.collate import Collator, content_key, plan_chunks
from mmembed.errors import RecordError
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.preprocess import Row

PICTURE = Image("picture.png")


@given(
    lengths=st.lists(st.tuples(st.integers(1, 90), st.booleans()), min_size=1, max_size=60),
    chunk_tokens=st.integers(1, 400),
    chunk_rows=st.one_of(st.none(), st.integers(1, 10)),
)
def test_plan(lengths, chunk_tokens, chunk_rows):
    rows = [Row([0] * length, images=(PICTURE,) if has_picture else ()) for length, has_picture in lengths]
    chunks = plan_chunks(rows, chunk_tokens, chunk_rows)
    assert sorted(index for chunk in chunks for index in chunk.index.tolist()) == list(range(len(rows)))
    for chunk in chunks:
        assert [rows[index] for index in chunk.index.tolist()] == list(chunk.rows)
        assert chunk.padded_tokens <= chunk_tokens or len(chunk.rows) == 1
        assert chunk_rows is None or len(chunk.rows) <= chunk_rows
        assert len({bool(row.images) for row in chunk.rows}) == 1


@pytest.fixture(scope="module")
def preprocessor(family_folder):
    return build_from_settings(EmbedderSettings(str(family_folder("qwen3"))))[1]


def collator(preprocessor, **options):
    return Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens=64, **options)


def example(index, positives=1, negatives=3, **options):
    documents = [Document((Text(f"positive {index} {p}"),), 1.0) for p in range(positives)]
    documents += [Document((Text(f"negative {index} {n}"),), 0.0) for n in range(negatives)]
    return Example((Text(f"query {index}"),), tuple(documents), source="s", where=f"f:{index}", **options)


@settings(max_examples=25, deadline=None)
@given(group=st.integers(1, 6), per_query=st.integers(1, 3), seed=st.integers(0, 9), count=st.integers(1, 6))
def test_groups(preprocessor, group, per_query, seed, count):
    per_query = min(per_query, group)
    make = collator(preprocessor, train_group_size=group, positives_per_query=per_query, seed=seed)
    examples = [example(index, positives=2) for index in range(count)]
    random.seed(seed)
    batch, again = make(examples), make(examples)
    assert batch.labels.document_keys.equal(again.labels.document_keys)
    assert batch.n_queries == count
    for query in range(count):
        own = batch.labels.relevance[batch.labels.owner == query].tolist()
        assert sum(own) == min(per_query, 2)
        assert len(own) - sum(own) == min(group - per_query, 3)
    assert batch.labels.positive_keys.shape == (count, 2, 2)
    assert batch.place.max() + 1 == sum(len(chunk.rows) for chunk in batch.chunks)


def test_an_input_that_occurs_twice_is_encoded_once(preprocessor):
    shared = Document((Text("the same answer"),), 1.0)
    examples = [Example((Text(f"query {index}"),), (shared,), source="s", where=str(index)) for index in range(4)]
    batch = collator(preprocessor)(examples)
    assert batch.n_documents == 4
    assert sum(len(chunk.rows) for chunk in batch.chunks) == 5
    assert len(set(batch.place[4:].tolist())) == 1


def test_query_and_document_of_one_text_stay_two_inputs(preprocessor):
    """Their prompts differ, and with dropout their vectors must (SimCSE)."""
    text = (Text("the same text"),)
    batch = collator(preprocessor)([Example(text, (Document(text),), source="s")])
    assert batch.place.tolist() == [0, 1]


def test_a_record_without_a_positive(preprocessor):
    with pytest.raises(RecordError, match="f:7"):
        collator(preprocessor)([example(7, positives=0)])


def test_a_middling_sts_pair_is_no_positive(preprocessor):
    pair = Example((Text("a"),), (Document((Text("b"),), 0.5),), task=Task.STS, source="s", where="f:1")
    with pytest.raises(RecordError, match="at_least"):
        collator(preprocessor)([pair])


def test_keys_tell_contents_apart():
    contents = [
        (Text("a"),),
        (Text("b"),),
        (Text("a"), Text("b")),
        (Text("ab"),),
        (Image("a"),),
        (Image(b"a"),),
        (Image("a"), Text("a")),
    ]
    assert len({content_key(content) for content in contents}) == len(contents)
    assert content_key((Text("a"),)) == content_key((Text("a"),))
