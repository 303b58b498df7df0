"""Models that come with mmembed, by name. Imports nothing heavy: the command line asks here."""

from __future__ import annotations

from pathlib import Path

NANO = "mmembed-nano"
FOLDERS = {NANO: "nano"}  # beside this file; recipes/build_FOLDER.py makes it


def resolve(name_or_path: str) -> str:
    """The folder of a packaged model; any other name as it is."""
    folder = FOLDERS.get(name_or_path)
    return name_or_path if folder is None else str(Path(__file__).parent / folder)
