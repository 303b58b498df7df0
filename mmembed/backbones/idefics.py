"""Idefics3 and SmolVLM: an image is a grid of tiles with row and column marks, and a small global view.

The models take a rectangle of images a row, padded with black; all images of the batch enter as one row, so that
nothing is padded and rows without images cost nothing (the model scatters features in batch order).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmembed.backbones.family import Family

if TYPE_CHECKING:
    import PIL.Image
    import torch


class Idefics(Family):
    name = "idefics"
    model_types = ("idefics3", "smolvlm")
    unstored = "the tiles of all images of a batch come out as one"

    def image_markup(self, width: int, height: int, images_in_row: int) -> str:
        _, rows, columns = self.processor.image_processor.get_number_of_image_patches(height, width)
        return self.processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)

    def image_tensors(self, images: Sequence[Sequence[PIL.Image.Image]]) -> dict[str, torch.Tensor]:
        batch = [[image for row in images for image in row]]
        return dict(self.processor.image_processor(images=batch, return_tensors="pt"))
