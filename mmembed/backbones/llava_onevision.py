"""LLaVA-OneVision: an image that is alone is cut into tiles by its shape; several images take one tile each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmembed.backbones.family import Family

if TYPE_CHECKING:
    import PIL.Image
    import torch


class LlavaOneVision(Family):
    name = "llava_onevision"
    model_types = ("llava_onevision",)
    unstored = "the tiles of an image depend on whether its input has others"

    def image_markup(self, width: int, height: int, images_in_row: int) -> str:
        if images_in_row == 1:
            return super().image_markup(width, height, images_in_row)
        tokens = self.processor.num_image_tokens + 1  # a newline closes the tile
        return self.image_token * (tokens - (self.processor.vision_feature_select_strategy == "default"))

    def image_tensors(self, images: Sequence[Sequence[PIL.Image.Image]]) -> dict[str, torch.Tensor]:
        return dict(self.processor.image_processor(images=[list(row) for row in images], return_tensors="pt"))
