"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of free size, flattened patches, 3-D rotary positions.

The model computes its positions from `mm_token_type_ids`; a batch without images gets none, which skips the python loop
over rows and equals the plain positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, cast

from mmembed.backbones import patches
from mmembed.backbones.family import Family
from mmembed.errors import MediaError

if TYPE_CHECKING:
    import PIL.Image
    import torch


class _RotaryIn3D(Protocol):
    """What the transformers classes of this family have in common."""

    def get_rope_index(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...


_WIDEST = 200  # the image processor's own limit


class QwenVL(Family):
    name = "qwen_vl"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
    vision_depth = "depth"
    vision_modules = r"visual(?!\.(deepstack_)?merger)"
    projector_modules = r"visual\.(deepstack_)?merger(_list)?"
    unstored = None
    image_rows = ("image_grid_thw",)

    def image_markup(self, width: int, height: int, images_in_row: int) -> str:
        if max(width, height) > _WIDEST * min(width, height):
            raise MediaError(
                f"image: {width} x {height} pixels is too narrow for '{self.config.model_type}' (at most {_WIDEST}:1); "
                "crop it, pad it, or skip the record",
                kind="too narrow",
            )
        images = self.processor.image_processor
        return self.image_token * (images.get_number_of_image_patches(height, width) // images.merge_size**2)

    def frame_markup(self, markup: str) -> str:
        return f"<|vision_start|>{markup}<|vision_end|>"

    @cached_property
    def _cuts(self) -> bool:
        return patches.covers(self.processor.image_processor)

    def image_tensors(self, images: Sequence[Sequence[PIL.Image.Image]]) -> dict[str, torch.Tensor]:
        flat = [image for row in images for image in row]
        if self._cuts and all(image.mode == "RGB" for image in flat):
            return patches.cut(self.processor.image_processor, flat)
        return super().image_tensors(images)

    def token_tensors(self, input_ids: torch.Tensor, has_images: bool) -> dict[str, torch.Tensor]:
        if not has_images:
            return {}
        return {"mm_token_type_ids": (input_ids == self.config.image_token_id).int()}  # (B, T)

    def position_ids(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if "mm_token_type_ids" not in tensors:
            return None
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        given = {name: tensors[name] for name in names if name in tensors}
        return cast("_RotaryIn3D", model).get_rope_index(**given)[0]  # (3, B, T)

    def split_features(self, output: Any, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        images = super().split_features(output, tensors)
        for layer, features in enumerate(output.get("deepstack_features") or ()):
            for image, of_image in zip(images, features, strict=True):
                image[f"deepstack.{layer}"] = of_image
        return images

    def join_features(self, images: Sequence[dict[str, torch.Tensor]]) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

        pooled: Any = tuple(image["pooled"] for image in images)
        layers = [name for name in images[0] if name.startswith("deepstack.")]
        if not layers:
            return BaseModelOutputWithPooling(pooler_output=pooled)
        deep: Any = [tuple(image[f"deepstack.{layer}"] for image in images) for layer in range(len(layers))]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=pooled, deepstack_features=deep)

    def set_pixel_limits(self, min_pixels: int | None, max_pixels: int | None) -> None:
        size = dict(self.processor.image_processor.size)
        if min_pixels is not None:
            size["shortest_edge"] = min_pixels
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
        self.processor.image_processor.size = type(self.processor.image_processor.size)(**size)
