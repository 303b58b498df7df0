"""Sounds: files are read within limits, inputs equal transformers' own, batches mix media, and tones are learned.

The yardsticks are transformers' processor and model, soundfile's own writer, and the sine that a file was made of.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from families import AUDIO_FAMILIES, TEXTS, build, contents, items, picture, tone, vectors

from mmembed.config.blocks import SourceConfig
from mmembed.content import Audio, Document, Example, Text, to_content
from mmembed.data.collate import Collator
from mmembed.data.dataset import RecordDataset
from mmembed.data.records import parse_record
from mmembed.errors import ConfigError, MediaError, MmembedError, RecordError
from mmembed.inference.embedder import Embedder
from mmembed.media import MediaStore
from mmembed.media_limits import MediaLimits
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.verification import verify_checkpoint
from mmembed.objectives import build_objective
from mmembed.preprocess import Item
from mmembed.training.gradcache import contrastive_step

(OMNI,) = AUDIO_FAMILIES
RATE = 16000
NOTES = {
    "c": 262.0,
    "e": 330.0,
    "g": 392.0,
    "b": 494.0,
    "high d": 587.0,
    "high f": 698.0,
    "high a": 880.0,
    "top": 1175.0,
}


def sound(pitch: float = 440.0, seconds: float = 0.5) -> dict[str, object]:
    return {"audio": tone(pitch, seconds), "sampling_rate": RATE}


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "rate", "channels"), [("wav", 16000, 1), ("flac", 44100, 2), ("ogg", 8000, 1)])
def test_a_file_becomes_the_waveform_that_it_was_made_of(suffix, rate, channels, tmp_path) -> None:
    wave = tone(300, 0.8, rate)
    file = tmp_path / f"a.{suffix}"
    soundfile.write(file, np.stack([wave * (1 + 0.2 * (-1) ** one) for one in range(channels)], axis=1), rate)
    store, part = MediaStore(tmp_path), Audio(f"a.{suffix}")
    heard = store.listen(part, RATE)
    assert heard.dtype == np.float32 and heard.ndim == 1
    assert len(heard) == store.samples(part, RATE) == math.ceil(len(wave) * RATE / rate)
    expected = tone(300, 0.8) * (1.2 if channels == 1 else 1.0)
    middle = slice(2000, 10000)  # a filter and a codec need some samples at the ends
    assert np.corrcoef(heard[middle], expected[middle])[0, 1] > 0.99
    assert np.abs(heard[middle]).max() == pytest.approx(np.abs(expected[middle]).max(), rel=0.1)


def test_what_cannot_be_heard_is_refused_with_the_reason(tmp_path) -> None:
    soundfile.write(tmp_path / "long.wav", tone(seconds=2.0), RATE)
    soundfile.write(tmp_path / "none.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(tmp_path / "good.flac", np.random.default_rng(0).normal(size=RATE).clip(-1, 1), RATE)
    whole = (tmp_path / "good.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.wav").write_text("no sound at all")
    soundfile.write(tmp_path / "slow.wav", tone(seconds=0.1), 800)
    soundfile.write(tmp_path / "fast.wav", tone(seconds=0.1), 384_000)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT")
    store = MediaStore(tmp_path, MediaLimits(max_seconds=1.5))
    for name, rate, message in (
        ("long.wav", None, r"2.0 seconds; the limit is 1.5. Cut it or raise data.media_limits.max_seconds"),
        ("none.wav", None, "holds no sound"),
        ("text.wav", None, "not a readable sound file"),
        ("slow.wav", None, "800 samples a second; between 1000 and 192000"),
        ("fast.wav", None, "384000 samples a second"),
        ("good.flac", 8000, "the file has 16000 samples a second, and the record says sampling_rate 8000"),
        ("there-is-none.wav", None, "there is no such file"),
        ("../out.wav", None, "outside the media folders"),
    ):
        with pytest.raises(MediaError, match=message):
            store.samples(Audio(name, rate), RATE)
    for name, message in (("cut.flac", "truncated or damaged"), ("nan.wav", "not finite")):
        assert store.samples(Audio(name), RATE) == RATE, "its header is fine"
        with pytest.raises(MediaError, match=message):
            store.listen(Audio(name), RATE)
    with pytest.raises(MediaError, match="bytes; the limit is 100"):
        MediaStore(tmp_path, MediaLimits(max_bytes=100)).samples(Audio("good.flac"), RATE)
    with pytest.raises(MediaError, match="not finite"):
        store.listen(Audio(np.array([0.0, np.inf] * 800), RATE), RATE)
    for wrong in ({"max_seconds": 0}, {"max_sampling_rate": 10}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MediaLimits(**wrong)


def test_a_bad_sound_is_refused_with_the_place_of_its_record(tmp_path) -> None:
    soundfile.write(tmp_path / "good.wav", tone(), RATE)
    (tmp_path / "bad.wav").write_bytes(b"RIFF, but no more")
    records = [{"query": {"audio": f"{name}.wav"}, "documents": [{"content": "a tone"}]} for name in ("good", "bad")]
    (tmp_path / "sounds.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    source, cache = SourceConfig(path="sounds.jsonl"), tmp_path / "cache"
    store = MediaStore(tmp_path)
    with pytest.raises(RecordError, match=r"sounds.jsonl:2: .*bad.wav: not a readable sound file"):
        RecordDataset(source, store, cache_dir=cache, root=tmp_path)
    kept = RecordDataset(source, store, "skip", cache_dir=cache, root=tmp_path)
    assert len(kept) == 1 and kept.fields == {"audio"} and sum(kept.skipped.values()) == 1
    example = parse_record({**records[0], "query": ["heard:", {"audio": "good.wav", "sampling_rate": 16000}]}, "here:1")
    assert example.query == (Text("heard:"), Audio("good.wav", 16000))


# Inputs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_mixed_batch_equals_single_inputs(attention, family_folder) -> None:
    model, preprocessor = build(family_folder(OMNI), attention=attention, prompt="instruct")
    batch = items(OMNI)
    together = vectors(model, preprocessor, batch)
    alone = torch.cat([vectors(model, preprocessor, [item]) for item in batch])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together, vectors(model, preprocessor, batch, "left"), atol=1e-5)
    assert preprocessor.lengths(batch) == [preprocessor([one]).tensors["input_ids"].shape[1] for one in batch]
    distances = torch.cdist(alone, alone) + torch.eye(len(alone))
    assert distances.min() > 1e-3, "different inputs must differ, or this test could not see a mix-up"
    back = vectors(model, preprocessor, batch[::-1]).flip(0)
    assert torch.allclose(together, back, atol=1e-5), "each sound stays with its row"


def test_inputs_equal_the_processor_of_transformers(family_folder) -> None:
    model, preprocessor = build(family_folder(OMNI), prompt="chat", pooling="last_token", normalize=False)
    processor, checked = preprocessor.processor, 0
    for content in contents(OMNI):
        parts: dict = {"text": content} if isinstance(content, str) else content  # type: ignore[assignment]
        if parts.get("sampling_rate", RATE) != RATE:
            parts = {**parts, "audio": MediaStore().listen(Audio(parts["audio"], parts["sampling_rate"]), RATE)}
        images = [parts["image"]] if "image" in parts else parts.get("images", [])
        sounds = [parts["audio"]] if "audio" in parts else []
        user = [{"type": "image"} for _ in images] + [{"type": "audio"} for _ in sounds]
        user += [{"type": "text", "text": parts["text"]}] if "text" in parts else []
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
        expected = processor(text=[prompt], images=images or None, audio=sounds or None, return_tensors="pt")
        ours = preprocessor([Item(to_content(content))])
        assert ours.tensors["input_ids"].tolist() == expected["input_ids"].tolist()
        if sounds:
            frames = int(expected["feature_attention_mask"].sum())
            assert ours.tensors["input_features"].shape[2] == frames
            assert torch.allclose(
                ours.tensors["input_features"][0], expected["input_features"][0, :, :frames], atol=1e-5
            )
            checked += 1
        keys = ("input_ids", "attention_mask", "input_features", "feature_attention_mask")
        keys += ("pixel_values", "image_grid_thw")
        with torch.inference_mode():
            given = {key: value for key, value in expected.items() if key in keys}
            hidden = model.backbone(**given).last_hidden_state[:, -1]
        assert torch.allclose(vectors(model, preprocessor, [Item(to_content(content))]), hidden, atol=1e-5)
    assert checked == 3


def test_gradients_do_not_depend_on_chunks(family_folder) -> None:
    """Texts, sounds, and a picture with a sound: in as few chunks as possible, or one input a chunk, encoded twice."""
    found = []
    for options, keep in (({}, None), ({"chunk_rows": 1}, 0), ({"share_prefix": True, "chunk_rows": 2}, 0)):
        torch.manual_seed(0)
        settings = {"adapter": {"type": "none"}, "freeze": ("vision",), "prompt": "instruct"}
        model, preprocessor = build(family_folder(OMNI), **settings)
        model.train()
        pairs = zip(contents(OMNI)[:3], TEXTS, strict=True)
        examples = [
            Example(to_content(heard), (Document(to_content(text)),), instruction="Find it", source="s", id=str(at))
            for at, (heard, text) in enumerate(pairs)
        ]
        batch = Collator(preprocessor, {"s": SourceConfig(path="s")}, 10**6, train_group_size=1, **options)(examples)
        objective = build_objective({"type": "infonce", "temperature": 0.1})
        loss, _ = contrastive_step(lambda chunk: model(chunk.inputs(preprocessor)), objective, batch, keep)  # noqa: B023
        found.append((loss, {name: one.grad for name, one in model.named_parameters() if one.grad is not None}))
    (loss, gradients), *others = found
    towers = {model.parameter_towers()[name] for name, gradient in gradients.items() if gradient.any()}
    assert towers == {"audio", "projector", "language"}
    for other, same in others:
        assert torch.allclose(loss, other, atol=1e-6)
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, same[name], atol=2e-6, rtol=1e-4), name


def test_towers_and_fillers(family_folder) -> None:
    """By default what sees and hears stands still; a batch without media gets both where towers must run."""
    block = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
    model, preprocessor = build(family_folder(OMNI), adapter=block)
    towers = model.parameter_towers()
    assert {"vision", "audio", "projector", "language"} == set(towers.values())
    assert {towers[name] for name, one in model.named_parameters() if one.requires_grad} == {"language"}
    texts = [Item(to_content(text)) for text in TEXTS]
    plain = vectors(model, preprocessor, texts)
    preprocessor.touch_vision = True
    for batch in (texts, [*texts, Item(to_content({"image": picture(1)}))]):
        inputs = preprocessor(batch)
        assert inputs.filler == 1 and {"pixel_values", "input_features"} <= set(inputs.tensors)
        assert torch.allclose(vectors(model, preprocessor, batch)[:3], plain, atol=1e-5)


def test_lora_reloads_and_merges(family_folder, tmp_path) -> None:
    block = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
    model, preprocessor = build(family_folder(OMNI), adapter=block, prompt="instruct")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = vectors(model, preprocessor, items(OMNI))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert verify_checkpoint(tmp_path / "saved", model, preprocessor) < 1e-6
    reloaded, other = load_checkpoint(tmp_path / "saved")
    assert torch.allclose(adapted, vectors(reloaded, other, items(OMNI)), atol=1e-6)
    reloaded.merge_adapter()
    assert torch.allclose(adapted, vectors(reloaded, other, items(OMNI)), atol=1e-4)


def test_refusals_name_the_remedy(family_folder) -> None:
    _, text = build(family_folder("qwen3"))
    with pytest.raises(MmembedError, match="'qwen3' has no audio encoder; use one that hears"):
        text([Item(to_content(sound()))])
    _, preprocessor = build(family_folder(OMNI))
    with pytest.raises(MediaError, match="too short for 'qwen2_5_omni_thinker'"):
        preprocessor([Item(to_content(sound(seconds=0.01)))])
    long = np.zeros(RATE * 301, np.float32)
    preprocessor.media = MediaStore(limits=MediaLimits(max_seconds=400))
    with pytest.raises(MediaError, match="hears at most 300"):
        preprocessor([Item((Audio(long, RATE),))])
    with pytest.raises(MmembedError, match="without 'sampling_rate'"):
        to_content({"audio": long})


# Learning -------------------------------------------------------------------------------------------------------------


def tones(folder: Path, name: str, count: int, seed: int) -> Path:
    """`count` recordings of each note, of other length, loudness, phase and noise, with the text that names it."""
    generator, lines = np.random.default_rng(seed), []
    for at in range(count):
        for note, pitch in NOTES.items():
            wave = tone(pitch, generator.uniform(0.25, 0.4))[int(generator.integers(0, 60)) :]
            wave = wave * generator.uniform(0.4, 1.0) + generator.normal(0, 0.01, len(wave)).astype(np.float32)
            file = f"{name}-{note.replace(' ', '-')}-{at}.flac"
            soundfile.write(folder / file, wave, RATE)
            lines.append({"query": {"audio": file}, "documents": [{"id": note, "content": f"the note {note}"}]})
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path


def test_tones_are_learned_and_held_out_ones_found(family_folder, tmp_path) -> None:
    """The real command: sounds as queries, their names as documents; then tones that were not trained on."""
    from recipes.train_embedder import main

    tones(tmp_path, "train", 6, seed=0)
    held_out = tones(tmp_path, "held-out", 3, seed=1)
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{name_or_path: {family_folder(OMNI)}, dtype: float32, freeze: [vision]}}
adapter: {{type: none}}
data:
  root: {tmp_path}
  train_group_size: 1
  train: [{{path: train.jsonl}}]
objective: {{type: infonce, temperature: 0.1}}
training:
  output_dir: {tmp_path / "out"}
  per_device_train_batch_size: 8
  max_steps: 40
  learning_rate: 3e-3
  lr_scheduler_type: constant
  logging_steps: 1
  save_strategy: "no"
  disable_tqdm: true
"""
    )
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    embedder = Embedder.from_pretrained(str(tmp_path / "out"), media=MediaStore(tmp_path))
    names = embedder.encode([f"the note {note}" for note in NOTES], role="document")
    records = [json.loads(line) for line in held_out.read_text().splitlines()]
    heard = embedder.encode([record["query"] for record in records], role="query")
    best = [list(NOTES)[at] for at in (heard @ names.T).argmax(1)]
    right = np.mean([note == record["documents"][0]["id"] for note, record in zip(best, records, strict=True)])
    assert right > 0.5, f"{right} of eight notes; chance is 0.125"
    pictured = embedder.encode([{"image": picture(1)}, {**sound(), "image": picture(1), "text": "heard"}])
    assert np.isfinite(pictured).all()
