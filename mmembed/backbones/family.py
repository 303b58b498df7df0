"""What mmembed needs to know of a backbone family, and the answers that hold for most of them.

A family answers five questions: how an image is written in a prompt, how many tokens it takes (from its size, without
opening it), which tensors the model wants beside the token ids, which modules are vision, projector and language, and
whether its attention can be causal. Everything else (tokenizing, truncation, masks, pooling) is the same for all and
lives in `mmembed.preprocess` and `mmembed.models`. A deviating family is one file that overrides what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mmembed.backbones.experts import ROUTERS, mixture_of
from mmembed.errors import ConfigError, MmembedError
from mmembed.registry import Registry

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image


class Medium(Enum):
    """What stands in a prompt in the place of a text; the value is its name in chat templates."""

    IMAGE = "image"
    AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt written out, with the character spans that matter.

    Attributes:
        hidden: instruction (and chat head), kept out of pooling.
        suffix_start: from here on the suffix.
        texts: the content's texts, the only characters that truncation may drop.
        media: images and sounds; their tokens do not count against a length limit.
        complete: it already holds the tokenizer's special tokens.
    """

    text: str
    hidden: tuple[tuple[int, int], ...]
    suffix_start: int
    texts: tuple[tuple[int, int], ...] = ()
    media: tuple[tuple[int, int], ...] = ()
    complete: bool = False


class Family:
    """The generic family: a text decoder, or a vision-language model whose image is a run of one special token.

    Args:
        config: the configuration of the loaded model.
        processor: its processor (vision-language) or tokenizer (text).
    """

    name: ClassVar[str] = "generic"
    model_types: ClassVar[tuple[str, ...]] = ()
    vision_modules: ClassVar[str] = r"visual|vision_tower|vision_model"
    projector_modules: ClassVar[str] = r"multi_modal_projector|connector"
    prefix_tuning: ClassVar[bool] = True  # False where attention follows token types, which a cache does not know
    language_modules: ClassVar[str] = r"language_model|text_model"
    audio_modules: ClassVar[str | None] = None  # None: the family has no audio tower
    tells_positions: ClassVar[bool] = False  # True where the model cannot compute them without an attention mask
    vision_depth: ClassVar[str] = "num_hidden_layers"  # key of `vision_config`: how many layers the tower has

    def __init__(self, config: Any, processor: Any) -> None:
        self.config, self.processor = config, processor
        self.multimodal: bool = "vision_config" in config.to_dict()
        self.tokenizer = processor.tokenizer if self.multimodal else processor

    @classmethod
    def media_of(cls, config: Any) -> frozenset[str]:
        """Which media a model of this configuration reads: of `image`, `video` and `audio`."""
        seen = {"image", "video"} if "vision_config" in config.to_dict() else set()
        return frozenset(seen | ({"audio"} if cls.audio_modules else set()))

    @property
    def media(self) -> frozenset[str]:
        """As `media_of`."""
        return self.media_of(self.config)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one (image tokens among themselves aside)."""
        text_config = vars(self.config.get_text_config())
        return text_config.get("is_causal") is not False and text_config.get("use_bidirectional_attention") is not True

    @property
    def vision_layers(self) -> int | None:
        """How many layers the vision tower has; None where there is none."""
        return int(self.config.vision_config.to_dict()[self.vision_depth]) if self.multimodal else None

    @property
    def head_width(self) -> int:
        """Values of one head's key; configurations name it where it does not follow from the hidden size."""
        text = self.config.get_text_config()
        named = text.to_dict().get("head_dim")
        return int(text.hidden_size // text.num_attention_heads if named is None else named)

    # What a prompt looks like -----------------------------------------------------------------------------------------

    @property
    def image_token(self) -> str:
        """The token that chat templates write once for an image."""
        return self.processor.image_token

    @property
    def reserved(self) -> tuple[str, ...]:
        """Strings that user text must not contain, because the model would look for a medium behind them."""
        if not self.multimodal:
            return ()
        video = vars(self.processor).get("video_token")
        return (self.image_token,) if video is None else (self.image_token, video)

    def image_markup(self, width: int, height: int, images_in_row: int) -> str:
        """The text that stands for one image of `width` x `height` pixels where the template wrote `image_token`.

        Args:
            images_in_row: how many images the same input has; some families cut an image only when it is alone.
        """
        counts = self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)])
        return self.image_token * counts.num_image_tokens[0]

    def frame_markup(self, markup: str) -> str:
        """What surrounds an image outside of a chat template."""
        return markup

    @property
    def audio_token(self) -> str:
        """The token that chat templates write once for a sound."""
        raise self._deaf()

    @property
    def sampling_rate(self) -> int:
        """Samples a second that the audio tower hears."""
        raise self._deaf()

    def audio_markup(self, samples: int) -> str:
        """The text that stands for one sound where the template wrote `audio_token`."""
        raise self._deaf()

    def frame_audio(self, markup: str) -> str:
        """What surrounds a sound outside of a chat template."""
        return markup

    def audio_tensors(self, sounds: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The tensors of the sounds of a batch, in batch order, each (T,) at `sampling_rate`."""
        raise self._deaf()

    def _deaf(self) -> MmembedError:
        return MmembedError(
            f"audio: the backbone '{self.config.model_type}' has no audio encoder; use one that hears (docs/guide/"
            "audio.md), or drop the audio"
        )

    def lay_out(self, prefix: str, parts: Sequence[str | Medium], markups: Sequence[str], suffix: str) -> Layout:
        """Writes a prompt without a chat template.

        Args:
            parts: the content in order, its texts and where media stand.
            markups: one a medium, with what surrounds it.
        """
        inserted, text, after_text = iter(markups), prefix, False
        texts: list[tuple[int, int]] = []
        media: list[tuple[int, int]] = []
        for part in parts:
            spoken = isinstance(part, str)
            piece = next(inserted) if isinstance(part, Medium) else "\n" + part if after_text else part
            (texts if spoken else media).append((len(text), len(text) + len(piece)))
            text, after_text = text + piece, spoken
        return Layout(text + suffix, ((0, len(prefix)),) if prefix else (), len(text), tuple(texts), tuple(media))

    # What the model wants ---------------------------------------------------------------------------------------------

    def image_tensors(self, images: Sequence[Sequence[PIL.Image.Image]]) -> dict[str, torch.Tensor]:
        """The image processor's tensors for the images of a batch.

        Args:
            images: the images of each input that has any, in batch order.
        """
        if not self.multimodal:
            raise MmembedError(
                f"image: the backbone '{self.config.model_type}' reads text only; "
                "use a vision-language backbone or drop the images"
            )
        flat = [image for row in images for image in row]
        return dict(self.processor.image_processor(images=flat, return_tensors="pt"))

    def token_tensors(self, input_ids: torch.Tensor, has_images: bool) -> dict[str, torch.Tensor]:
        """Tensors that follow from the token ids (B, T), for example token types."""
        return {}

    def position_ids(self, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Positions that the model would compute from the token ids, where they are not simply 0, 1, 2, ..."""
        return None

    def unshared(self, has_images: bool) -> str | None:
        """Why rows cannot share the keys and values of a common prefix; None where they can.

        Args:
            has_images: whether the rows hold images, behind the prefix.
        """
        return None if self.causal else "attention is bidirectional"

    # Image features that are kept -------------------------------------------------------------------------------------

    unstored: ClassVar[str | None] = "this family does not say how its image features divide into images"
    image_rows: ClassVar[tuple[str, ...]] = ()  # of `image_tensors`, those with a row an image

    def split_features(self, output: Any, tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """What the model's `get_image_features` gave -> the tensors of each image, with its rows of `image_rows`."""
        rows = [{name: tensors[name][at] for name in self.image_rows} for at in range(len(output.pooler_output))]
        return [{"pooled": pooled, **row} for pooled, row in zip(output.pooler_output, rows, strict=True)]

    def join_features(self, images: Sequence[dict[str, torch.Tensor]]) -> Any:
        """The tensors of each image of a batch -> what `get_image_features` would give."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        return BaseModelOutputWithPooling(pooler_output=torch.stack([image["pooled"] for image in images]))

    # Limits and towers ------------------------------------------------------------------------------------------------

    def set_pixel_limits(self, min_pixels: int | None, max_pixels: int | None) -> None:
        """Bounds the area of an image before it is cut into patches, in pixels.

        Raises ConfigError where the family's processor has a fixed image size.
        """
        if min_pixels is not None or max_pixels is not None:
            raise ConfigError(
                f"lengths.min_pixels / lengths.max_pixels: '{self.config.model_type}' has no free image "
                "size; remove them (they act on the Qwen-VL families)"
            )

    def towers(self) -> dict[str, str]:
        """Parts that are frozen or tuned together: name -> regular expression, found in a parameter's name."""
        router = {} if mixture_of(self.config) is None else {"router": ROUTERS}  # before the tower that it is in
        if not self.multimodal:
            return {**router, "language": r".*"}
        audio = {} if self.audio_modules is None else {"audio": rf"(^|\.)({self.audio_modules})\."}
        return {
            **router,
            "vision": rf"(^|\.)({self.vision_modules})\.",
            **audio,
            "projector": rf"(^|\.)({self.projector_modules})(\.|$)",
            "language": rf"(^|\.)({self.language_modules})\.",
        }


FAMILIES: Registry[Family] = Registry("mmembed.backbones", Family)


def family_of(config: Any, processor: Any) -> Family:
    """The family that claims `config.model_type`, or the generic one."""
    return family_class(config)(config, processor)


def family_class(config: Any) -> type[Family]:
    """As `family_of`, before there is a processor."""
    claiming = (cls for cls in FAMILIES.classes().values() if config.model_type in cls.model_types)
    return next(claiming, Family)
