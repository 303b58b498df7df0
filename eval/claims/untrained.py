"""Saves the embedder that a training config begins with, for claims about models as they are.

    python -m eval.claims.untrained --config arm.yaml training.output_dir=runs/arm

Takes the arguments of `python -m recipes.train_embedder`, which would refuse to call weights that never moved trained.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mmembed.arguments import Parser
from mmembed.config import load_config
from mmembed.errors import MmembedError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.claims.untrained", description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="a training config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file")
    options = parser.parse_args(arguments)
    try:
        save(options.config, options.overrides)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def save(path: str, overrides: Sequence[str]) -> None:
    """Builds as training does, from the config's seed, and saves."""
    from mmembed.data.dataset import media_store
    from mmembed.models.checkpoint import save_checkpoint
    from mmembed.models.continuing import build_for_training
    from mmembed.training.arguments import set_seed, training_arguments

    config = load_config(path, overrides)
    args = training_arguments(config)
    set_seed(args.seed)
    model, preprocessor = build_for_training(config, media_store(config.data))
    save_checkpoint(config.training.output_dir, model, preprocessor)


if __name__ == "__main__":
    sys.exit(main())
