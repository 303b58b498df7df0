"""Padding never matters, the instruction mask is exact, truncation keeps the prompt: for any text there is."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from families import make_tokenizer, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers, processors
from transformers import Qwen3Config

from mmembed.backbones import Family
from mmembed.content import Image, Text, to_content
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Item, Lengths, Preprocessor
from mmembed.prompts import PROMPTS

WORDS = st.text(alphabet=st.sampled_from(list("abc  \n.,:ßé日本🙂Ω1")), min_size=1, max_size=40)
POOLED = tuple(POOLINGS.classes())


@functools.cache
def make_preprocessor(
    prompt: str = "instruct", trim_offsets: bool = False, limit: int = 512, bos: bool = False
) -> Preprocessor:
    tokenizer = make_tokenizer("qwen", add_bos=bos)
    if trim_offsets:  # as in GPT-2's and Llama 3's tokenizers: offsets leave the space before a word out
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    block = {"type": prompt, "text_request": "\nOne word:"} if prompt == "one_word" else prompt
    if prompt == "one_word":
        tokenizer.chat_template = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant"
    family = Family(Qwen3Config(), tokenizer)
    return Preprocessor(tokenizer, family, PROMPTS.build(block), Lengths(limit, limit))


def bytes_of(token: str) -> int:
    """Bytes that a byte-level token stands for: one a character of its alphabet."""
    return len(token)


@settings(max_examples=150, deadline=None)
@given(instruction=WORDS, text=WORDS, trim=st.booleans(), bos=st.booleans())
def test_instruction_mask_equals_the_slow_definition(instruction: str, text: str, trim: bool, bos: bool) -> None:
    """A token is in the pool when one of its bytes lies behind the prompt's prefix: counted in bytes, no offsets."""
    preprocessor = make_preprocessor(trim_offsets=trim, bos=bos and not trim)
    inputs = preprocessor([Item((Text(text),), "query", instruction)])
    tokens = preprocessor.tokenizer.convert_ids_to_tokens(inputs.tensors["input_ids"][0])
    prefix = len(f"Instruct: {instruction}\nQuery: ".encode())
    alphabet, position, expected = set(pre_tokenizers.ByteLevel.alphabet()), 0, []
    for token in tokens:
        if set(token) <= alphabet and not token.startswith("<|"):
            position += bytes_of(token)
        expected.append(position > prefix)
    assert inputs.pool_mask[0].tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=2, max_size=5),
    pooling=st.sampled_from(POOLED),
    extra=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_pooling_ignores_padding(texts: list[str], pooling: str, extra: int, seed: int) -> None:
    """Random hidden states: padded left, padded right, padded more, or alone gives one vector."""
    torch.manual_seed(seed)
    module = POOLINGS.build(pooling, hidden_size=8).eval()
    lengths = [len(text) for text in texts]
    width = max(lengths) + extra
    for length in lengths:
        hidden, mask = torch.randn(1, length, 8), torch.rand(1, length) < 0.7
        mask[0, seed % length] = True
        alone = module(hidden, mask)
        garbage = torch.randn(1, width - length, 8) * 100
        none = torch.zeros(1, width - length, dtype=torch.bool)
        right = module(torch.cat([hidden, garbage], 1), torch.cat([mask, none], 1))
        left = module(torch.cat([garbage, hidden], 1), torch.cat([none, mask], 1))
        if module.multi_vector:
            assert torch.allclose(alone[0][mask[0]], right[0, :length][mask[0]], atol=1e-5)
            assert torch.allclose(alone[0][mask[0]], left[0, width - length :][mask[0]], atol=1e-5)
        else:
            assert torch.allclose(alone, right, atol=1e-5)
            assert torch.allclose(alone, left, atol=1e-5)


@settings(max_examples=80, deadline=None)
@given(text=st.text(alphabet="abc xyz\n", min_size=1, max_size=200), limit=st.integers(40, 70), query=st.booleans())
def test_truncation_keeps_prefix_and_suffix(text: str, limit: int, query: bool) -> None:
    item = Item((Text(text),), "query" if query else "document", "Find it")
    (whole,) = make_preprocessor("one_word").tokenize([item])
    (cut,) = make_preprocessor("one_word", limit=limit).tokenize([item])
    decode = make_preprocessor("one_word").tokenizer.decode
    assert len(cut) == min(len(whole), limit)
    suffix = "\nOne word:<|im_end|>\n<|im_start|>assistant"
    assert decode(cut.ids).endswith(suffix)
    assert cut.hidden == whole.hidden
    kept = len(cut) - (len(whole) - _suffix_start(whole.ids, decode, suffix))
    assert list(cut.ids[:kept]) == list(whole.ids[:kept])


PARTS = st.one_of(
    st.text(alphabet="abc xyz\n<|>", min_size=50, max_size=90), st.tuples(st.integers(40, 90), st.integers(40, 90))
)


@pytest.mark.parametrize("style", ["one_word", "chat", "hierarchical"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(PARTS, min_size=1, max_size=5), limit=st.integers(65, 90), query=st.booleans())
def test_truncation_drops_nothing_but_content_text(style: str, family_folder, parts, limit: int, query: bool) -> None:
    """Interleaved texts and images: every special token stays in its order, and so does all that is out of the pool."""
    shapes = {part for part in parts if not isinstance(part, str)}
    content = tuple(Text(part) if isinstance(part, str) else Image(picture(0, *part)) for part in parts)
    item = Item(content, "query" if query else "document", "Find")
    whole, cut = (vision_preprocessor(style, family_folder("qwen3_vl"), size) for size in (4096, limit))
    special = set(whole.tokenizer.all_special_ids) | set(whole.tokenizer.added_tokens_decoder)
    (all_of_it,), (shorter,) = whole.tokenize([item]), cut.tokenize([item])
    marks = [[token for token in row.ids if token in special] for row in (all_of_it, shorter)]
    assert marks[0] == marks[1]
    masked = [[row.ids[at] for span in row.hidden for at in range(*span)] for row in (all_of_it, shorter)]
    assert masked[0] == masked[1]
    images = shorter.ids.count(whole.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    assert (images > 0) == bool(shapes)
    assert len(shorter) - images == min(limit, len(all_of_it) - images)


@functools.cache
def vision_preprocessor(style: str, folder: Path, limit: int) -> Preprocessor:
    lengths = {"query_max_length": limit, "document_max_length": limit}
    block = {"type": style, "system": "Embed."} if style == "hierarchical" else style
    return build_from_settings(EmbedderSettings(str(folder), prompt=block, lengths=lengths))[1]


def _suffix_start(ids: list[int], decode, suffix: str) -> int:
    return max(index for index in range(len(ids)) if suffix in decode(ids[index:]))


@pytest.mark.parametrize("pooling", POOLED)
@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_vectors_do_not_depend_on_the_batch(pooling: str, attention: str, family_folder) -> None:
    """The same through a real backbone: alone, beside longer rows, padded on either side."""
    torch.manual_seed(0)
    settings_ = EmbedderSettings(str(family_folder("qwen3")), attention=attention, pooling=pooling, prompt="instruct")
    model, preprocessor = build_from_settings(settings_)
    model.eval()
    texts = ("short", "a somewhat longer text about cats and dogs", "日本 🙂 " * 9)
    batch = [Item(to_content(text), role, "Find it") for text in texts for role in ("query", "document")]
    with torch.inference_mode():
        alone = [model(preprocessor([item])) for item in batch]
        for side in ("left", "right"):
            together = model(preprocessor(batch, side))
            for index, single in enumerate(alone):
                if single.mask is None:
                    assert torch.allclose(together.vectors[index], single.vectors[0], atol=1e-5)
                else:
                    vectors = together.vectors[index][together.mask[index]]
                    assert torch.allclose(vectors, single.vectors[0][single.mask[0]], atol=1e-5)


def test_content_that_is_nothing_but_instruction_still_pools_a_token() -> None:
    inputs = make_preprocessor()([Item((Text(""),), "query", "Find it"), Item((Text(""),), "document")])
    assert inputs.pool_mask.sum(1).tolist() == [1, 1]
