"""A small encoder with dropout over Rows, and batches of random rows: what the step is tested with."""

import random
from contextlib import contextmanager

import torch
from torch import nn

from mmembed.backbones.output_embedding import OutputEmbedding
from mmembed.content import Task
from mmembed.data.collate import Batch, plan_chunks
from mmembed.data.labels import BatchLabels, label_keys, label_values
from mmembed.embeddings import Embeddings
from mmembed.preprocess import Row
from mmembed.training.teacher import teacher_of

VOCABULARY, SIZE = 50, 8


class ToyEncoder(nn.Module):
    """Token embeddings -> dropout -> tanh layer -> masked mean; or one vector a token. Layer 1 is before tanh."""

    def __init__(self, dropout=0.0, multi_vector=False, layers=()):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, SIZE)
        self.layer = nn.Linear(SIZE, SIZE)
        self.unused = nn.Linear(SIZE, SIZE)
        self.dropout, self.multi_vector, self.layers = nn.Dropout(dropout), multi_vector, layers

    def forward(self, chunk):
        _, mask, lower, hidden = self.states(chunk)
        return self.embed(mask, lower, hidden)

    def embed(self, mask, lower, hidden):
        def head(states):
            if self.multi_vector:
                return nn.functional.normalize(states, dim=-1)
            return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)

        layers = {layer: head(lower) for layer in self.layers} or None
        return Embeddings(head(hidden), mask if self.multi_vector else None, layers)

    def states(self, chunk):
        """Token ids and mask (B, T), states of the lower layer and of the last (B, T, H)."""
        longest = max(len(row) for row in chunk.rows)
        ids = torch.tensor([list(row.ids) + [0] * (longest - len(row)) for row in chunk.rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in chunk.rows]).bool()
        lower = self.dropout(self.table(ids))
        return ids, mask, lower, torch.tanh(self.layer(lower))


class Captioner(ToyEncoder):
    """Its hidden states also predict the next token, by its own table (tied, trained)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.output = OutputEmbedding(None)

    def forward(self, chunk):
        ids, mask, lower, hidden = self.states(chunk)
        nll, predicted = self.output(hidden, ids, mask, self.table)
        return self.embed(mask, lower, hidden)._replace(nll=nll, predicted=predicted)


def make_batch(
    queries,
    per_query,
    chunk_tokens,
    chunk_rows=None,
    seed=0,
    first=0,
    count=None,
    in_batch=True,
    ragged=False,
    twins=False,
    positives=1,
    graded=False,
):
    """A batch of `count` queries from `first` on, out of `queries`: the slice that one process would get.

    The first `positives` documents of a query are positive; `ragged`: all documents of query 0 are positive; `twins`:
    the first and the last query have the same positive; `graded`: all documents are pairs with a similarity. Queries
    are of the classes "0" to "3" in turn.
    """
    generator = random.Random(seed)
    count = queries - first if count is None else count

    def row():
        return Row([generator.randrange(1, VOCABULARY) for _ in range(generator.randint(1, 12))])

    query_rows = [row() for _ in range(queries)]
    document_rows = [[row() for _ in range(per_query)] for _ in range(queries)]
    chosen = range(first, first + count)
    rows = [query_rows[i] for i in chosen] + [document for i in chosen for document in document_rows[i]]
    keys = torch.arange(1000, 1000 + queries * per_query).view(queries, per_query)
    if twins:
        keys[-1, 0] = keys[0, 0]
    keys = keys[first : first + count]
    relevance = torch.tensor([1.0] * positives + [0.0] * (per_query - positives)).repeat(count)
    if ragged and first == 0:
        relevance[:per_query] = 1.0
    if graded:
        relevance = torch.linspace(0, 1, queries * per_query).roll(queries)[first * per_query :][: count * per_query]
    labels = BatchLabels(
        owner=torch.arange(count).repeat_interleave(per_query),
        relevance=relevance,
        document_keys=keys.reshape(-1, 1).expand(-1, 2),
        query_keys=torch.arange(first, first + count),
        positive_keys=keys[:, :positives, None].expand(-1, -1, 2),
        in_batch=in_batch and not graded,
        task=Task.STS if graded else Task.RETRIEVAL,
        label_keys=label_keys([[(str(query % 4),)] for query in chosen]),
        label_values=label_values([[(str(query % 4),)] for query in chosen]),
    )
    chunks = plan_chunks(rows, chunk_tokens, chunk_rows)
    return Batch(count, count * per_query, chunks, torch.arange(len(rows)), labels)


def teaching(encoder, objective, teacher=None):
    """What a step takes as `teacher`: the encoder with the weights that it has now, or those of a given one; None where
    the objective asks for none."""
    teacher = teacher or teacher_of(encoder, objective)
    if teacher is None:
        return None
    teacher.begin()

    @contextmanager
    def entered():
        with teacher.in_place():
            yield encoder

    return entered


def gradients(*modules):
    """Flat float64 gradient of everything; None counts as zero."""
    parts = [
        torch.zeros(parameter.numel()) if parameter.grad is None else parameter.grad.flatten()
        for module in modules
        for parameter in module.parameters()
    ]
    return torch.cat(parts).double()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()
