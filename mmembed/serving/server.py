"""Runs the application until a signal asks it to end, and then to the end of what is open."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from mmembed.errors import MmembedError
from mmembed.serving.app import Service, build_app

KEEP_ALIVE = 30  # seconds that a connection may idle between two requests


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is said before models load.

    Args:
        port: 0 takes one that is free.

    Raises:
        MmembedError: nothing can listen there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise MmembedError(f"--port {port}: cannot listen on {host} ({error}); give another --port") from error
    return bound


def build_server(
    service: Service, bound: socket.socket, *, key: str | None = None, ready: Callable[[str], Any] = lambda _: None
) -> uvicorn.Server:
    """The server of a service; `serve(sockets=[bound])` of it runs until `should_exit`.

    Args:
        ready: is told the address when it answers.
    """
    config = uvicorn.Config(
        build_app(service, key),
        http="h11",  # bounds the head of a request
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=service.limits.connections,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(service.limits.seconds) + 1,
    )
    host, port = bound.getsockname()[:2]
    return _Server(config, lambda: ready(f"http://{f'[{host}]' if ':' in host else host}:{port}"))


def serve(service: Service, bound: socket.socket, *, key: str | None, ready: Callable[[str], Any]) -> None:
    """Answers requests until SIGTERM or SIGINT (Ctrl-C), and returns when those that are open have their answers.

    New connections are refused from the signal on; after the time that a request may take, open ones are cut. A second
    Ctrl-C ends at once. Arguments as of `build_server`.
    """
    server = build_server(service, bound, key=key, ready=ready)
    gc.collect()
    gc.freeze()  # a million objects of imports and the model are garbage never, and looking through them is for nothing
    # uvicorn raises the signal again behind its shutdown, for handlers that were there before: these take it
    previous = {number: signal.signal(number, _taken) for number in HANDLED_SIGNALS}
    try:
        asyncio.run(server.serve(sockets=[bound]))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _taken(_: int, __: Any) -> None:
    """A signal that uvicorn has obeyed already."""


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: Callable[[], Any]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
