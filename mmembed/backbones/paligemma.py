"""PaliGemma: images first, then the begin mark and the text; the whole input is a prefix that attends both ways.

Its attention follows `token_type_ids` (0: prefix, 1: causal). The backbone's own way is the prefix; `attention: causal`
marks every token as causal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmembed.backbones.family import Family, Layout, Medium

if TYPE_CHECKING:
    import torch


class PaliGemma(Family):
    name = "paligemma"
    model_types = ("paligemma",)
    prefix_tuning = False
    unstored = None

    @property
    def causal(self) -> bool:
        return vars(self.config.get_text_config()).get("is_causal") is True

    def lay_out(self, prefix: str, parts: Sequence[str | Medium], markups: Sequence[str], suffix: str) -> Layout:
        pictures = "".join(markups)
        text = "\n".join(part for part in parts if isinstance(part, str))
        head = pictures + self.tokenizer.bos_token + prefix
        return Layout(
            head + text + suffix + "\n",  # the newline closes the prompt, as in its training
            hidden=((len(pictures), len(head)),) if prefix else (),
            suffix_start=len(head + text),
            texts=((len(head), len(head + text)),),
            media=((0, len(pictures)),) if pictures else (),
            complete=True,
        )

    def unshared(self, has_images: bool) -> str | None:
        return "attention follows token types"

    def token_tensors(self, input_ids: torch.Tensor, has_images: bool) -> dict[str, torch.Tensor]:
        return {"token_type_ids": input_ids.new_full(input_ids.shape, int(self.causal))}  # (B, T)
