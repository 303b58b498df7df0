"""Pictures of requests: what a data URL holds, or what an allowed host sends.

A request comes from anybody, so a picture is bytes and nothing else: there is no path, `file:` is an unknown scheme,
and an http address is only fetched where the operator named its host, without following it elsewhere. Of the formats
that Pillow reads those remain that a browser shows: EPS would be handed to Ghostscript, and the rest are rare enough to
be someone's attempt. Pixels and bytes are judged by `mmembed.media`, from the header, before anything is decoded.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.error
import urllib.request
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

import PIL.Image

from mmembed.media_limits import MediaLimits
from mmembed.serving.refusal import Refusal

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_SHOWN = 60  # characters of an address in a message


class _Stays(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """An allowed host may not send us to another one."""
        return


def _opener() -> urllib.request.OpenerDirector:
    """One that knows http and https alone: no files, no proxies, no redirects."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Stays(),
    ):
        opener.add_handler(handler)
    return opener


def is_remote(url: str) -> bool:
    """Whether reading it takes more than this process."""
    return not url[:5].lower().startswith("data:")


def read_picture(url: str, where: str, limits: MediaLimits, hosts: Collection[str], seconds: float) -> bytes:
    """The encoded picture that an `image_url` holds or names.

    Args:
        where: the field of the request, for messages.
        hosts: from which pictures may be fetched.
        seconds: that a fetch may wait for a byte.

    Raises:
        Refusal: 400 for an address that is not allowed or says nothing, 413 for too many bytes.
    """
    encoded = _fetch(url, where, limits, hosts, seconds) if is_remote(url) else _decode(url, where)
    if len(encoded) > limits.max_bytes:
        raise Refusal(413, f"{where}: {len(encoded)} bytes; the limit is {limits.max_bytes}. Compress it", where)
    _check_format(encoded, where)
    return encoded


def _decode(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise Refusal(400, f"{where}: a data URL of base64 is needed, data:image/png;base64,...", where)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(400, f"{where}: not base64 ({error}); encode the picture's bytes again", where) from None


def _fetch(url: str, where: str, limits: MediaLimits, hosts: Collection[str], seconds: float) -> bytes:
    shown = f"{url[:_SHOWN]!r}"
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        parts, host = None, None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise Refusal(
            400, f"{where}: {shown} is no data URL; send the picture itself as data:image/png;base64,...", where
        )
    if host.lower() not in hosts:
        raise Refusal(
            400,
            f"{where}: {shown} is an address of a host that is not allowed; send the picture itself as "
            "data:image/png;base64,..., or have the server started with --allowed-media-domains",
            where,
        )
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mmembed"})
        with _opener().open(request, timeout=seconds) as answer:
            return bytes(answer.read(limits.max_bytes + 1))
    except urllib.error.HTTPError as error:
        raise Refusal(400, f"{where}: {shown} answered {error.code}; redirects are not followed", where) from None
    except (OSError, ValueError) as error:
        raise Refusal(400, f"{where}: {shown} cannot be fetched ({error})", where) from None


def _check_format(encoded: bytes, where: str) -> None:
    try:
        PIL.Image.open(io.BytesIO(encoded), formats=FORMATS).close()
    except PIL.Image.DecompressionBombError:
        return  # mmembed.media says how many pixels
    except (OSError, SyntaxError, ValueError, EOFError):
        known = ", ".join(FORMATS)
        raise Refusal(
            400, f"{where}: {len(encoded)} bytes that are no picture of {known}; send one of those", where
        ) from None
