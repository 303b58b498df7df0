"""ALIP's gates as a filter: how well a picture, its text and its caption agree (arXiv 2308.08428).

w = min(1, e^{(s(text, caption) - H_tc)}^gamma)
a = e^{(s(picture, text) - H_xt)}^gamma, b alike with the caption, where w < 1; else 1

s are cosines of an embedder, H running means over batches of records in their order (they begin at 1, as in the paper).
The record's query is the picture, its first two positives are text and caption. Objective `alip` computes the same
gates of the model that it trains, and reads no field of a record; here a model that is trained already decides before
training, once: the weights go into the record's `meta.alip`, records of a low w are left out, and where text and
caption disagree only the better one may stay. Cost: one pass of the embedder over pictures and texts, in shards that
a kill leaves there.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_tools.synthesis.encoding import encoded, encoder_of, unit
from data_tools.synthesis.stages import Context, Dropped, Item, Items, Kind, SetStage
from mmembed.config.blocks import TypedBlock
from mmembed.content import Role
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

        views = self._views(items, context)
        means, at = torch.ones(3), 0
        rest = iter(items)
        while chunk := list(islice(rest, self.batch)):
            whole = [item for item in chunk if _is_whole(item)]
            weighed: dict[str, tuple[list[float], list[float]]] = {}
            if whole:
                span, at = slice(at, at + len(whole)), at + len(whole)
                found = agreement(torch.from_numpy(np.stack([unit(view[span]) for view in views])))  # (3, n)
                means = self.decay * means + (1 - self.decay) * found.mean(1)
                weights = torch.stack(gates(found, means, self.gamma))  # (3, n)
                for item, gate, cosines in zip(whole, weights.T.tolist(), found[1:].T.tolist(), strict=True):
                    weighed[item["id"]] = (gate, cosines)
            for item in chunk:
                if item["id"] in weighed:
                    yield self._judged(item, *weighed[item["id"]], context)
                else:
                    yield Dropped(item, "no text and caption")

    def _views(self, items: Items, context: Context) -> list[NDArray[np.float32]]:
        """Pictures, texts, captions of the whole records: (n, E) each, mapped."""
        from data_tools.mining.retrievers import Item as Entry

        def of(number: int | None) -> Iterator[Entry]:
            for item in filter(_is_whole, items):
                content = item["query"] if number is None else item["documents"][_positives(item)[number]]["content"]
                yield Entry(content, None, None, f"record '{item['id']}'")

        views: tuple[tuple[str, int | None, Role], ...] = (
            ("pictures", None, "query"),
            ("texts", 0, "document"),
            ("captions", 1, "document"),
        )
        return [encoded(name, partial(of, number), self.encoder, role, context) for name, number, role in views]

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


def _is_whole(item: Item) -> bool:
    """Whether it has a text and a caption."""
    return len(_positives(item)) > 1
