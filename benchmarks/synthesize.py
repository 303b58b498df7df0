"""Tokens a second of a pipeline against those of the engine itself, on the same prompts.

    python -m benchmarks.synthesize --json [--model .llm/smollm2-135m-instruct] [--queries 256]

Passages at four levels for real queries, with a JSON schema. Engine, its settings, prompts and seeds are the same:

    ours    stage `graded_passages` through the generator `vllm`: templates, digests, JSON lines to the engine's
            process, answers checked and stored
    limit   `LLM.chat` of all prompts at once, in a process of its own that does nothing else

Each run is a process of its own with an engine of its own, timed from the first request to the last answer (loading is
left out on both sides), and they take turns; seeds are new in every round. Goal: 0.95 of the limit. Needs the
environment of `make vllm-env`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, environment, parser, set_up, show, told
from mmembed import packaged

GOAL = 0.95
ENGINE = {
    "max_model_len": 2048,
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 2 << 30,
    "enable_chunked_prefill": False,
}
TOKENS = 160  # of an answer
REPOSITORY = Path(__file__).resolve().parents[1]
PYTHON = REPOSITORY / ".venv-vllm/bin/python"
QUIET = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
DUMP = """
import json, sys
from data_tools.synthesis.inputs import collect, media_of
from data_tools.synthesis.settings import load_synthesis, steps
from data_tools.synthesis.stages import Context
from pathlib import Path
import tempfile
config = load_synthesis(sys.argv[1])
media, step = media_of(config), steps(config)[0]
with tempfile.TemporaryDirectory() as folder:
    items = collect(config, media, Path(folder)).items
    asks = [next(step.stage.work(item, Context(0, media, Path(folder), Path)))[0] for item in items]
json.dump({"messages": [ask.messages for ask in asks], "schema": asks[0].schema}, sys.stdout)
"""  # benchmarks do not import the data tools


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="mmembed-nano", help="what writes (default: the packaged nano)")
    options.add_argument("--queries", type=int, default=256)
    options.add_argument("--backend", default="guidance", help="of vLLM, for schemas (default: guidance; or xgrammar)")
    options.add_argument("--python", default=str(PYTHON), help="has vLLM (default: that of make vllm-env)")
    options.set_defaults(rounds=3)
    arguments = options.parse_args()
    set_up()
    engine = {**ENGINE, "structured_outputs_config": {"backend": arguments.backend, "disable_any_whitespace": True}}
    generator = {"type": "vllm", "model": arguments.model, "python": arguments.python, "engine": engine}
    row = measured(generator, arguments.queries, arguments.rounds)
    show([told(row)], arguments.json)


def measured(generator: dict[str, Any], queries: int, rounds: int) -> Row:
    rates: dict[str, list[float]] = {"ours": [], "limit": []}
    counts: dict[str, list[Any]] = {"ours": [], "limit": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = (DATA / "squad-en" / "queries.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:queries]
        (folder / "queries.jsonl").write_text("".join(lines), encoding="utf-8")
        config = folder / "synthesis.yaml"
        config.write_text(json.dumps(pipeline(generator, folder)), encoding="utf-8")
        contenders = {"ours": through_pipeline, "limit": at_once}
        for turn in range(rounds):
            for contender in sorted(contenders, reverse=bool(turn % 2)):
                seconds, tokens = contenders[contender](config, generator, turn)
                rates[contender].append(tokens / seconds)
                counts[contender].append([tokens, round(seconds, 2)])
                print(f"round {turn + 1}: {contender} {tokens / seconds:,.0f} tokens/s", file=sys.stderr, flush=True)
    return row_of(rates, counts, generator)


def pipeline(generator: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config of ours."""
    stage = {"type": "graded_passages", "max_tokens": TOKENS, "min_words": 5, "max_words": 20}
    return {
        "output": str(folder / "out"), "sources": [{"path": str(folder / "queries.jsonl"), "kind": "queries"}],
        "generator": generator, "stages": [stage], "attempts": 1, "max_lost": 1.0,
    }  # fmt: skip


def row_of(rates: dict[str, list[float]], counts: dict[str, list[Any]], generator: dict[str, Any]) -> Row:
    """Args: counts: tokens and seconds of each round."""
    ratios = [own / other for own, other in zip(rates["ours"], rates["limit"], strict=True)]
    ratio, speeds = statistics.median(ratios), {name: statistics.median(given) for name, given in rates.items()}
    details = {"ratios": [round(one, 3) for one in ratios], "tokens": counts}
    details |= {"model": generator["model"], "engine": generator["engine"]}
    return Row(
        "graded passages, tokens of answers", "tokens/s", round(speeds["ours"], 1), limit=round(speeds["limit"], 1),
        ratio_to_limit=round(ratio, 3), goal_to_limit=GOAL, meets=ratio >= GOAL, details={**details, **environment()},
    )  # fmt: skip


def through_pipeline(config: Path, _: dict[str, Any], seed: int) -> tuple[float, int]:
    """Seconds and answer tokens of the command."""
    output = config.parent / f"out-{seed}"
    command = [sys.executable, "-m", "data_tools.synthesize", "--config", str(config)]
    subprocess.run([*command, f"output={output}", f"seed={seed}"], cwd=REPOSITORY, check=True, stdout=sys.stderr)
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary["stages"][0]["seconds"], summary["stages"][0]["tokens"]


def at_once(config: Path, generator: dict[str, Any], seed: int) -> tuple[float, int]:
    """The same of the engine itself, on the prompts of the command."""
    dump = subprocess.run([sys.executable, "-c", DUMP, str(config)], cwd=REPOSITORY, check=True, capture_output=True)
    job = {**json.loads(dump.stdout), "engine": generator["engine"], "seed": 1000 * (seed + 1), "max_tokens": TOKENS}
    job["model"] = packaged.resolve(generator["model"])
    done = subprocess.run(
        [generator["python"], str(Path(__file__).with_name("synthesize_direct.py"))],
        input=json.dumps(job), text=True, check=True, stdout=subprocess.PIPE, env={**os.environ, **QUIET},
    )  # fmt: skip
    said = json.loads(done.stdout)
    return said["seconds"], said["tokens"]


if __name__ == "__main__":
    main()
