"""MultiCSR's second stage: the model that wrote a positive and a negative scores both, 0.0 to 5.0 (arXiv 2310.10962).

kept where score+ >= positive_line, score- <= negative_line and they differ

Where the negative scores higher, the two change places first. A score is one digit, or one and a tenth, as the authors'
code takes it; any other answer is unusable. Scores go into `meta.similarity` of the documents and not into `score`,
which losses read as a guide's cosine. Cost: two short answers a record.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Unusable, Work
from data_tools.synthesis.templates import Template, text_of
from mmembed.registry import Weight

_SCORE = re.compile(r"[0-4](?:\.[0-9])?|5(?:\.0)?")
_VARIABLES = ("first", "second")
Line = Annotated[float, Field(ge=0, le=5)]


class MultiCSRCurate(AskingStage):
    """Keeps records whose positive is similar to the query and whose negative is not, by the model's own scores.

    Args:
        positive_line: least score of a positive (the paper's filter: 3).
        negative_line: highest score of a negative (3).
        temperature: 0, as the authors score.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "multicsr_curate"
    takes: ClassVar[frozenset[Kind]] = frozenset({"records"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        positive_line: Line = 3.0,
        negative_line: Line = 3.0,
        temperature: Weight = 0.0,
        template: str | None = None,
    ) -> None:
        self.lines, self.temperature = (positive_line, negative_line), temperature
        self.template = Template(self.name, template, below_root, _VARIABLES)

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        relevant = [one for one in item["documents"] if one.get("relevance", 1.0) > 0]
        others = [one for one in item["documents"] if one.get("relevance", 1.0) <= 0]
        texts = [text_of(one) for one in (item["query"], *(document["content"] for document in relevant + others))]
        if len(relevant) != 1 or len(others) != 1 or not all(texts):
            return Dropped(item, "not one positive and one negative text")
        query, *compared = texts
        scores = yield [
            Ask(
                name,
                self.template.messages({"first": query, "second": text}),
                sample,
                read_score,
                max_tokens=8,
                temperature=self.temperature,
            )
            for name, text, sample in zip(("positive", "negative"), compared, ("4.5", "1.0"), strict=True)
        ]
        decided = curate(scores[0], scores[1], *self.lines)
        if decided is None:
            return Dropped(item, "scores", "positive {}, negative {}".format(*scores))
        pairs = list(zip((*relevant, *others), scores, strict=True))
        if decided == "swap":
            context.notes["negatives that scored higher: roles swapped"] += 1
            pairs.reverse()
        documents = [
            {**one, "relevance": relevance, "meta": {**one.get("meta", {}), "similarity": score}}
            for (one, score), relevance in zip(pairs, (relevant[0].get("relevance", 1.0), 0.0), strict=True)
        ]
        return [{**item, "documents": documents}]


def read_score(answer: str) -> float:
    """The score that an answer is. Raises Unusable."""
    if _SCORE.fullmatch(answer) is None:
        raise Unusable("no score", answer[:100])
    return float(answer)


def curate(
    positive: float, negative: float, positive_line: float = 3.0, negative_line: float = 3.0
) -> Literal["keep", "swap"] | None:
    """What becomes of a record by its two scores; None leaves it out.

    >>> [curate(4.5, 1.0), curate(3.0, 3.0), curate(1.0, 4.5)]
    ['keep', None, 'swap']
    """
    higher, lower = max(positive, negative), min(positive, negative)
    if higher < positive_line or lower > negative_line or higher == lower:
        return None
    return "keep" if positive == higher else "swap"
