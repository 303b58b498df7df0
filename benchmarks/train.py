"""Training throughput and memory at batch 256, against sentence-transformers' GradCache.

    python -m benchmarks.train --json

Both sides fine-tune the whole language tower of the nano weights (mean pooling, no prompt, vision frozen, AdamW,
InfoNCE at temperature 0.05 over in-batch negatives) through their own trainers, on the same pairs in the same batches;
the loss of the first step must agree (to 1e-4 in float32, 2e-2 under bfloat16 autocast) before anything counts. Real
pairs: one question a SQuAD paragraph, one a MedQuAD answer, so lengths are skewed and no batch holds a passage twice.

    ours   recipes' trainer with a token budget whose memory stays under the peer's
    peer   CachedMultipleNegativesRankingLoss, the fastest of its mini-batches (sizes, and its own token budget)

Each run is a process of its own, because peak memory is; the sides take turns. A speed is that of the median step, the
first step left out.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, own_peak_mb, parser, set_up, show

BATCH = 256
QUERY_LENGTH, DOCUMENT_LENGTH = 64, 256
TEMPERATURE = 0.05
LEARNING_RATE = 1e-4
GOAL = 1.5
PEER_SETTINGS = ("size=16", "size=32", "size=64", "tokens=4096", "tokens=8192")
OUR_BUDGET = {"fp32": 8192, "bf16": 4096}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--steps", type=int, default=5, help="counted steps a run (default 5)")
    options.add_argument("--precisions", nargs="+", choices=OUR_BUDGET, default=list(OUR_BUDGET))
    options.add_argument(
        "--worker", nargs=3, metavar=("SIDE", "PRECISION", "SETTING"), help="used by the benchmark itself"
    )
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    if arguments.worker:
        print(json.dumps(_worker(*arguments.worker, steps=arguments.steps)))
        return
    rows = [_measure(precision, arguments.steps, arguments.rounds, threads) for precision in arguments.precisions]
    show(rows, arguments.json)


def _measure(precision: str, steps: int, rounds: int, threads: int) -> Row:
    peer = max(PEER_SETTINGS, key=lambda setting: _run("peer", precision, setting, 2, threads)["pairs_per_second"])
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "peer": []}
    settings = {"ours": str(OUR_BUDGET[precision]), "peer": peer}
    for turn in range(rounds):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            runs[side].append(_run(side, precision, settings[side], steps, threads))
    first = {side: found[0]["first_loss"] for side, found in runs.items()}
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    if abs(first["ours"] - first["peer"]) > tolerance:
        raise SystemExit(f"{precision}: first-step losses differ: {first}; the timing would mean nothing")
    speed = {side: statistics.median(run["pairs_per_second"] for run in found) for side, found in runs.items()}
    peak = {side: int(statistics.median(run["peak_mb"] for run in found)) for side, found in runs.items()}
    ratio = statistics.median(
        ours["pairs_per_second"] / other["pairs_per_second"] for ours, other in zip(*runs.values(), strict=True)
    )
    return Row(
        f"train_{precision}",
        "pairs/s",
        round(speed["ours"], 2),
        round(speed["peer"], 2),
        f"CachedMultipleNegativesRankingLoss, mini-batch {peer}",
        ratio_to_peer=round(ratio, 3),
        goal_to_peer=GOAL,
        peak_mb_ours=peak["ours"],
        peak_mb_peer=peak["peer"],
        meets=ratio >= GOAL and peak["ours"] <= peak["peer"],
    )


def _run(side: str, precision: str, setting: str, steps: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.train", "--threads", str(threads), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--worker", side, precision, setting], check=True, stdout=subprocess.PIPE, text=True, cwd=DATA.parent
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _worker(side: str, precision: str, setting: str, steps: int) -> dict[str, float]:
    """One run of one side: speed of its median step, loss of its first step, peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_ours if side == "ours" else _peer)(precision, setting, steps + 1, folder)
        clock = _clock()
        trainer.add_callback(clock)
        trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {
        "pairs_per_second": BATCH / statistics.median(clock.seconds[1:]),
        "first_loss": first,
        "peak_mb": own_peak_mb(),
    }


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the end of one optimizer step to the end of the next: data loading counts."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not self.seconds:
                self.since = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

    return Clock()


def pairs(count: int) -> list[tuple[str, str]]:
    """(question, passage): every passage once, shortest and longest mixed as they come in the data."""
    found = []
    for name in ("squad-en", "medquad"):
        folder = DATA / name
        texts = {}
        for file in ("queries", "corpus"):
            with (folder / f"{file}.jsonl").open(encoding="utf-8") as lines:
                texts |= {record["_id"]: record["text"] for record in map(json.loads, lines)}
        used: set[str] = set()
        for line in (folder / "qrels" / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]:
            query, document, _ = line.split("\t")
            if texts[document] not in used:
                used.add(texts[document])
                found.append((texts[query], texts[document]))
    step = 997  # coprime to the number of pairs: mixes the two sets evenly, without a random generator
    return [found[index * step % len(found)] for index in range(count)]


def _arguments(precision: str, steps: int, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": precision == "bf16",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def _ours(precision: str, budget: str, steps: int, folder: str) -> Any:
    from mmembed.config import build_config
    from mmembed.content import Document, Example, to_content
    from mmembed.data.dataset import RecordDataset, media_store
    from mmembed.data.records import write_records
    from mmembed.models.embedding_model import build_embedding_model
    from mmembed.objectives import build_objective
    from mmembed.training.arguments import training_arguments
    from mmembed.training.trainer import EmbedderTrainer

    records = Path(folder, "pairs.jsonl")
    examples = (Example(to_content(query), (Document(to_content(text)),)) for query, text in pairs(BATCH * steps))
    write_records(records, examples)
    config = build_config(
        {
            "model": {"name_or_path": "mmembed-nano", "dtype": "float32"},
            "adapter": {"type": "none"},
            "lengths": {"query_max_length": QUERY_LENGTH, "document_max_length": DOCUMENT_LENGTH},
            "data": {"train": [{"path": str(records)}], "train_group_size": 1},
            "objective": {"type": "contrastive", "temperature": TEMPERATURE, "mask_duplicates": False},
            "training": {**_arguments(precision, steps, folder), "token_budget": int(budget)},
        }
    )
    args = training_arguments(config)
    media = media_store(config.data)
    model, preprocessor = build_embedding_model(config, media)
    objective = build_objective(config.objective, model.embedding_size)
    data = [RecordDataset(source, media, cache_dir=folder) for source in config.data.train]
    trainer = EmbedderTrainer(config, args, model, preprocessor, objective, data)
    trainer.plan = _InOrder(len(data[0]))
    return trainer


class _InOrder:
    """Batches of our trainer in the order of the file, as the peer gets them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for start in range(0, self.rows, BATCH):
            yield [(0, row, 0) for row in range(start, start + BATCH)]

    def __len__(self) -> int:
        return self.rows // BATCH

    def set_epoch(self, epoch: int) -> None:
        """One epoch only."""


def _peer(precision: str, setting: str, steps: int, folder: str) -> Any:
    from mmembed.backbones import resolve_backbone  # isort: skip - makes torchvision importable on a CPU machine

    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from torch.utils.data import SequentialSampler

    transformer = Transformer(
        resolve_backbone("mmembed-nano"),
        max_seq_length=DOCUMENT_LENGTH,  # questions of this data are all shorter than QUERY_LENGTH
        model_kwargs={"dtype": torch.float32},
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("visual" not in name)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    kind, _, value = setting.partition("=")
    size = {"mini_batch_size": int(value)} if kind == "size" else {"mini_batch_num_tokens": int(value)}
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **size)

    class InOrder(DefaultBatchSampler):
        def __init__(self, dataset: Dataset, **options: Any) -> None:
            super().__init__(SequentialSampler(dataset), **options)

    queries, documents = zip(*pairs(BATCH * steps), strict=True)
    data = Dataset.from_dict({"anchor": list(queries), "positive": list(documents)})
    args = SentenceTransformerTrainingArguments(
        **_arguments(precision, steps, folder), use_cpu=True, report_to="none", batch_sampler=InOrder
    )
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)


if __name__ == "__main__":
    main()
