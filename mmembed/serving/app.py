"""The ASGI application: routes, the key, limits of bytes and time, and what becomes of a request that is not done.

The event loop moves bytes and waits. JSON, base64 and tokens are read in one thread beside it (a tokenizer is not for
two), the model computes in another (`batcher.py`). A client that goes away takes its inputs out of the queue; so does
the end of a request's time.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import numpy as np
import orjson
from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from numpy.typing import NDArray
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmembed.errors import MediaError, MmembedError
from mmembed.preprocess import Row
from mmembed.serving.batcher import WAIT, Batcher, QueueFull
from mmembed.serving.contents import Entry, Pictures, check_size, entries_of, judged_of, read_all, side_of
from mmembed.serving.limits import ServeLimits
from mmembed.serving.metrics import Metrics
from mmembed.serving.models import Served, ServedEmbedder, ServedReranker
from mmembed.serving.pictures import is_remote, read_picture
from mmembed.serving.refusal import CLIENT_GONE, Refusal
from mmembed.serving.schemas import EmbeddingsRequest, RerankRequest, parse
from mmembed.version import __version__

FETCHERS = 8  # threads that fetch pictures from allowed hosts
DRAINED = 3  # bodies that are read to the end though they are too long, so that the client reads why
OPEN_TO_ALL = ("/health",)
_INDEX = re.compile(r"^contents\[(\d+)\]: ")


class Service:
    """Models, the queue in front of them, and the answers to requests.

    Args:
        models: an embedder, a reranker, or one of each.
        hosts: from which pictures may be fetched.
        wait, budget: of `Batcher`.
    """

    def __init__(
        self,
        models: Sequence[ServedEmbedder | ServedReranker],
        limits: ServeLimits,
        *,
        hosts: Collection[str] = (),
        wait: float = WAIT,
        budget: int | None = None,
    ) -> None:
        self.models, self.limits = models, limits
        for model in models:
            model.limit(limits.media)
        self.hosts = frozenset(host.lower() for host in hosts)
        self.metrics = Metrics()
        self.batcher = Batcher(limits.waiting_inputs, self.metrics, wait, budget)
        self._open_bytes = 0
        self._reader = ThreadPoolExecutor(1, "mmembed-reader")
        self._fetchers = ThreadPoolExecutor(FETCHERS, "mmembed-fetcher")
        self._started = int(time.time())

    @asynccontextmanager
    async def running(self, _: Any = None) -> AsyncIterator[None]:
        """From the first request to behind the last."""
        self.batcher.start()
        yield
        await asyncio.to_thread(self.batcher.close)
        self._reader.shutdown()
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    # Routes ---------------------------------------------------------------------------------------------------------

    async def embeddings(self, request: Request) -> Response:
        return await self._in_time(request, self._embed)

    async def rerank(self, request: Request) -> Response:
        return await self._in_time(request, self._rerank)

    async def health(self) -> Response:
        return Response(status_code=200 if self.batcher.healthy else 503)

    async def show_metrics(self) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def list_models(self) -> Response:
        data = [
            {
                "id": model.name,
                "object": "model",
                "created": self._started,
                "owned_by": "mmembed",
                **({"dimensions": model.size} if isinstance(model, ServedEmbedder) else {}),
            }
            for model in self.models
        ]
        return _json({"object": "list", "data": data})

    # Embeddings -----------------------------------------------------------------------------------------------------

    async def _embed(self, request: Request, body: bytes) -> Response:
        model = self._model(ServedEmbedder, "embeddings")
        asked: EmbeddingsRequest = await self._read(parse, body, EmbeddingsRequest)
        _check_name(asked.model, model)
        if asked.dimensions is not None and asked.dimensions > model.size:
            raise Refusal(
                400,
                f"dimensions: found {asked.dimensions}; the vectors have {model.size}, give 1 to that",
                "dimensions",
            )
        entries = await self._read(entries_of, asked)
        self._check_count(len(entries), "inputs")
        contents = await self._contents(entries, asked.instruction)
        instructions = [entry.instruction or asked.instruction for entry in entries]
        names = [entry.where for entry in entries]
        rows = await self._prepared(names, partial(model.prepare, contents, side_of(entries, asked), instructions))
        vectors = await self._computed(request, model, rows, names)
        tokens = sum(map(len, rows))
        return await self._read(_embeddings, model.shorten(vectors, asked.dimensions), model.name, tokens, asked)

    # Reranking ------------------------------------------------------------------------------------------------------

    async def _rerank(self, request: Request, body: bytes) -> Response:
        model = self._model(ServedReranker, "rerank")
        asked: RerankRequest = await self._read(parse, body, RerankRequest)
        _check_name(asked.model, model)
        self._check_count(len(asked.documents), "documents")
        entries = await self._read(judged_of, asked)
        query, *documents = await self._contents(entries, asked.instruction)
        names = [entry.where for entry in entries[1:]]
        rows = await self._prepared(names, partial(model.prepare, query, documents, asked.instruction))
        scores = await self._computed(request, model, rows, names)
        return await self._read(_ranking, scores, model.name, sum(map(len, rows)), asked)

    # What both share ------------------------------------------------------------------------------------------------

    async def _in_time(self, request: Request, respond: Callable[[Request, bytes], Awaitable[Response]]) -> Response:
        try:
            async with asyncio.timeout(self.limits.seconds), self._body(request) as body:
                return await respond(request, body)
        except TimeoutError:
            raise Refusal(
                504, f"no answer within {self.limits.seconds:g} s; send less at a time, or try again later"
            ) from None

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, counted among the open ones while it is held."""
        _check_type(request)
        self._check_room()
        held: list[int] = []
        try:
            yield await self._receive(request, held)
        finally:
            self._open_bytes -= sum(held)

    async def _receive(self, request: Request, held: list[int]) -> bytes:
        """Args: held: is told the bytes that are counted."""
        limit, size, chunks = self.limits.body_bytes, 0, list[bytes]()
        if int(request.headers.get("content-length", 0)) > DRAINED * limit:
            raise _too_long(limit)
        try:
            async with asyncio.timeout(self.limits.upload_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > DRAINED * limit:
                        raise _too_long(limit)
                    if size > limit:
                        chunks.clear()
                        continue
                    held.append(len(chunk))
                    self._open_bytes += len(chunk)
                    if self._open_bytes > self.limits.open_bytes:
                        raise _try_again("requests of so many bytes are open already", 1)
                    chunks.append(chunk)
        except TimeoutError:
            seconds = self.limits.upload_seconds
            raise Refusal(408, f"the body did not arrive within {seconds:g} s; send it faster") from None
        except ClientDisconnect:
            raise Refusal(CLIENT_GONE, "the client is gone") from None
        if size > limit:
            raise _too_long(limit)
        return b"".join(chunks)

    def _check_room(self, inputs: int = 1) -> None:
        try:
            self.batcher.check_room(inputs)
        except QueueFull as full:
            raise _try_again(str(full), full.seconds) from None

    def _check_count(self, count: int, what: str) -> None:
        limit = self.limits.inputs
        if count > limit:
            raise Refusal(413, f"{count} {what}; the limit of a request is {limit}. Send several requests")
        self._check_room(count)

    def _model(self, kind: type[Any], endpoint: str) -> Any:
        """The model that answers an endpoint."""
        for model in self.models:
            if isinstance(model, kind):
                return model
        there = "a reranker, which answers /rerank" if kind is ServedEmbedder else "an embedder; see /v1/embeddings"
        raise Refusal(404, f"{endpoint}: the model of this server is {there}")

    async def _read(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Work of the one thread that parses and tokenizes."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work, *arguments)

    async def _contents(self, entries: Sequence[Entry], instruction: str | None) -> list[Any]:
        """What the entries hold, their pictures read."""
        await self._read(check_size, entries, self.limits, instruction)
        if any(is_remote(url) for entry in entries for _, url in entry.pictures):
            work = [(where, url) for entry in entries for where, url in entry.pictures]
            loop = asyncio.get_running_loop()
            read = await asyncio.gather(
                *(loop.run_in_executor(self._fetchers, self._picture, where, url) for where, url in work)
            )
            pictures: Pictures = {where: encoded for (where, _), encoded in zip(work, read, strict=True)}
        else:
            pictures = await self._read(read_all, entries, self._picture)
        return [entry.content(pictures) for entry in entries]

    def _picture(self, where: str, url: str) -> bytes:
        limits = self.limits
        return read_picture(url, where, limits.media, self.hosts, limits.upload_seconds)

    async def _prepared(self, names: Sequence[str], prepare: Callable[[], list[Row]]) -> list[Row]:
        try:
            rows: list[Row] = await self._read(prepare)
        except MmembedError as error:
            raise _unusable(error, names) from None
        pixels = sum(width * height for row in rows for width, height in row.sizes)
        if pixels > self.limits.image_pixels:
            raise Refusal(
                413, f"pictures of {pixels} pixels together; the limit of a request is {self.limits.image_pixels}. "
                "Scale them down, or send several requests",
            )  # fmt: skip
        return rows

    async def _computed(
        self, request: Request, model: Served, rows: list[Row], names: Sequence[str]
    ) -> NDArray[np.float32]:
        """What the model makes of the rows, unless the client goes away first."""
        try:
            job = self.batcher.submit(model, rows)
        except QueueFull as full:
            raise _try_again(str(full), full.seconds) from None
        done, gone = asyncio.wrap_future(job.future), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((done, gone), return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise Refusal(CLIENT_GONE, "the client is gone")
            return _finite(done.result())
        except MmembedError as error:
            raise _unusable(error, names[job.failed :]) from None
        finally:
            done.cancel()
            gone.cancel()
            del done  # keeps an exception whose traceback keeps this frame


def build_app(service: Service, key: str | None = None) -> ASGIApp:
    """The application of a service.

    Args:
        key: that requests must bring as `Authorization: Bearer KEY`, except those to `/health`; None: none.
    """
    app = FastAPI(
        title="mmembed", version=__version__, docs_url=None, redoc_url=None, lifespan=lambda _: service.running()
    )
    routes: list[tuple[str, str, Callable[..., Any], type[BaseModel] | None]] = [
        ("POST", "/v1/embeddings", service.embeddings, EmbeddingsRequest),
        ("POST", "/rerank", service.rerank, RerankRequest),
        ("POST", "/v1/rerank", service.rerank, RerankRequest),
        ("GET", "/v1/models", service.list_models, None),
        ("GET", "/health", service.health, None),
        ("GET", "/metrics", service.show_metrics, None),
    ]
    for method, path, answer, schema in routes:
        app.add_api_route(path, answer, methods=[method], response_model=None, openapi_extra=_described(schema))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return _Gate(app, service.metrics, key, {path for _, path, _, _ in routes})


class _Gate:
    """Counts every request, and lets in who has the key."""

    def __init__(self, app: ASGIApp, metrics: Metrics, key: str | None, endpoints: Collection[str]) -> None:
        self.app, self.metrics, self.endpoints = app, metrics, endpoints
        self.key = None if key is None else _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        endpoint = scope["path"] if scope["path"] in self.endpoints else "other"
        begin, status = time.perf_counter(), 500

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.opened()
        try:
            if self._may(scope):
                await self.app(scope, receive, note)
            else:
                refusal = Refusal(
                    401,
                    "give the key of this server as 'Authorization: Bearer KEY'",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await _answer(refusal)(scope, receive, note)
        finally:
            self.metrics.answered(endpoint, status, time.perf_counter() - begin)

    def _may(self, scope: Scope) -> bool:
        if self.key is None or scope["path"] in OPEN_TO_ALL:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(_digest(key.strip()), self.key)


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing takes the same time for any key."""
    return hashlib.sha256(key).digest()


# Answers ------------------------------------------------------------------------------------------------------------


def _embeddings(vectors: NDArray[np.float32], model: str, tokens: int, asked: EmbeddingsRequest) -> Response:
    """vectors (N, E)."""
    encoded: Any = vectors
    if asked.encoding_format == "base64":  # little-endian float32, as OpenAI's client reads it
        encoded = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    return _json({
        "id": f"embd-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "embedding", "embedding": one} for index, one in enumerate(encoded)],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    })  # fmt: skip


def _ranking(scores: NDArray[np.float32], model: str, tokens: int, asked: RerankRequest) -> Response:
    """scores (K,)."""
    order = np.argsort(-scores, kind="stable")[: asked.top_n or None]
    results = []
    for index in order.tolist():
        result: dict[str, Any] = {"index": index, "relevance_score": float(scores[index])}
        if asked.return_documents:
            document = asked.documents[index]
            result["document"] = (
                {"text": document}
                if isinstance(document, str)
                else {"multi_modal": [part.model_dump() for part in document.content]}
            )
        results.append(result)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return _json({"id": f"rerank-{uuid.uuid4().hex}", "model": model, "usage": usage, "results": results})


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    encoded = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(encoded, status, dict(headers or {}), "application/json")


def _answer(refusal: Refusal) -> Response:
    return _json(refusal.body(), refusal.status, refusal.headers)


async def _refused(_: Request, refusal: Any) -> Response:
    return _answer(refusal)


async def _not_found(_: Request, error: Any) -> Response:
    return _answer(Refusal(error.status_code, str(error.detail), headers=error.headers))


async def _failed(_: Request, error: Exception) -> Response:
    """What is no request's fault: the log has its trace."""
    return _answer(Refusal(500, f"the server failed ({type(error).__name__}); its log says more"))


# Checks -------------------------------------------------------------------------------------------------------------


def _check_type(request: Request) -> None:
    found = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if found != "application/json":
        raise Refusal(415, f"Content-Type: found '{found[:100]}'; send application/json")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refusal(415, "Content-Encoding: bodies are read as they are; send it without compression")


def _check_name(given: str | None, model: Served) -> None:
    if given is not None and given != model.name:
        raise Refusal(404, f"model: there is no '{given[:200]}' here; this server has '{model.name}'", "model")


def _unusable(error: MmembedError, names: Sequence[str]) -> Refusal:
    """A content that cannot be embedded, by the field that it stands in."""
    found, message, field = _INDEX.match(str(error)), str(error), None
    if found is not None and int(found[1]) < len(names):
        field = names[int(found[1])]
        message = f"{field}: {message[found.end() :]}"
    too_large = isinstance(error, MediaError) and error.kind == "gigantic"
    return Refusal(413 if too_large else 400, message, field)


def _too_long(limit: int) -> Refusal:
    return Refusal(413, f"the body is longer than {limit} bytes; send less at a time")


def _try_again(why: str, seconds: int) -> Refusal:
    return Refusal(429, why, headers={"Retry-After": str(seconds)})


def _finite(values: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(values).all():
        raise Refusal(500, "the model gave numbers that are none (NaN or infinite); load it with --dtype float32")
    return values


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# Description --------------------------------------------------------------------------------------------------------


def _described(schema: type[BaseModel] | None) -> dict[str, Any] | None:
    if schema is None:
        return None
    reference = {"$ref": f"#/components/schemas/{schema.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """What /openapi.json says. FastAPI would only describe bodies that it parses itself."""
    described = get_openapi(title=app.title, version=app.version, routes=app.routes)
    template = "#/components/schemas/{model}"
    _, schemas = models_json_schema(
        [(EmbeddingsRequest, "validation"), (RerankRequest, "validation")], ref_template=template
    )
    described.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
    return described
