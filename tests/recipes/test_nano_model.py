"""What the nano's recipe writes, whatever attended to its pictures while it learned."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

import mmembed
from recipes.nano.model import PICTURE_KERNEL, build_model, export

NANO = Path(mmembed.__file__).parent / "nano"


@pytest.mark.parametrize("kernel", ["eager", PICTURE_KERNEL], ids=["cpu", "gpu"])
def test_an_export_loads_with_the_logits_of_training(kernel, tmp_path):
    """The kernel of a GPU has a name that only the recipe knows."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(NANO)
    model = build_model(tokenizer, seed=0).eval()
    model.model.visual.config._attn_implementation = kernel
    assert export(model, tokenizer, tmp_path) == (tmp_path / "model.safetensors").stat().st_size
    assert model.model.visual.config._attn_implementation == kernel  # it goes on training
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer("a red bus in the rain")["input_ids"]])
    with torch.no_grad():
        states = model.model.language_model(input_ids=ids).last_hidden_state
        trained = model.lm_head(states / model.model.language_model.norm.weight)
        logits = loaded(input_ids=ids).logits
    torch.testing.assert_close(logits, trained, rtol=0, atol=0.1 * float(trained.std()))  # bf16
