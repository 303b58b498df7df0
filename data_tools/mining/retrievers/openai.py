"""An endpoint that speaks OpenAI's embeddings API: a server of vLLM, text-embeddings-inference, llama.cpp, a service.

    POST {url}/embeddings  {"model": ..., "input": ["...", ...], "encoding_format": "float"}

Contents with pictures go one by one as `messages`, the form in which vLLM takes multimodal inputs: each picture as a
data URL, then the text. What is sent leaves this machine where the address is another one's; nothing is sent that the
config does not say. Busy answers (429, 5xx) and broken connections are tried again, with growing pauses.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from data_tools.mining.retrievers import Encoder, Item
from mmembed.content import Image, Role, Text, to_content
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.registry import Above0, Count, Positive

_FIRST_PAUSE = 0.5  # seconds; doubled each time


class OpenAi(Encoder):
    """An OpenAI-compatible endpoint.

    Args:
        url: of the API, for example http://localhost:8000/v1.
        model: its name there.
        key_variable: environment variable that holds the key; None sends none.
        dimensions: asked for; None takes what the model gives.
        query_prompt, document_prompt: put before texts; {instruction} stands for the query's own.
        batch_size: texts a request.
        concurrency: requests at a time.
        timeout: seconds of one request.
        retries: of one request.
    """

    name: ClassVar[str] = "openai"
    reads: ClassVar[frozenset[str]] = frozenset({"text", "image"})

    def __init__(
        self,
        url: str,
        model: str,
        key_variable: str | None = None,
        dimensions: Positive | None = None,
        query_prompt: str = "",
        document_prompt: str = "",
        batch_size: Positive = 64,
        concurrency: Positive = 4,
        timeout: Above0 = 120.0,
        retries: Count = 5,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"retriever.url: found '{url}'; give an http or https address, up to /v1")
        self.url, self.model, self.key_variable, self.dimensions = url.rstrip("/"), model, key_variable, dimensions
        self.prompts = {"query": query_prompt, "document": document_prompt}
        self.batch_size, self.concurrency, self.timeout, self.retries = batch_size, concurrency, timeout, retries

    def fingerprint(self) -> Any:
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ConfigError(f"retriever.key_variable: the environment has no {self.key_variable}; set it")
        return [self.name, self.model, self.dimensions, self.prompts]

    def load(self, media: MediaStore) -> None:
        self._media = media

    def encode(self, items: Sequence[Item], role: Role) -> NDArray[np.float32]:
        texts = [row for row, item in enumerate(items) if not _pictures(item)]
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        batches += [[row] for row, item in enumerate(items) if _pictures(item)]
        with ThreadPoolExecutor(self.concurrency) as pool:
            found = list(pool.map(lambda rows: self._request([items[row] for row in rows], role), batches))
        widths = {vectors.shape[1] for vectors in found}
        if len(widths) > 1:
            raise MmembedError(f"{self.url}: vectors of {sorted(widths)} dimensions in one answer; ask for one model")
        vectors = np.empty((len(items), widths.pop()), np.float32)
        for rows, given in zip(batches, found, strict=True):
            vectors[rows] = given
        return vectors

    def _request(self, items: list[Item], role: Role) -> NDArray[np.float32]:
        body: dict[str, Any] = {"model": self.model, "encoding_format": "float"}
        if self.dimensions is not None:
            body["dimensions"] = self.dimensions
        prompts = [self.prompts[role].replace("{instruction}", item.instruction or "") for item in items]
        if _pictures(items[0]):
            body["messages"] = [{"role": "user", "content": self._parts(items[0], prompts[0])}]
        else:
            body["input"] = [prompt + item.text for prompt, item in zip(prompts, items, strict=True)]
        answer = self._send(json.dumps(body).encode(), items[0])
        try:
            rows = sorted(answer["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
            if vectors.shape[0] != len(items) or vectors.ndim != 2:
                raise ValueError(f"{len(rows)} vectors for {len(items)} inputs")
        except (KeyError, TypeError, ValueError) as error:
            raise MmembedError(f"{self.url}/embeddings: not an answer of the embeddings API ({error!r})") from None
        return vectors

    def _parts(self, item: Item, prompt: str) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = []
        for part in to_content(item.content):
            if isinstance(part, Image):
                encoded = base64.b64encode(self._media.read(part) or b"").decode()
                kind = self._media_type(part)
                parts.append({"type": "image_url", "image_url": {"url": f"data:{kind};base64,{encoded}"}})
            elif isinstance(part, Text):
                parts.append({"type": "text", "text": part.text})
            else:
                raise MmembedError(f"{item}: '{self.name}' sends texts and pictures; leave it out")
        return [{"type": "text", "text": prompt}, *parts] if prompt else parts

    def _media_type(self, image: Image) -> str:
        import io

        import PIL.Image

        encoded = self._media.read(image) or b""
        with PIL.Image.open(io.BytesIO(encoded)) as header:
            return PIL.Image.MIME.get(header.format or "", "image/png")

    def _send(self, body: bytes, item: Item) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {os.environ[self.key_variable]}"
        for turn in range(self.retries + 1):
            request = urllib.request.Request(f"{self.url}/embeddings", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read(300).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    raise MmembedError(f"{self.url}/embeddings: {reason} (at {item}); correct the config") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error)
            if turn < self.retries:
                time.sleep(_FIRST_PAUSE * 2**turn)
        raise MmembedError(
            f"{self.url}/embeddings: no answer after {self.retries + 1} tries ({reason}); start the server, then the "
            "same command, which goes on"
        )


def _pictures(item: Item) -> bool:
    return any(not isinstance(part, Text) for part in to_content(item.content))
