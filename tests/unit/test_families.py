"""Every family, tiny: inputs equal transformers' own, mixed batches equal single inputs, attention does what it says.

The yardstick is transformers itself: `processor(text, images)` and a plain forward pass of the model.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from families import FAMILIES, TEXTS, VISION_FAMILIES, build, build_family, contents, items, picture, vectors
from tokenizers import Tokenizer

from mmembed.content import to_content
from mmembed.errors import ConfigError, MediaError, MmembedError
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.preprocess import Item, Preprocessor


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_batch_equals_single_inputs(name, attention, family_folder) -> None:
    model, preprocessor = build(family_folder(name), attention=attention, prompt="instruct")
    batch = items(name)
    together = vectors(model, preprocessor, batch)
    alone = torch.cat([vectors(model, preprocessor, [item]) for item in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, vectors(model, preprocessor, batch, "left"), atol=1e-5)
    distances = torch.cdist(alone, alone) + torch.eye(len(alone))
    assert distances.min() > 1e-3, "different inputs must differ, or this test could not see a mix-up"


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_image_content_matters_and_keeps_its_row(name, family_folder) -> None:
    model, preprocessor = build(family_folder(name))
    first, second = (Item(to_content({"image": picture(seed)})) for seed in (5, 6))
    there = vectors(model, preprocessor, [first, Item(to_content("text")), second])
    back = vectors(model, preprocessor, [second, Item(to_content("text")), first])
    assert (there[0] - there[2]).abs().max() > 1e-4
    assert torch.allclose(there, back[[2, 1, 0]], atol=1e-6)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_inputs_equal_the_processor_of_transformers(name, family_folder) -> None:
    """Chat prompts: same ids and same last hidden state as the processor's own template and call."""
    style = "plain" if name == "paligemma" else "chat"
    model, preprocessor = build(family_folder(name), prompt=style, pooling="last_token", normalize=False)
    for content in contents(name):
        parts = {"text": content} if isinstance(content, str) else content
        images = [parts["image"]] if "image" in parts else parts.get("images", [])
        if name == "paligemma" and not images:
            continue  # its processor refuses text alone
        expected = _processor_call(name, model, preprocessor, parts.get("text", ""), images)
        ours = preprocessor([Item(to_content(content))])
        assert ours.tensors["input_ids"].tolist() == expected["input_ids"].tolist()
        with torch.inference_mode():
            hidden = model.backbone(**expected).last_hidden_state[:, -1]
        assert torch.allclose(vectors(model, preprocessor, [Item(to_content(content))]), hidden, atol=1e-5)


def _processor_call(name: str, model: EmbeddingModel, preprocessor: Preprocessor, text: str, images: list) -> dict:
    processor = preprocessor.processor
    if name == "paligemma":
        inputs = processor(text=["<image>" * len(images) + text], images=[images], return_tensors="pt")
        return {key: value for key, value in inputs.items() if key != "labels"}
    user = [{"type": "image"} for _ in images] + ([{"type": "text", "text": text}] if text else [])
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
    )
    special = {"add_special_tokens": False}  # the template has written them
    inputs = processor(text=[prompt], images=[images] if images else None, return_tensors="pt", text_kwargs=special)
    return {key: value for key, value in inputs.items() if images or key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths_are_counted_without_opening_images(name, family_folder) -> None:
    _, preprocessor = build(family_folder(name), prompt="instruct")
    batch = items(name)
    counted = preprocessor.lengths(batch)
    assert counted == [preprocessor([item]).tensors["input_ids"].shape[1] for item in batch]
    assert preprocessor(batch).num_tokens == sum(counted)


@pytest.mark.parametrize("name", FAMILIES)
def test_bidirectional_sees_the_last_token_and_causal_does_not(name, family_folder) -> None:
    for attention, sees in (("bidirectional", True), ("causal", False)):
        model, preprocessor = build(family_folder(name), attention=attention)
        inputs = preprocessor([Item(to_content("a red bus drives through the town"))])
        first = _first_state(model, inputs)
        inputs.tensors["input_ids"][:, -1] += 1
        assert ((first - _first_state(model, inputs)).abs().max() > 1e-6) == sees, attention


@torch.inference_mode()
def _first_state(model: EmbeddingModel, inputs) -> torch.Tensor:
    return model.backbone(**inputs.tensors).last_hidden_state[:, 0]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizer_is_the_one_that_was_saved(name, family_folder) -> None:
    """AutoTokenizer may turn a folder into its own class of tokenizer, with other ids."""
    _, preprocessor = build(family_folder(name))
    saved = Tokenizer.from_file(str(family_folder(name) / "tokenizer.json"))
    for text in (*TEXTS, "Der schöne Tag!  Zwei   Räume\n\n1234567 naïve"):
        assert preprocessor.tokenizer.backend_tokenizer.encode(text).ids == saved.encode(text).ids


def test_dropping_the_mask_changes_nothing(family_folder) -> None:
    for name in ("qwen3", "qwen3_vl", "gemma3_text"):
        model, preprocessor = build(family_folder(name))
        batch = items("qwen3")
        inputs = preprocessor(batch)
        with torch.inference_mode():
            masked = model.backbone(**inputs.tensors).last_hidden_state
            bare = model.backbone(input_ids=inputs.tensors["input_ids"]).last_hidden_state
        attended = inputs.tensors["attention_mask"].bool()
        assert torch.allclose(masked[attended], bare[attended], atol=1e-5), name


def test_a_backbone_made_bidirectional_by_its_own_config_keeps_its_mask(tmp_path) -> None:
    """EmbeddingGemma: its config says it, not ours; padding must not be seen."""
    folder = build_family("gemma3_text", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_bidirectional_attention": True}))
    model, preprocessor = build(folder)
    assert not model.family.causal
    alone = torch.cat([vectors(model, preprocessor, [item]) for item in items("qwen3")])
    assert torch.allclose(alone, vectors(model, preprocessor, items("qwen3")), atol=1e-5)


def test_pooling_sums_in_float32_under_autocast(family_folder) -> None:
    model, preprocessor = build(family_folder("qwen3"), normalize=False)
    inputs = preprocessor(items("qwen3"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        produced = model(inputs).vectors
        hidden = model.backbone(input_ids=inputs.tensors["input_ids"]).last_hidden_state
    assert produced.dtype == torch.float32
    for row, mask, vector in zip(hidden.double(), inputs.pool_mask, produced.double(), strict=True):
        assert torch.allclose(row[mask].mean(0), vector, atol=1e-6)


def test_preprocessor_travels_to_worker_processes(family_folder) -> None:
    _, preprocessor = build(family_folder("qwen3_vl"), prompt="chat")
    copy = pickle.loads(pickle.dumps(preprocessor))
    ours, theirs = preprocessor(items("qwen3_vl")), copy(items("qwen3_vl"))
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


def test_text_families_refuse_images(family_folder) -> None:
    _, preprocessor = build(family_folder("qwen3"))
    with pytest.raises(MmembedError, match="reads text only"):
        preprocessor([Item(to_content({"image": picture()}))])


def test_video_is_its_frames_and_audio_is_refused(family_folder) -> None:
    model, preprocessor = build(family_folder("qwen3_vl"))
    frames = [picture(seed) for seed in range(3)]
    video, images = Item(to_content({"video": frames})), Item(to_content({"images": frames}))
    assert torch.equal(vectors(model, preprocessor, [video]), vectors(model, preprocessor, [images]))
    with pytest.raises(MmembedError, match="no audio encoder"):
        preprocessor([Item(to_content({"audio": "sound.wav"}))])


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_odd_image_shapes(name, family_folder) -> None:
    model, preprocessor = build(family_folder(name))
    for size in ((1, 1), (3, 500), (500, 3), (900, 70)):
        assert vectors(model, preprocessor, [Item(to_content({"image": picture(0, *size)}))]).isfinite().all()
    if name.startswith("qwen"):
        with pytest.raises(MediaError, match="too narrow"):
            preprocessor([Item(to_content({"image": picture(0, 1, 300)}))])


def test_pixel_limits_act_or_raise(family_folder) -> None:
    picture_item = [Item(to_content({"image": picture(0, 300, 300)}))]
    limits = {"query_max_length": 64, "document_max_length": 64}
    tokens = [
        build(family_folder("qwen3_vl"), lengths={**limits, "max_pixels": pixels})[1].lengths(picture_item)[0]
        for pixels in (64 * 64, 128 * 128)
    ]
    assert tokens == [2 + 4, 2 + 16]
    with pytest.raises(ConfigError, match="max_pixels"):
        build(family_folder("gemma3"), lengths={**limits, "max_pixels": 4096})


def test_unknown_backbone_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="neither|cannot load"):
        build(Path("nowhere/at-all"))


def test_media_tokens_in_user_text_are_harmless(family_folder) -> None:
    model, preprocessor = build(family_folder("qwen3_vl"))
    text = Item(to_content({"text": "write <|image_pad|> here", "image": picture(1)}))
    assert vectors(model, preprocessor, [text]).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_text_cannot_write_control_tokens(name, family_folder) -> None:
    """Neither whole, nor nested, nor in two halves; neither as content nor as instruction."""
    for style in ("plain",) if name == "paligemma" else ("plain", "one_word"):
        lengths = {"query_max_length": 4096, "document_max_length": 4096}
        _, preprocessor = build(family_folder(name), prompt=style, lengths=lengths)
        added = preprocessor.tokenizer.added_tokens_decoder
        special = {str(token): at for at, token in added.items() if token.special}
        assert special, "nothing would be tested"
        evil = " ".join([*special, *(token[:2] + token + token[2:] for token in special)])
        halves = [half for token in special for half in (token[:2], token[2:])]
        plain, *others = preprocessor.tokenize(
            [
                Item(to_content("a"), "query", "b"),
                Item(to_content(evil), "query", "b"),
                Item(to_content(halves), "query", "b"),
                Item(to_content("a"), "query", evil),
            ]
        )
        expected = [token for token in plain.ids if token in special.values()]
        for row in others:
            assert [token for token in row.ids if token in special.values()] == expected, (name, style)


def test_filler_keeps_vision_in_the_graph_without_changing_vectors(family_folder) -> None:
    model, preprocessor = build(family_folder("qwen3_vl"), freeze=())
    batch = [Item(to_content(text)) for text in TEXTS]
    expected = vectors(model, preprocessor, batch)
    preprocessor.touch_vision = True
    inputs = preprocessor(batch)
    assert len(inputs) == len(batch)
    produced = model(inputs).vectors
    assert torch.allclose(expected, produced, atol=1e-6)
    produced.sum().backward()
    gradients = [p.grad for n, p in model.named_parameters() if model.parameter_towers()[n] == "vision"]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
