"""The engine itself, for `benchmarks.synthesize`: a script for the environment that has vLLM; imports nothing of ours.

Reads one JSON object, {"model", "engine", "messages": [[...], ...], "schema", "seed", "max_tokens"}, and writes one,
{"seconds", "tokens"}: all prompts at once, timed without the loading.
"""

from __future__ import annotations

import json
import os
import sys
import time


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    job = json.load(sys.stdin)
    engine = LLM(job["model"], **job["engine"])
    sampling = [
        SamplingParams(
            max_tokens=job["max_tokens"], temperature=0.7, seed=job["seed"] + number,
            structured_outputs=StructuredOutputsParams(json=job["schema"]),
        )
        for number in range(len(job["messages"]))
    ]  # fmt: skip
    began = time.perf_counter()
    outputs = engine.chat(job["messages"], sampling, use_tqdm=False)
    seconds = time.perf_counter() - began
    json.dump({"seconds": seconds, "tokens": sum(len(one.outputs[0].token_ids) for one in outputs)}, answers)
    answers.close()


if __name__ == "__main__":
    main()
