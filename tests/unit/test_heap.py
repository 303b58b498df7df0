"""The heap gives back what tensors held."""

import psutil
import pytest
import torch

from mmembed.training import heap
from mmembed.training.heap import CHUNKS, _malloc_trim, give_back, giving_back


@pytest.mark.skipif(_malloc_trim() is None, reason="the C library is not glibc")
def test_pages_between_living_tensors_are_given_back():
    process = psutil.Process()
    tensors = [torch.ones(2**14) for _ in range(4000)]  # 64 KB each: from the heap, not from mappings of their own
    kept = tensors[::200]
    full = process.memory_info().rss
    del tensors
    assert give_back()
    assert process.memory_info().rss < full - 150 * 2**20
    assert all(bool((one == 1).all()) for one in kept)


def test_a_long_pass_gives_back_now_and_then(monkeypatch):
    seen = []
    monkeypatch.setattr(heap, "give_back", lambda: seen.append("given back"))
    for number in giving_back(range(2 * CHUNKS + 3)):
        seen.append(number)
    assert [number for number in seen if number != "given back"] == list(range(2 * CHUNKS + 3))
    assert [at for at, one in enumerate(seen) if one == "given back"] == [CHUNKS, 2 * CHUNKS + 1]
