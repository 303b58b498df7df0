"""Rows `sft` and `contrastive` of `benchmarks.rerank`: training a reranker against sentence-transformers' trainer.

Both sides fine-tune the language tower of the nano weights (vision tower, projector and the two answers' rows frozen,
AdamW) through their own trainers on the same steps of 8 queries: a question of SQuAD or MedQuAD, the document that
answers it and seven others of the best by BM25. The losses of all steps must agree to 1e-4 in float32, to 1e-3 under
bfloat16 autocast, or a row has no timing.

    sft, sft_bf16                   cross-entropy of the two answers, pair by pair: BinaryCrossEntropyLoss
    contrastive, contrastive_bf16   the answer among a query's eight: ListNetLoss, whose softmax of the labels 100 and 0
                                    is 1 and 0 to the last digit

    ours   recipes' trainer, at the fastest of several token budgets
    peer   CrossEncoderTrainer on strings in which the chat stands already, at the fastest of several ways to cut its
           step: BinaryCrossEntropyLoss by gradient accumulation, ListNetLoss by its mini-batches

Each run is a process of its own, because peak memory is; the sides take turns, each in the waiting policy of OpenMP in
which it is faster (`benchmarks.train`). A speed is that of the median step, the first one left out.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, environment, own_peak_mb
from benchmarks.rerank import LENGTHS, PROMPT, WORDS, Collection, peer, written
from benchmarks.train import LEARNING_RATE, WAITING, in_order, peer_in_order, step_clock

QUERIES, GROUP = 8, 8  # of a step; documents a query, the first one relevant
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-3}
CERTAIN = 100.0  # a label beside 0: softmax is 1 and e^-100
BUDGETS = ("2048", "4096", "8192")  # tokens at a time, ours


@dataclass(frozen=True)
class Case:
    """One row: the loss, the precision, and how the peer may cut its step (pairs at a time)."""

    loss: str
    precision: str
    goal: float = 2.0
    settings: tuple[str, ...] = ("8", "16", "32", "64")


CASES = {
    "sft": Case("sft", "fp32"),
    "contrastive": Case("contrastive", "fp32"),
    "sft_bf16": Case("sft", "bf16"),
    "contrastive_bf16": Case("contrastive", "bf16"),
}
PEER_LOSSES = {"sft": "BinaryCrossEntropyLoss", "contrastive": "ListNetLoss"}


def measure(name: str, steps: int, rounds: int, threads: int) -> Row:
    """The row of a case. Raises SystemExit where the losses differ."""
    case, best = CASES[name], {side: _best(side, name, threads) for side in ("ours", "peer")}
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for turn in range(rounds):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            runs[side].append(_run(side, name, best[side], steps, threads))
    losses = {side: found[0]["losses"] for side, found in runs.items()}
    apart = max(abs(ours - other) for ours, other in zip(*losses.values(), strict=True))
    if not apart <= TOLERANCES[case.precision]:
        raise SystemExit(f"{name}: losses differ: {losses}; the timing would mean nothing")
    speeds = {
        side: [QUERIES * GROUP / statistics.median(run["seconds"][1:]) for run in found] for side, found in runs.items()
    }
    peak = {side: int(statistics.median(run["peak_mb"] for run in found)) for side, found in runs.items()}
    ratio = statistics.median(ours / other for ours, other in zip(*speeds.values(), strict=True))
    return Row(
        name,
        "pairs/s",
        round(statistics.median(speeds["ours"]), 2),
        round(statistics.median(speeds["peer"]), 2),
        f"{PEER_LOSSES[case.loss]}, {best['peer']} pairs at a time",
        ratio_to_peer=round(ratio, 3),
        goal_to_peer=case.goal,
        peak_mb_ours=peak["ours"],
        peak_mb_peer=peak["peer"],
        meets=ratio >= case.goal and peak["ours"] <= peak["peer"],
        details={
            "token_budget": int(best["ours"]),
            "losses": losses,
            "largest_difference": apart,
            "environment": environment(),
        },
    )


@cache
def _best(side: str, name: str, threads: int) -> str:
    """The setting of a side whose second step is the fastest."""
    settings = BUDGETS if side == "ours" else CASES[name].settings
    return min(settings, key=lambda one: _run(side, name, one, 1, threads)["seconds"][1])


def _run(side: str, name: str, setting: str, steps: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.rerank", "--threads", str(threads), "--steps", str(steps)]
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [*command, "--worker", side, name, setting],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=DATA.parent,
        env=inherited | WAITING[side],
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def work(side: str, name: str, setting: str, steps: int) -> dict[str, Any]:
    """One run of one side: seconds and loss of each step, peak memory of the process."""
    groups = _groups(QUERIES * (steps + 1))
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_ours if side == "ours" else _peer)(CASES[name], int(setting), groups, folder)
        clock = step_clock()
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": clock.seconds, "losses": losses, "peak_mb": own_peak_mb()}


def _groups(queries: int) -> list[tuple[str, list[str]]]:
    """Questions with eight documents each, of which the first answers it; SQuAD and MedQuAD in turn."""
    found: list[list[tuple[str, list[str]]]] = []
    for name in ("squad-en", "medquad"):
        collection = Collection(name)
        found.append([])
        for query in collection.spread((queries + 1) // 2):
            others = [text for text in collection.nearest(query.text, GROUP) if text != query.answer]
            found[-1].append((query.text, [query.answer, *others[: GROUP - 1]]))
    return [group for both in zip(*found, strict=True) for group in both][:queries]


def _arguments(case: Case, groups: list[Any], rows: int, folder: str) -> dict[str, Any]:
    """What both trainers are told. `rows`: of a step's data set."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": rows,
        "max_steps": len(groups) // QUERIES,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": case.precision == "bf16",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _ours(case: Case, budget: int, groups: list[tuple[str, list[str]]], folder: str) -> Any:
    from mmembed.config import build_config
    from mmembed.config.blocks import RerankerConfig
    from mmembed.content import Document, Example, to_content
    from mmembed.data.records import write_records

    records = Path(folder, "groups.jsonl")
    write_records(
        records,
        (
            Example(
                to_content(query),
                tuple(Document(to_content(text), relevance=float(not place)) for place, text in enumerate(documents)),
            )
            for query, documents in groups
        ),
    )
    tree = {
        "model": {"name_or_path": "mmembed-nano", "dtype": "float32", "freeze": ["vision", "projector"]},
        "adapter": {"type": "none"},
        "head": {"type": "yes_no", "words": list(WORDS)},
        "prompt": PROMPT,
        "lengths": LENGTHS,
        "data": {"train": [{"path": str(records)}], "train_group_size": GROUP},
        "objective": "sft" if case.loss == "sft" else {"type": "ranking", "loss": "infonce"},
        "training": {**_arguments(case, groups, QUERIES, folder), "token_budget": budget},
    }
    return in_order(build_config(tree, kind=RerankerConfig), QUERIES, folder)


def _peer(case: Case, pairs: int, groups: list[tuple[str, list[str]]], folder: str) -> Any:
    """Its trainer, `pairs` at a time."""
    import mmembed.backbones  # noqa: F401  # isort: skip - makes torchvision importable on a CPU machine

    from datasets import Dataset
    from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, ListNetLoss

    model = peer("float32", written=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name and "lm_head" not in name)
    texts = [[written(query, document) for document in documents] for query, documents in groups]
    loss: Any
    if case.loss == "sft":
        loss, steps, rows = BinaryCrossEntropyLoss(model), QUERIES * GROUP // pairs, pairs
        columns: dict[str, list[Any]] = {
            "query": [query for group in texts for query, _ in group],
            "document": [document for group in texts for _, document in group],
            "label": [float(not place) for group in texts for place in range(len(group))],
        }
    else:
        loss, steps, rows = ListNetLoss(model, mini_batch_size=pairs), 1, QUERIES
        columns = {
            "query": [group[0][0] for group in texts],
            "documents": [[document for _, document in group] for group in texts],
            "labels": [[CERTAIN * (not place) for place in range(len(group))] for group in texts],
        }
    args = CrossEncoderTrainingArguments(
        **_arguments(case, groups, rows, folder),
        gradient_accumulation_steps=steps,
        use_cpu=True,
        report_to="none",
        batch_sampler=peer_in_order(),
    )
    return CrossEncoderTrainer(model=model, args=args, train_dataset=Dataset.from_dict(columns), loss=loss)
