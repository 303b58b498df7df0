"""What may be opened of media that somebody else named. Apart from `mmembed.media`, which loads numpy and Pillow."""

from __future__ import annotations

from dataclasses import dataclass

from mmembed.errors import ConfigError

MOST_PIXELS = 178_956_970  # Pillow itself opens nothing above: twice its MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class MediaLimits:
    """What may be opened: pixels of one image, bytes of one encoded file, and whether URLs are fetched.

    Raises:
        ConfigError: a limit that nothing could pass, or that would not be the one that acts.
    """

    max_pixels_decoded: int = 64_000_000
    max_bytes: int = 50_000_000
    allow_urls: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels_decoded <= MOST_PIXELS:
            raise ConfigError(
                f"max_pixels_decoded: found {self.max_pixels_decoded}; give 1 to {MOST_PIXELS}, above which Pillow "
                "refuses to open a picture"
            )
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes: found {self.max_bytes}; give a number above 0")
