"""An item's asks until they are answered or lost.

    key of an ask = digest(generator, item's id, ask, attempt, seed)

`Desk.outcome` makes an item's result of the stored answers alone, and raises `Missing` where some are not there.
`ask_all` looks at an item again when what it missed has come: so an item that asks in turns (an answer, then a
judgement of it) and one that goes on after a kill are the same thing. An answer that cannot be used is asked for again
with another seed, up to `attempts` times; then the item is lost, unless its stage does without. What a generator could
not answer is not stored: the same command asks for it again.

Cost: 0.1 to 0.3 ms an item and turn besides the engine, for templates, digests and schemas.
"""

from __future__ import annotations

import json
import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from tqdm import tqdm

from data_tools.command import TooMuchLost
from data_tools.files import digest
from data_tools.generators import Answer, Generator, Message, Request, RequestFailed, Sampling
from data_tools.synthesis.answers import Answers
from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Items, Lost, Unusable
from mmembed.content import Image

BUDGET = "the budget is spent"
EARLIEST = 50  # items, before which nothing is said about how many are lost
LANGUAGE_CHARACTERS = 40  # texts below say too little about their language
SURE = 0.9  # of a language
_SORTED = json.JSONEncoder(sort_keys=True)  # kept: json.dumps with an option builds one at every call
_SHOWN = 300  # characters of an answer


class Missing(Exception):
    """Answers that are not there yet: requests by their keys."""

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self.requests = requests


@dataclass
class Spent:
    """What a run has asked for, earlier lives of it included, and may ask for."""

    requests: int
    tokens: int
    most_requests: int | None
    most_tokens: int | None

    @property
    def over(self) -> bool:
        return (self.most_requests is not None and self.requests >= self.most_requests) or (
            self.most_tokens is not None and self.tokens >= self.most_tokens
        )


@dataclass
class Desk:
    """Asks on behalf of a stage.

    Attributes:
        identity: digest of the generator.
        attempts: of an ask.
        sampling: of asks that say nothing else.
        failed: key of a request -> why the generator could not answer it in this life.
        unusable: how many answers could not be used, by kind.
        asks, lost: questions, and those of them that have no usable answer.
    """

    stage: AskingStage
    context: Context
    answers: Answers
    identity: str
    attempts: int
    sampling: Sampling
    failed: dict[str, str] = field(default_factory=dict)
    unusable: Counter[str] = field(default_factory=Counter)
    asks: int = 0
    lost: int = 0

    def outcome(self, item: Item) -> list[Item] | Dropped:
        """What the stage makes of an item. Raises Missing."""
        work = self.stage.work(item, self.context)
        try:
            asks = next(work)
            while True:
                values = self._values(item, asks)
                lost = next((one for one in values if isinstance(one, Lost)), None)
                asks = work.throw(lost) if lost is not None else work.send(values)
        except StopIteration as end:
            return end.value if isinstance(end.value, Dropped) else list(end.value)
        except Lost as lost:
            return Dropped(item, lost.kind, lost.found, lost=True)

    def _values(self, item: Item, asks: Sequence[Ask]) -> list[Any]:
        missing: dict[str, Request] = {}
        values = [self._value(item, ask, missing) for ask in asks]
        if missing:
            raise Missing(missing)
        self.asks += len(asks)
        self.lost += sum(isinstance(value, Lost) for value in values)
        return [
            None if isinstance(value, Lost) and ask.optional else value for value, ask in zip(values, asks, strict=True)
        ]

    def _value(self, item: Item, ask: Ask, missing: dict[str, Request]) -> Any:
        """The value of an ask, Lost, or None where its request went to `missing`."""
        error = Unusable("unanswered")
        for attempt in range(self.attempts):
            request = self._request(item, ask, attempt)
            answer = self.answers.get(request.key)
            if answer is None and request.key in self.failed:
                return Lost(self.failed[request.key])
            if answer is None:
                missing[request.key] = request
                return None
            try:
                return read(answer, ask)
            except Unusable as unusable:
                error = unusable
                self.unusable[error.kind] += 1
                if answer.finish == "refused":
                    break
        return Lost(error.kind, error.found)

    def _request(self, item: Item, ask: Ask, attempt: int) -> Request:
        """The seed is of the question, not of its wording: of two templates the same draw is seen."""
        seed = int(digest(self.context.seed, self.context.name, item["id"], ask.name, attempt)[:8], 16) >> 1
        sampling = Sampling(
            max_tokens=ask.max_tokens or self.sampling.max_tokens,
            temperature=self.sampling.temperature if ask.temperature is None else ask.temperature,
            top_p=self.sampling.top_p,
            seed=seed,
            stop=self.sampling.stop,
        )
        asked = [vars(sampling), ask.schema, [_identified(message, self.context) for message in ask.messages]]
        key = digest(self.identity, item["id"], ask.name, attempt, asked)
        return Request(key, ask.messages, sampling, ask.schema)


def ask_all(
    desk: Desk,
    items: Items | Sequence[Item],
    started: Callable[[], Generator],
    spent: Spent,
    max_lost: float,
    shown: tqdm[Any],
) -> None:
    """Asks until every item has an outcome.

    Args:
        started: the generator, ready; not called where every answer is there.
        max_lost: the share of items above which it is of no use to go on.

    Raises:
        GeneratorDown: nothing is answered any more; what was is stored.
        TooMuchLost: of `EARLIEST` items or more a share is lost that is surely above `max_lost`.
    """
    arrived: queue.SimpleQueue[Future[Answer]] = queue.SimpleQueue()
    of_future: dict[Future[Answer], tuple[str, Item]] = {}
    waiting: dict[str, int] = {}  # item's id -> its requests in flight
    tokens, began = desk.answers.tokens, time.monotonic()
    done = lost = 0

    def look(item: Item) -> None:
        nonlocal done, lost
        while True:
            try:
                outcome = desk.outcome(item)
                break
            except Missing as missing:
                if spent.over:
                    desk.failed |= dict.fromkeys(missing.requests, BUDGET)
                    continue
                waiting[item["id"]] = len(missing.requests)
                generator = started()
                for key, request in missing.requests.items():
                    future = generator.submit(request)
                    of_future[future] = (key, item)
                    future.add_done_callback(arrived.put)
                spent.requests += len(missing.requests)
                return
        done += 1
        lost += isinstance(outcome, Dropped) and outcome.lost and outcome.reason != BUDGET
        shown.update()
        _check_lost(done, lost, len(items), max_lost)

    def take(future: Future[Answer]) -> None:
        key, item = of_future.pop(future)
        try:
            answer = future.result()
        except RequestFailed as error:
            desk.failed[key] = error.kind
        else:
            desk.answers.add(key, answer)
            spent.tokens += answer.prompt_tokens + answer.tokens
        waiting[item["id"]] -= 1
        if not waiting[item["id"]]:
            del waiting[item["id"]]
            look(item)
        seconds = time.monotonic() - began
        shown.set_postfix_str(f"{(desk.answers.tokens - tokens) / max(seconds, 1e-9):,.0f} tokens/s", refresh=False)

    for item in items:
        look(item)
        while of_future and len(of_future) >= started().capacity:
            take(arrived.get())
    while of_future:
        take(arrived.get())


def _check_lost(done: int, lost: int, count: int, max_lost: float) -> None:
    """Raises TooMuchLost where the share is above `max_lost` whatever comes, or three standard errors above it."""
    certain = lost > max_lost * count
    likely = lost / done > max_lost + 3 * (max_lost * (1 - max_lost) / done) ** 0.5
    if done >= EARLIEST and done < count and (certain or (likely and done >= 4 * EARLIEST)):
        raise TooMuchLost(
            "",
            f"{lost:,} of the first {done:,} items of {count:,} are lost, more than max_lost {max_lost:g} allows; "
            "stopped, and what was answered is kept: look at the generator and the stage's settings (their reasons: "
            "the same command with max_lost=1 goes on to the end and writes them down)",
        )


def results(desk: Desk, items: Iterable[Item]) -> Iterator[list[Item] | Dropped]:
    """The outcome of each item, in order; nothing is asked."""
    desk.unusable.clear()
    desk.asks = desk.lost = 0
    for item in items:
        yield desk.outcome(item)


def read(answer: Answer, ask: Ask) -> Any:
    """The value of an answer. Raises Unusable."""
    if answer.finish == "refused":
        raise Unusable("refused", answer.text[:_SHOWN])
    text = answer.text.strip()
    if not text:
        raise Unusable("empty")
    if answer.finish == "length":
        raise Unusable("cut off", text[-_SHOWN:])
    value = text if ask.schema is None else _json(text, ask.schema)
    if ask.language is not None:
        _check_language(value, ask.language)
    return ask.read(value)


def _json(text: str, schema: Mapping[str, Any]) -> Any:
    import jsonschema

    inner = text.removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        value = json.loads(inner, strict=False)
    except (ValueError, RecursionError):
        raise Unusable("not JSON", text[:_SHOWN]) from None
    error = jsonschema.exceptions.best_match(_validator(_SORTED.encode(schema)).iter_errors(value))
    if error is not None:
        raise Unusable("not of the schema", f"{error.json_path}: {error.message}"[:_SHOWN])
    return value


@lru_cache(256)
def _validator(schema: str) -> Any:
    """Made once for a schema, of its JSON: that takes longer than its use."""
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(schema))


def _check_language(value: Any, language: str) -> None:
    from data_tools.languages import identify

    texts = [text for text in _texts(value) if len(text) >= LANGUAGE_CHARACTERS]
    for text, (found, confidence) in zip(texts, identify(texts), strict=True):
        if found != language and confidence >= SURE:
            raise Unusable("another language", f"{found}: {text[:_SHOWN]}")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _identified(message: Message, context: Context) -> Any:
    """A message with digests of pictures for their places: a picture that has changed is asked about again."""
    content = message["content"]
    if isinstance(content, str):
        return [message["role"], content]
    return [message["role"], *(
        part["text"] if part["type"] == "text" else context.media.digest(Image(part["image"])).hex() for part in content
    )]  # fmt: skip
