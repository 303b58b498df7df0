"""Late interaction in blocks of both sides: equal to the definition, with gradients, in little memory."""

import pytest
import torch

from mmembed.embeddings import Embeddings
from mmembed.objectives import similarity


def sequences(count, longest, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, longest, size, generator=generator, dtype=torch.float64)  # (B, T, E)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return Embeddings(vectors.requires_grad_(), torch.arange(longest)[None] < lengths[:, None])


def by_definition(a, b):
    rows = []
    for x, keep_x in zip(a.vectors, a.mask, strict=True):
        pairs = zip(b.vectors, b.mask, strict=True)
        rows.append(torch.stack([(x[keep_x] @ y[keep_y].T).amax(1).sum() for y, keep_y in pairs]))
    return torch.stack(rows)  # (A, B)


@pytest.mark.parametrize("products", [1, 200, 10**9])
def test_maxsim_is_the_definition_for_any_block(monkeypatch, products):
    monkeypatch.setattr(similarity, "PRODUCTS", products)
    a, b = sequences(5, 6), sequences(7, 9, seed=1)
    found, expected = similarity.maxsim(a, b), by_definition(a, b)
    assert torch.allclose(found, expected)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ours = torch.autograd.grad((found * weight).sum(), [a.vectors, b.vectors])
    theirs = torch.autograd.grad((expected * weight).sum(), [a.vectors, b.vectors])
    assert all(torch.allclose(x, y) for x, y in zip(ours, theirs, strict=True))


def test_no_block_holds_more_products_than_allowed(monkeypatch):
    """Many candidates, few queries: the side that grows with the processes is cut too."""
    seen = []
    block = similarity._maxsim_block

    def watched(a, b, *masks):
        seen.append(a.shape[0] * a.shape[1] * b.shape[0] * b.shape[1])
        return block(a, b, *masks)

    monkeypatch.setattr(similarity, "PRODUCTS", 1000)
    monkeypatch.setattr(similarity, "_maxsim_block", watched)
    with torch.no_grad():
        similarity.maxsim(sequences(2, 5), sequences(300, 5, seed=1))
    assert sum(seen) == 2 * 5 * 300 * 5
    assert max(seen) <= 1000
