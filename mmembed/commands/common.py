"""What the commands share: how a subcommand is added, options of models and of encoding, and a loaded embedder.

Importing it is light: nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmembed.arguments import Parser, add_media_limits, media_limits_of, vision_cache_of
from mmembed.errors import MmembedError
from mmembed.media_limits import MediaLimits

if TYPE_CHECKING:
    from mmembed.inference.embedder import Embedder
    from mmembed.workers import Workers

PRECISIONS = ("float32", "float16", "bfloat16", "int8", "binary")  # repeated from mmembed.quantize, which loads numpy
DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_command(
    subparsers: Any, name: str, run: Callable[[argparse.Namespace], int], *, help: str, description: str
) -> Parser:
    """A subcommand that calls `run`; its description keeps its lines."""
    command: Parser = subparsers.add_parser(
        name,
        help=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=textwrap.dedent(description),
    )
    command.set_defaults(run=run)
    return command


def add_model(command: Parser, default: str | None, **options: Any) -> None:
    usual = f"checkpoint folder or backbone (default {default or 'the one the folder was encoded with'})"
    command.add_argument("--model", **{"default": default, "help": usual, **options})
    command.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda where there is one)")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default auto)")
    add_trust(command)
    command.add_argument(
        "--media-root",
        type=Path,
        help="folder that relative image paths of files start from and must stay in (default: the file's own folder)",
    )
    add_media_limits(command, *vars(MediaLimits()))


def add_trust(command: Parser) -> None:
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the python code that the backbone brings with it; read it first",
    )


def add_encoding(command: Parser) -> None:
    command.add_argument(
        "--role",
        choices=("document", "query"),
        default="document",
        help="document (default) or query; also which side of a training record is taken",
    )
    command.add_argument("--instruction", help="instruction of every entry without its own")
    command.add_argument("--truncate-dim", type=int, help="keep the first dimensions (Matryoshka)")
    command.add_argument("--layers", type=int, help="compute the first decoder layers only (2-D Matryoshka)")
    command.add_argument("--precision", choices=PRECISIONS, default="float32")
    command.add_argument("--token-budget", type=int, help="padded tokens in a batch (default by device)")
    add_on_bad_record(command)


def add_on_bad_record(command: Parser) -> None:
    command.add_argument(
        "--on-bad-record",
        choices=("raise", "skip"),
        default="raise",
        help="what to do with an entry that cannot be encoded (default raise)",
    )


def add_workers(command: Parser) -> None:
    command.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="let workers of a Ray cluster encode: auto or HOST:PORT of a running one, local for one of this machine",
    )
    command.add_argument("--workers", type=int, metavar="N", help="of Ray, each with a model of its own (default 1)")
    command.add_argument("--worker-threads", type=int, metavar="N", help="CPU cores and threads of each (default 1)")
    command.add_argument(
        "--worker-gpus", type=float, metavar="N", help="GPUs of each (default 1 where the cluster has any, else 0)"
    )


def workers_of(arguments: argparse.Namespace) -> Workers | None:
    """What was given of the options of `add_workers`. Raises MmembedError where one has no effect."""
    from mmembed.workers import Workers, check_ray

    given = {"count": arguments.workers, "threads": arguments.worker_threads, "gpus": arguments.worker_gpus}
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.ray is None:
        for name in given:
            flag = "--workers" if name == "count" else f"--worker-{name}"
            raise MmembedError(f"{flag}: no effect without --ray; give an address, or remove it")
        return None
    check_ray()
    return Workers(arguments.ray, **given)


def load_embedder(arguments: argparse.Namespace, model: str, layers: int | None = None) -> Embedder:
    """The embedder, its media confined to the folder of what is encoded."""
    from transformers.utils.logging import disable_progress_bar

    from mmembed.inference.embedder import Embedder
    from mmembed.inference.sources import media_root
    from mmembed.media import MediaStore

    disable_progress_bar()  # a bar a file of weights says nothing
    root = arguments.media_root or media_root(vars(arguments).get("source") or arguments.target)
    embedder = Embedder.from_pretrained(
        model,
        device=arguments.device,
        dtype=arguments.dtype,
        media=MediaStore(root, media_limits_of(arguments)),
        trust_remote_code=arguments.trust_remote_code,
        layers=layers,
        **vision_cache_of(arguments),
    )
    if embedder.model.pooling.multi_vector:
        raise MmembedError(
            f"{model}: gives many vectors a content, and an encoded folder holds one; use Embedder.encode and "
            "Embedder.similarity in Python"
        )
    return embedder


def portable(model: str) -> str:
    """A folder as an absolute path, so that search finds it from anywhere; a name as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def report(error: MmembedError) -> None:
    print(f"skipped: {error}", file=sys.stderr)
