"""What a server takes: of one request, of all that wait, and how long."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmembed.errors import ConfigError
from mmembed.media_limits import MediaLimits


@dataclass(frozen=True)
class ServeLimits:
    """Limits of a server; every one of them answers with a 4xx or 5xx that says which it was.

    Attributes:
        body_bytes: of a request's body.
        inputs: texts and conversations of a request, documents of a reranking.
        characters: of the texts of one input, its instruction among them.
        images: pictures of a request.
        image_pixels: of all pictures of a request together.
        media: of one picture.
        waiting_inputs: inputs of all requests that wait for the model; more are refused with 429.
        open_bytes: of the bodies of all open requests together; more are refused with 429.
        connections: open connections and requests; more are refused with 503.
        seconds: from the head of a request to its answer; then 504.
        upload_seconds: for a body to arrive; then 408.

    Raises:
        ConfigError: a limit that nothing could pass.
    """

    body_bytes: int = 32_000_000
    inputs: int = 256
    characters: int = 100_000
    images: int = 64
    image_pixels: int = 100_000_000
    media: MediaLimits = field(default_factory=lambda: MediaLimits(20_000_000, 20_000_000))
    waiting_inputs: int = 1024
    open_bytes: int = 256_000_000
    connections: int = 512
    seconds: float = 60.0
    upload_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "media" and not 0 < value < float("inf"):
                raise ConfigError(f"{name}: found {value}; give a number above 0")
        for name, other in (("inputs", "waiting_inputs"), ("body_bytes", "open_bytes")):
            if vars(self)[name] > vars(self)[other]:
                raise ConfigError(
                    f"{other}: found {vars(self)[other]}, below the {vars(self)[name]} of `{name}` that a request may "
                    "have, which would never be taken; give at least as many"
                )
