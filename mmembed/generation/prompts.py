"""Queries and documents as a chat that asks for an order, or for a judgement with its reason.

system    = what is wanted
user      = the instruction, the query, the documents [1] [2] ..., and the request
assistant = [2] > [1] > [3], or a reason and in the last line yes or no

The structure is that of RankGPT (arXiv 2304.09542) and RankZephyr (2312.02724): the query stands in front of the
documents and again behind them; numbers in brackets within a document become (3), so that none can be named from
inside. Texts are cut to their token limits at the end; control tokens in them are broken up. The same object writes
what is trained on and what is asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mmembed.backbones import Family
from mmembed.config.blocks import LengthsConfig
from mmembed.content import Audio, Content, Image, Text, Video
from mmembed.errors import MmembedError
from mmembed.generation.judgements import read_judgement, write_judgement
from mmembed.preprocess import broken_up, control_tokens
from mmembed.prompts.judge import INSTRUCTION

Message = dict[str, Any]
LISTWISE = (
    "You rank documents by how relevant they are to a query. You answer with the numbers of all documents, the most "
    "relevant one first, in the form [2] > [1], and with nothing else."
)
RATIONALE = (
    "You judge whether the Document meets the requirements based on the Query and the Instruct provided. You give the "
    'reason first; your last line is "{yes}" or "{no}".'
)
_REFERENCE = re.compile(r"\[\s*([0-9]+)\s*\]")


@dataclass(frozen=True)
class Cut:
    """What a length limit took off a text: tokens that were there, and that are left."""

    tokens: int
    kept: int


@dataclass
class Prompt:
    """Messages of a chat, the pictures that stand in them, in order, and how often texts were cut."""

    messages: list[Message]
    images: tuple[Image, ...] = ()
    cuts: list[Cut] = field(default_factory=list)


class Writer:
    """Writes prompts for one language model.

    Args:
        lengths: text tokens of a query and of a document.
    """

    def __init__(self, family: Family, lengths: LengthsConfig, words: Sequence[str] = ("yes", "no")) -> None:
        self.family, self.lengths = family, lengths
        self.yes, self.no = words
        self._control = control_tokens(family)
        family.set_pixel_limits(lengths.min_pixels, lengths.max_pixels)

    def listwise(self, query: Content, documents: Sequence[Content], instruction: str | None = None) -> Prompt:
        """Asks for the order of documents.

        Raises:
            MmembedError: a content that the backbone cannot read.
        """
        cuts: list[Cut] = []
        asked = self._cut(query, self.lengths.query_max_length, cuts)
        parts: list[str | Image] = [f"<Instruct>: {self._told(instruction)}\n<Query>: ", *asked]
        parts.append(f"\nThe {len(documents)} documents:\n")
        for number, document in enumerate(documents, start=1):
            parts += [f"[{number}] ", *self._cut(document, self.lengths.document_max_length, cuts, numbered=True)]
            parts.append("\n")
        texts = [one for one in asked if isinstance(one, str)]  # a picture is shown once
        again = f"<Query>: {' '.join(texts)}\n" if texts else ""
        parts.append(f"{again}Rank the {len(documents)} documents by their relevance to the query.")
        return self._chat(LISTWISE, parts, cuts)

    def rationale(self, query: Content, document: Content, instruction: str | None = None) -> Prompt:
        """Asks whether a document answers a query, and why. Raises as `listwise`."""
        cuts: list[Cut] = []
        parts: list[str | Image] = [f"<Instruct>: {self._told(instruction)}\n<Query>: "]
        parts += self._cut(query, self.lengths.query_max_length, cuts)
        parts += ["\n<Document>: ", *self._cut(document, self.lengths.document_max_length, cuts)]
        return self._chat(RATIONALE.replace("{yes}", self.yes).replace("{no}", self.no), parts, cuts)

    def judgement(self, rationale: str, relevant: bool) -> str:
        """What is answered to `rationale`."""
        return write_judgement(rationale, relevant, (self.yes, self.no))

    def read_judgement(self, text: str) -> tuple[str, bool | None]:
        """The reason, and whether the document is relevant; None where the last line is neither word."""
        return read_judgement(text, (self.yes, self.no))

    def _told(self, instruction: str | None) -> str:
        return broken_up(instruction or INSTRUCTION, self._control)

    def _cut(self, content: Content, limit: int, cuts: list[Cut], numbered: bool = False) -> list[str | Image]:
        """The texts of a content, control tokens broken up and cut to `limit` tokens together, and its pictures.

        Args:
            numbered: it stands among numbers in brackets, and has none of its own.
        """
        found: list[str | Image] = []
        tokens = kept = 0
        for part in _merged(content):
            if isinstance(part, str):
                text = broken_up(_REFERENCE.sub(r"(\1)", part) if numbered else part, self._control)
                encoding = self.family.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
                left = max(0, limit - kept)
                tokens, kept = tokens + len(encoding), kept + min(left, len(encoding))
                found += [text if len(encoding) <= left else text[: encoding.offsets[left - 1][1]] if left else ""]
            elif not self.family.multimodal:
                raise MmembedError(
                    f"image: the backbone '{self.family.config.model_type}' reads text only; use a vision-language "
                    "backbone or drop the images"
                )
            else:
                found.append(part)
        if kept < tokens:
            cuts.append(Cut(tokens, kept))
        return found

    def _chat(self, system: str, parts: Sequence[str | Image], cuts: list[Cut]) -> Prompt:
        images = tuple(part for part in parts if isinstance(part, Image))
        if not self.family.multimodal:
            text = "".join(part for part in parts if isinstance(part, str))
            return Prompt([{"role": "system", "content": system}, {"role": "user", "content": text}], (), cuts)
        user: list[dict[str, str]] = []
        for part in parts:
            if isinstance(part, Image):
                user.append({"type": "image"})
            elif user and user[-1]["type"] == "text":
                user[-1] = {"type": "text", "text": user[-1]["text"] + part}
            else:
                user.append({"type": "text", "text": part})
        told = {"role": "system", "content": [{"type": "text", "text": system}]}
        return Prompt([told, {"role": "user", "content": user}], images, cuts)


def answered(text: str, family: Family) -> list[Message]:
    """The assistant's turn."""
    return [{"role": "assistant", "content": [{"type": "text", "text": text}] if family.multimodal else text}]


def _merged(content: Content) -> list[str | Image]:
    """Texts that follow each other as one, a video as its frames."""
    found: list[str | Image] = []
    for part in content:
        if isinstance(part, Audio):
            raise MmembedError("audio: no offered backbone has an encoder for it; drop the audio")
        if isinstance(part, Text):
            if found and isinstance(found[-1], str):
                found[-1] = f"{found[-1]}\n{part.text}"
            else:
                found.append(part.text)
        else:
            found += part.frames if isinstance(part, Video) else (part,)
    return found
