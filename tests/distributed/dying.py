"""Run by torchrun: the training command, in which one process dies of SIGKILL half way through writing a file.

python -m tests.distributed.dying RANK PART ARGUMENTS...: PART is in the path of the file, which `torch.save` writes
"""

import os
import signal
import sys

import torch


def main() -> int:
    rank, part, *arguments = sys.argv[1:]
    usual = torch.save

    def cut(value, file, *more, **options):
        usual(value, file, *more, **options)
        if part in str(file):
            os.truncate(file, os.path.getsize(file) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == rank:
        torch.save = cut
    from recipes.train_embedder import main as train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(main())
