"""Any server that speaks OpenAI's chat API: vLLM, SGLang, llama.cpp, a service; vLLM's own, started by us, if asked.

    POST {url}/chat/completions  {"model": ..., "messages": [...], "max_tokens": ..., "response_format": ...}

`concurrency` threads keep a connection each. What is sent leaves this machine where the address is another one's;
nothing is sent that the config does not say.

What is tried again, with pauses that double up to 30 s and are drawn between half and whole: a server that cannot be
reached or says that it is busy (429, 502, 503, 504), for `patience` seconds without one good answer of it; anything
else that is no answer (500, a broken connection, bytes that are no answer of this API), `retries` times a request.
`Retry-After` holds all threads back. Costs 0.4 ms of CPU a request (`docs/synthesis.md`), a third of what httpx takes.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import random
import threading
import time
from concurrent.futures import Future
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar
from urllib.parse import urlsplit

from data_tools.generators import Answer, Finish, Generator, GeneratorDown, Request, RequestFailed
from data_tools.generators.identity import model_identity, settings
from data_tools.generators.line import Broken, Line, Reply, Unreachable
from data_tools.generators.server import Server
from data_tools.generators.wire import to_wire
from mmembed.errors import ConfigError, nearest
from mmembed.media import MediaStore
from mmembed.registry import Above0, Count, Positive, check_options

_log = logging.getLogger(__name__)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds
_BUSY = (429, 502, 503, 504)
_AGAIN = (408, 409, 425)  # of the 4xx, those that another try may mend
_FILTERS = ("content_filter", "content_policy_violation", "moderation_blocked")
_NO_CREDIT = ("insufficient_quota", "billing_hard_limit_reached")
_NO_READING = (  # a body of another shape; numbers and nesting beyond what Python takes
    KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
)  # fmt: skip
_FINISH: dict[str | None, Finish] = {"stop": "stop", "length": "length", "content_filter": "refused"}


class OpenAiGenerator(Generator):
    """A server of OpenAI's chat API.

    Args:
        model: its name there; with `serve`, a folder or a name that vLLM loads.
        url: of the API, for example http://localhost:8000/v1; a query (?api-version=...) goes with every request.
            None with `serve`.
        key_variable: environment variable that holds the key; None sends none.
        serve: options of `Server`: vLLM's own server is started and stopped with the run; {} takes all defaults.
        options: more of the request's body, for example {top_k: 20}; null takes out what would be sent.
        concurrency: requests at a time.
        timeout: seconds without a byte of an answer.
        patience: seconds that a server may be away or busy.
        retries: of one request that the server gets, and does not answer.
    """

    name: ClassVar[str] = "openai"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image"})

    def __init__(
        self,
        model: str,
        url: str | None = None,
        key_variable: str | None = None,
        serve: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        concurrency: Positive = 64,
        timeout: Above0 = 600.0,
        patience: Above0 = 300.0,
        retries: Count = 6,
    ) -> None:
        if (url is None) == (serve is None):
            raise ConfigError("generators.openai: give either url (a server that runs) or serve (one that we start)")
        self.model, self.key_variable, self.options = model, key_variable, options or {}
        self.concurrency, self.timeout, self.patience, self.retries = concurrency, timeout, patience, retries
        self.server: Server | None = None
        if serve is not None:
            checked = check_options(Server, serve, "generators.openai.serve", given=("model",))
            self.server = Server(model, **checked)
        self._url, self._query = ("", "") if url is None else _checked(url)
        self._threads: list[threading.Thread] = []
        self._lines: list[Line] = []
        self._asked: queue.SimpleQueue[tuple[Request, Future[Answer]] | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._pauses = random.Random()
        self._good = self._not_before = 0.0  # times of the last good answer, and until which the server wants rest
        self._down: GeneratorDown | None = None

    @property
    def capacity(self) -> int:
        return self.concurrency

    @property
    def url(self) -> str:
        """Of the API, without a query; that of a server of our own changes when it is started again."""
        return f"http://127.0.0.1:{self.server.port}/v1" if self.server else self._url

    def fingerprint(self) -> Any:
        self._headers()
        if self.server is None:
            return [self.name, self.model, self.options]
        return [self.name, model_identity(self.model, "generators.openai"), self.options, settings(self.server.options)]

    def start(self, media: MediaStore) -> None:
        if self._threads or self._closing.is_set():
            raise GeneratorDown(f"generators.openai: it is {'closed' if self._closing.is_set() else 'started already'}")
        self._media, self._good = media, time.monotonic()
        self._lines = [Line(self._headers(), self.timeout) for _ in range(self.concurrency)]
        if self.server is not None:
            self.server.ensure()
        self._greet(self._lines[0])
        self._threads = [threading.Thread(target=self._work, args=(line,), daemon=True) for line in self._lines]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> Future[Answer]:
        if not self._threads:
            raise GeneratorDown(f"generators.openai: it is {'closed' if self._closing.is_set() else 'not started'}")
        future: Future[Answer] = Future()
        self._asked.put((request, future))
        return future

    def close(self) -> None:
        self._closing.set()
        if self.server is not None:
            self.server.stop()
        for line in self._lines:
            line.hang_up()
        for _ in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable)
            if not key:
                raise ConfigError(f"generators.openai.key_variable: the environment has no {self.key_variable}; set it")
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _greet(self, line: Line) -> None:
        """Asks what models there are: a wrong key, address or name is told now. A server without a list is taken."""
        first = time.monotonic()
        for turn in itertools.count():
            self._await_turn()
            try:
                reply = line.ask("GET", f"{self.url}/models{self._query}")
                if reply.status not in _BUSY:
                    break
                reason = _reason(reply)
            except (Unreachable, Broken) as error:
                reason = str(error)
            if turn == 0:
                _log.warning("%s: no answer (%s); it gets %g s", self.url, reason, self.patience)
            self._lose_patience(first, reason)
            self._closing.wait(self._pause(turn))
        if reply.status in (401, 403):
            raise self._refused_key(_reason(reply))
        known = _model_names(reply)
        if known and self.model not in known:
            raise GeneratorDown(f"{self.url} has no model '{self.model}'; {nearest(self.model, known)}")

    def _work(self, line: Line) -> None:
        while (item := self._asked.get()) is not None:
            request, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(self._answer(line, request))
            except GeneratorDown as error:
                self._down = error
                future.set_exception(error)
            except Exception as error:  # of any kind: the caller waits for the future
                future.set_exception(error)

    def _answer(self, line: Line, request: Request) -> Answer:
        """Asks until there is an answer. Raises GeneratorDown and RequestFailed."""
        body = json.dumps(self._body(request)).encode()
        first, failures = time.monotonic(), 0
        for turn in itertools.count():
            self._await_turn()
            sent = time.monotonic()
            try:
                if self.server is not None and self.server.ensure():
                    first = self._good = time.monotonic()
                answer = self._read(line.ask("POST", f"{self.url}/chat/completions{self._query}", body), request)
                self._good = time.monotonic()
                return answer
            except Unreachable as error:
                self._lose_patience(first, str(error))
            except Broken as error:
                if error.late and self._good < sent:
                    self._lose_patience(first, f"it says nothing for {self.timeout:g} s")
                failures += 1
                if failures > self.retries:
                    raise RequestFailed(
                        f"{request.key}: no answer of {self.url} after {failures} tries ({error})", kind="no answer"
                    ) from None
            self._closing.wait(self._pause(turn))
        raise AssertionError("unreachable")

    def _await_turn(self) -> None:
        """Waits as long as the server asked for. Raises GeneratorDown where all is over."""
        while (pause := self._not_before - time.monotonic()) > 0 and not self._closing.wait(pause):
            pass
        if self._closing.is_set():
            raise GeneratorDown("generators.openai: it was closed before the answer came")
        if self._down is not None:
            raise GeneratorDown(str(self._down))

    def _lose_patience(self, first: float, reason: str) -> None:
        waited = time.monotonic() - max(self._good, first)
        if waited < self.patience:
            return
        raise GeneratorDown(
            f"{self.url}: no good answer for {waited:.0f} s ({reason}); start the server, then the same command, which "
            "goes on (a server that needs longer: patience)"
        )

    def _pause(self, turn: int) -> float:
        return min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(turn, 10)) * self._pauses.uniform(0.5, 1)

    def _body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": to_wire(request.messages, self._media),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
        }
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if request.schema is not None:
            schema = {"name": "answer", "schema": request.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {key: value for key, value in (body | self.options).items() if value is not None}

    def _read(self, reply: Reply, request: Request) -> Answer:
        """The answer in a reply. Raises Unreachable (ask later), Broken (ask again), RequestFailed, GeneratorDown."""
        if reply.status == 200:
            return _answer_in(reply.body)
        reason, code = _reason(reply), _error_code(reply.body)
        if code in _NO_CREDIT or reply.status == 402:
            raise GeneratorDown(f"{self.url}: the account has no credit left ({reason}); raise its limit")
        if reply.status in _BUSY:
            self._rest(reply.retry_after, reason)
            raise Unreachable(reason)
        if reply.status >= 500 or reply.status in _AGAIN:
            raise Broken(reason)
        if code in _FILTERS:
            raise RequestFailed(f"{request.key}: a filter of the server refused it ({reason})", kind="refused")
        if reply.status in (401, 403):
            raise self._refused_key(reason)
        if reply.status in (404, 405):
            raise GeneratorDown(f"{self.url}: {reason}; correct url (up to /v1) or model ('{self.model}')")
        raise RequestFailed(f"{request.key}: {self.url} rejects it: {reason}", kind="rejected by the server")

    def _rest(self, retry_after: str | None, reason: str) -> None:
        seconds = _seconds(retry_after)
        if seconds > self.patience:
            raise GeneratorDown(
                f"{self.url}: it asks to wait {seconds:.0f} s ({reason}), longer than patience ({self.patience:g} s); "
                "start the same command later, or set patience higher"
            )
        self._not_before = max(self._not_before, time.monotonic() + seconds)

    def _refused_key(self, reason: str) -> GeneratorDown:
        key = f"the key in {self.key_variable}" if self.key_variable else "a request without a key; set key_variable"
        return GeneratorDown(f"{self.url} refuses {key} ({reason})")


def _checked(url: str) -> tuple[str, str]:
    """An address of an API without its query, and that, with its mark. Raises ConfigError."""
    where = "generators.openai.url"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half of a bracket
        usable = False
    if not usable:
        raise ConfigError(f"{where}: found '{url}'; give an http or https address, up to /v1")
    if parts.fragment:
        raise ConfigError(f"{where}: found '#{parts.fragment}', which no server gets to see; leave it out")
    if parts.username is not None:
        raise ConfigError(f"{where}: it names a user; leave that out, and give the key by key_variable")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}", f"?{parts.query}" if parts.query else ""


def _answer_in(body: bytes) -> Answer:
    """Raises Broken: no answer of the chat API."""
    try:
        reply = json.loads(body.decode("utf-8"))
        choice = reply["choices"][0]
        message, usage = choice["message"], reply.get("usage") or {}
        counts = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
        if isinstance(message.get("refusal"), str):
            return Answer(message["refusal"], "refused", *counts)
        text = message["content"]
        finish = _FINISH[choice["finish_reason"]]
        if not isinstance(text, str) and finish != "refused":
            raise TypeError(f"content is {text!r}")
        return Answer(text or "", finish, *counts)
    except _NO_READING as error:
        found = body[:80] if body else "nothing"
        raise Broken(f"not an answer of the chat API ({error!r} in {found!r})") from None


def _reason(reply: Reply) -> str:
    try:
        error = json.loads(reply.body)
        text = str(error["error"]["message"] if isinstance(error["error"], dict) else error["error"])
    except _NO_READING:
        text = reply.body[:300].decode("utf-8", errors="replace")
    return f"{reply.status} {' '.join(text.split())[:300]}"


def _error_code(body: bytes) -> Any:
    try:
        return json.loads(body)["error"]["code"]
    except _NO_READING:
        return None


def _model_names(reply: Reply) -> list[str]:
    try:
        return [str(model["id"]) for model in json.loads(reply.body)["data"]] if reply.status == 200 else []
    except _NO_READING:
        return []


def _seconds(retry_after: str | None) -> float:
    """Of a `Retry-After`: a number, or a date. Anything else is no wish."""
    if retry_after is None:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
