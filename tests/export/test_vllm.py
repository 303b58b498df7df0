"""vLLM itself, offline and over HTTP, on exported folders. Needs `make vllm-env`."""

import pytest

from mmembed.export.comparison import compare_all
from mmembed.export.subject import load_subject
from mmembed.vllm_environment import find_vllm
from tests.export.making import JUDGE, LENGTHS, save

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(find_vllm() is None, reason="there is no environment with vLLM; run `make vllm-env`"),
]
NANO = {"backbone": "mmembed-nano", "lengths": LENGTHS}


@pytest.mark.parametrize(
    ("settings", "runtimes"),
    [
        ({"pooling": "last_token", "prompt": "instruct", **NANO}, ["vllm", "vllm-server"]),
        ({"pooling": "mean", "attention": "bidirectional", "projection": 64, **NANO}, ["vllm"]),
        ({**JUDGE, **NANO}, ["vllm", "vllm-server"]),
    ],
    ids=["embedder", "bidirectional", "reranker"],
)
def test_the_numbers_are_the_checkpoints(settings, runtimes, tmp_path):
    path = save(tmp_path / "saved", **settings)
    for row in compare_all(load_subject(str(path), merge=False, dtype="float32"), runtimes):
        assert row.difference is not None and row.difference < 1e-4, row
