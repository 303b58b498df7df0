"""The command-line parser of all commands: argparse, with the nearest flag named and no abbreviations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mmembed.errors import MmembedError, nearest
from mmembed.media_limits import MediaLimits


class Parser(argparse.ArgumentParser):
    """argparse whose errors name the nearest flag, command or choice.

    A misspelt flag is named also where it leaves a required one missing: the misspelling is the likelier reason.
    """

    given: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends with the nearest known flag of this parser named."""
        first = unknown[0].split("=")[0]
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        hint = nearest(first, known) if first.startswith("-") else "see --help for the arguments"
        super().error(f"unknown argument '{first}'; {hint}")

    def error(self, message: str) -> NoReturn:
        if "are required" in message:
            flags = [flag for flag in self.given if flag.startswith("--")]
            unknown = [flag for flag in flags if flag.split("=")[0] not in self._option_string_actions]
            if unknown:
                self.refuse(unknown)
        if message.startswith("unrecognized arguments: "):
            self.refuse(message.removeprefix("unrecognized arguments: ").split())
        if "invalid choice" in message and "choose from" in message:
            wrong = message.split("invalid choice: ")[1].split("'")[1]
            known = [name.strip(" ')") for name in message.split("choose from ")[1].split(",")]
            message = f"{message.split(': invalid')[0]}: there is no '{wrong}'; {nearest(wrong, known)}"
        super().error(message)


def add_vision_cache(parser: argparse.ArgumentParser) -> None:
    """The options of a store of image features, under their names in a config's training block."""
    parser.add_argument(
        "--vision-cache",
        default="off",
        metavar="FOLDER",
        help="keep features of images in a folder, or auto (mmembed's cache folder, where the backbone allows it), and "
        "read them the next time; default off",
    )
    parser.add_argument("--vision-cache-gb", type=float, metavar="GB", help="bound of that folder (default 20)")


def vision_cache_of(options: argparse.Namespace) -> dict[str, Any]:
    """What was given, as arguments of `Embedder.from_pretrained`. Raises MmembedError where it has no effect."""
    if options.vision_cache_gb is None:
        return {"vision_cache": options.vision_cache}
    if options.vision_cache == "off":
        raise MmembedError("--vision-cache-gb: no effect without --vision-cache; give a folder, or remove it")
    if not 0 < options.vision_cache_gb < float("inf"):
        raise MmembedError(f"--vision-cache-gb: found {options.vision_cache_gb}; give a number above 0")
    return {"vision_cache": options.vision_cache, "vision_cache_gb": options.vision_cache_gb}


def add_media_limits(parser: argparse._ActionsContainer, *names: str, usual: MediaLimits | None = None) -> None:
    """The options of what may be opened, under their names in a config's `data.media_limits`; those of `names` only.

    Args:
        usual: the defaults, where they are not those of MediaLimits.
    """
    usual = usual or MediaLimits()
    if "allow_urls" in names:
        parser.add_argument("--allow-urls", action="store_true", help="fetch pictures from http and https URLs")
    if "max_pixels_decoded" in names:
        parser.add_argument(
            "--max-pixels-decoded",
            type=int,
            metavar="N",
            default=usual.max_pixels_decoded,
            help=f"refuse a picture with more pixels (default {usual.max_pixels_decoded:,})",
        )
    if "max_seconds" in names:
        parser.add_argument(
            "--max-seconds",
            type=float,
            metavar="S",
            default=MediaLimits.max_seconds,
            help=f"refuse a longer sound (default {MediaLimits.max_seconds:g})",
        )
    if "max_sampling_rate" in names:
        parser.add_argument(
            "--max-sampling-rate",
            type=int,
            metavar="HZ",
            default=MediaLimits.max_sampling_rate,
            help=f"refuse a sound of more samples a second (default {MediaLimits.max_sampling_rate:,})",
        )
    if "max_bytes" in names:
        parser.add_argument(
            "--max-bytes",
            type=int,
            metavar="N",
            default=usual.max_bytes,
            help=f"refuse a file of more bytes (default {usual.max_bytes:,})",
        )


def media_limits_of(options: argparse.Namespace) -> MediaLimits:
    """What was given of the options of `add_media_limits`. Raises MmembedError where a number is out of range."""
    given = vars(options)
    return MediaLimits(**{key: given[key] for key in vars(MediaLimits()) if key in given})
