"""`mmembed encode`: a corpus of any size becomes a folder of vectors (`mmembed.inference.corpus`)."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from mmembed.arguments import Parser, add_vision_cache
from mmembed.commands.common import (
    add_command,
    add_encoding,
    add_model,
    add_workers,
    load_embedder,
    portable,
    report,
    workers_of,
)
from mmembed.errors import MmembedError
from mmembed.packaged import NANO

FORMATS = ("npy", "arrow", "parquet")  # repeated from mmembed.inference.encoding, which loads torch
SHARD_ROWS = 4096


def add(subparsers: Any) -> Parser:
    """The parser of the command."""
    command = add_command(
        subparsers,
        "encode",
        run,
        help="encode images, JSON lines or parquet tables into a folder of vectors",
        description="""\
            Encodes a folder of images, JSON lines, parquet tables, or a folder of such files, into a folder of vectors,
            items.jsonl, encoding.json and manifest.json. Sources may be larger than memory. A command that was killed
            goes on where it was when it is given again.

            A line is {"text": ..., "image": ..., "id": ...}, a line of a BEIR folder, or a canonical training record.

              mmembed encode photos/ --output photos.enc
              mmembed encode corpus.jsonl --model runs/demo/embedder --output corpus.enc --precision int8
              mmembed encode corpus/ --output corpus.enc --format parquet --ray auto --workers 8""",
    )
    command.add_argument("source", type=Path, help="folder of images or data, .jsonl or .parquet file")
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument(
        "--overwrite", action="store_true", help="replace an encoded folder, or an unfinished one of something else"
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        default="npy",
        help="of the vectors: one vectors.npy (default), or a table of ids and vectors for each shard",
    )
    command.add_argument(
        "--shard-rows",
        type=int,
        default=SHARD_ROWS,
        metavar="N",
        help=f"entries encoded together; a kill loses so many at most (default {SHARD_ROWS})",
    )
    add_model(command, NANO)
    add_vision_cache(command)
    add_encoding(command)
    add_workers(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    """Carries the command out."""
    if arguments.shard_rows < 1:
        raise MmembedError(f"--shard-rows: found {arguments.shard_rows}; give at least 1, typically 1024 to 65536")
    workers = workers_of(arguments)
    from mmembed.files import disk_errors
    from mmembed.inference.corpus import Task, encode_corpus, unfinished
    from mmembed.inference.encoding import Encoding
    from mmembed.inference.sources import media_root

    encoding = Encoding(
        portable(arguments.model),
        0,  # the model says
        arguments.role,
        arguments.instruction,
        arguments.precision,
        arguments.truncate_dim,
        arguments.layers,
        str((arguments.media_root or media_root(arguments.source)).resolve()),
        format=arguments.format,
    )
    try:
        with disk_errors(unfinished(arguments.output)):
            done = encode_corpus(
                arguments.output,
                arguments.source,
                Task(encoding, arguments.device, arguments.dtype, arguments.token_budget),
                partial(load_embedder, arguments, encoding.model, arguments.layers),
                shard_rows=arguments.shard_rows,
                on_bad=arguments.on_bad_record,
                overwrite=arguments.overwrite,
                report=report,
                workers=workers,
            )
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    skipped = f", {done.skipped} skipped" if done.skipped else ""
    print(f"{arguments.output}: {done.count} vectors of {done.size} dimensions, {done.precision}{skipped}")
    return 0
