"""Qwen2.5-Omni's thinker: Qwen2.5-VL with an audio tower. It reads texts, pictures and sounds in any order.

A sound is 25 tokens a second: mel frames of 10 ms, halved by a convolution and again by a mean. The mel spectrogram of
each sound is made alone, with silence behind it as long as a window, so it does not depend on the rest of the batch; it
equals the processor's own, which pads to five minutes. Where there are no pictures the 3-D positions are the plain
ones; with pictures the model would need an attention mask to find them, so it is told.

Of a whole Qwen2.5-Omni the thinker alone is loaded: what speaks is not needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch

from mmembed.backbones.qwen_vl import QwenVL
from mmembed.errors import MediaError


class QwenOmni(QwenVL):
    name = "qwen_omni"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_omni_thinker",)
    audio_modules = r"audio_tower(?!\.proj)"
    vision_modules = r"visual(?!\.merger)"
    projector_modules = r"visual\.merger|audio_tower\.proj"
    tells_positions = True

    @property
    def reserved(self) -> tuple[str, ...]:
        return (*super().reserved, self.audio_token)

    @property
    def audio_token(self) -> str:
        return self.processor.audio_token

    @property
    def sampling_rate(self) -> int:
        return int(self.processor.feature_extractor.sampling_rate)

    def frame_markup(self, markup: str) -> str:
        return f"{self.processor.vision_bos_token}{markup}{self.processor.vision_eos_token}"

    def frame_audio(self, markup: str) -> str:
        return f"{self.processor.audio_bos_token}{markup}{self.processor.audio_eos_token}"

    def audio_markup(self, samples: int) -> str:
        frames, extractor = self._frames(samples), self.processor.feature_extractor
        if samples > extractor.n_samples:
            raise MediaError(
                f"audio: {samples / self.sampling_rate:.0f} seconds; '{self.config.model_type}' hears at most "
                f"{extractor.chunk_length}. Cut the sound, or skip the record",
                kind="too long",
            )
        tokens = ((frames - 1) // 2 - 1) // 2 + 1
        if tokens < 1:
            raise MediaError(
                f"audio: {samples} samples are too short for '{self.config.model_type}'; skip the record",
                kind="too short",
            )
        return self.audio_token * tokens

    def audio_tensors(self, sounds: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """input_features (S, mels, L), L frames of the longest sound, and feature_attention_mask (S, L)."""
        features = [self._mel(sound) for sound in sounds]
        longest = max(one.shape[1] for one in features)
        padded = torch.zeros(len(features), features[0].shape[0], longest)
        mask = torch.zeros(len(features), longest, dtype=torch.long)
        for at, one in enumerate(features):
            padded[at, :, : one.shape[1]] = one
            mask[at, : one.shape[1]] = 1
        return {"input_features": padded, "feature_attention_mask": mask}

    def token_tensors(self, input_ids: torch.Tensor, has_images: bool) -> dict[str, torch.Tensor]:
        return {}

    def position_ids(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
        if "image_grid_thw" not in tensors:
            return None
        ids, heard = tensors["input_ids"], tensors.get("feature_attention_mask")
        mask = tensors.get("attention_mask", torch.ones_like(ids))
        lengths = None if heard is None else heard.sum(1)
        found = cast("Any", model).get_rope_index(ids, tensors["image_grid_thw"], None, mask, False, lengths)
        positions: torch.Tensor = found[0]  # (3, B, T)
        return positions.to(ids.dtype)

    def _frames(self, samples: int) -> int:
        """Of a mel spectrogram."""
        return -(-samples // int(self.processor.feature_extractor.hop_length))

    def _mel(self, sound: np.ndarray) -> torch.Tensor:
        """(mels, frames) of one sound (T,)."""
        extractor = self.processor.feature_extractor
        silent = len(sound) + extractor.n_fft
        found = extractor(
            sound, sampling_rate=self.sampling_rate, padding="max_length", max_length=silent, return_tensors="pt"
        )
        features: torch.Tensor = found["input_features"][0, :, : self._frames(len(sound))]
        return features
