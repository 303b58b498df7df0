"""Search on a GPU gives what search on a CPU gives, bit by bit."""

import numpy as np
import pytest
import torch

from mmembed.search import top_k

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("kind", ["plain", "one direction"])
def test_devices_agree(products, precision, kind):
    random = np.random.default_rng(0)
    corpus = random.standard_normal((70_000, 96)).astype(np.float32)
    queries = corpus[:300] + 0.3 * random.standard_normal((300, 96)).astype(np.float32)
    if kind == "one direction":
        corpus, queries = (
            one * np.float32(0.01) + np.linspace(1, 2, 96, dtype=np.float32) for one in (corpus, queries)
        )
    expected = top_k(queries, corpus, 20)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # "high" lets float32 products be TF32
    try:
        found = top_k(queries, corpus, 20, products=products, device="cuda", corpus_rows=9000)
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.scores, expected.scores)
