"""ALIP's gates as a filter: how well a picture, its text and its caption agree (arXiv 2308.08428).

w = min(1, e^{(s(text, caption) - H_tc)}^gamma)
a = e^{(s(picture, text) - H_xt)}^gamma, b alike with the caption, where w < 1; else 1

s are cosines of an embedder, H running means over batches of records in their order (they begin at 1, as in the paper).
The record's query is the picture, its first two positives are text and caption. Objective `alip` computes the same
gates of the model that it trains, and reads no field of a record; here a model that is trained already decides before
training, once: the weights go into the record's `meta.alip`, records of a low w are left out, and where text and
caption disagree only the better one may stay. Cost: one pass of the embedder over pictures and texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, ClassVar

from pydantic import Field

from data_tools.synthesis.embedding import encoder_of, unit_vectors
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.registry import Above0, Below1, Positive


class ALIPGates(SetStage):
    """Weighs records of a picture, a text and a caption, and leaves out what does not agree.

    Args:
        embedder: a block as mining's `retriever`: `{type: mmembed, model: runs/embedder}`.
        batch: records whose means move H together.
        gamma: sharpness of the weights, 2 in the authors' code.
        decay: of the running means, 0.99.
        least: records of a smaller w are left out; None keeps all.
        better_alone: where w is below 1, the text or caption with the smaller gate is taken off.
        scores: each of the two documents gets its cosine with the picture as `score`, which distillation and a
            `guide` with `momentum: null` read.
    """

    name: ClassVar[str] = "alip_gates"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        embedder: TypedBlock | None = None,
        batch: Positive = 256,
        gamma: Above0 = 2.0,
        decay: Below1 = 0.99,
        least: Annotated[float, Field(gt=0, le=1)] | None = None,
        better_alone: bool = False,
        scores: bool = False,
    ) -> None:
        self.encoder, self.batch, self.gamma, self.decay = encoder_of(embedder, self.name), batch, gamma, decay
        self.least, self.better_alone, self.scores = least, better_alone, scores

    def fingerprint(self) -> Any:
        return self.encoder.fingerprint()

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped]:
        import torch

        from mmembed.objectives.alip import agreement, gates

        self.encoder.load(context.media)
        means = torch.ones(3)
        rest = iter(items)
        while chunk := list(islice(rest, self.batch)):
            whole = [item for item in chunk if len(_positives(item)) > 1]
            weighed: dict[str, tuple[list[float], list[float]]] = {}
            if whole:
                found = agreement(torch.from_numpy(self._views(whole)))  # (3, n)
                means = self.decay * means + (1 - self.decay) * found.mean(1)
                weights = torch.stack(gates(found, means, self.gamma))  # (3, n)
                for item, gate, cosines in zip(whole, weights.T.tolist(), found[1:].T.tolist(), strict=True):
                    weighed[item["id"]] = (gate, cosines)
            for item in chunk:
                if item["id"] in weighed:
                    yield self._judged(item, *weighed[item["id"]], context)
                else:
                    yield Dropped(item, "no text and caption")

    def _views(self, items: Sequence[Item]) -> Any:
        """(3, n, E): pictures, texts, captions."""
        import numpy as np

        where = [f"record '{item['id']}'" for item in items]
        pictures = unit_vectors(self.encoder, [item["query"] for item in items], where, "query")
        both = [item["documents"][_positives(item)[number]]["content"] for number in (0, 1) for item in items]
        texts = unit_vectors(self.encoder, both, where * 2, "document")
        return np.concatenate([pictures, texts]).reshape(3, len(items), -1)

    def _judged(self, item: Item, weights: list[float], cosines: list[float], context: Context) -> Item | Dropped:
        sample, *gates = weights
        if self.least is not None and sample < self.least:
            return Dropped(item, "text and caption disagree", f"weight {sample:.3f}")
        documents = list(item["documents"])
        places = _positives(item)[:2]
        if self.scores:
            for place, cosine in zip(places, cosines, strict=True):
                documents[place] = {**documents[place], "score": round(cosine, 6)}
        if self.better_alone and sample < 1:
            worse = places[0] if gates[0] < gates[1] else places[1]
            context.notes["captions taken off" if worse == places[1] else "texts taken off"] += 1
            del documents[worse]
        told = {key: round(one, 6) for key, one in zip(("sample", "text", "caption"), weights, strict=True)}
        return {**item, "documents": documents, "meta": {**item.get("meta", {}), "alip": told}}


def _positives(item: Item) -> list[int]:
    return [place for place, one in enumerate(item["documents"]) if one.get("relevance", 1.0) > 0]
