"""Fine-tunes a decoder or vision-language decoder into a reranker.

    python -m recipes.train_reranker --config recipes/configs/reranker/sft.yaml training.learning_rate=1e-4
    accelerate launch recipes/train_reranker.py --config recipes/configs/reranker/contrastive.yaml

A reranker is trained as an embedder of pairs whose vector is its logits, so this is `recipes/train_embedder.py` with
another config: the same steps, engines, checkpoints and resume. What comes out loads with `Reranker.from_pretrained`.
Exit status: 0 done, 2 refused, 75 stopped (SIGTERM, SIGUSR1, a process lost): start the same command again.
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
from mmembed.config.blocks import RerankerConfig
from recipes.train_embedder import exit_status, leave, train


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, for example recipes/configs/reranker/sft.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="win over the file: training.max_steps=10")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads would spin beside the workers
    return exit_status(lambda: train(load_config(options.config, options.overrides, RerankerConfig)))


if __name__ == "__main__":
    leave(main())
