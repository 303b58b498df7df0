"""Rounds of mining and training (UDR, arXiv 2305.04320): each round mines with the embedder of the one before.

    python -m recipes.train_rounds --config recipes/configs/embedder/rounds.yaml --rounds 3
    accelerate launch recipes/train_rounds.py --config recipes/configs/embedder/rounds.yaml training.learning_rate=5e-5

A round is a run of `recipes.train_embedder` whose config has `data.mining`: it starts from the last round's embedder,
which mines before the first step, and goes on from its weights. `training.output_dir` holds a folder a round, `round-1`
and so on; the last is the result. The same command again passes over finished rounds and goes on in the one that was
stopped; a command with other settings, or over other records, than a finished round had is refused. Exit status: 0
done, 2 refused, 75 stopped: start the same command again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__" and __package__ is None:  # run as a file: its folder is on the path, the repository is not
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmembed.arguments import Parser
from mmembed.config import load_config
from mmembed.config.blocks import EmbedderConfig
from mmembed.errors import ConfigError
from recipes.train_embedder import exit_status, train


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, for example recipes/configs/embedder/rounds.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="how many (default 3, as in UDR)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: training.max_steps=10")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would spin beside the workers
    return exit_status(lambda: train_rounds(options.config, options.overrides, options.rounds))


def train_rounds(config: str, overrides: Sequence[str], rounds: int) -> Path:
    """Trains what is left of the rounds; the folder of the last one.

    Raises:
        ConfigError: no rounds, or a config that mines nothing.
        CheckpointError: a round is finished, and was made with other settings or records.
    """
    whole = load_config(config, overrides)
    if rounds < 1:
        raise ConfigError(f"--rounds {rounds}: give 1 or more")
    if whole.data.mining is None:
        raise ConfigError(f"{config}: has no data.mining, so no round would mine anything; add it, for example {{}}")
    folder = Path()
    for number in range(1, rounds + 1):
        start = [] if number == 1 else [f"model.name_or_path={folder}"]
        folder = Path(whole.training.output_dir, f"round-{number}")
        of_round = load_config(config, [*overrides, *start, f"training.output_dir={folder}"])
        done = (folder / "metrics.json").exists()  # written last
        if done:
            check_done(of_round, folder)
        else:
            train(of_round)
        say(f"round {number} of {rounds} {'was done before' if done else 'is done'}: {folder}")
    say(f"the result: {folder}")
    return folder


def check_done(config: EmbedderConfig, folder: Path) -> None:
    """Raises CheckpointError where the run that ended in `folder` had other settings or records."""
    from mmembed.data.dataset import media_store
    from mmembed.data.streaming import open_source
    from mmembed.models.continuing import inherit_settings
    from mmembed.training.arguments import training_arguments
    from mmembed.training.checkpoints import check_finished

    args, config = training_arguments(config), inherit_settings(config)
    seed = args.seed if args.data_seed is None else args.data_seed
    media = media_store(config.data)
    with args.main_process_first(desc="reading the data"):
        sources = [open_source(source, config.data, media, seed) for source in config.data.train]
    check_finished(
        folder, config, args, [{"name": one.name, "rows": one.size, "digest": one.digest()} for one in sources]
    )


def say(line: str) -> None:
    """Prints it once, whatever the number of processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
