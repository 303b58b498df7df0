"""Patches of Qwen-VL pictures: the numbers of transformers' image processor, and what the first layer makes of them."""

import numpy as np
import PIL.Image
import pytest
import torch
from families import picture
from torch import nn
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from mmembed.backbones import patches
from mmembed.backbones.family import Family
from mmembed.content import Image, to_content
from mmembed.inference.cpu import OneDnnPatches, accelerate
from mmembed.media import MediaStore
from mmembed.preprocess import Item
from tests.equivalence.layouts import built

NANO = {"patch_size": 16, "size": {"shortest_edge": 16384, "longest_edge": 36864}}
SETTINGS = {
    "nano": NANO,
    "qwen2_vl": {},
    "one patch a token": {"patch_size": 14, "merge_size": 1, "size": {"shortest_edge": 784, "longest_edge": 12544}},
    "one frame": {**NANO, "temporal_patch_size": 1},
    "half": {**NANO, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "rescale_factor": 1 / 127.5},
}
UNCOVERED = {
    "no resizing": {"do_resize": False},
    "no normalising": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "bilinear": {"resample": 2},
}


def sizes(seed, count):
    """(width, height), among them very flat and tall ones, one pixel, and the processor's own."""
    draw = np.random.default_rng(seed)
    drawn = np.exp(draw.uniform(np.log(2), np.log(600), (count, 2))).astype(int).tolist()
    flat = [(width, max(height, -(-width // 150))) for width, height in drawn]
    fit = [(max(width, -(-height // 150)), height) for width, height in flat]
    return [*fit, (1, 1), (1, 190), (190, 1), (128, 128), (192, 192)]


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_processors_numbers_bit_by_bit(settings):
    processor = Qwen2VLImageProcessor(**settings)
    assert patches.covers(processor)
    pictures = [picture(seed, *size) for seed, size in enumerate(sizes(0, 20))]
    for given in (pictures[:1], pictures[7:9], pictures):
        theirs, ours = processor(images=given, return_tensors="pt"), patches.cut(processor, given)
        assert ours["pixel_values"].dtype == torch.float32
        assert torch.equal(ours["pixel_values"].flatten(1), theirs["pixel_values"])
        assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])


def test_smooth_pictures_at_the_ends_of_the_range():
    """Resizing overshoots at an edge between black and white, and is cut off there."""
    processor = Qwen2VLImageProcessor(**NANO)
    bars = np.zeros((70, 90, 3), np.uint8)
    bars[:, ::9], bars[30:50] = 255, (255, 0, 255)
    given = [PIL.Image.fromarray(bars), PIL.Image.new("RGB", (300, 200), "white"), PIL.Image.new("RGB", (40, 500))]
    theirs = processor(images=given, return_tensors="pt")["pixel_values"]
    assert torch.equal(patches.cut(processor, given)["pixel_values"].flatten(1), theirs)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_any_mode_through_the_media_store(family_folder, mode):
    """The store makes RGB of it, as the processor does by itself."""
    _, preprocessor = built(family_folder("qwen3_vl"))
    family, processor = preprocessor.family, preprocessor.processor.image_processor
    source = picture(3, 150, 110)
    if mode in ("LA", "RGBA"):
        source.putalpha(picture(4, 150, 110).convert("L"))
    source = source.convert(mode)
    opened = MediaStore().open(Image(source))
    found = family.image_tensors([[opened, picture(1)], [picture(2, 30, 200)]])
    expected = processor(images=[source, picture(1), picture(2, 30, 200)], return_tensors="pt")
    assert found["pixel_values"].stride(2) == 0, "it was cut here"
    assert torch.equal(found["pixel_values"].flatten(1), expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])


def test_a_picture_that_is_not_rgb_goes_to_the_processor(family_folder):
    _, preprocessor = built(family_folder("qwen3_vl"))
    given = [[picture(1)], [picture(2).convert("L")]]
    found, expected = preprocessor.family.image_tensors(given), Family.image_tensors(preprocessor.family, given)
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("settings", UNCOVERED.values(), ids=UNCOVERED)
def test_other_settings_go_to_the_processor(family_folder, settings):
    _, preprocessor = built(family_folder("qwen3_vl"))
    processor = Qwen2VLImageProcessor(**{"patch_size": 14, **settings})
    preprocessor.processor.image_processor = processor
    given = [[picture(1, 56, 84)]]
    found = preprocessor.family.image_tensors(given)["pixel_values"]
    assert not patches.covers(processor)
    assert torch.equal(found, processor(images=given[0], return_tensors="pt")["pixel_values"])


def test_other_processors_are_not_covered(monkeypatch):
    class Own(Qwen2VLImageProcessor):
        pass

    assert not patches.covers(Own())
    normalised = Qwen2VLImageProcessor.rescale_and_normalize
    monkeypatch.setattr(
        Qwen2VLImageProcessor, "rescale_and_normalize", lambda self, *given: normalised(self, *given) * (1 + 1e-6)
    )
    assert not patches.covers(Qwen2VLImageProcessor()), "a version of transformers that computes something else"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frames_stay_one_memory_in_another_dtype(dtype):
    frames = patches.cut(Qwen2VLImageProcessor(**NANO), [picture()])["pixel_values"]
    found = patches.in_dtype(frames, dtype)
    assert found.dtype == dtype and found.stride(2) == 0 and torch.equal(found, frames.to(dtype))
    whole = torch.rand(3, 3, 2, 4)
    assert torch.equal(patches.in_dtype(whole, dtype), whole.to(dtype))


@pytest.mark.parametrize("bias", [True, False])
def test_equal_frames_are_multiplied_once(bias, monkeypatch):
    torch.manual_seed(0)
    stock = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias)
    expected = stock(frames := torch.randn(5, 3, 1, 4, 4).expand(-1, -1, 2, -1, -1))
    stock.__class__ = OneDnnPatches
    widths, multiply = [], torch.nn.functional.linear
    monkeypatch.setattr(
        "mmembed.inference.cpu._onednn_linear",
        lambda input, weight, bias: widths.append(input.shape[1]) or multiply(input, weight, bias),
    )
    with torch.inference_mode():
        assert torch.allclose(stock(frames), expected, atol=1e-6)
        assert torch.allclose(stock(frames.contiguous()), expected, atol=1e-6)
    assert widths == [48, 96]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vectors_are_those_of_the_processors_patches(family_folder, family, monkeypatch):
    model, preprocessor = built(family_folder(family))
    accelerate(model.backbone)
    items = [
        Item(to_content({"text": "a bus", "images": [picture(1), picture(2, 40, 100)]})),
        Item(to_content("a cat")),
    ]
    ours = preprocessor(items)
    monkeypatch.setattr(type(preprocessor.family), "image_tensors", Family.image_tensors)
    theirs = preprocessor(items)
    assert ours.tensors["pixel_values"].dim() == 4 and theirs.tensors["pixel_values"].dim() == 2
    with torch.inference_mode():
        assert torch.allclose(model(ours).vectors, model(theirs).vectors, atol=1e-6)


def test_too_narrow_a_picture_is_refused_as_by_the_processor():
    with pytest.raises(ValueError, match="aspect ratio"):
        patches.cut(Qwen2VLImageProcessor(**NANO), [picture(0, 201, 1)])
