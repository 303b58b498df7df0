"""The engine itself, for `benchmarks.synthesize`: a script for the environment that has vLLM; imports nothing of ours.

{"model": ..., "engine": {...}}                                    first line in; {} out when it is ready
{"messages": [[...], ...], "schema": ..., "seed": 1, ...}          a round; {"prompt_tokens": ..., "tokens": ...} out
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    job = json.loads(sys.stdin.readline())
    structured = {"backend": "xgrammar", "disable_any_whitespace": True}
    engine = LLM(job["model"], structured_outputs_config=structured, **job["engine"])
    say(answers, {})
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = [
            SamplingParams(
                max_tokens=asked["max_tokens"], temperature=asked["temperature"], seed=asked["seed"] + number,
                structured_outputs=StructuredOutputsParams(json=asked["schema"]),
            )
            for number in range(len(asked["messages"]))
        ]  # fmt: skip
        outputs = engine.chat(asked["messages"], sampling, use_tqdm=False)
        say(answers, {
            "prompt_tokens": sum(len(one.prompt_token_ids) for one in outputs),
            "tokens": sum(len(one.outputs[0].token_ids) for one in outputs),
        })  # fmt: skip


def say(answers, message) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
