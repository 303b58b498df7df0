"""`mmembed export`: a trained model as a folder that other programs load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mmembed.arguments import Parser
from mmembed.commands.common import add_command, add_trust
from mmembed.errors import MmembedError

TARGETS = ("sentence-transformers", "vllm", "merged", "adapter", "onnx")  # of mmembed.export, which loads torch
DTYPES = ("auto", "float32", "bfloat16", "float16")
PRECISIONS = ("float32", "float16", "bfloat16", "int8", "binary")


def add(subparsers: Any) -> Parser:
    command = add_command(
        subparsers,
        "export",
        run,
        help="write a model for sentence-transformers, vLLM, peft or ONNX Runtime",
        description="""\
            Writes a trained embedder or reranker as a folder that another program loads, with a model card that says
            how. A LoRA adapter becomes part of the weights. What that program cannot hold is refused with the reason.

              mmembed export runs/embedder --to sentence-transformers --output exported
              mmembed export runs/embedder --to vllm --output served --query-instruction "Find the answer."
              mmembed export runs/reranker --to vllm --output judge --push-to-hub me/judge --private""",
    )
    command.add_argument("checkpoint", help="folder of a saved embedder or reranker")
    command.add_argument("--to", required=True, choices=TARGETS, help="what loads the folder")
    command.add_argument("--output", type=Path, required=True, help="folder to write")
    command.add_argument("--overwrite", action="store_true", help="replace a folder")
    command.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default auto: as saved)")
    command.add_argument("--query-instruction", metavar="TEXT", help="of queries that bring none")
    command.add_argument("--document-instruction", metavar="TEXT", help="of documents that bring none")
    command.add_argument("--dims", type=int, nargs="+", default=[], metavar="N", help="lengths a vector may be cut to")
    command.add_argument("--precision", choices=PRECISIONS, default="float32", help="vectors are meant to be stored in")
    command.add_argument("--licence", metavar="ID", help="of the weights, for the card, for example apache-2.0")
    command.add_argument("--data", nargs="+", default=[], metavar="NAME", help="the model was trained on, for the card")
    command.add_argument(
        "--metrics", type=Path, nargs="+", default=[], metavar="FILE", help="results of eval.run, for the card"
    )
    command.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to the Hugging Face Hub")
    command.add_argument("--private", action="store_true", help="the repository that is made there is private")
    add_trust(command)
    return command


def run(arguments: argparse.Namespace) -> int:
    from transformers.utils.logging import disable_progress_bar

    from mmembed.export import NAMES, export
    from mmembed.export import TARGETS as WRITERS
    from mmembed.export.card import read_metrics
    from mmembed.export.hub import check_push, push
    from mmembed.export.subject import load_subject

    assert NAMES == TARGETS, "repeated here, because that package loads torch"
    if arguments.private and arguments.push_to_hub is None:
        raise MmembedError("--private: no effect without --push-to-hub; remove it")
    if arguments.push_to_hub is not None:
        check_push(arguments.push_to_hub)
    if arguments.output.exists() and not arguments.overwrite:
        raise MmembedError(f"{arguments.output}: exists; give another --output, or --overwrite")
    disable_progress_bar()
    sides = {"query": arguments.query_instruction, "document": arguments.document_instruction}
    subject = load_subject(
        arguments.checkpoint,
        dtype=arguments.dtype,
        instructions={side: told for side, told in sides.items() if told},
        dims=arguments.dims,
        precision=arguments.precision,
        trust_remote_code=arguments.trust_remote_code,
        merge=WRITERS.get(arguments.to).merges,
        licence=arguments.licence,
        data=tuple(arguments.data),
        metrics=read_metrics(arguments.metrics),
    )
    writer = export(subject, arguments.to, arguments.output, arguments.overwrite)
    merged = f", {subject.adapter} merged" if writer.merges and subject.adapter != "none" else ""
    print(f"{arguments.output}: for {arguments.to}, {str(subject.dtype).removeprefix('torch.')}{merged}; see README.md")
    if arguments.push_to_hub is not None:
        print(push(arguments.output, arguments.push_to_hub, arguments.private))
    return 0
