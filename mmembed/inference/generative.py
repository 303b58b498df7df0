"""Rerankers that answer in words: orders of documents, and judgements with their reasons.

`ListwiseReranker` ranks lists of any length through windows that slide from the end to the front (RankGPT, arXiv
2304.09542): ceil((N - window) / stride) + 1 answers a list, so what a window ranks first can rise to the top. Answers
are greedy. Whatever the model writes is an order (`mmembed.generation.orders`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from mmembed.content import to_content
from mmembed.errors import MmembedError
from mmembed.generation.orders import read_order, slide, window_starts, write_order
from mmembed.generation.prompts import Prompt
from mmembed.inference.devices import check_device
from mmembed.models.generator import Generator, load_generator, read_generator
from mmembed.preprocess import Item, template_options

if TYPE_CHECKING:
    from mmembed.content import ContentLike
    from mmembed.media import MediaStore

logger = logging.getLogger(__name__)
MARGIN = 8  # tokens an answer may be longer than the longest order: the end of the turn, a line break


class _Answerer:
    """A trained folder that answers prompts. Subclasses name what they answer."""

    answers = ""

    def __init__(self, generator: Generator, media: MediaStore | None = None) -> None:
        if media is None:
            from mmembed.media import MediaStore

            media = MediaStore()
        asked = generator.settings.answer["type"]
        if asked != self.answers:
            other = {"listwise": "ListwiseReranker", "rationale": "RationaleReranker"}[asked]
            raise MmembedError(f"'{generator.settings.name_or_path}' was trained to answer '{asked}'; load {other}")
        self.generator, self.media = generator, media
        generator.model.eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        media: MediaStore | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Loads a folder that `recipes/train_generative_reranker.py` wrote.

        Args:
            device: default the first CUDA device, else the CPU.
            dtype: of the base model; default: that of training.
            media: opens pictures; default: any local file.
            trust_remote_code: run the code that the base model brings.

        Raises:
            CheckpointError: files are missing or broken, or of another kind of model.
            MmembedError: it was trained for another answer, or there is no such device.
        """
        check_device(None if device is None else str(device))
        settings = read_generator(path)
        generator = load_generator(settings, dtype=dtype, trust_remote_code=trust_remote_code, folder=path)
        generator.model.merge_adapter()
        generator.model.to(torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        return cls(generator, media)

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int = 8) -> list[str]:
        """What the model writes behind each prompt.

        Raises:
            MmembedError: a prompt and its answer are longer than the model's positions.
        """
        found: list[str] = []
        for start in range(0, len(prompts), batch_size):
            found += self._answer(prompts[start : start + batch_size], max_new_tokens)
        return found

    def _answer(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        model, tokenizer, inputs = self.generator.model, self.generator.tokenizer, self.inputs(prompts)
        length = inputs["input_ids"].shape[1]
        most = self.generator.family.config.get_text_config().max_position_embeddings
        if length + max_new_tokens > most:
            raise MmembedError(
                f"a prompt of {length:,} tokens and an answer of {max_new_tokens:,} are more than the {most:,} "
                "positions of the model; show fewer documents at once (window), or train with a smaller "
                "lengths.document_max_length"
            )
        ends = _ends(model, tokenizer)
        written = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        return [text.strip() for text in tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)]

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """Tensors of prompts, padded on the left: (B, T) ids and mask, and the family's media tensors."""
        processor = self.generator.processor
        texts = [
            processor.apply_chat_template(
                one.messages, tokenize=False, add_generation_prompt=True, **template_options(processor)
            )
            for one in prompts
        ]
        pictures = [[self.media.open(image) for image in one.images] for one in prompts]
        given = {"images": [one for one in pictures if one]} if any(pictures) else {}
        padded = {"padding": True, "padding_side": "left", "return_tensors": "pt", "add_special_tokens": False}
        made = processor(text=texts, **given, **padded)
        return {name: tensor.to(self.generator.model.device) for name, tensor in made.items()}


class ListwiseReranker(_Answerer):
    """A trained model that orders documents.

    Args:
        generator: is put into evaluation mode.
        media: opens pictures.
    """

    answers = "listwise"

    def rank(
        self,
        query: ContentLike,
        documents: Sequence[ContentLike],
        *,
        instruction: str | None = None,
        window: int | None = None,
        stride: int | None = None,
        top_k: int | None = None,
    ) -> list[int]:
        """The places of the documents of one query, best first. Give them in the order of a first stage: what the model
        leaves open stays in it. Arguments and errors as of `rank_all`."""
        options: dict[str, Any] = {"window": window, "stride": stride, "top_k": top_k}
        return self.rank_all([query], [documents], instructions=[instruction], **options)[0]

    def rank_all(
        self,
        queries: Sequence[ContentLike],
        documents: Sequence[Sequence[ContentLike]],
        *,
        instructions: Sequence[str | None] | None = None,
        window: int | None = None,
        stride: int | None = None,
        top_k: int | None = None,
        batch_size: int = 8,
    ) -> list[list[int]]:
        """As `rank`, of several queries, whose windows are answered together.

        Args:
            documents: of each query.
            instructions: of each query; None: the prompt's.
            window: documents that are shown at once; default: as many as in training.
            stride: how far windows move; default: half of the window.
            top_k: keep so many of each; the best `window` - `stride` are found by comparing all.
            batch_size: prompts that are answered together.

        Raises:
            MmembedError: numbers that do not fit each other, a content that cannot be read, or prompts that are too
                long.
        """
        window = self.generator.settings.answer["documents"] if window is None else window
        stride = max(1, window // 2) if stride is None else stride
        if top_k is not None and top_k < 1:
            raise MmembedError(f"top_k: {top_k}; give at least 1")
        if batch_size < 1:
            raise MmembedError(f"batch_size: {batch_size}; give at least 1")
        told = [None] * len(queries) if instructions is None else list(instructions)
        if not len(queries) == len(documents) == len(told):
            raise MmembedError(
                f"{len(queries)} queries, {len(documents)} lists of documents and {len(told)} instructions; give one "
                "each"
            )
        window_starts(0, window, stride)  # whether they fit each other
        asked = [Item(to_content(query), "query", one) for query, one in zip(queries, told, strict=True)]
        shown = [[to_content(one) for one in listed] for listed in documents]
        complete = [0, 0]

        def order(windows: list[tuple[int, list[int]]]) -> list[tuple[int, ...]]:
            prompts = [
                self.generator.writer.listwise(
                    asked[number].content, [shown[number][place] for place in places], asked[number].instruction
                )
                for number, places in windows
            ]
            longest = max(len(places) for _, places in windows)
            texts = self.answer(prompts, self._room(longest), batch_size)
            found = [read_order(text, len(places)) for text, (_, places) in zip(texts, windows, strict=True)]
            complete[0] += sum(one.named == len(one.places) for one in found)
            complete[1] += len(found)
            return [one.places for one in found]

        ranked = slide([len(listed) for listed in shown], window, stride, order)
        if complete[0] < complete[1]:
            logger.warning(
                "%d of %d answers did not name all documents: those left out stand behind the others as given",
                complete[1] - complete[0],
                complete[1],
            )
        return [places[:top_k] for places in ranked]

    def _room(self, documents: int) -> int:
        """Tokens that an order of so many documents may take."""
        return len(self.generator.tokenizer.encode(write_order(range(documents)), add_special_tokens=False)) + MARGIN


@dataclass(frozen=True, slots=True)
class Judgement:
    """relevant: None where the answer ends with neither word."""

    rationale: str
    relevant: bool | None


class RationaleReranker(_Answerer):
    """A trained model that says why a document answers a query, and whether."""

    answers = "rationale"

    def judge(
        self,
        pairs: Sequence[tuple[ContentLike, ContentLike]],
        *,
        instruction: str | None = None,
        max_new_tokens: int = 256,
        batch_size: int = 8,
    ) -> list[Judgement]:
        """A judgement of each (query, document).

        Raises:
            MmembedError: a content cannot be read, or prompts are too long.
        """
        if any(isinstance(pair, str | bytes) or len(pair) != 2 for pair in pairs):
            raise MmembedError("pairs: give (query, document) each")
        writer = self.generator.writer
        prompts = [writer.rationale(to_content(query), to_content(one), instruction) for query, one in pairs]
        return [Judgement(*writer.read_judgement(text)) for text in self.answer(prompts, max_new_tokens, batch_size)]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the model's own, and the tokenizer's."""
    named = model.generation_config.eos_token_id
    own = [] if named is None else [named] if isinstance(named, int) else list(named)
    return sorted({*own, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
