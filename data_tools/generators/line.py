"""One kept connection to a server of HTTP, for one thread."""

from __future__ import annotations

import base64
import http.client
import ipaddress
import socket
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from data_tools.generators import GeneratorDown

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
    """Asks one thing at a time; connects again where it has to. Proxies of the environment are used by CONNECT, and
    never for this machine: it is not what they mean by its name.
    """

    def __init__(self, headers: Mapping[str, str], timeout: float) -> None:
        self._headers, self._timeout = dict(headers), timeout
        self._origin: tuple[str, str] | None = None
        self._connection = http.client.HTTPConnection("localhost")
        self._hung_up = False

    def ask(self, method: str, url: str, body: bytes | None = None) -> Reply:
        """The whole answer, whatever its status. Raises Unreachable, Broken, and GeneratorDown: an unusable proxy."""
        parts = urlsplit(url)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        if (parts.scheme, parts.netloc) != self._origin:
            self._connection.close()
            self._connection = self._to(parts.scheme, parts.netloc)
            self._origin = parts.scheme, parts.netloc
        kept = self._connection.sock is not None
        try:
            return self._exchange(method, target, body)
        except Broken as error:
            if not kept or error.late or self._hung_up:
                raise
        return self._exchange(method, target, body)  # the server had closed a connection that nobody used

    def hang_up(self) -> None:
        """Ends what another thread waits for."""
        self._hung_up = True
        if (waiting := self._connection.sock) is not None:
            with suppress(OSError):  # it may be closed already
                waiting.shutdown(socket.SHUT_RDWR)

    def _to(self, scheme: str, place: str) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
        host = urlsplit(f"//{place}")
        proxy = urllib.request.getproxies().get(scheme)
        if not proxy or _is_here(host.hostname or "") or urllib.request.proxy_bypass(place):
            return kind(place, timeout=_CONNECT_SECONDS)
        name, port, headers = _proxy_parts(proxy, scheme)
        connection = kind(name, port, timeout=_CONNECT_SECONDS)
        connection.set_tunnel(host.hostname or "", host.port or (443 if scheme == "https" else 80), headers)
        return connection

    def _exchange(self, method: str, target: str, body: bytes | None) -> Reply:
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
            connection.request(method, target, body, self._headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers.get("Retry-After"), answer.read())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Broken(f"{type(error).__name__}: {error}", late=isinstance(error, TimeoutError)) from None


def _is_here(host: str) -> bool:
    """Whether an address leads to this machine: localhost, 127.0.0.0/8, ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"


def _proxy_parts(proxy: str, scheme: str) -> tuple[str, int, dict[str, str]]:
    """Host, port and headers of `[http://][user:password@]host[:port]`. Its password is in no error.

    Raises:
        GeneratorDown: an address of another kind.
    """
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # a port that is no number
        host, port = None, 0
    if parts.scheme not in ("http", "https") or not host:
        raise GeneratorDown(
            f"{scheme}_proxy of the environment is no address of an HTTP proxy; give http://host:port, or name the "
            "server in no_proxy"
        )
    if parts.username is None:
        return host, port, {}
    named = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
    return host, port, {"Proxy-Authorization": f"Basic {base64.b64encode(named).decode()}"}
