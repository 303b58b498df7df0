"""What may be opened of media that somebody else named. Apart from `mmembed.media`, which loads numpy and Pillow."""

from __future__ import annotations

from dataclasses import dataclass

from mmembed.errors import ConfigError

LEAST_SAMPLING_RATE = 1_000  # samples a second; a header that says less is wrong
MOST_PIXELS = 178_956_970  # Pillow itself opens nothing above: twice its MAX_IMAGE_PIXELS


@dataclass(frozen=True)
class MediaLimits:
    """What may be opened: pixels of one image, seconds of one sound and its samples a second, bytes of one encoded
    file, and whether URLs are fetched.

    Raises:
        ConfigError: a limit that nothing could pass, or that would not be the one that acts.
    """

    max_pixels_decoded: int = 64_000_000
    max_bytes: int = 50_000_000
    max_seconds: float = 120.0
    max_sampling_rate: int = 192_000
    allow_urls: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels_decoded <= MOST_PIXELS:
            raise ConfigError(
                f"max_pixels_decoded: found {self.max_pixels_decoded}; give 1 to {MOST_PIXELS}, above which Pillow "
                "refuses to open a picture"
            )
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes: found {self.max_bytes}; give a number above 0")
        if not 0 < self.max_seconds < float("inf"):
            raise ConfigError(f"max_seconds: found {self.max_seconds}; give a number above 0")
        if self.max_sampling_rate < LEAST_SAMPLING_RATE:
            raise ConfigError(
                f"max_sampling_rate: found {self.max_sampling_rate}; give {LEAST_SAMPLING_RATE} or more: no sound is "
                "below"
            )
