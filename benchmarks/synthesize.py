"""Tokens a second of a pipeline against those of the engine itself, on the same prompts.

    python -m benchmarks.synthesize --json [--model .llm/smollm2-135m-instruct] [--queries 256]

Passages at four levels for real queries, with a JSON schema. Engine, its settings, prompts and seeds are the same:

    ours    stage `graded_passages` through the generator `vllm`: templates, digests, JSON lines to the engine's
            process, answers checked and stored
    limit   `LLM.chat` of all prompts at once, in a process of its own that does nothing else

Both engines are loaded before anything is timed, and take turns; seeds are new in every round. Goal: 0.95 of the limit.
Needs the environment of `make vllm-env`.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._common import DATA, Row, alternate, environment, parser, set_up, show, told

GOAL = 0.95
ENGINE = {"max_model_len": 2048, "dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 2 << 30}
TOKENS = 160  # of an answer


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", default="mmembed-nano", help="what writes (default: the packaged nano)")
    options.add_argument("--queries", type=int, default=256)
    options.add_argument("--python", help="interpreter that has vLLM (default: that of make vllm-env)")
    options.add_argument("--direct", action="store_true", help="used by the benchmark itself")
    options.set_defaults(rounds=3)
    arguments = options.parse_args()
    set_up()
    row = measured(arguments.model, arguments.queries, arguments.python, arguments.rounds)
    show([told(row)], arguments.json)


def measured(model: str, queries: int, python: str | None, rounds: int) -> Row:
    from data_tools.generators.child import vllm_python
    from data_tools.generators.vllm import VllmGenerator

    from mmembed.media import MediaStore
    from mmembed.packaged import resolve

    items = [{"id": f"q{number}", "query": text} for number, text in enumerate(questions(queries))]
    generator = VllmGenerator(model, python=python, engine=ENGINE)
    direct = subprocess.Popen(
        [vllm_python(python, "benchmarks.synthesize"), str(Path(__file__).with_name("synthesize_direct.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip
    try:
        _ask(direct, {"model": resolve(model), "engine": ENGINE})
        generator.start(MediaStore(None))
        counts: dict[str, list[tuple[int, int]]] = {"ours": [], "limit": []}
        number, asks = itertools.count(), asks_of(items)

        def ours() -> None:
            counts["ours"].append(through_pipeline(generator, items, next(number)))

        def limit() -> None:
            counts["limit"].append(at_once(direct, asks, next(number)))

        seconds = alternate({"ours": ours, "limit": limit}, rounds)
    finally:
        generator.close()
        direct.kill()
    return row_of(seconds, {name: given[-rounds:] for name, given in counts.items()}, model)


def row_of(seconds: dict[str, list[float]], counts: dict[str, list[tuple[int, int]]], model: str) -> Row:
    """Args: counts: prompt and answer tokens of each round."""
    rates = {
        name: [tokens / time for (_, tokens), time in zip(counts[name], times, strict=True)]
        for name, times in seconds.items()
    }
    ratios = [own / other for own, other in zip(rates["ours"], rates["limit"], strict=True)]
    ratio, speeds = statistics.median(ratios), {name: statistics.median(given) for name, given in rates.items()}
    details = {"rounds": [round(one, 3) for one in ratios], "tokens": counts, "model": model, "engine": ENGINE}
    return Row(
        "graded passages, tokens of answers", "tokens/s", round(speeds["ours"], 1), limit=round(speeds["limit"], 1),
        ratio_to_limit=round(ratio, 3), goal_to_limit=GOAL, meets=ratio >= GOAL, details={**details, **environment()},
    )  # fmt: skip


def through_pipeline(generator: Any, items: Sequence[dict[str, Any]], seed: int) -> tuple[int, int]:
    """Prompt and answer tokens of one pass of the stage over the items."""
    from data_tools.generators import Sampling
    from data_tools.synthesis.answers import Answers
    from data_tools.synthesis.asking import Desk, Spent, ask_all, results
    from data_tools.synthesis.stages import Context
    from mmembed.progress import bar

    with tempfile.TemporaryDirectory() as folder, Answers(Path(folder) / "answers.jsonl") as answers:
        desk = Desk(_stage(), Context(seed, generator._media, Path(folder), Path), answers, "", 1, Sampling())
        with bar("ours", len(items), " items") as shown:
            ask_all(desk, items, lambda: generator, Spent(0, 0, None, None), shown)
        assert len(list(results(desk, items))) == len(items) and not desk.failed
        return answers.prompt_tokens, answers.tokens


def at_once(direct: subprocess.Popen[str], asks: Sequence[Any], seed: int) -> tuple[int, int]:
    """The same of the engine itself."""
    messages, schema = [ask.messages for ask in asks], asks[0].schema
    asked = {"messages": messages, "schema": schema, "seed": seed, "max_tokens": TOKENS, "temperature": 0.7}
    said = _ask(direct, asked)
    return said["prompt_tokens"], said["tokens"]


def asks_of(items: Sequence[dict[str, Any]]) -> list[Any]:
    from data_tools.synthesis.stages import Context
    from mmembed.media import MediaStore

    stage, context = _stage(), Context(0, MediaStore(None), Path(), Path)
    return [next(stage.work(item, context))[0] for item in items]


def questions(count: int) -> list[str]:
    lines = (DATA / "squad-en" / "queries.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [json.loads(line)["text"] for line in lines]


def _stage() -> Any:
    from data_tools.synthesis.stages.graded_passages import GradedPassages

    return GradedPassages(Path, max_tokens=TOKENS, min_words=5, max_words=20)


def _ask(direct: subprocess.Popen[str], message: dict[str, Any]) -> dict[str, Any]:
    assert direct.stdin is not None and direct.stdout is not None
    direct.stdin.write(json.dumps(message) + "\n")
    direct.stdin.flush()
    return json.loads(direct.stdout.readline())


if __name__ == "__main__":
    main()
