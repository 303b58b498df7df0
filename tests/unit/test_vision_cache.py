"""Features of a frozen vision tower: equal vectors, one run of the tower an image, nothing stale, reasons where not."""

import re

import PIL.Image
import pytest
import torch
from families import VISION_FAMILIES, build, contents, picture

from mmembed import Embedder
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, Image, Text, to_content
from mmembed.data.collate import Collator
from mmembed.errors import ConfigError, RecordError
from mmembed.media import MediaStore
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.models.vision_cache import fingerprint, open_features, uncached
from mmembed.preprocess import Item

GB = 10**9
STORED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma")


def count_runs(model):
    """How many images `get_image_features` is asked for, in a list that grows."""
    runs, original = [], model.base.get_image_features

    def counted(**pixels):
        output = original(**pixels)
        runs.append(len(output.pooler_output))
        return output

    model.base.get_image_features = counted
    return runs


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_families(name, family_folder, tmp_path):
    """Computed, then read, then read by another store: the vectors of a model without one. Others say why not."""
    model, preprocessor = build(family_folder(name), prompt="instruct", dtype="float32")
    reason = uncached(model, training=False)
    if name not in STORED:
        assert "tiles" in reason
        return
    assert reason is None
    given = [Item(to_content(content), "query", "Find the picture") for content in contents(name)]
    given += [Item(to_content({"image": picture(1), "text": "the first picture again"}))]
    with torch.no_grad():
        expected = model(preprocessor(given)).vectors
        runs = count_runs(model)
        for _ in range(2):
            preprocessor.features = open_features(model, preprocessor, tmp_path, GB, "")
            for _ in range(2):
                assert torch.allclose(model(preprocessor(given)).vectors, expected, atol=1e-6)
    assert runs == [4]  # of the five images one occurs twice
    assert len(preprocessor.features) == 4
    assert "pixel_values" not in preprocessor(given).tensors


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_with_a_shared_prefix(name, family_folder, tmp_path):
    model, preprocessor = build(family_folder(name), prompt="instruct", dtype="float32")
    rows = preprocessor.tokenize(
        [Item(to_content({"image": picture(seed)}), "query", "Find the picture that looks like it") for seed in (1, 2)]
    )
    count = preprocessor.shareable(rows[0])
    assert count > 8
    with torch.no_grad():
        expected = model(preprocessor.collate(rows)).vectors
        preprocessor.features = open_features(model, preprocessor, tmp_path, GB, "")
        for _ in range(2):
            assert torch.allclose(model(preprocessor.collate(rows, shared=count)).vectors, expected, atol=1e-5)


def test_nothing_is_stale(family_folder, tmp_path):
    """Another picture under the same path and size, another size, other pixel limits, weights, precision: misses."""
    file, name = tmp_path / "picture.png", "qwen3_vl"
    model, preprocessor = build(family_folder(name), dtype="float32")
    item = Item(to_content({"image": str(file)}))
    preprocessor.features = open_features(model, preprocessor, tmp_path / "cache", GB, "")
    with torch.no_grad():
        for seed, size in ((1, (64, 64)), (2, (64, 64)), (3, (96, 64))):
            picture(seed, *size).save(file)
            preprocessor.media._sizes.clear()
            found = model(preprocessor([item])).vectors
            preprocessor.features, kept = None, preprocessor.features
            assert torch.allclose(found, model(preprocessor([item])).vectors, atol=1e-6)
            preprocessor.features = kept
    assert len(preprocessor.features) == 3
    first = fingerprint(model, preprocessor, "")
    assert first == fingerprint(*build(family_folder(name), dtype="float32"), "")
    others = [fingerprint(model, preprocessor, "bf16"), fingerprint(*build(family_folder(name), dtype="bfloat16"), "")]
    others += [fingerprint(*build(family_folder(name), dtype="float32", attn_implementation="eager"), "")]
    lengths = {"query_max_length": 64, "document_max_length": 64, "max_pixels": 64 * 64}
    others += [fingerprint(*build(family_folder(name), dtype="float32", lengths=lengths), "")]
    for part in ("blocks.0.mlp.linear_fc1.bias", "merger.linear_fc2.weight", "deepstack_merger_list.0.norm.weight"):
        with torch.no_grad():
            model.base.get_submodule("visual").get_parameter(part)[0] += 1
        others.append(fingerprint(model, preprocessor, ""))
    assert len({first, *others}) == 1 + len(others)
    with torch.no_grad():
        model.base.get_input_embeddings().weight[0] += 1
    assert fingerprint(model, preprocessor, "") == others[-1]


@pytest.fixture
def reads(monkeypatch):
    """Every opening of a file of a picture, by name."""
    opened, original = [], MediaStore._stream

    def counted(self, source):
        opened.append(source)
        return original(self, source)

    monkeypatch.setattr(MediaStore, "_stream", counted)
    return opened


def batch_of(file, preprocessor):
    """One record whose positive is a picture, as the trainer makes a batch of it."""
    collator = Collator(preprocessor, {"s": SourceConfig(path="s")}, chunk_tokens=10**4)
    found = Document((Image(str(file)),), 1.0)
    return collator([Example((Text("query"),), (found,), source="s", where="f:1")])


def test_a_batch_reads_a_kept_picture_once(family_folder, tmp_path, reads):
    """For its name; and the first time once more, to decode it. A chunk that is encoded twice reads nothing again."""
    model, preprocessor = build(family_folder("qwen3_vl"), dtype="float32")
    preprocessor.features = open_features(model, preprocessor, tmp_path / "cache", GB, "")
    file = tmp_path / "picture.png"
    picture(1).save(file)
    for expected in (2, 1):
        reads.clear()
        batch = batch_of(file, preprocessor)
        with torch.no_grad():
            once, twice = ([model(chunk.inputs(preprocessor)).vectors for chunk in batch.chunks] for _ in range(2))
        assert len(reads) == expected
        assert all(map(torch.equal, once, twice))
    reads.clear()
    preprocessor.media._sizes.clear()
    model(preprocessor([Item(to_content({"image": str(file)}))]))
    assert len(reads) == 2  # its header for the tokens, its bytes for the name


def test_a_picture_that_changes_between_batch_and_step_is_kept_under_no_name(family_folder, tmp_path):
    model, preprocessor = build(family_folder("qwen3_vl"), dtype="float32")
    preprocessor.features = open_features(model, preprocessor, tmp_path / "cache", GB, "")
    file = tmp_path / "picture.png"
    picture(1).save(file)
    batch = batch_of(file, preprocessor)
    picture(2).save(file)
    with pytest.raises(RecordError, match=r"f:1.*the file changed meanwhile"):
        [model(chunk.inputs(preprocessor)) for chunk in batch.chunks]
    assert len(preprocessor.features) == 0


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"adapter": {"type": "none"}, "freeze": ("vision", "projector")}, None),
        ({"adapter": {"type": "none"}}, r"projector is trained.*freeze: \[audio, projector, vision\]"),
        ({"adapter": {"type": "none"}, "freeze": ()}, "vision tower and projector are trained"),
    ],
)
def test_only_what_stands_still_is_kept(options, reason, family_folder):
    model, _ = build(family_folder("qwen3_vl"), **options)
    found = uncached(model, training=True)
    assert (found is None) if reason is None else re.search(reason, found)
    assert uncached(model, training=False) is None


class DropPath(torch.nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda visual: visual.blocks[0].add_module("drop", torch.nn.Dropout(0.1)), r"visual.blocks.0.drop.*p: 0.1"),
        (lambda visual: visual.blocks[0].add_module("path", DropPath(0.2)), r"visual.blocks.0.path.*drop_prob: 0.2"),
        (lambda visual: setattr(visual.blocks[1].attn, "attention_dropout", 0.3), r"blocks.1.attn.*attention_dropout"),
        (lambda visual: setattr(visual.config, "attention_dropout", 0.3), r"vision_config.attention_dropout is 0.3"),
        (
            lambda visual: visual.blocks[0].add_module("norm3", torch.nn.BatchNorm1d(4, affine=False)),
            r"norm3.*by the batch",
        ),
        (lambda visual: visual.blocks[0].add_module("drop", torch.nn.Dropout(0.0)), None),
        (lambda visual: setattr(visual.config, "drop_path_rate", 0.0), None),
    ],
    ids=["module", "drop path", "attention", "configuration", "batch norm", "off", "configured off"],
)
def test_a_tower_that_is_another_in_training_is_refused(change, reason, family_folder):
    model, _ = build(family_folder("qwen3_vl"), adapter={"type": "none"}, freeze=("vision", "projector"))
    change(model.base.get_submodule("visual"))
    found = uncached(model, training=True)
    assert (found is None) if reason is None else re.search(reason, found)
    assert uncached(model, training=False) is None


def test_text_backbones_and_tiles_are_refused(family_folder, tmp_path):
    for name in ("qwen3", "smolvlm"):
        folder = tmp_path / name
        Embedder(*build_from_settings(EmbedderSettings(str(family_folder(name))))).save(folder)
        with pytest.raises(ConfigError, match="cannot be kept"):
            Embedder.from_pretrained(folder, vision_cache=tmp_path / "cache")
        assert Embedder.from_pretrained(folder, vision_cache="auto").preprocessor.features is None
    assert not (tmp_path / "cache").exists()


def test_encode(tmp_path):
    """The second time nothing is decoded: each file is read for its bytes and its header only."""
    files = [tmp_path / f"{seed}.png" for seed in range(5)]
    for seed, file in enumerate(files):
        picture(seed, 80, 60).save(file)
    given = [{"image": str(file)} for file in files] + ["a text", PIL.Image.open(files[0]).copy()]
    plain = Embedder.from_pretrained("mmembed-nano", dtype="float32").encode(given)
    for turn in range(2):
        embedder = Embedder.from_pretrained("mmembed-nano", dtype="float32", vision_cache=tmp_path / "cache")
        assert len(embedder.preprocessor.features) == (6 if turn else 0)
        opened = []
        original = embedder.preprocessor._open
        embedder.preprocessor._open = lambda *image, opened=opened, original=original: (
            opened.append(image),
            original(*image),
        )[1]
        assert abs(embedder.encode(given) - plain).max() < 1e-5
        assert len(opened) == (0 if turn else 6)
