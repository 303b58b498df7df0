"""Teach the nano backbone to judge pairs, from its data to a reranker, in one command:

    python recipes/build_nano_judge.py --data-root <shared data> --out runs/nano-judge

A LoRA adapter learns in stages (`recipes.nano.judging`), each a run of `recipes/train_reranker.py`: from telling a
sentence from others to telling which document answers a question. A killed run goes on from its last checkpoint when
the same command is given again. Two CPU cores take an hour and a half, which is too little for a judge of what a first
stage finds (docs/log.md, 2026-11-27); on one GPU, with many more queries a step:

    ... --processes 1 --queries 256 training.bf16=true training.token_budget=65536
"""

import argparse
import itertools
import json
import logging
import os
import random
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmembed.backbones  # noqa: F401  (before transformers: torchvision on a CPU machine)

# isort: split
import torch
from safetensors.torch import load_file, save_file

from mmembed.arguments import Parser
from mmembed.data.records import write_records
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.folder import ADAPTER
from recipes.nano import data, judging
from recipes.nano.judging import Stage

logger = logging.getLogger("build_nano_judge")
REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "recipes/configs/reranker/nano_judge.yaml"
FAST = {"training.learning_rate": 0.002}  # harder pairs are lost at this rate
TASKS = ("squad-en", "openstax-glossary", "mbpp", "odex", "medquad", "tldr-commands/en")


CARD = """---
library_name: peft
tags: [reranker, mmembed, test-model]
---
# A judge of mmembed-nano

A reranker of the packaged nano backbone: a LoRA adapter (rank 64, bf16), built by one command,

    {command}

`DATA` being a folder of the shared sets. It is for rerankers that begin with a model which reads a document for a
query; that takes a bare nano longer than the minutes of a test. **It is not a product model.**

## Use
`Reranker.from_pretrained` of this folder, or its name as `model.name_or_path` in a config of
`recipes/train_reranker.py`. English texts, queries up to 64 tokens and documents up to 80; it has judged no pictures.

## How it was made
Stages of `recipes/train_reranker.py`, each from where the last one ended; eight documents a query, one of them relevant
(`recipes/nano/judging.py`):

| stage | documents | steps |
|---|---|---|
{stages}

Loss: InfoNCE over the eight and twice the cross-entropy of each document's answer, `ok` or `no`.

## Data
Train splits alone: paragraphs of squad-en (CC BY-SA 4.0) and openstax-text (CC BY 4.0); queries and documents of
medquad and tldr-commands (CC BY 4.0), dbpedia-entity (MIT) and recipes (The Unlicense); docstrings and functions of
Python's own library (PSF-2.0). No query of squad-en, openstax-glossary, mbpp or odex. Dev queries, and documents
relevant only to them, were never seen.

{measured}"""


def stages(root: Path) -> list[Stage]:
    """From the easiest to the hardest."""
    prose = [p for p in data.train_passages(root) if p.source in ("squad-en", "openstax-text")]
    pairs = data.train_pairs(root) + data.python_pairs()
    return [
        Stage(
            "copies",
            "sentences, one of which is the query itself",
            300,
            lambda draw: judging.copies(prose, draw),
            lengths(48, 32) | FAST,
        ),
        Stage(
            "found",
            "parts of paragraphs, one of which holds the query",
            300,
            lambda draw: judging.cloze(prose, draw, characters=180, kept=1.0, near=0.0),
            lengths(64, 48) | FAST,
        ),
        Stage(
            "cloze",
            "the same, but the query is cut out of every second paragraph, and some paragraphs are neighbours",
            500,
            lambda draw: judging.cloze(prose, draw, characters=250, kept=0.5, near=0.1),
            lengths(64, 64) | FAST,
        ),
        Stage(
            "questions",
            "half longer parts, many of them neighbours, one of which holds the query; a fifth cloze without it; the "
            "rest train queries with documents of their set",
            500,
            lambda draw: judging.mixed(
                [
                    (0.5, judging.cloze(prose, draw, characters=300, kept=1.0, near=0.4)),
                    (0.2, judging.cloze(prose, draw, characters=300, kept=0.0, near=0.0)),
                    (0.3, judging.questions(pairs, draw)),
                ],
                draw,
            ),
            lengths(64, 80),
        ),
        Stage(
            "keywords",
            "parts of paragraphs, a third of them neighbours, for a few words of a sentence that one of them holds; a "
            "quarter train queries",
            800,
            lambda draw: judging.mixed(
                [
                    (0.75, judging.keywords(prose, draw, characters=250, near=0.3)),
                    (0.25, judging.questions(pairs, draw)),
                ],
                draw,
            ),
            lengths(48, 64),
        ),
    ]


def scaled(stage: Stage, scale: float) -> int:
    return max(1, round(stage.steps * scale))


def lengths(query: int, document: int) -> dict[str, int]:
    return {"lengths.query_max_length": query, "lengths.document_max_length": document}


def main() -> None:
    options = arguments()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    start, all_stages = "mmembed-nano", stages(options.data_root)
    for number, stage in enumerate(all_stages):
        records, folder = work / f"{stage.name}.jsonl", work / stage.name
        steps = scaled(stage, options.scale)
        if not records.exists():
            drawn = stage.records(random.Random(options.seed + number))
            count = steps * options.processes * options.queries
            write_records(records.with_suffix(".part"), itertools.islice(drawn, count))
            records.with_suffix(".part").rename(records)
        settings = {
            "model.name_or_path": start,
            "data.train": json.dumps([{"path": str(records)}]),
            "training.output_dir": folder,
            "training.max_steps": steps,
            "training.per_device_train_batch_size": options.queries,
            "training.seed": options.seed,
            **stage.settings,
        }
        logger.info("stage '%s': %d steps", stage.name, steps)
        train(settings, options.processes, options.overrides)
        start = str(folder)
    package(Path(start), options.out)
    measured = measure(options.out, options.data_root, work / "measured")
    (options.out / "README.md").write_text(card(options, all_stages, measured), encoding="utf-8")


def train(settings: dict[str, object], processes: int, overrides: Sequence[str] = ()) -> None:
    """Runs the recipe; where it has run before, it goes on from the last checkpoint."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(REPOSITORY / "recipes/accelerate/ddp.yaml")]
    command = [sys.executable, *launcher, "--num_processes", str(processes), "recipes/train_reranker.py"]
    command += ["--config", str(CONFIG), *(f"{key}={value}" for key, value in settings.items()), *overrides]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    usual = {"OMP_NUM_THREADS": threads} | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    environment = usual | os.environ
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)


def package(trained: Path, out: Path) -> None:
    """The judge with an adapter of 16-bit numbers, which float32 holds without a loss."""
    model, preprocessor = load_checkpoint(trained)
    with torch.no_grad():
        for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
            parameter.copy_(parameter.bfloat16())
    save_checkpoint(out, model, preprocessor)
    adapter = {name: tensor.bfloat16() for name, tensor in load_file(out / ADAPTER).items()}
    save_file(adapter, out / ADAPTER)


def measure(judge: Path, root: Path, output: Path) -> str:
    """The table of `eval.rerank` over what BM25 finds for 300 dev queries of each task."""
    command = [sys.executable, "-m", "eval.rerank", "--model", str(judge), "--first-stage", "bm25", "--depth", "10"]
    command += ["--max-queries", "300", "--tasks", *TASKS, "--data-root", str(root), "--output", str(output)]
    subprocess.run(command, cwd=REPOSITORY, check=True)
    return (output / "table.md").read_text(encoding="utf-8")


def card(options: argparse.Namespace, trained: Sequence[Stage], measured: str) -> str:
    told = f"python recipes/build_nano_judge.py --data-root DATA --out OUT --seed {options.seed}"
    told += f" --processes {options.processes} --queries {options.queries} --scale {options.scale:g}"
    told = shlex.join([*told.split(), *options.overrides])
    rows = "\n".join(f"| {s.name} | {s.about} | {scaled(s, options.scale)} |" for s in trained)
    return CARD.format(command=told, stages=rows, measured=measured.replace("# Rerankers", "## Rerankers"))


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the shared data sets")
    parser.add_argument("--out", type=Path, required=True, help="where the finished judge goes")
    parser.add_argument("--work", type=Path, default=Path("out/judge-run"), help="records and runs of the stages")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--queries", type=int, default=8, help="of a step, a process")
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps of all stages")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of all trainings: training.bf16=true")
    options = parser.parse_intermixed_args()
    for name in ("data_root", "out", "work"):  # the trainings run in the repository, wherever this was started
        setattr(options, name, getattr(options, name).absolute())
    return options


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    main()
