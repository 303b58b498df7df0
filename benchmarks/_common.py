"""What every benchmark shares: alternating runs, peak memory of a fresh process, rows with ratios and goals.

A benchmark is `python -m benchmarks.NAME --json` and prints one object `{"rows": [...]}`. The contenders of a row take
turns in one process on the same threads, and the order rotates from round to round, so a slow minute of the machine
hits all of them. A speed is the median over the rounds; a ratio is the median over the rounds of the ratio within a
round, which noise moves far less than a ratio of medians. Peak memory is measured apart, one fresh process a contender.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmembed.arguments import Parser

DATA = Path(__file__).resolve().parent.parent / "data"
LIMIT_BUDGET = 8192  # padded tokens of a batch of `bare_forward`
# 64 tokens of the nano tokenizer
INSTRUCTION = (
    "Instruct: Given a question somebody asked, find the passages of an encyclopedia or of a medical handbook that "
    "answer it; a passage counts if a careful reader could give the answer from it alone, and not if it names the same "
    "things.\nQuery: "
)
QWEN3 = {  # of Qwen/Qwen3-0.6B-Base, config.json
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


@dataclass
class Row:
    """One figure. Speeds are in `unit`; higher is better. None where a row has no such contender."""

    name: str
    unit: str
    ours: float | None  # None: the row did not run, and `details` say why
    peer: float | None = None
    peer_name: str | None = None
    limit: float | None = None
    ratio_to_peer: float | None = None
    goal_to_peer: float | None = None
    ratio_to_limit: float | None = None
    goal_to_limit: float | None = None
    peak_mb_ours: int | None = None
    peak_mb_peer: int | None = None
    meets: bool = True
    details: dict[str, Any] = field(default_factory=dict)  # what else was measured


def compare(
    name: str,
    unit: str,
    count: int,
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    peer_name: str | None,
    goal_to_peer: float | None = None,
    goal_to_limit: float | None = None,
    peak_mb: Mapping[str, int] | None = None,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> Row:
    """Times `ours`, `peer` and optionally `limit`, each doing `count` units of the same work.

    Args:
        runs: contender -> one full run.
        warm_up: the first round is discarded; false where the caller has warmed up with something shorter.
        clock: in seconds.
    """
    seconds = alternate(runs, rounds, warm_up, clock)
    speeds = {key: round(count / statistics.median(times), 2) for key, times in seconds.items()}
    ratios = {
        key: round(statistics.median(other / ours for other, ours in zip(times, seconds["ours"], strict=True)), 3)
        for key, times in seconds.items()
    }
    meets = all(
        goal is None or ratios[key] >= goal
        for key, goal in (("peer", goal_to_peer), ("limit", goal_to_limit))
        if key in ratios
    )
    peaks = peak_mb or {}
    return Row(
        name,
        unit,
        speeds["ours"],
        speeds.get("peer"),
        peer_name,
        speeds.get("limit"),
        ratios.get("peer"),
        goal_to_peer,
        ratios.get("limit"),
        goal_to_limit,
        peaks.get("ours"),
        peaks.get("peer"),
        meets,
    )


def alternate(
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    warm_up: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, a warm-up round before them left out; the order rotates."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + warm_up):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            runs[name]()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    return seconds


def best_setting(run: Callable[[Any], object], settings: Sequence[Any]) -> Any:
    """The setting with the shortest of two runs: the peer competes at its best."""

    def shortest(setting: Any) -> float:
        return min(alternate({"run": lambda: run(setting)}, rounds=2)["run"])

    return min(settings, key=shortest)


def bare_forward(backbone: Any, preprocessor: Any, rows: Sequence[Any]) -> Callable[[Any], None]:
    """The limit: batches of tokenized rows made beforehand, then nothing but the backbone's forward.

    The function that it gives takes what other contenders take, and ignores it.
    """
    import torch

    from mmembed.backbones.patches import in_dtype
    from mmembed.data.collate import plan_chunks

    batches = [chunk.inputs(preprocessor) for chunk in plan_chunks(rows, LIMIT_BUDGET)]
    for inputs in batches:
        inputs.tensors.pop("attention_mask")
        for name, tensor in inputs.tensors.items():
            inputs.tensors[name] = in_dtype(tensor, backbone.dtype) if tensor.is_floating_point() else tensor

    @torch.inference_mode()
    def run(setting: Any) -> None:
        for inputs in batches:
            backbone(**inputs.tensors)

    return run


def peak_mb_of(module: str, arguments: Sequence[str]) -> int:
    """Peak resident memory, in MB, that `python -m module arguments` prints as its last line (see `own_peak_mb`)."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True, cwd=DATA.parent
    )
    return int(done.stdout.strip().splitlines()[-1])


def own_peak_mb() -> int:
    """Peak resident memory of this process so far, in MB. (`ru_maxrss` would include the parent's, across exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) // 1024


def set_up(threads: int | None = None) -> int:
    """Same threads for all, nothing from the network, quiet libraries; returns the number of threads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads or os.cpu_count() or 1)
    return torch.get_num_threads()


def environment() -> dict[str, str]:
    """What a figure was measured with: commit, versions of the libraries, card or processor."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    names = ("torch", "transformers", "accelerate", "peft", "deepspeed", "sentence-transformers")
    found = {"commit": commit(), "device": _processor()}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def commit() -> str:
    """Of the repository; with a digest of what was changed since, where something was."""
    import hashlib

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=DATA.parent, capture_output=True, check=True).stdout

    try:
        head, changes = git("rev-parse", "--short=12", "HEAD").decode().strip(), git("diff", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+{hashlib.blake2b(changes, digest_size=4).hexdigest()}" if changes else head


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else "a CPU"


def parser(description: str) -> Parser:
    """The options that all benchmarks share."""
    options = Parser(description=description)
    options.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    options.add_argument("--threads", type=int, default=None, help="default: all cores")
    return options


def told(row: Row) -> Row:
    """The row, which is told on stderr as soon as it is there: a run that is stopped has not measured for nothing."""
    print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return row


def show(rows: Sequence[Row], as_json: bool) -> None:
    """Prints the rows: one JSON object, or a table."""
    if as_json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))
        return
    head = ("name", "ours", "peer", "limit", "x peer", "goal", "x limit", "goal", "MB ours", "MB peer", "meets")
    table = [
        [
            row.name,
            row.ours,
            row.peer,
            row.limit,
            row.ratio_to_peer,
            row.goal_to_peer,
            row.ratio_to_limit,
            row.goal_to_limit,
            row.peak_mb_ours,
            row.peak_mb_peer,
            "yes" if row.meets else "NO",
        ]
        for row in rows
    ]
    cells = [list(head), *([("-" if cell is None else str(cell)) for cell in line] for line in table)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def texts(count: int, seed: int = 0) -> list[str]:
    """Real English texts of the shipped data with a skewed length: questions, paragraphs, a tail of long passages.

    Of every 20: 11 questions, 5 medical answers, 3 encyclopaedia paragraphs, 1 passage of three paragraphs. In tokens
    of the nano tokenizer: median about 30, 95 % under 370, longest beyond 512 (both sides truncate there).
    """
    import random

    draw = random.Random(seed)
    questions = _field("squad-en/queries.jsonl") + _field("medquad/queries.jsonl")
    answers, paragraphs = _field("medquad/corpus.jsonl"), _field("squad-en/corpus.jsonl")
    chosen = []
    for _ in range(count):
        kind = draw.randrange(20)
        if kind < 11:
            chosen.append(draw.choice(questions))
        elif kind < 16:
            chosen.append(draw.choice(answers))
        elif kind < 19:
            chosen.append(draw.choice(paragraphs))
        else:
            at = draw.randrange(len(paragraphs) - 2)
            chosen.append("\n".join(paragraphs[at : at + 3]))
    return chosen


def images(count: int, seed: int = 0) -> list[bytes]:
    """Encoded pictures of the shipped data: figures, photographs, illustrations and drawings in equal parts."""
    import random

    import pyarrow.parquet as parquet

    tables = [
        parquet.read_table(DATA / name / "images.parquet", columns=["image"])["image"]
        for name in ("openstax-figures", "clothing", "story-pages", "noto-emoji")
    ]
    draw = random.Random(seed)
    picked = [tables[index % len(tables)] for index in range(count)]
    return [table[draw.randrange(len(table))].as_py()["bytes"] for table in picked]


def _field(path: str, field: str = "text") -> list[str]:
    with (DATA / path).open(encoding="utf-8") as lines:
        return [json.loads(line)[field] for line in lines]
