"""vLLM's own server, started and stopped by us: on a free port of this machine, in the environment that has vLLM."""

from __future__ import annotations

import http.client
import logging
import socket
import threading
import time
from typing import Any

from data_tools.generators import GeneratorDown
from data_tools.generators.child import Child, engine_options, vllm_python
from mmembed.packaged import resolve
from mmembed.registry import Above0, Count
from mmembed.vllm_environment import flags

_log = logging.getLogger(__name__)
_WHERE = "generators.openai.serve"
_POLL = 0.2


class Server:
    """`python -m vllm.entrypoints.openai.api_server`.

    Args:
        model: what it loads, and the name that requests give.
        python: interpreter of the environment that has vLLM; None: that of `make vllm-env`.
        options: of its command line, with underscores: {max_model_len: 4096}.
        start_seconds: until it has to be ready.
        restarts: how often one that died is started again.
        log: file of its output; None: a temporary one.
    """

    def __init__(
        self,
        model: str,
        python: str | None = None,
        options: dict[str, Any] | None = None,
        start_seconds: Above0 = 1800.0,
        restarts: Count = 3,
        log: str | None = None,
    ) -> None:
        self.model, self.python, self.options = model, python, options or {}
        self.start_seconds, self.restarts, self.log = start_seconds, restarts, log
        self.port = 0
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._child: Child | None = None
        self._starts, self._was_ready = 0, False

    def ensure(self) -> bool:
        """Starts it unless it runs; whether it had to. Called by any thread; the others wait for the one that starts.

        Raises:
            GeneratorDown: it does not start, died too often, or was stopped.
        """
        with self._lock:
            if self._child is not None and self._child.alive:
                return False
            while not self._closing.is_set():
                if self._child is not None:
                    self._judge_death(self._child)
                self._starts += 1
                self._launch()
                if self._becomes_ready():
                    return True
            raise GeneratorDown(f"{_WHERE}: it was stopped")

    def stop(self) -> None:
        """Ends it, also one that is starting."""
        self._closing.set()
        with self._lock:
            if self._child is not None:
                self._child.stop()

    def _judge_death(self, child: Child) -> None:
        """Raises GeneratorDown where another start makes no sense."""
        words = child.last_words()
        child.stop()
        if self._starts > self.restarts or not self._was_ready:
            what = f"died {self._starts} times; see restarts" if self._was_ready else "does not start"
            raise GeneratorDown(f"{_WHERE}: the server {what}; {words}")
        _log.warning("%s: the server died and is started again; %s", _WHERE, words)

    def _launch(self) -> None:
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        python = vllm_python(self.python, _WHERE)
        command = [python, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", resolve(self.model), "--served-model-name", self.model]
        command += ["--host", "127.0.0.1", "--port", str(self.port), *flags(engine_options(python, self.options))]
        self._child = Child(command, self.log)

    def _becomes_ready(self) -> bool:
        """Waits for its health. False where it died."""
        assert self._child is not None
        until = time.monotonic() + self.start_seconds
        while self._child.alive:
            if self._healthy():
                self._was_ready = True
                return True
            if self._closing.wait(_POLL):
                raise GeneratorDown(f"{_WHERE}: it was stopped while it started")
            if time.monotonic() > until:
                words = self._child.last_words()
                self._child.stop()
                raise GeneratorDown(
                    f"{_WHERE}: the server is not ready after {self.start_seconds:g} s; set start_seconds higher if it "
                    f"still loads; {words}"
                )
        return False

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
