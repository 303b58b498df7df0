"""Reads sound files (WAV, FLAC, OGG, MP3: what libsndfile knows) into the mono waveform that an audio tower hears.

The header is judged before anything is decoded: seconds, sampling rate, and that a file is as long as it says. Channels
are averaged; another rate than the tower's is resampled by a polyphase filter (scipy). Without `soundfile`, the extra
`audio`, nothing is heard. Cost: about a millisecond a second of 44.1 kHz stereo, most of it the filter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from mmembed.errors import ConfigError, MediaError
from mmembed.media_limits import LEAST_SAMPLING_RATE, MediaLimits

if TYPE_CHECKING:
    import soundfile


@contextmanager
def opened(stream: BinaryIO, limits: MediaLimits, label: str, where_to_set: str) -> Iterator[soundfile.SoundFile]:
    """A sound file of which the header was judged.

    Args:
        where_to_set: where the limit of seconds is set, for the message.

    Raises:
        MediaError: no sound file, empty, too long, or of an odd rate.
        ConfigError: soundfile is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: without libsndfile
        raise ConfigError(f"audio: needs soundfile ({error}); pip install 'mmembed[audio]'") from None
    try:
        file = soundfile.SoundFile(stream)
    except (soundfile.LibsndfileError, ValueError, TypeError) as error:
        raise MediaError(
            f"{label}: not a readable sound file ({_reason(error)}); replace the file or skip the record"
        ) from None
    with file:
        judge(file.frames, file.samplerate, limits, label, where_to_set)
        yield file


def judge(frames: int, rate: int, limits: MediaLimits, label: str, where_to_set: str) -> None:
    """Raises MediaError for a sound of no samples, of an odd rate, or above the limit of seconds."""
    if not LEAST_SAMPLING_RATE <= rate <= limits.max_sampling_rate:
        raise MediaError(
            f"{label}: {rate} samples a second; between {LEAST_SAMPLING_RATE} and {limits.max_sampling_rate} are read. "
            "Resample the file or skip the record",
            kind="sampling rate",
        )
    if frames < 1:
        raise MediaError(f"{label}: holds no sound; replace the file or skip the record", kind="empty")
    if frames / rate > limits.max_seconds:
        raise MediaError(
            f"{label}: {frames / rate:.1f} seconds; the limit is {limits.max_seconds:g}. Cut it or raise "
            f"{where_to_set}",
            kind="too long",
        )


def decoded(file: soundfile.SoundFile, label: str) -> np.ndarray:
    """(T,) float32, channels averaged. Raises MediaError where the file is shorter than it says, or not finite."""
    import soundfile

    try:
        samples = file.read(dtype="float32", always_2d=True)  # (T, channels)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise _damaged(label, _reason(error)) from None
    if len(samples) != file.frames:
        raise _damaged(label, f"{len(samples)} of {file.frames} samples are there")
    return finite(samples.mean(axis=1), label)


def finite(samples: np.ndarray, label: str) -> np.ndarray:
    """The samples as float32. Raises MediaError where some are no numbers."""
    samples = np.asarray(samples, dtype=np.float32)
    if not np.isfinite(samples).all():
        raise _damaged(label, "samples are not finite")
    return samples


def length_at(frames: int, rate: int, wanted: int) -> int:
    """Samples that `resampled` makes."""
    return -(-frames * wanted // rate)


def resampled(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """(T,) at `rate` Hz -> (ceil(T * wanted / rate),) float32 at `wanted` Hz."""
    if rate == wanted:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    found: np.ndarray = resample_poly(samples, wanted // common, rate // common)
    return found.astype(np.float32)


def _damaged(label: str, how: str) -> MediaError:
    return MediaError(
        f"{label}: the sound is truncated or damaged ({how}); replace the file or skip the record",
        kind="truncated or damaged",
    )


def _reason(error: Any) -> str:
    return str(error).strip().rstrip(".") or type(error).__name__
