"""Makes training data: a language model writes queries, graded passages and judgements, and stages choose among them.

    python -m data_tools.synthesize --config recipes/configs/synthesis/graded.yaml output=runs/graded
    python -m data_tools.synthesize --config ... --dry-run        what would be asked, and what it would cost

A run that was killed, at any moment, goes on where it was when the same command is started again: every answer is kept
under a digest of its request (`data_tools.synthesis.answers`). A pipeline without stages that ask is a filter of
records that are there. docs/synthesis.md has the config and all stages.

Exit status: 0 done, 1 done but more was lost than `max_lost` allows, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.command import carry_out, parse, stop

if TYPE_CHECKING:
    from data_tools.synthesis.settings import SynthesisConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = parse("data_tools.synthesize", __doc__, "recipes/configs/synthesis", arguments, dry_run=True)

    def load() -> SynthesisConfig:
        from data_tools.synthesis.settings import load_synthesis

        return load_synthesis(options.config, options.overrides)

    def work(config: SynthesisConfig, output: Path) -> str:
        from data_tools.synthesis.estimate import estimate
        from data_tools.synthesis.pipeline import Run

        return estimate(config, output) if options.dry_run else Run(config, output)()

    return carry_out(load, work)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    sys.exit(main())
