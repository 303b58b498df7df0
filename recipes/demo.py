"""The main job on a laptop: measure the packaged nano model, fine-tune it, measure again, look at the difference.

    make demo                       # or: python recipes/demo.py --output runs/demo

It strings the project's own commands together, each in a process of its own, exactly as a user would type them:

    python -m eval.run               mmembed-nano (zero-shot) beside BM25 and MiniLM, dev parts of real data
    python -m recipes.train_embedder LoRA on the training parts
    python -m eval.run               the trained model, same tasks
    python -m eval.report            report.html and report.json

With --rerank three steps come before the report, about three minutes more: a reranker of the same small model is put
behind the embedder. So few steps do not make a good one of it (docs/log.md); it shows how the commands go together.

    python -m data_tools.mine_negatives  hard negatives that the trained model finds
    python -m recipes.train_reranker     LoRA on these
    python -m eval.rerank                the trained model's best documents, ordered by the reranker

An interrupted demo goes on after the last finished step when it is started again; a finished one starts anew. While it
runs, the memory of all its processes together is sampled four times a second (shared pages count for each of them).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from mmembed.arguments import Parser
from mmembed.config import load_config
from mmembed.errors import ConfigError
from mmembed.inference.cpu import cpu_capabilities

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = REPOSITORY / "recipes/configs/embedder/demo.yaml"
TASKS = (
    "squad-en", "openstax-glossary", "mbpp", "odex", "xquad/de",
    "openstax-figures", "noto-emoji/en", "story-pages/en", "tech-figures", "vega-charts", "stsb-en",
)  # fmt: skip
RERANKED = ("squad-en", "openstax-glossary", "mbpp", "odex")
MINING = REPOSITORY / "recipes/configs/mining/demo_reranker.yaml"
RERANKER = REPOSITORY / "recipes/configs/reranker/demo.yaml"
DEPTH = 10  # documents that are ordered anew
SAMPLE_SECONDS = 0.25
BFLOAT16 = ["model.dtype=bfloat16", "training.bf16=true"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    output: Path = options.output
    try:  # now, not after the minutes of the first step
        load_config(options.config, overrides(options))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    record = output / "steps.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    if done:
        print(f"Going on with an interrupted demo ({', '.join(done)} done); delete {output} to start afresh.")
    commands = steps(options)
    for number, (name, (what, command)) in enumerate(commands.items(), start=1):
        if done.get(name, {}).get("command") == command:
            continue
        print(f"\n[{number}/{len(commands)}] {what}\n$ {shlex.join(['python', *command])}", flush=True)
        code, measured = run_measured([sys.executable, *command])
        if code != 0:
            print(f"\nThe step '{name}' failed (exit status {code}); start the demo again to go on from it.")
            return code
        done[name] = {"command": command, **measured}
        record.write_text(json.dumps(done, indent=1))
        print(f"    {measured['seconds']:.0f} s, {measured['peak_rss_mb']:.0f} MB", flush=True)

    print(f"\n[{len(commands) + 1}/{len(commands) + 1}] Writing the report", flush=True)
    code = subprocess.run([sys.executable, "-m", "eval.report", "--run", str(output), "--data-root", options.data_root],
                          cwd=REPOSITORY).returncode  # fmt: skip
    if code == 0:
        record.unlink()
    return code


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run (default: runs/demo)")
    parser.add_argument("--config", default=str(CONFIG), help="training configuration (default: the demo's)")
    parser.add_argument("--data-root", default=str(REPOSITORY / "data"), help="data sets (default: the repository's)")
    parser.add_argument("--rerank", action="store_true", help="train a reranker, too, and put it behind the embedder")
    parser.add_argument("--mining-config", default=str(MINING), help="negatives for the reranker (default: the demo's)")
    parser.add_argument("--reranker-config", default=str(RERANKER), help="of the reranker (default: the demo's)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="what is measured, of the local benchmark")
    parser.add_argument("--reranked", nargs="+", default=list(RERANKED), help="tasks whose documents are reranked")
    parser.add_argument("--model", default="mmembed-nano", help="what is fine-tuned (default: mmembed-nano)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the training configuration")
    options = parser.parse_intermixed_args(arguments)
    options.output = options.output.absolute()  # the steps run in the repository, wherever this was started
    for name in ("config", "mining_config", "reranker_config", "data_root"):
        setattr(options, name, str(Path(getattr(options, name)).absolute()))
    if Path(options.model).exists():  # else a name
        options.model = str(Path(options.model).absolute())
    return options


def steps(options: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """name -> (what it does, arguments of python)."""
    output, trained = options.output, options.output / "embedder"

    def evaluation(name: str, model: str, *flags: str) -> list[str]:
        return ["-m", "eval.run", "--model", model, *flags, "--data-root", options.data_root, "--tasks", *options.tasks,
                "--output", str(output / f"{name}.json"), "--rankings", str(output / name)]  # fmt: skip

    training = ["-m", "recipes.train_embedder", "--config", options.config, *overrides(options)]
    mined, reranker = output / "mined", output / "reranker"
    mining = ["-m", "data_tools.mine_negatives", "--config", options.mining_config, f"root={options.data_root}",
              f"output={mined}", f"retriever.model={trained}"]  # fmt: skip
    reranking = ["-m", "recipes.train_reranker", "--config", options.reranker_config, f"data.root={mined}",
                 f"data.media_root={options.data_root}",
                 f"model.name_or_path={options.model}", f"training.output_dir={reranker}",
                 *precision(options.reranker_config == str(RERANKER))]  # fmt: skip
    measuring = ["-m", "eval.rerank", "--model", str(reranker), "--first-stage", str(trained), "--depth", str(DEPTH),
                 "--data-root", options.data_root, "--output", str(output / "reranked"), "--tasks",
                 *options.reranked]  # fmt: skip
    main_job = {
        "before": ("Measuring the model as it is, beside BM25 and MiniLM", evaluation("before", options.model)),
        "training": ("Fine-tuning it on texts and pictures", training),
        "after": ("Measuring the fine-tuned model", evaluation("after", str(trained), "--no-baselines")),
    }  # fmt: skip
    if not options.rerank:
        return main_job
    return main_job | {
        "mining": ("Mining hard negatives with it", mining),
        "reranker": ("Training a reranker on them", reranking),
        "reranked": ("Measuring what the reranker does to the embedder's best documents", measuring),
    }  # fmt: skip


def overrides(options: argparse.Namespace) -> list[str]:
    """What the training takes beside its configuration."""
    folders = (f"data.root={options.data_root}", f"training.output_dir={options.output / 'embedder'}")
    fast = precision(options.config == str(CONFIG))
    return [f"model.name_or_path={options.model}", *folders, *fast, *options.overrides]


def precision(ours: bool) -> list[str]:
    """Of a training with our own configuration."""
    return BFLOAT16 if ours and trains_faster_in_bfloat16() else []


def trains_faster_in_bfloat16() -> bool:
    """A GPU does, and a processor with AVX-512's bfloat16 instructions (1.7 times); not one with AMX (.8 times, for so
    small a model), and one without either emulates it (a twentieth)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = cpu_capabilities()
    return bool(cpu.get("avx512_bf16")) and not cpu.get("amx_bf16")


def run_measured(command: list[str]) -> tuple[int, dict[str, Any]]:
    """(exit status, seconds and peak memory of the command and all it starts, with this process)."""
    environment = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "true"} | os.environ
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment)
    finished, peak = threading.Event(), [0.0]

    def sample() -> None:
        while not finished.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], resident_megabytes())

    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    finally:
        finished.set()
        watcher.join()
    return code, {"seconds": round(time.monotonic() - started, 1), "peak_rss_mb": round(peak[0], 1)}


def resident_megabytes() -> float:
    """Resident memory of this process and everything below it."""
    total = 0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # it ended between listing and reading
            continue
    return total / 2**20


if __name__ == "__main__":
    sys.exit(main())
