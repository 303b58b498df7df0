"""vLLM's offline engine, in an environment of its own (`make vllm-env`), because vLLM pins torch and transformers.

The engine runs in `vllm_worker.py`, a process that ends with this one. Requests go in as JSON lines and answers come
out as they finish, so the engine's batch stays full. Where the process dies, it is started again and asked what it had
not answered.
"""

from __future__ import annotations

import itertools
import json
import logging
import threading
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict
from typing import Any, ClassVar

from data_tools.generators import Answer, Generator, GeneratorDown, Request, RequestFailed, vllm_worker
from data_tools.generators.child import Child, engine_options, vllm_python
from data_tools.generators.identity import model_identity, settings
from data_tools.generators.wire import to_wire
from mmembed.media import MediaStore
from mmembed.packaged import resolve
from mmembed.registry import Above0, Count, Positive

_log = logging.getLogger(__name__)
_WHERE = "generators.vllm"


class VllmGenerator(Generator):
    """vLLM's offline engine.

    Args:
        model: a folder, a name that vLLM loads, or 'mmembed-nano'.
        python: interpreter of the environment that has vLLM; None: that of `make vllm-env`.
        engine: arguments of vLLM's engine, for example {max_model_len: 4096, tensor_parallel_size: 2}.
        in_flight: requests that wait or run in the engine; twice its max_num_seqs keeps it full.
        start_seconds: until it has to be ready.
        restarts: how often an engine that died is started again.
        log: file of its output; None: a temporary one.
    """

    name: ClassVar[str] = "vllm"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image"})

    def __init__(
        self,
        model: str,
        python: str | None = None,
        engine: dict[str, Any] | None = None,
        in_flight: Positive = 512,
        start_seconds: Above0 = 1800.0,
        restarts: Count = 3,
        log: str | None = None,
    ) -> None:
        self.model, self.python, self.engine, self.log = model, python, engine or {}, log
        self.in_flight, self.start_seconds, self.restarts = in_flight, start_seconds, restarts
        self._numbers = itertools.count()
        self._lock, self._writing = threading.Lock(), threading.Lock()  # of all that follows; of the worker's input
        self._waiting: dict[int, tuple[bytes, str, Future[Answer]]] = {}  # asked: the line, its key, its future
        self._process: Child | None = None
        self._ready: Child | None = None  # the same, once it takes requests
        self._starts = 0
        self._closed = False
        self._down: GeneratorDown | None = None
        self._reader: threading.Thread | None = None

    @property
    def capacity(self) -> int:
        return self.in_flight

    def fingerprint(self) -> Any:
        return [self.name, model_identity(self.model, _WHERE), settings(self.engine)]

    def start(self, media: MediaStore) -> None:
        self._media = media
        if self._closed or self._reader is not None:
            raise GeneratorDown(f"{_WHERE}: it is {'closed' if self._closed else 'started already'}")
        self._launch()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def submit(self, request: Request) -> Future[Answer]:
        if self._reader is None or self._closed:
            raise GeneratorDown(f"{_WHERE}: it is {'closed' if self._closed else 'not started'}")
        future: Future[Answer] = Future()
        try:
            messages = to_wire(request.messages, self._media)
        except RequestFailed as error:
            future.set_exception(error)
            return future
        number = next(self._numbers)
        asked = {"id": number, "messages": messages, "sampling": asdict(request.sampling), "schema": request.schema}
        line = json.dumps(asked).encode() + b"\n"
        with self._lock:
            if self._down is not None:
                future.set_exception(self._down)
                return future
            self._waiting[number] = line, request.key, future
            worker = self._ready
        if worker is not None:  # else the one that starts is asked all that waits
            self._write(worker, line)
        return future

    def close(self) -> None:
        with self._lock:
            self._closed, process = True, self._process
        if process is not None:
            process.stop()
        if self._reader is not None:
            self._reader.join()

    def _launch(self) -> None:
        """Starts a worker, waits until it is ready, and asks it all that waits. Raises GeneratorDown."""
        python = vllm_python(self.python, _WHERE)
        with self._lock:
            if self._closed:
                raise GeneratorDown(f"{_WHERE}: it was closed")
            self._starts += 1
            self._process = worker = Child([python, vllm_worker.__file__], self.log, piped=True)
        job = {"model": resolve(self.model), "engine": engine_options(python, self.engine)}
        self._write(worker, json.dumps(job).encode() + b"\n")
        late = threading.Timer(self.start_seconds, worker.stop)
        late.daemon = True  # else an interrupted start would wait for it
        late.start()
        try:
            first = worker.output.readline()
        finally:
            late.cancel()
        try:
            said = json.loads(first)
        except ValueError:  # nothing, or cut off by the worker's death
            said = {}
        if "ready" not in said:
            words = worker.last_words()
            worker.stop()
            limit = f"its process ended, or was not ready within start_seconds ({self.start_seconds:g})"
            raise GeneratorDown(f"{_WHERE}: the engine does not start: {said.get('error', limit)}; {words}")
        with self._lock:
            self._ready = worker
            lines = [line for line, _, _ in self._waiting.values()]
        for line in lines:
            self._write(worker, line)

    def _write(self, worker: Child, line: bytes) -> None:
        with self._writing, suppress(OSError, ValueError):  # a worker that died: the reader sees it, and asks again
            worker.input.write(line)
            worker.input.flush()

    def _read(self) -> None:
        """Takes answers, from one worker after another; whatever happens, no future is left open."""
        try:
            while True:
                assert self._process is not None
                for line in self._process.output:
                    self._take(line)
                self._replace(self._process)
        except GeneratorDown as error:
            self._end(error)
        except Exception as error:  # of any kind: the callers wait for the futures
            assert self._process is not None
            words = self._process.last_words()
            self._process.stop()
            self._end(GeneratorDown(f"{_WHERE}: the engine cannot be read ({type(error).__name__}: {error}); {words}"))

    def _end(self, error: GeneratorDown) -> None:
        with self._lock:
            self._down = error
            left, self._waiting = list(self._waiting.values()), {}
        for _, _, future in left:
            future.set_exception(error)

    def _replace(self, worker: Child) -> None:
        """Another worker for one that died. Raises GeneratorDown where there is to be none."""
        with self._lock:
            self._ready = None
            if self._closed:
                raise GeneratorDown(f"{_WHERE}: it was closed before the answer came")
        words = worker.last_words()
        worker.stop()
        if self._starts > self.restarts:
            raise GeneratorDown(f"{_WHERE}: the engine died {self._starts} times; see restarts; {words}")
        _log.warning("%s: the engine died and is started again; %s", _WHERE, words)
        self._launch()

    def _take(self, line: bytes) -> None:
        if not line.endswith(b"\n"):  # cut off by the worker's death
            return
        said = json.loads(line)
        with self._lock:
            found = self._waiting.pop(said["id"], None)
        if found is None:  # asked of two workers, and answered by both
            return
        _, key, future = found
        if "error" in said:
            future.set_exception(RequestFailed(f"{key}: vLLM rejects it: {said['error']}", "rejected by the engine"))
        else:
            future.set_result(Answer(said["text"], said["finish"], said["prompt_tokens"], said["tokens"]))
