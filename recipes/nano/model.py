"""The nano's architecture: Qwen3-VL at 1/500 of its size, started as a static embedding model.

Blocks start as the identity (their output projections are zero), so before the first step the model is its token table
under the final norm. That table is the teacher's own vector of each token, so mean pooling means something at once.
The last LANGUAGE dimensions pass the final norm with a small gain: they let a token be quiet ("the") or loud
("photosynthesis") although the norm gives all tokens one length, and they hold what the next token needs and the mean
does not. The output matrix is not tied to the token table: a state that must point at the present token's meaning and
at the next token with the same vectors does both badly (docs/log.md).
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

HIDDEN = 256
LANGUAGE = 32
MEANING = HIDDEN - LANGUAGE
QUIET_GAIN = 0.05
PATCH, MERGE = 16, 2
TOKEN_PIXELS = (PATCH * MERGE) ** 2
MIN_VISUAL_TOKENS, MAX_VISUAL_TOKENS = 16, 36


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), "one token has one id"
    return found


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3VLForConditionalGeneration:
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {
        "depth": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_heads": 4,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [1],
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=token_id(tokenizer, "<|image_pad|>"),
        video_token_id=token_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=token_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=token_id(tokenizer, "<|vision_end|>"),
    )
    model = Qwen3VLForConditionalGeneration(config)
    for layer in model.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    for merger in model.model.visual.deepstack_merger_list:
        torch.nn.init.zeros_(merger.linear_fc2.weight)
    with torch.no_grad():
        model.model.language_model.norm.weight[MEANING:] = QUIET_GAIN
    model.model.language_model.norm.weight.requires_grad_(False)
    return model


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3VLProcessor:
    size = {
        "shortest_edge": MIN_VISUAL_TOKENS * TOKEN_PIXELS,
        "longest_edge": MAX_VISUAL_TOKENS * TOKEN_PIXELS,
    }
    shape: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**shape),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**shape),
        chat_template=tokenizer.chat_template,
    )


def token_table(
    tokenizer: PreTrainedTokenizerFast, token_vectors: np.ndarray, counts: np.ndarray, seed: int
) -> torch.Tensor:
    """(V, 256) first token embeddings: rare tokens loud in the meaning dimensions, frequent ones in the others.

    `token_vectors` (V, 224) are unit vectors of the teacher; `counts` (V,) token frequencies. The weight a / (a + p) is
    smooth inverse frequency (Arora et al. 2017), with a = 1e-3.
    """
    generator = torch.Generator().manual_seed(seed)
    probability = torch.from_numpy(counts / counts.sum()).float()
    loudness = (1e-3 / (1e-3 + probability)).clamp(0.1, 0.95).unsqueeze(1)  # (V, 1)
    quiet = torch.nn.functional.normalize(torch.randn(len(tokenizer), LANGUAGE, generator=generator), dim=-1)
    meaning = torch.nn.functional.normalize(torch.from_numpy(token_vectors), dim=-1)
    table = torch.cat([meaning * loudness, quiet * (1 - loudness**2).sqrt()], dim=-1)  # (V, 256), unit rows
    return table * HIDDEN**0.5  # RMS 1


def choose_picture_kernel(model: Qwen3VLForConditionalGeneration) -> None:
    """Attention within each picture: the plain one on a CPU, on a GPU one kernel for all pictures of a batch."""
    kernel = "eager" if model.device.type == "cpu" else PICTURE_KERNEL
    model.model.visual.config._attn_implementation = kernel


def _attend_within_pictures(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention over pictures laid end to end: states (1, heads, S, D) and their borders (pictures + 1,)."""
    q, k, v = (states.squeeze(0).transpose(0, 1).to(torch.bfloat16) for states in (query, key, value))
    borders = cu_seq_lens_q.to(torch.int32)
    attended = varlen_attn(q, k, v, borders, borders, max_length_q, max_length_q)
    assert isinstance(attended, torch.Tensor), "no logsumexp was asked for"
    return attended.unsqueeze(0), None


PICTURE_KERNEL = "flash_within_pictures"  # transformers hands borders to a kernel whose name says "flash"
ALL_ATTENTION_FUNCTIONS.register(PICTURE_KERNEL, _attend_within_pictures)


def export(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write the bf16 model, tokenizer and processor; returns the bytes of the weights."""
    state = {name: tensor.to("cpu", torch.bfloat16) for name, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config)
    config._attn_implementation = {"vision_config": "eager"}  # our kernel is no name that transformers finds again
    twin = Qwen3VLForConditionalGeneration(config).bfloat16()
    twin.load_state_dict(state)
    gain = model.model.language_model.norm.weight.data  # (H,)
    twin.lm_head.weight.data.copy_(model.lm_head.weight.data / gain)  # trained to read the state before the gain
    twin.save_pretrained(folder)
    tokenizer.backend_tokenizer.no_truncation()  # the last call's truncation would be saved, and cut every user's texts
    build_processor(tokenizer).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    return (folder / "model.safetensors").stat().st_size
