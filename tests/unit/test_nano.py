"""The packaged nano backbone is a trained language model that sees, and small enough to ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import picture
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

import mmembed
from mmembed.backbones import load_backbone
from mmembed.content import to_content
from mmembed.models.checkpoint import load_checkpoint
from mmembed.preprocess import Item

FOLDER = Path(mmembed.__file__).parent / "nano"
MOST_BYTES = 16_000_000
PARAGRAPH = (
    "The river runs through the middle of the city. In the morning people walk along its banks, and children play "
    "under the trees of the park. In winter the water freezes, and the ships stay in the harbour until spring. "
    "The old bridge was built in the fourteenth century and is one of the most famous buildings of the country."
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for file in FOLDER.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_it_fits_into_the_package() -> None:
    assert 0 < sum(file.stat().st_size for file in FOLDER.glob("*.safetensors")) <= MOST_BYTES


def test_no_matrix_is_empty_of_content(weights) -> None:
    """A projection of zeros lets nothing through: no attention, no image."""
    matrices = {name: tensor for name, tensor in weights.items() if tensor.dim() >= 2}
    assert matrices
    assert not [name for name, tensor in matrices.items() if not tensor.isfinite().all() or not tensor.any()]


@torch.inference_mode()
def test_the_last_token_has_seen_the_first() -> None:
    model, preprocessor = load_checkpoint("mmembed-nano", dtype="float32")
    inputs = preprocessor([Item(to_content("one two three four five six seven eight"))])
    ids = inputs.tensors["input_ids"]
    first = model.backbone(input_ids=ids).last_hidden_state[0, -1]
    ids[0, 0] += 100
    second = model.backbone(input_ids=ids).last_hidden_state[0, -1]
    assert (first - second).norm() > 1e-2 * first.norm()


@torch.inference_mode()
def test_the_last_token_has_seen_the_picture() -> None:
    model, preprocessor = load_checkpoint("mmembed-nano", dtype="float32")
    states = []
    for seed in (1, 2):
        inputs = preprocessor([Item(to_content({"image": picture(seed, 128, 128), "text": "what is it"}))])
        states.append(model.backbone(**inputs.tensors).last_hidden_state[0, -1])
    assert (states[0] - states[1]).norm() > 1e-3 * states[0].norm()


@torch.inference_mode()
def test_it_has_learned_language() -> None:
    """It predicts plain English better than the frequencies of tokens in 500 passages do (a model without context),
    and far better than a guess over the vocabulary."""
    tokenizer = load_backbone("mmembed-nano").family.tokenizer
    model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(PARAGRAPH)["input_ids"])  # (T,)
    logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1]  # (T - 1, vocabulary)
    perplexity = cross_entropy(logits.float(), ids[1:]).exp().item()

    vocabulary = model.config.get_text_config().vocab_size
    with (Path(__file__).parents[2] / "data" / "squad-en" / "corpus.jsonl").open(encoding="utf-8") as lines:
        passages = [json.loads(line)["text"] for _, line in zip(range(500), lines, strict=False)]
    seen = torch.tensor([token for row in tokenizer(passages)["input_ids"] for token in row])
    counts = torch.bincount(seen, minlength=vocabulary) + 1.0  # (vocabulary,), no token is impossible
    of_frequencies = (counts.sum() / counts[ids[1:]]).log().mean().exp().item()
    assert perplexity < min(of_frequencies, vocabulary / 20), f"{perplexity:.0f}, by frequencies {of_frequencies:.0f}"


def test_its_tokenizer_cuts_nothing_by_itself() -> None:
    """A truncation left in the file would cut texts silently in every other runtime."""
    assert json.loads((FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["truncation"] is None
