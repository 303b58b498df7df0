"""What a request is answered when it is not done, in the form of OpenAI and vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

CLIENT_GONE = 499  # nginx's number; nobody reads that answer, the metrics count it


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: where, what was found, what to do.
        param: the field of the request that it is about.
        headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        phrase = "Client Closed Request" if self.status == CLIENT_GONE else HTTPStatus(self.status).phrase
        kind = "".join(word[0].upper() + word[1:] for word in phrase.split() if word.isalpha())
        kind = kind if kind.endswith("Error") else f"{kind}Error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}
