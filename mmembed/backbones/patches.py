"""Pictures -> the patches that transformers' Qwen2-VL image processor makes of them, the same numbers bit by bit.

The processor copies a picture nine times on its way: bands apart, stacked with others of its size, float, normalised,
cut, repeated for the two frames of a still picture, joined with the batch. Here a picture is resized by the same
kernel as four bytes a pixel, cut as whole pixels, and its bands become floats in blocks that stay in the cache, in the
one array of the batch. The frames of a still picture are equal, so they are one memory with two indices:

    pixel_values (N, C, T, p * p), stride 0 along T; `flatten(1)` is the processor's (N, C * T * p * p)

Whoever computes the first layer may use that (`mmembed.inference.cpu.OneDnnPatches`); to everybody else it is a tensor.
Milliseconds a picture of some 20,000 pixels: 0.38, of the processor 0.91 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256  # patches whose bands are made floats at a time: 800 KB
_BICUBIC = PIL.Image.Resampling.BICUBIC


def covers(processor: Any) -> bool:
    """Whether `cut` does what this image processor does: by its class and settings, and by its answer to a picture."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    if type(processor) is not Qwen2VLImageProcessor:
        return False
    steps = (processor.do_convert_rgb, processor.do_resize, processor.do_rescale, processor.do_normalize)
    statistics = (processor.image_mean, processor.image_std)
    if not all(steps) or processor.resample != _BICUBIC or any(len(one) != 3 for one in statistics):
        return False
    side = processor.patch_size * processor.merge_size
    noise = np.random.default_rng(0).integers(0, 256, (side + 3, 2 * side - 5, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(noise)
    theirs, ours = processor(images=[picture], return_tensors="pt"), cut(processor, [picture])
    return torch.equal(theirs["pixel_values"], ours["pixel_values"].flatten(1))


def cut(processor: Any, pictures: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
    """RGB pictures -> pixel_values (N, C, T, p * p) float32, N patches of all pictures, and image_grid_thw (B, 3).

    Args:
        processor: one that `covers` accepts.

    Raises:
        ValueError: a picture is more than 200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    side, merged, limits = processor.patch_size, processor.merge_size, dict(processor.size)
    grids = []
    for picture in pictures:
        height, width = smart_resize(
            picture.height, picture.width, side * merged, limits["shortest_edge"], limits["longest_edge"]
        )
        grids.append((1, height // side, width // side))
    pixels = np.empty((sum(rows * columns for _, rows, columns in grids), side**2), np.int32)  # (N, p * p), RGBX
    start = 0
    for picture, (_, rows, columns) in zip(pictures, grids, strict=True):
        resized = _resized(picture, rows * side, columns * side)  # (H, W)
        tiles = resized.reshape(rows // merged, merged, side, columns // merged, merged, side)
        tiles = tiles.transpose(0, 3, 1, 4, 2, 5)  # patches that the model merges stand beside each other
        pixels[start : start + rows * columns].reshape(tiles.shape)[...] = tiles
        start += rows * columns
    mean, std = (
        (torch.tensor(one) * (1.0 / processor.rescale_factor)).unsqueeze(1)  # (C, 1), as the processor rounds them
        for one in (processor.image_mean, processor.image_std)
    )
    values = torch.empty(len(pixels), 3, side**2)  # (N, C, p * p)
    for first in range(0, len(pixels), BLOCK):
        block, out = pixels[first : first + BLOCK], values[first : first + BLOCK]
        bands = np.empty(out.shape, np.uint8)
        for band in range(3):
            bands[:, band] = block >> 8 * band
        out.copy_(torch.from_numpy(bands)).sub_(mean).div_(std)
    frames = values.unsqueeze(2).expand(-1, -1, processor.temporal_patch_size, -1)
    return {"pixel_values": frames, "image_grid_thw": torch.tensor(grids, dtype=torch.long)}


def in_dtype(tensor: Tensor, dtype: torch.dtype, copy: bool = False) -> Tensor:
    """`tensor.to(dtype, copy=copy)`, but of frames that are one memory, as `cut` makes them, one memory again."""
    if tensor.dim() != 4 or tensor.stride(2) != 0:
        return tensor.to(dtype, copy=copy)
    return tensor[:, :, :1].to(dtype, copy=copy).expand(tensor.shape)


def _resized(picture: PIL.Image.Image, height: int, width: int) -> np.ndarray:
    """(H, W) int32, a pixel in its four bytes R, G, B, X as a little-endian processor reads them."""
    encoded = np.frombuffer(picture.tobytes("raw", "RGBX"), np.uint8).reshape(1, picture.height, picture.width, 4)
    if (height, width) != (picture.height, picture.width):
        pixels = torch.from_numpy(encoded.copy()).permute(0, 3, 1, 2)  # (1, 4, H, W); torch warns of read-only memory
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", antialias=True, align_corners=False)
        encoded = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    return encoded.view("<i4")[0, :, :, 0]
