"""Selective self-to-supervised fine-tuning: what a model is tuned on is its own answer where that is right
(after the abstract of S3FT, arXiv 2502.08130).

answer = own, where it is equivalent to the gold one
         else its own paraphrase of the gold one, where that is equivalent
         else the gold one

`s3ft_answers` wrote both. A model judges whether two reasons are equivalent: give it a `generator` of its own, which
may be a stronger one. Of a document without a gold `rationale` the relevance is all the gold there is, and an own
answer with the right verdict is taken. What was chosen becomes the document's `rationale`, which
recipes/train_generative_reranker.py trains on; records without any are left out. Cost: a short answer for each own one,
another where that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, text_of
from mmembed.registry import Weight

Chosen = Literal["own", "paraphrase", "gold"]
_VARIABLES = ("query", "document", "gold", "answer")


class S3FTSelect(AskingStage):
    """Puts a model's own right answers in the place of the gold ones.

    Args:
        temperature: of the judge.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "s3ft_select"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self, below_root: Callable[[str], Path], temperature: Weight = 0.0, template: str | None = None
    ) -> None:
        self.temperature = temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        documents = item["documents"]
        chosen: dict[int, Chosen] = {}
        for place, one in enumerate(documents):
            if one.get("rationale"):
                chosen[place] = "gold"
            elif "own" in one.get("meta", {}):
                chosen[place] = "own"
        judged = [place for place, kind in chosen.items() if kind == "gold"]
        kinds: tuple[Literal["own", "paraphrase"], ...] = ("own", "paraphrase")
        for kind in kinds:
            tried = [place for place in judged if chosen[place] == "gold" and kind in documents[place].get("meta", {})]
            verdicts = (yield [self._ask(item, place, kind) for place in tried]) if tried else []
            context.notes["lost verdicts"] += verdicts.count(None)
            chosen |= {place: kind for place, same in zip(tried, verdicts, strict=True) if same}
        for kind_chosen in chosen.values():
            context.notes[f"trained on: {kind_chosen}"] += 1
        if not chosen:
            return Dropped(item, "no answer to train on")
        return [{**item, "documents": [_with(one, chosen.get(place)) for place, one in enumerate(documents)]}]

    def _ask(self, item: Item, place: int, kind: str) -> Ask:
        document = item["documents"][place]
        values = {
            "query": text_of(item["query"]), "document": text_of(document["content"]),
            "gold": document["rationale"], "answer": document["meta"][kind],
        }  # fmt: skip
        return Ask(
            f"{kind}-{place}", self.template.messages(values), "yes", read_equivalence, max_tokens=8,
            temperature=self.temperature, optional=True,
        )  # fmt: skip


def read_equivalence(answer: str) -> bool:
    """Whether a judge says yes. Raises Unusable."""
    said = answer.strip().strip(".!\"'*").lower()
    if said not in ("yes", "no"):
        raise Unusable("neither yes nor no", answer[:100])
    return said == "yes"


def _with(document: Mapping[str, Any], kind: Chosen | None) -> dict[str, Any]:
    """A document with the rationale that was chosen, and without what was to choose from."""
    meta = dict(document.get("meta", {}))
    offered: Sequence[Any] = [meta.pop(key, None) for key in ("own", "paraphrase")]
    if kind is None:
        return {**document, "meta": meta}
    rationale = {"own": offered[0], "paraphrase": offered[1], "gold": document.get("rationale")}[kind]
    return {**document, "rationale": rationale, "meta": {**meta, "by": S3FTSelect.name, "answer": kind}}
