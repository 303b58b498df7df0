"""Checkpoints to export: tiny models of real families with an adapter that changes what they give."""

import torch

from mmembed.models.checkpoint import save_checkpoint
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
JUDGE = {
    "pooling": "last_token",
    "normalize": False,
    "prompt": {"type": "judge", "words": ["a", "b"]},
    "head": {"type": "yes_no", "words": ["a", "b"]},
}
LENGTHS = {"query_max_length": 256, "document_max_length": 256}


def save(folder, backbone, adapter=LORA, **settings):
    """A checkpoint; its adapter and head are drawn, as if trained."""
    torch.manual_seed(0)
    given = {"dtype": "float32", "lengths": LENGTHS, "adapter": adapter, **settings}
    model, preprocessor = build_from_settings(EmbedderSettings(str(backbone), **given))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or (not name.startswith("backbone.") and "norm" not in name):
                parameter.normal_(std=0.05)
    save_checkpoint(folder, model, preprocessor)
    return folder
