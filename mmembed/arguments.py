"""The command-line parser of all commands: argparse, with the nearest flag named and no abbreviations."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mmembed.errors import nearest


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
