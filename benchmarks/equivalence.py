"""Whether every way to launch a run gives the same model: the table of docs/guide/equivalence.md.

    python -m benchmarks.equivalence --write docs/guide/equivalence.md
    python -m benchmarks.equivalence --json                                # a row a run: its largest difference

{one process, DDP, ZeRO-1, ZeRO-2, ZeRO-3, FSDP2} x {large chunks, small ones} x {LoRA, full, QLoRA} x {accumulation 1,
2}: each run is the real command with the shipped YAML, from the same seed and the same global batches of texts and
pictures (a chunk holds texts or pictures, so two chunks are the fewest), on a tiny random model of the nano's
architecture. Two processes on the CPU (gloo). A run takes 7 to 25 seconds, the table 20 minutes on two quiet cores;
runs that lie complete in --work are not run again, as long as the code is the same.

Each tensor is held to its own change, so that a small one cannot hide behind a large one; but to no less than FLOOR of
the largest change of any: a tensor whose gradient is 0 but for rounding (the bias of keys, which softmax does not see)
would be held to its rounding. Under LoRA no tensor needs it. What is left is rounding all the same, up to 2e-4: that of
a `lora_A` of the second layer, which moves a fiftieth as far as other tensors, for its gradient goes through a `lora_B`
that starts at 0. A wrong factor, a chunk or a process left out move a tensor by 1e-1 and more.

The optimizer is AdamW with an epsilon of 1: like gradient descent it shows a factor in a gradient, which the usual
epsilon hides, and it does not turn rounding into a step where a gradient is nearly zero.
Nothing is clipped: clipping to a norm would take the factor out again.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mmembed.backbones  # noqa: F401  declares the operators that torchvision misses
from benchmarks._common import DATA, Row, commit, environment, images, show, texts
from mmembed.arguments import Parser

ROOT = DATA.parent
STRATEGIES = {
    "one process": None,
    "DDP": "ddp",
    "ZeRO-1": "zero1",
    "ZeRO-2": "zero2",
    "ZeRO-3": "zero3",
    "FSDP2": "fsdp2",
}
ADAPTERS = {
    "LoRA": "adapter={type: lora, r: 4, dropout: 0.0}",
    "full": "adapter={type: none}",
    "QLoRA": "adapter={type: qlora, r: 4, dropout: 0.0}",
}
LARGE, SMALL = "large chunks", "small chunks"
CHUNKS = {LARGE: "training.token_budget=100000", SMALL: "training.token_budget=256"}
REFUSED = {("ZeRO-3", "QLoRA")}  # by design; any other refusal is a failure
FLOOR = 1e-3
TOLERANCE = 3e-4
ACCUMULATION = (1, 2)
STEPS, BATCH = 4, 8
CONFIG = """
model: {{name_or_path: {model}}}
lengths: {{query_max_length: 48, document_max_length: 96}}
projection: 16
data: {{root: {root}, train_group_size: 2, train: [{{path: mixed.jsonl}}]}}
objective: {{type: contrastive, temperature: {{value: 0.1, learn: true}}}}
training: {{max_steps: {steps}, learning_rate: 3e-2, adam_epsilon: 1.0, max_grad_norm: 0, warmup_steps: 0,
  lr_scheduler_type: constant, logging_steps: 1, save_strategy: "no", disable_tqdm: true}}
"""


@dataclass(frozen=True)
class Cell:
    """One run, compared with one process, large chunks: largest difference of a loss, relative, and of a tensor (of a
    weight in it, as a part of the largest change of one in it), or why it was refused."""

    loss: float = 0.0
    weight: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        return "refused" if self.refused else f"{self.loss:.0e} / {self.weight:.0e}"


def main() -> int:
    """The command. Fails where a run fails or is refused that should not be, or differs by more than --tolerance."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, help="the page to write; printed otherwise")
    parser.add_argument("--json", action="store_true", help="print one JSON object of rows instead of the page")
    parser.add_argument("--work", type=Path, help="keeps runs here, and goes on from those that are there")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help=f"of both differences (default {TOLERANCE:.0e})"
    )
    parser.add_argument("--adapters", nargs="*", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--accumulation", nargs="*", default=list(ACCUMULATION), choices=ACCUMULATION, type=int)
    options = parser.parse_args()
    kept = options.work or Path(tempfile.mkdtemp(prefix="equivalence-"))
    work = kept / commit()
    prepare(work)
    cells: dict[tuple[str, str, str, int], Cell] = {}
    for adapter, accumulation in itertools.product(options.adapters, options.accumulation):
        before = work / run(work, "one process", adapter, LARGE, 1, still=True)
        reference = work / run(work, "one process", adapter, LARGE, accumulation)
        for strategy, chunks in itertools.product(options.strategies, CHUNKS):
            found = run(work, strategy, adapter, chunks, accumulation)
            cell = compare(before, reference, work / found)
            cells[strategy, adapter, chunks, accumulation] = cell
            print(f"{strategy}, {adapter}, {chunks}, accumulation {accumulation}: {cell}", file=sys.stderr, flush=True)
    page = written(cells, options.tolerance)
    if options.write:
        options.write.write_text(page, encoding="utf-8")
    if options.json:
        show(rows_of(cells, options.tolerance), as_json=True)
    elif not options.write:
        print(page)
    if options.work is None:
        shutil.rmtree(kept)
    near = {key for key, cell in cells.items() if cell.loss <= options.tolerance and cell.weight <= options.tolerance}
    apart = [key for key in cells if key not in near]  # also where one is no number
    refused = [key for key, cell in cells.items() if cell.refused and key[:2] not in REFUSED]
    for key in (*apart, *refused):
        print(f"differs: {', '.join(map(str, key))}: {cells[key]} {cells[key].refused}", file=sys.stderr)
    return 1 if apart or refused else 0


def prepare(work: Path) -> None:
    """The model, the data and the config."""
    if (work / "run.yaml").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    import torch
    from transformers import AutoConfig, AutoModel, AutoProcessor

    nano = str(ROOT / "mmembed" / "nano")
    config = AutoConfig.from_pretrained(nano)
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 2
    config.vision_config.deepstack_visual_indexes = [1]
    config.dtype = config.text_config.dtype = config.vision_config.dtype = "float32"
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(work / "model")
    AutoProcessor.from_pretrained(nano).save_pretrained(work / "model")
    words, pictures = texts(3 * 64), images(8)
    for number, picture in enumerate(pictures):
        (work / f"{number}.png").write_bytes(picture)
    records = []
    for number in range(64):
        query, positive, negative = words[3 * number : 3 * number + 3]
        content: Any = [{"image": f"{number % 8}.png"}, positive] if number % 3 == 0 else positive
        records.append(
            {"query": f"{number} {query}", "documents": [{"content": content}, {"content": negative, "relevance": 0}]}
        )
    (work / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (work / "run.yaml").write_text(CONFIG.format(model=work / "model", root=work, steps=STEPS))


def run(work: Path, strategy: str, adapter: str, chunks: str, accumulation: int, still: bool = False) -> str:
    """Runs one combination through the real command; the name of its folder in `work`. `still`: one step that moves
    nothing, for the weights before training."""
    name = "-".join((strategy, adapter, chunks, str(accumulation), *(["before"] if still else []))).replace(" ", "_")
    folder = work / name
    if (folder / "metrics.json").exists() or (folder / "refused").exists():
        return name
    shutil.rmtree(folder, ignore_errors=True)
    processes = 1 if STRATEGIES[strategy] is None else 2
    command = [sys.executable]
    if processes == 2:
        yaml = f"recipes/accelerate/{STRATEGIES[strategy]}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", yaml]
    command += ["recipes/train_embedder.py", "--config", str(work / "run.yaml"), ADAPTERS[adapter], CHUNKS[chunks]]
    command += [f"training.output_dir={folder}", f"training.gradient_accumulation_steps={accumulation}"]
    command += [f"training.per_device_train_batch_size={BATCH // processes}"]
    command += ["training.learning_rate=1e-30", "training.max_steps=1"] if still else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode == 0:
        return name
    lines = done.stderr.replace("error: ", "\nerror: ").splitlines()  # two processes may write in one line
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors:
        raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "refused").write_text(errors[0], encoding="utf-8")
    return name


def compare(before: Path, reference: Path, found: Path) -> Cell:
    """A run beside its reference."""
    if (found / "refused").exists():
        return Cell(refused=(found / "refused").read_text(encoding="utf-8"))
    ours, theirs = losses(found), losses(reference)
    start, expected, weights = tensors(before), tensors(reference), tensors(found)
    if len(ours) != len(theirs) or expected.keys() != weights.keys():
        raise SystemExit(f"{found}: other steps or tensors than {reference}")
    moved = {name: (expected[name] - start[name]).abs().max().item() for name in expected}
    floor = FLOOR * max(moved.values())
    apart = [(expected[name] - weights[name]).abs().max().item() / max(change, floor) for name, change in moved.items()]
    return Cell(_largest(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), _largest(apart))


def _largest(values: Iterable[float]) -> float:
    """Not a number where one of them is none."""
    return float(np.max(list(values)))


def losses(folder: Path) -> list[float]:
    """The logged loss of each step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def tensors(folder: Path) -> dict[str, Any]:
    """Every saved weight of a run, in float32."""
    from safetensors.torch import load_file

    files = [file for file in folder.glob("*.safetensors") if file.name != "probes.safetensors"]
    return {f"{file.name} {name}": value.float() for file in files for name, value in load_file(file).items()}


def rows_of(cells: dict[tuple[str, str, str, int], Cell], tolerance: float) -> list[Row]:
    """The larger difference of each run beside the tolerance, its limit. The run that others are compared with, and
    those that are refused by design, are no rows."""
    rows = []
    for (strategy, adapter, chunks, accumulation), cell in cells.items():
        if (cell.refused and (strategy, adapter) in REFUSED) or (STRATEGIES[strategy] is None and chunks == LARGE):
            continue
        apart = _largest((cell.loss, cell.weight))
        row = Row(
            f"{strategy}, {adapter}, {chunks}, accumulation {accumulation}",
            "largest relative difference",
            float(f"{apart:.2g}"),
            limit=tolerance,
            ratio_to_limit=round(tolerance / apart, 2) if apart else None,
            goal_to_limit=1.0,
            meets=apart <= tolerance and not cell.refused,
            details={"refused": cell.refused} if cell.refused else {},
        )
        rows.append(row)
    return rows


def written(cells: dict[tuple[str, str, str, int], Cell], tolerance: float) -> str:
    """The page."""
    lines = [
        "# One model, however it is launched",
        "",
        "Written by `python -m benchmarks.equivalence --write docs/guide/equivalence.md`; do not edit. Measured with",
        ", ".join(f"{name} {value}" for name, value in environment().items()) + ".",
        "",
        f"Each cell is a run of {STEPS} steps of {BATCH} queries (texts and pictures, learned temperature, projection)",
        "through the real command and the shipped YAML, by two processes except where one is named, compared with one",
        "process and large chunks (one of texts, one of pictures): largest difference of a loss, relative / largest",
        "difference of a tensor: of a weight in it, as a part of the largest change of one in it that training made",
        f"(at least {FLOOR:.0e} of the largest change of any tensor). Tolerance {tolerance:.0e}.",
        "",
        "| adapter | accumulation | launched as | large chunks | small chunks (recomputed) |",
        "|---|---|---|---|---|",
    ]
    rows = dict.fromkeys((adapter, accumulation, strategy) for strategy, adapter, _, accumulation in cells)
    for adapter, accumulation, strategy in rows:
        row = [str(cells[strategy, adapter, chunks, accumulation]) for chunks in CHUNKS]
        lines.append(f"| {adapter} | {accumulation} | {strategy} | {' | '.join(row)} |")
    reasons = dict.fromkeys((key[0], key[1], cell.refused) for key, cell in cells.items() if cell.refused)
    lines += ["", *(f"{strategy} with {adapter} is refused: {reason}" for strategy, adapter, reason in reasons)]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
