"""Training throughput and memory against sentence-transformers' GradCache: text, an instruction, images.

    python -m benchmarks.train --json [--only text_1024 ...]

Both sides fine-tune the whole language tower of the nano weights (mean pooling, vision tower and its projector frozen,
AdamW, InfoNCE at temperature 0.05 over in-batch negatives) through their own trainers, on the same pairs in the same
batches. The losses of all steps must agree, or a row has no timing: to 1e-4 in float32, to 3e-4 under bfloat16
autocast, where the sides round in other places. Measured: float32 7e-7 in three steps of 24 texts or pictures,
bfloat16 5e-5 there and 2e-5 in two steps of 256 texts. `details` has the losses and the largest difference.

    train_fp32, train_bf16          batch 256: one question a SQuAD paragraph, one a MedQuAD answer, so lengths are
                                    skewed and no batch holds a passage twice
    text_1024                       the same pairs at batch 1,024, float32
    instruction_1024                and an instruction of 64 tokens before each question
    images_1024_first_epoch         a caption and its picture, each seen for the first time: the run's first step, with
                                    the reading of the pictures
    images_1024_second_epoch        the same run from its second step on: the same pictures again
    instructed_images_1024          the second epoch, with the instruction before each caption

    ours   recipes' trainer with a token budget whose memory stays under the peer's
    peer   CachedMultipleNegativesRankingLoss, the fastest of its mini-batches (sizes, and its own token budget), tried
           on one step of 256 pairs of the same kind and kept for all rows of the kind; the instruction is its `prompts`

The memory cap of a row is what the peer needs in that fastest setting (`peak_mb_peer`): `meets` asks for the goal at no
more than that. A first epoch has no goal but the cap.

Each run is a process of its own, because peak memory is; the sides take turns. Each has the waiting policy of OpenMP in
which it is faster: ours passive, as `recipes.train_embedder` sets it, the peer the default. A speed is that of the
median step, the first step left out where it is not what is asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, INSTRUCTION, Row, environment, own_peak_mb, parser, set_up, show, told
from benchmarks._peers import mean_embedder

SEARCHED = 256  # pairs of the steps that choose the peer's setting
QUERY_LENGTHS, DOCUMENT_LENGTH = {"text": 64, "instruction": 128, "images": 256, "instructed images": 256}, 256
PICTURED = ("images", "instructed images")
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-4}  # of a loss
TEMPERATURE = 0.05
LEARNING_RATE = 1e-4
WAITING = {"ours": {"OMP_WAIT_POLICY": "passive"}, "peer": {}}  # as our command sets it; the peer is faster without
PEER_SETTINGS = ("size=16", "size=32", "size=64", "tokens=4096", "tokens=8192")


@dataclass(frozen=True)
class Case:
    """One row: what is trained on, how, and our token budget."""

    kind: str
    batch: int
    precision: str
    goal: float | None
    budget: int
    steps: int
    first: bool = False  # the first step counts, and no other

    @property
    def run(self) -> tuple[str, int, str, int]:
        """What two rows have in common that are read off the same runs."""
        return self.kind, self.batch, self.precision, self.budget


CASES = {
    "train_fp32": Case("text", 256, "fp32", 1.5, 8192, 5),
    "train_bf16": Case("text", 256, "bf16", 1.5, 4096, 5),
    "text_1024": Case("text", 1024, "fp32", 1.5, 4096, 1),
    "instruction_1024": Case("instruction", 1024, "fp32", 2.5, 4096, 1),
    "images_1024_first_epoch": Case("images", 1024, "fp32", None, 8192, 1, first=True),
    "images_1024_second_epoch": Case("images", 1024, "fp32", 3.0, 8192, 1),
    "instructed_images_1024": Case("instructed images", 1024, "fp32", 3.0, 8192, 1),
}


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.set_defaults(rounds=2)
    options.add_argument("--steps", type=int, help="counted steps a run (default 5 at batch 256, 1 at batch 1,024)")
    options.add_argument("--batch", type=int, help="another batch size, for a short run")
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="rows (default all)")
    options.add_argument("--peer-setting", choices=PEER_SETTINGS, help="the peer's mini-batch, instead of a search")
    options.add_argument("--worker", nargs=3, metavar=("SIDE", "CASE", "SETTING"), help="used by the benchmark itself")
    arguments = options.parse_args()
    threads = set_up(arguments.threads)
    if arguments.worker:
        side, name, setting = arguments.worker
        print(json.dumps(_worker(side, CASES[name], setting, arguments.batch, arguments.steps)))
        return
    rows, found = [], {}
    for name in arguments.only:
        case = CASES[name]
        batch, steps = arguments.batch or case.batch, arguments.steps or case.steps
        peer = arguments.peer_setting or _best_peer(name, min(SEARCHED, batch), threads)
        if case.run not in found:
            found[case.run] = _runs(name, batch, steps, arguments.rounds, peer, threads)
        rows.append(told(_row(name, batch, found[case.run], peer)))
    show(rows, arguments.json)


def _best_peer(name: str, batch: int, threads: int) -> str:
    case = CASES[name]
    of_kind = next(
        other for other in CASES if (CASES[other].kind, CASES[other].precision) == (case.kind, case.precision)
    )
    return _search(of_kind, batch, threads)


@cache
def _search(name: str, batch: int, threads: int) -> str:
    return min(PEER_SETTINGS, key=lambda one: _run("peer", name, one, batch, 1, threads)["seconds"][1])


def _runs(name: str, batch: int, steps: int, rounds: int, peer: str, threads: int) -> dict[str, list[dict[str, Any]]]:
    """Side -> what each of its runs found; the sides in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    settings = {"ours": str(CASES[name].budget), "peer": peer}
    for turn in range(rounds):
        for side in ("ours", "peer") if turn % 2 else ("peer", "ours"):
            runs[side].append(_run(side, name, settings[side], batch, steps, threads))
    return runs


def _row(name: str, batch: int, runs: dict[str, list[dict[str, Any]]], peer: str) -> Row:
    case = CASES[name]
    losses = {side: found[0]["losses"] for side, found in runs.items()}
    apart = [abs(ours - other) for ours, other in zip(*losses.values(), strict=True)]
    print(f"{name}: losses differ by at most {max(apart):.2g}", file=sys.stderr)
    if not all(one <= TOLERANCES[case.precision] for one in apart):
        raise SystemExit(f"{name}: losses differ: {losses}; the timing would mean nothing")
    speeds = {
        side: [batch / (run["seconds"][0] if case.first else statistics.median(run["seconds"][1:])) for run in found]
        for side, found in runs.items()
    }
    speed = {side: statistics.median(found) for side, found in speeds.items()}
    peak = {side: int(statistics.median(run["peak_mb"] for run in found)) for side, found in runs.items()}
    ratio = statistics.median(ours / other for ours, other in zip(*speeds.values(), strict=True))
    return Row(
        name,
        "pairs/s",
        round(speed["ours"], 2),
        round(speed["peer"], 2),
        f"CachedMultipleNegativesRankingLoss, mini-batch {peer}",
        ratio_to_peer=round(ratio, 3),
        goal_to_peer=case.goal,
        peak_mb_ours=peak["ours"],
        peak_mb_peer=peak["peer"],
        meets=(case.goal is None or ratio >= case.goal) and peak["ours"] <= peak["peer"],
        details={"losses": losses, "largest_difference": max(apart), "environment": environment()},
    )


def _run(side: str, name: str, setting: str, batch: int, steps: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train", "--threads", str(threads), "--steps", str(steps)]
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [*command, "--batch", str(batch), "--worker", side, name, setting],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=DATA.parent,
        env=inherited | WAITING[side],
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _worker(side: str, case: Case, setting: str, batch: int, steps: int) -> dict[str, Any]:
    """One run of one side: seconds and loss of each step, peak memory of the process."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = (ours if side == "ours" else _peer)(case, setting, batch, steps + 1, folder)
        clock = step_clock()
        trainer.add_callback(clock)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": clock.seconds, "losses": losses, "peak_mb": own_peak_mb()}


def step_clock() -> Any:
    """A callback whose `seconds` are those of each step."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds from the end of one optimizer step to the end of the next, of the first one from the start of the
        epoch: data loading counts."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            if not self.seconds:
                self.since = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()  # the optimizer's kernels may still be waiting
            now = time.perf_counter()
            self.seconds.append(now - self.since)
            self.since = now

    return Clock()


# Data -----------------------------------------------------------------------------------------------------------------


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


def pictures(count: int, instruction: str = "") -> list[tuple[str, bytes]]:
    """(instruction and caption, encoded picture), each once: figures of textbooks and manuals, then emoji by name.

    Captions are cut to 200 characters: the two sides truncate a chat at different places.
    """
    import pyarrow.parquet as parquet

    found = []
    for name, column in (("openstax-figures", "alt"), ("tech-figures", "alt"), ("noto-emoji", "name")):
        table = parquet.read_table(DATA / name / "images.parquet", columns=["image", column])
        rows = zip(table[column].to_pylist(), table["image"].to_pylist(), strict=True)
        found += [(instruction + text[:200], picture["bytes"]) for text, picture in rows if text]
    if count > len(found):
        raise SystemExit(f"--batch: {count} pictures of {len(found)} there are; give a smaller batch")
    return found[:count]


def _before_captions(case: Case) -> str:
    """What stands in the captions themselves, so that the chats of both sides are the same tokens."""
    return INSTRUCTION if case.kind == "instructed images" else ""


def _arguments(case: Case, batch: int, steps: int, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "bf16": case.precision == "bf16",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


# Our side -------------------------------------------------------------------------------------------------------------


def ours(case: Case, budget: str, batch: int, steps: int, folder: str) -> Any:
    """Our trainer on `steps` batches of text, or on one batch of pictures again and again."""
    from mmembed.config import build_config

    records, pictured = Path(folder, "pairs.jsonl"), case.kind in PICTURED
    given: list[tuple[str, Any]] = [] if pictured else list(pairs(batch * steps))
    if pictured:
        for number, (caption, encoded) in enumerate(pictures(batch, _before_captions(case))):
            Path(folder, f"{number}.webp").write_bytes(encoded)
            given.append((caption, {"image": f"{number}.webp"}))
    write_pairs(records, given)
    prompt: dict[str, Any] = {"type": "plain", "mask_instruction": False}
    if case.kind == "instruction":
        prompt["query_prefix"] = INSTRUCTION
    if pictured:
        prompt = {"type": "chat", "mask_instruction": False, "add_generation_prompt": False}
    keep = {"vision_cache": str(Path(folder, "features"))} if pictured else {}
    config = build_config(
        {
            "model": {"name_or_path": "mmembed-nano", "dtype": "float32", "freeze": ["vision", "projector"]},
            "adapter": {"type": "none"},
            "lengths": {"query_max_length": QUERY_LENGTHS[case.kind], "document_max_length": DOCUMENT_LENGTH},
            "prompt": prompt,
            "data": {"train": [{"path": str(records)}], "train_group_size": 1},
            "objective": {"type": "contrastive", "temperature": TEMPERATURE, "mask_duplicates": False},
            "training": {**_arguments(case, batch, steps, folder), "token_budget": int(budget), **keep},
        }
    )
    return in_order(config, batch, folder)


def in_order(config: Any, batch: int, folder: str, loaded: Any = None) -> Any:
    """The trainer of a config whose batches are the records in the order of the file.

    Args:
        loaded: (model, preprocessor), where they are built already.
    """
    from mmembed.data.dataset import RecordDataset, media_store
    from mmembed.models.embedding_model import build_embedding_model
    from mmembed.objectives import build_objective
    from mmembed.training.arguments import training_arguments
    from mmembed.training.trainer import EmbedderTrainer

    args = training_arguments(config)
    media = media_store(config.data)
    model, preprocessor = loaded or build_embedding_model(config, media)
    objective = build_objective(config.objective, model.embedding_size, model.depth)
    data = [RecordDataset(source, media, cache_dir=folder) for source in config.data.train]
    trainer = EmbedderTrainer(config, args, model, preprocessor, objective, data)
    trainer.plan = InOrder(len(data[0]), batch)
    return trainer


def write_pairs(file: Path, given: Iterable[tuple[Any, Any]]) -> None:
    """(query, document) contents as records of one positive each."""
    from mmembed.content import Document, Example, to_content
    from mmembed.data.records import write_records

    write_records(file, (Example(to_content(query), (Document(to_content(document)),)) for query, document in given))


class InOrder:
    """Batches of our trainer in the order of the file, as the peer gets them, in every epoch."""

    def __init__(self, rows: int, batch: int) -> None:
        self.rows, self.batch = rows, batch

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        for start in range(0, self.rows, self.batch):
            yield [(0, row, 0) for row in range(start, start + self.batch)]

    def __len__(self) -> int:
        return self.rows // self.batch

    def set_epoch(self, epoch: int) -> None:
        """The same order again."""


# The peer -------------------------------------------------------------------------------------------------------------


def _peer(case: Case, setting: str, batch: int, steps: int, folder: str) -> Any:
    from mmembed.backbones import resolve_backbone  # isort: skip - makes torchvision importable on a CPU machine

    import torch
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss

    model = mean_embedder(
        resolve_backbone("mmembed-nano"),
        pictures=case.kind in PICTURED,
        length=DOCUMENT_LENGTH,  # questions of this data are all shorter than our limit for queries
        dtype=torch.float32,
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual" not in name)
    kind, _, value = setting.partition("=")
    size = {"mini_batch_size": int(value)} if kind == "size" else {"mini_batch_num_tokens": int(value)}
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **size)

    args = SentenceTransformerTrainingArguments(
        **_arguments(case, batch, steps, folder),
        use_cpu=True,
        report_to="none",
        batch_sampler=peer_in_order(),
        prompts={"anchor": INSTRUCTION} if case.kind == "instruction" else None,
    )
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=_peer_data(case, batch, steps), loss=loss)


def peer_in_order() -> Any:
    """The sampler class with which the peer's batches follow the order of its dataset."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    class PeerInOrder(DefaultBatchSampler):
        def __init__(self, dataset: Any, **options: Any) -> None:
            super().__init__(SequentialSampler(dataset), **options)

    return PeerInOrder


def _peer_data(case: Case, batch: int, steps: int) -> Any:
    from datasets import Dataset, Features, Image, Value

    if case.kind not in PICTURED:
        queries, documents = zip(*pairs(batch * steps), strict=True)
        return Dataset.from_dict({"anchor": list(queries), "positive": list(documents)})
    captions, encoded = zip(*pictures(batch, _before_captions(case)), strict=True)
    columns = {"anchor": list(captions), "positive": [{"bytes": one, "path": None} for one in encoded]}
    return Dataset.from_dict(columns, features=Features({"anchor": Value("string"), "positive": Image(mode="RGB")}))


if __name__ == "__main__":
    main()
