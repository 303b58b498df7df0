"""One kept connection to a server of HTTP, for one thread."""

from __future__ import annotations

import http.client
import socket
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

_CONNECT_SECONDS = 20.0


class Unreachable(Exception):
    """Nobody takes the connection."""


class Broken(Exception):
    """A connection that ended before an answer was whole. `late`: the server said nothing for `timeout` seconds."""

    def __init__(self, message: str, late: bool = False) -> None:
        super().__init__(message)
        self.late = late


@dataclass(frozen=True)
class Reply:
    status: int
    retry_after: str | None
    body: bytes


class Line:
    """Asks one thing at a time; connects again where it has to. Proxies of the environment are used by CONNECT."""

    def __init__(self, headers: Mapping[str, str], timeout: float) -> None:
        self._headers, self._timeout = dict(headers), timeout
        self._origin: tuple[str, str] | None = None
        self._connection = http.client.HTTPConnection("localhost")
        self._hung_up = False

    def ask(self, method: str, url: str, body: bytes | None = None) -> Reply:
        """The whole answer, whatever its status. Raises Unreachable and Broken."""
        parts = urlsplit(url)
        if (parts.scheme, parts.netloc) != self._origin:
            self._connection.close()
            self._connection = self._to(parts.scheme, parts.netloc)
            self._origin = parts.scheme, parts.netloc
        kept = self._connection.sock is not None
        try:
            return self._exchange(method, parts.path, body)
        except Broken as error:
            if not kept or error.late or self._hung_up:
                raise
        return self._exchange(method, parts.path, body)  # the server had closed a connection that nobody used

    def hang_up(self) -> None:
        """Ends what another thread waits for."""
        self._hung_up = True
        if (waiting := self._connection.sock) is not None:
            with suppress(OSError):  # it may be closed already
                waiting.shutdown(socket.SHUT_RDWR)

    def _to(self, scheme: str, place: str) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        proxy = urllib.request.getproxies().get(scheme)
        if proxy is None or urllib.request.proxy_bypass(place):
            return kind(place, timeout=_CONNECT_SECONDS)
        connection = kind(urlsplit(proxy).netloc or proxy, timeout=_CONNECT_SECONDS)
        host = urlsplit(f"//{place}")
        connection.set_tunnel(host.hostname or "", host.port or (443 if scheme == "https" else 80))
        return connection

    def _exchange(self, method: str, path: str, body: bytes | None) -> Reply:
        connection = self._connection
        try:
            if connection.sock is None:
                connection.connect()
                assert connection.sock is not None
                connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sock.settimeout(self._timeout)
        except OSError as error:
            connection.close()
            raise Unreachable(str(error)) from None
        try:
            if self._hung_up:
                raise OSError("hung up")
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers.get("Retry-After"), answer.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Broken(f"{type(error).__name__}: {error}", late=isinstance(error, TimeoutError)) from None
