"""vLLM's offline engine behind JSON lines: `data_tools.generators.vllm` starts it in the environment that has vLLM.

    {"model": ..., "engine": {...}}                                    first line in
    {"ready": {"vllm": "0.32.0", "max_num_seqs": 256}}                 first line out, or {"error": ...} and the end
    {"id": 7, "messages": [...], "sampling": {...}, "schema": ...}     requests in, at any time
    {"id": 7, "text": ..., "finish": "stop", "prompt_tokens": 12, "tokens": 40}      answers out as they finish,
    {"id": 7, "error": ...}                                            or why a request has none

Requests join the running batch at the engine's next step (continuous batching), so it is full while the caller keeps
enough in flight. A thread reads; the main thread adds what was read and steps. vLLM computes in a process of its own,
so it goes on while prompts are tokenized and pictures prepared here. Standard output is this protocol's alone: what
libraries print goes to standard error. Imports nothing of mmembed.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

_READ_AT_ONCE = 64  # requests between two steps: reading a thousand would let the engine run dry


def main() -> int:
    """Serves until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    here = Path(__file__).parent  # a `vllm.py` lies beside this file
    sys.path[:] = [place for place in sys.path if Path(place or os.curdir).resolve() != here]
    job = json.loads(sys.stdin.buffer.readline())
    try:
        engine = load(job["model"], job["engine"])
    except Exception as error:  # of any kind: it is the answer
        say(answers, {"error": f"{type(error).__name__}: {error}"})
        raise
    say(answers, {"ready": about(engine)})
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=read, args=(lines,), daemon=True).start()
    serve(engine, lines, answers)
    return 0


def load(model: str, options: Mapping[str, Any]) -> Any:
    """The engine. Raises ValueError: an option that it has not."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    for key in options:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else "see vllm.EngineArgs"
            raise ValueError(f"engine: vLLM has no option '{key}'; {hint}")
    return LLM(model, **options)


def about(engine: Any) -> dict[str, Any]:
    import vllm

    config = engine.llm_engine.vllm_config
    return {"vllm": vllm.__version__, "max_num_seqs": config.scheduler_config.max_num_seqs}


def read(lines: queue.SimpleQueue[bytes | None]) -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    lines.put(None)


def serve(engine: Any, lines: queue.SimpleQueue[bytes | None], answers: IO[bytes]) -> None:
    """Adds and steps until the input has ended."""
    asked: dict[str, int] = {}  # the engine's name of a request -> ours
    steps = engine.llm_engine
    while True:
        for turn in range(_READ_AT_ONCE):
            if lines.empty() and (asked or turn):
                break
            if (line := lines.get()) is None:
                return
            add(engine, json.loads(line), asked, answers)
        if not asked:
            continue
        for output in steps.step():
            if output.finished:
                say(answers, answer_of(output, asked.pop(output.request_id)))


def add(engine: Any, request: Mapping[str, Any], asked: dict[str, int], answers: IO[bytes]) -> None:
    """Gives a request to the engine; what it refuses is answered at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.exceptions import EngineDeadError

    schema = request["schema"]
    structured = None if schema is None else StructuredOutputsParams(json=schema)
    try:
        sampling = SamplingParams(**request["sampling"], structured_outputs=structured)
        [name] = engine.enqueue_chat(request["messages"], sampling, use_tqdm=False)
    except EngineDeadError:
        raise
    except Exception as error:  # of any kind: the next request may be a good one
        say(answers, {"id": request["id"], "error": f"{type(error).__name__}: {error}"})
    else:
        asked[name.partition("-")[0]] = request["id"]  # outputs name it without the engine's random part


def answer_of(output: Any, number: int) -> dict[str, Any]:
    [text] = output.outputs
    finish = text.finish_reason if text.finish_reason in ("stop", "length") else None
    if finish is None:
        return {"id": number, "error": f"the engine ended it ({text.finish_reason})"}
    counts = {"prompt_tokens": len(output.prompt_token_ids), "tokens": len(text.token_ids)}
    return {"id": number, "text": text.text, "finish": finish, **counts}


def say(answers: IO[bytes], message: Mapping[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
