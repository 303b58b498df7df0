"""vLLM's server on an exported folder, for as long as a comparison takes."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from mmembed.errors import MmembedError
from mmembed.export import MANIFEST
from mmembed.vllm_environment import flags

_START, _POLL, _ANSWER, _STOP = 900.0, 0.3, 300.0, 20.0  # seconds


class Served:
    """The server, started with the arguments that the folder's manifest names.

    Args:
        options: of vLLM's engine, beside those of the manifest.
        launcher: command in front of the module, whose last word is an interpreter.
    """

    def __init__(
        self, folder: Path, options: Mapping[str, Any], launcher: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.folder = folder
        self._log = tempfile.NamedTemporaryFile(prefix="mmembed-vllm-", suffix=".log")  # noqa: SIM115 - closed in __exit__
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        told = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["serve"]
        named = [str(folder / one) if (folder / one).is_file() else one for one in told]
        further = {key: value for key, value in options.items() if f"--{key}" not in told}
        command = [*launcher, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
        command += ["--served-model-name", "exported", "--host", "127.0.0.1", "--port", str(self.port)]
        self._process = subprocess.Popen(
            [*command, *named, *flags(further)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env={**environment, **os.environ, "PYTHONSAFEPATH": "1"},
        )

    def __enter__(self) -> Served:
        until = time.monotonic() + _START
        while True:
            try:
                if self._request("GET", "/health", None)[0] == 200:
                    return self
            except (OSError, http.client.HTTPException):
                pass
            if self._process.poll() is not None or time.monotonic() > until:
                words = Path(self._log.name).read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
                self.__exit__(None, None, None)
                shown = "\n".join(f"    {line[:300]}" for line in words)
                raise MmembedError(f"vllm-server: does not start on {self.folder.name}; its last lines:\n{shown}")
            time.sleep(_POLL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(_STOP)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def ask(self, wire: Mapping[str, Any]) -> list[float]:
        """The vector of messages, or the score of a pair. Raises MmembedError where the server refuses."""
        if "messages" in wire:
            messages = [{**one, "content": [_sent(part) for part in one["content"]]} for one in wire["messages"]]
            answer = self._post("/v1/embeddings", {"model": "exported", "messages": messages})
            return list(answer["data"][0]["embedding"])
        query, document = (_side(wire[name]) for name in ("query", "document"))
        answer = self._post("/score", {"model": "exported", "text_1": query, "text_2": document})
        return [float(answer["data"][0]["score"])]

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        status, answer = self._request("POST", path, json.dumps(body).encode())
        if status != 200:
            raise MmembedError(f"vllm-server: {path} answers {status}: {answer[:500]!r}")
        return dict(json.loads(answer))

    def _request(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_ANSWER)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def _sent(part: Mapping[str, str]) -> dict[str, Any]:
    if part["type"] == "text":
        return dict(part)
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + part["image"]}}


def _side(parts: Sequence[Mapping[str, str]]) -> Any:
    """A text as a string, anything else as vLLM's content of parts."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return {"content": [_sent(part) for part in parts]}
