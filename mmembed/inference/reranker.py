"""Pairs of a query and a document in, scores out: the public way to use a trained reranker.

Batches, threads, kernels and the order of results are the embedder's (`mmembed.inference.embedder`), whose vectors are
the logits here. The documents of a query begin with the same tokens, instruction and query, which are computed once for
all of them where the backbone allows it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from mmembed.backbones.output_embedding import load_output_embedding
from mmembed.data.collate import content_key
from mmembed.errors import MmembedError, nearest
from mmembed.generation.orders import read_order
from mmembed.heads import Head, log_odds
from mmembed.inference.answering import answer, completed
from mmembed.inference.embedder import Embedder, item_of, load_merged, naming
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.preprocess import Item, Place, Preprocessor, Row

if TYPE_CHECKING:
    from mmembed.content import ContentLike
    from mmembed.media import MediaStore

Pair = tuple["ContentLike", "ContentLike"]
Scale = Literal["probability", "logit"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A document of `Reranker.rank`: its place among those given, and its score."""

    index: int
    score: float


class _Pairs(Sequence[Item]):
    """Pairs as the inputs of a model, made when they are asked for."""

    def __init__(self, pairs: Sequence[Pair], instruction: str | Sequence[str | None] | None) -> None:
        self.pairs, self.instruction = pairs, instruction

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Any) -> Any:
        told = self.instruction
        told = told if told is None or isinstance(told, str) else told[index]
        query, document = (item_of(one, "query", told) for one in self.pairs[index])
        return Item(query.content, "query", query.instruction, document.content)


class _Listed(Sequence[Item]):
    """Pairs as the documents of lists, one for each query and instruction.

    Attributes:
        order: of each item, the pair that it is: those of a list stand one behind another.
    """

    def __init__(self, pairs: _Pairs) -> None:
        items = []
        for index in range(len(pairs)):
            with naming(index):
                items.append(pairs[index])
        lists: dict[tuple[int, str | None], list[int]] = {}
        for index, item in enumerate(items):
            lists.setdefault((content_key(item.content), item.instruction), []).append(index)
        self.order = [index for of in lists.values() for index in of]
        self.items = [
            replace(items[index], place=Place(number, place))
            for number, of in enumerate(lists.values())
            for place, index in enumerate(of, 1)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]


class Reranker:
    """A trained reranker with the preprocessing it was trained with.

    Args:
        model: is put into evaluation mode.
        preprocessor: the one the model was trained with.

    Raises:
        MmembedError: the model is an embedder.
    """

    def __init__(self, model: EmbeddingModel, preprocessor: Preprocessor) -> None:
        if not isinstance(model.projection, Head):
            raise MmembedError(
                f"'{model.settings.name_or_path}' is an embedder: it has no head that scores pairs; load it with "
                "Embedder, or train a reranker with recipes/train_reranker.py"
            )
        self.model, self.preprocessor = model, preprocessor
        self.reads_lists = preprocessor.prompt.reads_lists
        self._encoder = Embedder(model, preprocessor)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        media: MediaStore | None = None,
        trust_remote_code: bool = False,
    ) -> Reranker:
        """Loads a folder that `recipes/train_reranker.py` wrote. Arguments and errors as of `Embedder.from_pretrained`.

        Raises:
            MmembedError: the folder is of an embedder, or a bare backbone.
        """
        model, preprocessor = load_merged(path, device, dtype, trust_remote_code)
        if media is not None:
            preprocessor.media = media
        return cls(model, preprocessor)

    def score(
        self,
        pairs: Sequence[Pair],
        *,
        instruction: str | Sequence[str | None] | None = None,
        scale: Scale = "probability",
        token_budget: int | None = None,
        share_prefix: Literal["auto", "off"] = "auto",
        show_progress: bool | None = None,
    ) -> NDArray[np.float32]:
        """Scores of pairs, in their order.

        An in-context reranker reads all documents of a query together (they are found among the pairs): their scores
        are shares, which sum to 1, and so depend on which documents stand beside each other.

        Args:
            pairs: (query, document) each; either may be anything that `Embedder.encode` takes. A query may bring its
                own `instruction`.
            instruction: of all queries that bring none, or one a pair; None: the prompt's.
            scale: "probability" of being relevant (of a list, the share), or the "logit" behind it, which does not
                round to 0 or 1.
            token_budget, share_prefix, show_progress: as of `Embedder.encode`; of a list, tokens of documents that are
                read at a time (`mmembed.inference.lists`). Give the documents of a query one behind another or not:
                pairs of one query are found.

        Returns:
            (N,) float32.

        Raises:
            MmembedError: an option is unknown, or a pair cannot be scored; the message begins with its index.
        """
        if scale not in ("probability", "logit"):
            raise MmembedError(f"scale: there is no '{scale}'; {nearest(scale, ['probability', 'logit'])}")
        if not (instruction is None or isinstance(instruction, str)) and len(instruction) != len(pairs):
            raise MmembedError(f"instruction: {len(instruction)} instructions for {len(pairs)} pairs; give one each")
        if any(isinstance(pair, str | bytes) or len(pair) != 2 for pair in pairs):
            raise MmembedError("pairs: give (query, document) each")
        asked = _Pairs(pairs, instruction)
        listed = _Listed(asked) if self.reads_lists else None
        logits = self._encoder.encode(
            listed or asked,
            token_budget=token_budget,
            share_prefix=share_prefix,
            output="torch",
            show_progress=show_progress,
        )  # (N, L)
        scores = self._scores(logits, scale)
        if listed is not None:
            scores[listed.order] = scores.copy()
        return scores

    def prepare(
        self, query: ContentLike, documents: Sequence[ContentLike], *, instruction: str | None = None
    ) -> list[Row]:
        """The pairs of a query tokenized, for `score_prepared`: see `Embedder.prepare`.

        Raises:
            MmembedError: as `score`, but for damage that only decoding an image shows.
        """
        pairs = _Pairs([(query, document) for document in documents], instruction)
        return self._encoder.prepare(_Listed(pairs) if self.reads_lists else pairs)

    def score_prepared(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Probabilities (N,) of rows of `prepare`: of several queries, of an in-context reranker of one and all."""
        return self._scores(self._encoder.encode(rows, output="torch", show_progress=False), "probability")

    def _scores(self, logits: torch.Tensor, scale: Scale) -> NDArray[np.float32]:
        """logits (N, L), of an in-context reranker the shares (N, 1), to scores (N,)."""
        if self.reads_lists:
            shares: NDArray[np.float32] = logits[:, 0].numpy()
            with np.errstate(divide="ignore"):  # of a list of one: infinite
                return shares if scale == "probability" else np.log(shares) - np.log1p(-shares)
        found = log_odds(logits)
        scores: NDArray[np.float32] = (torch.sigmoid(found) if scale == "probability" else found).numpy()
        return scores

    def answer(
        self, query: ContentLike, documents: Sequence[ContentLike], *, instruction: str | None = None, limit: int = 64
    ) -> list[int]:
        """The order of the documents as an in-context reranker writes it, best first: places among those given.

        `rank` reads it from attention, faster and as well; this tells what the model answers. Documents that the answer
        leaves out follow by their shares.

        Args:
            limit: tokens of the answer, at most.

        Raises:
            MmembedError: it is no in-context reranker, or its backbone's output embedding is gone.
        """
        if not self.reads_lists:
            raise MmembedError("answer: this reranker judges pairs, and writes nothing; use rank")
        if not documents:
            return []
        if self.model.output_embedding is None:
            settings = self.model.settings
            self.model.output_embedding = load_output_embedding(
                self.model.family, settings.name_or_path, settings.revision, self.model.dtype, "answer"
            ).to(self.model.device)
        listed = _Listed(_Pairs([(query, document) for document in documents], instruction))
        inputs = self.preprocessor(list(listed)).to(self.model.device)
        text, shares = answer(self.model, inputs, self.preprocessor.tokenizer, limit)
        return completed(read_order(text, len(documents)), shares[: len(documents)].tolist())

    def check(self, query: ContentLike, document: ContentLike) -> None:
        """Raises MmembedError when a pair could not be scored: reads and opens it, but runs no model."""
        pair = _Pairs([(query, document)], None)
        (item,) = _Listed(pair) if self.reads_lists else pair
        self.preprocessor.collate(self.preprocessor.tokenize([item]))

    def rank(
        self, query: ContentLike, documents: Sequence[ContentLike], top_k: int | None = None, **options: Any
    ) -> list[Ranked]:
        """The documents of one query, best first; equal scores in the order given.

        Args:
            top_k: keep so many; None keeps all.
            options: of `score`.
        """
        if top_k is not None and top_k < 1:
            raise MmembedError(f"top_k: {top_k}; give at least 1")
        scores = self.score([(query, document) for document in documents], **options)
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [Ranked(int(index), float(scores[index])) for index in order]
