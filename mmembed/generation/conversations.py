"""Records -> what trl trains on: a prompt, the right answer, and a wrong one for preferences.

Of a record's documents as many are drawn as a prompt shows, at least one of the best and one of the worst among them,
and shuffled: a record lists its positives first, and a model would learn just that. Draws follow from the seed, the
place of the record and the number of the shuffle. Conversations are made once and kept in memory: about 1 GB of
100,000 prompts of 20 documents of 500 characters.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mmembed.config.generative import AnswerConfig, GenerativeConfig, MethodConfig
from mmembed.content import Document, Example
from mmembed.data.dataset import RecordDataset
from mmembed.errors import ConfigError, RecordError
from mmembed.generation.orders import best_order, swapped, write_order
from mmembed.generation.prompts import Cut, Prompt, Writer

TRIES = 8  # draws of a rejected order, in which another one may be found


@dataclass
class Conversation:
    """rejected: None where nothing is compared. where: `file:line` of the record."""

    prompt: Prompt
    answer: str
    rejected: str | None
    where: str


@dataclass
class Conversations:
    """Of one source: what is trained on, how many records taught nothing and why, and where the first of them is."""

    name: str
    found: list[Conversation] = field(default_factory=list)
    records: int = 0
    idle: Counter[str] = field(default_factory=Counter)
    first_idle: str = ""

    @property
    def cuts(self) -> list[Cut]:
        return [cut for one in self.found for cut in one.prompt.cuts]


def converse(source: RecordDataset, config: GenerativeConfig, writer: Writer, seed: int) -> Conversations:
    """The conversations of a source.

    Raises:
        ConfigError: no record has what is taught, or the source carries a field that goes unused.
        RecordError: a document has no score, and orders are made by it.
    """
    _refuse_unread(source, config)
    made = Conversations(source.name)
    for example in (source[row] for row in range(len(source))):
        made.records += 1
        before = len(made.found)
        for conversation in _of_record(example, config, writer, seed):
            made.found.append(conversation)
        if len(made.found) == before:
            made.idle[_LACKS[config.answer.type]] += 1
            made.first_idle = made.first_idle or example.where
    if not made.found:
        what = _LACKS[config.answer.type]
        raise ConfigError(
            f"data source '{source.name}': all {made.records:,} records, the first at {made.first_idle}, {what}; "
            + _REMEDIES[config.answer.type]
        )
    return made


_LACKS = {
    "listwise": "have no two documents that differ in grade: every order of theirs is right",
    "rationale": "have no document with a 'rationale'",
}
_REMEDIES = {
    "listwise": "add documents of another relevance (python -m data_tools.mine_negatives gives negatives), or set "
    "answer.by to what tells them apart",
    "rationale": 'write it beside the content, {"content": ..., "relevance": 1.0, "rationale": "..."}, or set answer: '
    "listwise",
}


def _of_record(example: Example, config: GenerativeConfig, writer: Writer, seed: int) -> Iterator[Conversation]:
    if config.answer.type == "rationale":
        for document in example.documents:
            if document.rationale is not None:
                prompt = writer.rationale(example.query, document.content, example.instruction)
                answer = writer.judgement(document.rationale, document.relevance > 0)
                yield Conversation(prompt, answer, None, example.where)
        return
    grades = [grade_of(example, place, config.answer) for place in range(len(example.documents))]
    if len(set(grades)) < 2:
        return
    for number in range(config.answer.shuffles):
        generator = random.Random(f"{seed}:{number}:{example.where}")
        drawn = draw(grades, config.answer.documents, generator)
        shown = [grades[place] for place in drawn]
        prompt = writer.listwise(
            example.query, [example.documents[place].content for place in drawn], example.instruction
        )
        best = best_order(shown)
        for worse in worse_orders(best, shown, config.method, generator):
            rejected = None if worse is None else write_order(worse)
            yield Conversation(prompt, write_order(best), rejected, example.where)


def grade_of(example: Example, place: int, answer: AnswerConfig) -> float:
    """What a document of a record is ordered by. Raises RecordError where it has none."""
    document: Document = example.documents[place]
    if answer.by == "relevance":
        return document.relevance
    if document.score is None:
        raise RecordError(
            example.where, f"documents[{place}] has no 'score'", "Score all documents, or set answer.by: relevance"
        )
    return document.score


def draw(grades: Sequence[float], count: int, generator: random.Random) -> list[int]:
    """Places of `count` documents in random order, one of the best and one of the worst among them."""
    places = list(range(len(grades)))
    generator.shuffle(places)
    best = max(places, key=lambda place: grades[place])
    worst = min(places, key=lambda place: grades[place])
    others = [place for place in places if place not in (best, worst)]
    drawn = [best, worst, *others[: count - 2]]
    generator.shuffle(drawn)
    return drawn


def worse_orders(
    best: Sequence[int], grades: Sequence[float], method: MethodConfig, generator: random.Random
) -> Sequence[tuple[int, ...] | None]:
    """Orders that are to be rejected, each once; [None] where there is nothing to compare with."""
    if method.type == "sft":
        return [None]
    if method.rejected == "reversed":
        return [tuple(reversed(best))]
    tried = (swapped(best, grades, method.swaps, generator) for _ in range(TRIES * method.pairs))
    return [*dict.fromkeys(tried)][: method.pairs]


def _refuse_unread(source: RecordDataset, config: GenerativeConfig) -> None:
    """Raises ConfigError for a field of the data that nothing reads."""
    answer, unread = config.answer, {"labels": "no answer is made of"}
    if answer.type == "rationale":
        unread |= {"score": "answer 'rationale' does not read"}
    else:
        unread["rationale"] = "answer 'listwise' does not read"
        other = "score" if answer.by == "relevance" else "relevance"
        unread[other] = f"answer.by '{answer.by}' does not read"
    for name, reason in unread.items():
        if name in source.fields and name not in config.data.ignore_fields:
            raise ConfigError(
                f"data source '{source.name}' carries '{name}', which {reason}. To train without it set "
                f"data.ignore_fields: [{name}]"
            )
