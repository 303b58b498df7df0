"""Rerankers on a real CUDA device: lists read in blocks, and pairs, are what the CPU computes, and so are gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from mmembed import Reranker
from mmembed.backbones.block_attention import Blocks, attend_blocks
from mmembed.backbones.patch_conv import PatchConv3d
from mmembed.backbones.shared_prefix import masked_attention
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Text
from mmembed.data.collate import Collator
from mmembed.objectives import build_objective
from mmembed.training.gradcache import contrastive_step
from tests.equivalence.layouts import FULL, built
from tests.equivalence.toy import gradients, relative

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
QUERY = "a question about the old town"
TEXTS = ("the town is old", "a red bus " * 6, "no", "photosynthesis turns sunlight into sugar " * 3)
LISTS = {"type": "attention", "layer": 2, "offset": 1024}


@pytest.fixture(autouse=True)
def whole_float32():
    """Another test of this process may have turned TF32 on."""
    from transformers.utils.import_utils import enable_tf32

    enable_tf32(False)


def reads_lists(folder):
    return built(folder, head=LISTS, prompt="in_context", pooling="last_token", normalize=False, adapter=FULL)


def judges(folder, dtype="float32"):
    """A reranker of pairs, whose two words are single letters of the tests' tokenizer."""
    options = {"head": {"type": "yes_no", "words": ["a", "b"]}, "prompt": {"type": "judge", "words": ["a", "b"]}}
    return built(folder, dtype, pooling="last_token", normalize=False, adapter=FULL, **options)


def example(index):
    texts = (f"an answer {index} " * (1 + index), "no " * (1 + 2 * index), f"the bus {index}")
    documents = tuple(Document((Text(text),), float(place == 0)) for place, text in enumerate(texts))
    return Example((Text(f"a question about {index}"),), documents, source="s", where=str(index))


def gradient(loaded, device, temperature, autocast=False):
    """(loss, flat gradient) of one step of the ranking loss over three queries of three documents."""
    model, preprocessor = loaded
    model.to(device).train()
    source = SourceConfig(path="s", name="s")
    collator = Collator(preprocessor, {"s": source}, 200, train_group_size=3, judges=True, share_prefix=True)
    batch = collator([example(index) for index in range(3)])
    block = {"type": "ranking", "loss": "infonce", "temperature": temperature}
    objective = build_objective(block, model.embedding_size, model.depth).to(device)

    def encode(chunk):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            return model(chunk.inputs(preprocessor).to(device))

    loss, _ = contrastive_step(encode, objective, batch, keep_tokens=0)
    return loss.item(), gradients(model.cpu())


def attention(kernel, device, dtype):
    """One layer of blocks on random numbers: (output, the gradients at query, key and value, shares)."""
    drawn = torch.Generator().manual_seed(0)
    real = torch.ones(5, 40, dtype=torch.bool)
    real[1, 30:] = real[4, 7:] = False
    size = 24 + real.numel() + 9
    shapes = [(1, heads, size, 64) for heads in (4, 2, 2)]
    numbers = (torch.randn(shape, generator=drawn).bfloat16() for shape in shapes)
    tensors = [one.to(device, dtype).requires_grad_() for one in numbers]
    blocks = Blocks(None, 24, real.to(device), 9, 1, (7, 8), kernel=kernel)
    seen = torch.cat([torch.ones(24, dtype=torch.bool), real.flatten(), torch.ones(9, dtype=torch.bool)])
    output = attend_blocks(blocks, 0, *tensors, 0.0, None, masked_attention)[0, seen.to(device)]  # (S, H, D)
    weights = torch.randn(output.shape, generator=drawn).to(device, dtype)
    ((output * weights).sum() + (blocks.shares * torch.arange(5, device=device)).sum()).backward()
    return [one.detach().float().cpu() for one in (output, *(one.grad for one in tensors), blocks.shares)]


@pytest.mark.parametrize("kernel", ["sdpa", "flex"])
def test_block_attention_is_that_of_the_cpu(kernel):
    """`flex` is compiled here, of a length that is no multiple of its blocks, and with grouped heads."""
    expected = attention("sdpa", "cpu", torch.float32)
    found = attention(kernel, DEVICE, torch.bfloat16)
    assert all(one.norm() > 0 for one in expected)
    for one, other in zip(found, expected, strict=True):
        assert relative(one, other) < 2e-2


def test_lists_in_block_attention_score_and_train_as_on_the_cpu(family_folder):
    folder = family_folder("qwen3")
    scores = {}
    for device in ("cpu", DEVICE):
        model, preprocessor = reads_lists(folder)
        scores[device] = Reranker(model.to(device), preprocessor).score([(QUERY, text) for text in TEXTS])
    assert scores["cpu"].std() > 0 and scores[DEVICE].sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(scores[DEVICE], scores["cpu"], atol=1e-5)
    expected_loss, expected = gradient(reads_lists(folder), "cpu", 0.05)
    loss, found = gradient(reads_lists(folder), DEVICE, 0.05)
    assert expected.norm() > 0
    assert loss == pytest.approx(expected_loss, abs=1e-5)
    assert relative(found, expected) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_rerank_pairs_score_as_on_the_cpu(family_folder, dtype, tolerance):
    folder = family_folder("qwen3")
    pairs = [(f"{QUERY} {number}", text) for number in range(2) for text in TEXTS]
    model, preprocessor = judges(folder)
    expected = Reranker(model, preprocessor).score(pairs)
    model, preprocessor = judges(folder, dtype)
    found = Reranker(model.to(DEVICE), preprocessor).score(pairs)
    assert expected.std() > 0
    np.testing.assert_allclose(found, expected, atol=tolerance)


@pytest.mark.parametrize(("autocast", "of_loss", "tolerance"), [(False, 1e-4, 1e-3), (True, 2e-2, 1e-1)])
def test_rerank_gradients_are_those_of_the_cpu(family_folder, autocast, of_loss, tolerance):
    folder = family_folder("qwen3")
    expected_loss, expected = gradient(judges(folder), "cpu", 1.0)
    loss, found = gradient(judges(folder), DEVICE, 1.0, autocast)
    assert expected.norm() > 0
    assert loss == pytest.approx(expected_loss, abs=of_loss)
    assert relative(found, expected) < tolerance


def test_patches_are_multiplied_in_blocks_of_one_product():
    """Of the shape of Qwen2-VL's, in bfloat16, against the CPU's convolution in float32."""
    torch.manual_seed(0)
    layer = PatchConv3d(3, 64, (2, 14, 14), stride=(2, 14, 14), bias=False)
    patches = torch.randn(500, 3, 2, 14, 14)
    expected = nn.Conv3d.forward(layer, patches).flatten(1)
    found = layer.to(DEVICE, torch.bfloat16)(patches.to(DEVICE, torch.bfloat16)).flatten(1)
    assert relative(found.float().cpu(), expected) < 1e-2
