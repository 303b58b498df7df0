"""What `benchmarks.rerank` compares is the same work on both sides."""

import numpy as np
import pytest

from benchmarks import rerank
from data_tools.mining.retrievers import Item as Entry
from data_tools.mining.retrievers.bm25 import Bm25


@pytest.fixture(scope="module")
def collection():
    return rerank.Collection("medquad")


def test_documents_are_those_that_bm25_finds(collection):
    """Of `mine_negatives`, which was written for itself."""
    other = Bm25()
    other.index([Entry(text, None, None, "") for text in collection.documents])
    queries = [query.text for query in collection.spread(20)]
    none = np.full((len(queries), 1), -1)
    hits, _ = other.search([Entry(text, None, None, "") for text in queries], 10, none)
    for text, rows in zip(queries, hits.indices, strict=True):
        assert collection.nearest(text, 10) == [collection.documents[row] for row in rows]


def test_strings_written_beforehand_are_the_tokens_of_pairs(collection):
    """Also where a text begins with a space, a digit or a mark, and ends in a mark."""
    tokenizer = rerank.ours("float32").preprocessor
    texts = [*collection.documents[:50], "1 of 2", '"quoted"', "(so)", " spaced", "東京"]
    pairs = [(query.text, text) for query, text in zip(collection.spread(len(texts)), texts, strict=True)]
    pairs += [(end, "A text.") for end in ("Why?", "a)", "7", "no end ")]
    for pair, row in zip(pairs, tokenizer.tokenize(rerank._items(pairs)), strict=True):
        parts = rerank.written(*pair)
        ids = [token for part in parts for token in tokenizer.tokenizer.encode(part, add_special_tokens=False)]
        assert ids == list(row.ids), pair


def test_the_peers_template_writes_the_same(collection):
    from jinja2 import Environment

    query, document = collection.queries[0].text, collection.documents[0]
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("query", query), ("document", document))
    ]
    assert Environment().from_string(rerank._template()).render(messages=messages) == "".join(
        rerank.written(query, document)
    )
