"""`mmembed verify`: whether a checkpoint is the model that was trained, here and in the runtimes that serve it."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmembed.arguments import Parser
from mmembed.commands.common import add_command, add_trust
from mmembed.errors import MmembedError

if TYPE_CHECKING:
    from mmembed.export.comparison import Row

RUNTIMES = ("sentence-transformers", "vllm", "vllm-server")  # of mmembed.export.comparison, which loads torch
TOLERANCE = 1e-3


def add(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "verify",
        run,
        help="compare a checkpoint with what it gave when it was saved, and with other runtimes",
        description="""\
            Loads a checkpoint and compares its vectors, or a reranker's probabilities:

              recorded       with those that were recorded when it was saved; they must also differ from those of the
                             backbone before training
              reloaded       after saving and loading again
              merged         with the adapter made part of the weights, in float32
              sentence-transformers, vllm, vllm-server
                             of a fixed set of texts and pictures, in float32, through a folder of `mmembed export`:
                             offline, and over HTTP

            The largest differences are printed; one above the tolerance ends with exit code 2. A runtime that is not
            installed, or cannot hold the model, is a line that says so.

              mmembed verify runs/embedder
              mmembed verify runs/embedder --runtimes sentence-transformers""",
    )
    command.add_argument("checkpoint", type=Path, help="folder of a saved embedder or reranker")
    command.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest difference (default 1e-3)")
    command.add_argument(
        "--runtimes",
        nargs="*",
        choices=RUNTIMES,
        metavar="RUNTIME",
        help=f"of {', '.join(RUNTIMES)}, which must then be there (default: the installed ones; no name: none)",
    )
    command.add_argument(
        "--vllm-python", metavar="PATH", help="interpreter that has vLLM (default: of `make vllm-env`)"
    )
    command.add_argument("--query-instruction", metavar="TEXT", help="export with it, as `mmembed export` does")
    command.add_argument("--document-instruction", metavar="TEXT", help="the same for documents")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    add_trust(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    from mmembed.backbones import resolve_backbone
    from mmembed.export.comparison import RUNTIMES as KNOWN
    from mmembed.models.folder import SETTINGS, settle

    assert KNOWN == RUNTIMES, "repeated here, because that module loads torch"
    saved = Path(resolve_backbone(str(arguments.checkpoint)))
    settle(saved)
    if (saved / "config.json").is_file() and not (saved / SETTINGS).is_file():
        raise MmembedError(
            f"{arguments.checkpoint}: a bare backbone has nothing to verify: it was not trained to embed, and no "
            "vectors were recorded; give a folder that training or Embedder.save has written"
        )
    rows, about = _own(arguments)
    rows += _elsewhere(arguments)
    if arguments.json:
        print(
            json.dumps(
                {
                    "checkpoint": str(arguments.checkpoint),
                    "tolerance": arguments.tolerance,
                    "rows": [vars(row) for row in rows],
                }
            )
        )
    else:
        print(about)
        print(render(rows, arguments.tolerance))
    far = [
        row for row in rows if row.difference is not None and not row.difference <= arguments.tolerance and row.judged
    ]
    if far:
        raise MmembedError(
            f"{arguments.checkpoint}: {far[0].runtime} differs by {far[0].difference:.2g} at '{far[0].at}', more than "
            f"{arguments.tolerance:g}; do not serve it there"
        )
    return 0


def _own(arguments: argparse.Namespace) -> tuple[list[Row], str]:
    """The checkpoint against its record and its copy, in the type that it is loaded in; and a line about it."""
    from mmembed.errors import CheckpointError
    from mmembed.export.comparison import Row
    from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
    from mmembed.models.probes import check_recorded
    from mmembed.models.verification import verify_checkpoint

    path = arguments.checkpoint
    model, preprocessor = load_checkpoint(path, trust_remote_code=arguments.trust_remote_code)
    distance = check_recorded(path, model, preprocessor, arguments.tolerance)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        save_checkpoint(copy, model, preprocessor)
        try:
            again = verify_checkpoint(copy, model, preprocessor, arguments.tolerance)
        except CheckpointError as error:  # of the copy, which is gone when this is read
            raise CheckpointError(str(error).replace(str(copy), str(path))) from error
    recorded = "no vectors were recorded when it was saved" if distance is None else f"{distance:.2g} to the record"
    rows = [
        Row("recorded", difference=distance, note="" if distance is not None else "none were recorded", judged=False),
        Row("reloaded", difference=again, judged=False),
    ]
    return rows, (
        f"{path}: ok; largest difference: {recorded}, {again:.2g} after saving and reloading; "
        f"vectors of {model.embedding_size} dimensions, {str(model.dtype).removeprefix('torch.')}"
    )


def _elsewhere(arguments: argparse.Namespace) -> list[Row]:
    """The adapter in the weights, and other runtimes, against the checkpoint as it was trained; in float32."""
    from transformers.utils.logging import disable_progress_bar

    from mmembed.export.comparison import compare_all
    from mmembed.export.subject import load_subject

    disable_progress_bar()
    sides = {"query": arguments.query_instruction, "document": arguments.document_instruction}
    subject = load_subject(
        str(arguments.checkpoint),
        instructions={side: told for side, told in sides.items() if told},
        trust_remote_code=arguments.trust_remote_code,
        merge=False,
        dtype="float32",
    )
    named = arguments.runtimes
    return compare_all(subject, RUNTIMES if named is None else named, arguments.vllm_python, must=named is not None)


def render(rows: list[Row], tolerance: float) -> str:
    """The table that is printed."""
    lines = [f"{'runtime':<22}  {'inputs':>6}  largest difference (tolerance {tolerance:g})"]
    for row in rows:
        count = str(row.inputs) if row.inputs else ""
        found = row.note if row.difference is None else f"{row.difference:.2g}" + (f"  at '{row.at}'" if row.at else "")
        lines.append(f"{row.runtime:<22}  {count:>6}  {found}")
    return "\n".join(lines)
