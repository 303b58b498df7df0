"""Gemma 3: an image is a fixed number of soft tokens between two marks, and attends to itself in both directions.

Pan-and-scan crops stay off, as in the processor's defaults.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmembed.backbones.family import Family

if TYPE_CHECKING:
    import torch


class Gemma3(Family):
    name = "gemma3"
    model_types = ("gemma3",)
    prefix_tuning = False
    unstored = None

    @property
    def reserved(self) -> tuple[str, ...]:
        return (self.image_token, self.tokenizer.image_token)

    def image_markup(self, width: int, height: int, images_in_row: int) -> str:
        return self.processor.full_image_sequence

    def unshared(self, has_images: bool) -> str | None:
        return "image tokens attend to each other in both directions" if has_images else super().unshared(has_images)

    def token_tensors(self, input_ids: torch.Tensor, has_images: bool) -> dict[str, torch.Tensor]:
        if not has_images:
            return {}
        return {"token_type_ids": (input_ids == self.config.image_token_id).int()}  # (B, T)
