"""Runs the command again and again in processes that die of SIGKILL, until one reaches the end.

    python -m tests.mining.killing '{"seed": 0, "lives": 20, "arguments": ["--config", ...]}'

Imports cost most of a start, so this process imports everything once and forks: each life is a real process that begins
with `main(arguments)`. Every other one dies within a write: of the n-th shard a half reaches the disk, or before
the n-th fsync, with the last line of a journal cut off. The others die at a moment that is drawn. Prints what each life
left: the shards that are complete.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

MOST = 0.6  # seconds until a life is killed from outside; more, and a fast machine is done before the twentieth


def main() -> None:
    job = json.loads(sys.argv[1])
    draw = random.Random(job["seed"])
    for name in (
        "data_tools.mining.steps",
        "data_tools.mining.audit",
        "mmembed.inference.embedder",
        "pyarrow",
        "faiss",
    ):
        importlib.import_module(name)
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

    assert all((Qwen3VLForConditionalGeneration, Qwen3VLProcessor))  # transformers loads a name when it is asked for
    assert threading.active_count() == 1, "a fork would lose the other threads"
    left = []
    for number in range(job["lives"] + 1):
        last = number == job["lives"]
        how = "" if last else ("write", "time")[number % 2]
        status = life(job["arguments"], how, draw)
        work = Path(job["output"]) / "work"
        complete = sum(len(file.read_bytes().split(b"\n")) - 2 for file in work.glob("*/*.done"))
        complete += len(list(work.glob("*/*/*.safetensors")))
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        left.append({"how": how, "killed": killed, "status": os.waitstatus_to_exitcode(status), "shards": complete})
    print(json.dumps(left))


def life(arguments: list[str], how: str, draw: random.Random) -> int:
    number, seconds = draw.randint(1, 5), draw.uniform(0, MOST)
    child = os.fork()
    if child:
        if how == "time":
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    from data_tools.mine_negatives import main as mine

    log = os.open("/dev/null", os.O_WRONLY)
    os.dup2(log, 1)
    if how == "write":
        die_within_a_write(number)
    os._exit(mine(arguments))


def die_within_a_write(number: int) -> None:
    """Odd numbers: with a half of the n-th shard; even ones: before an fsync."""
    pwrite, fsync, seen = os.pwrite, os.fsync, 0

    def half(descriptor: int, content: bytes, at: int) -> int:
        nonlocal seen
        seen += 1
        if seen < number:
            return pwrite(descriptor, content, at)
        pwrite(descriptor, content[: len(content) // 2], at)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("it is dead")

    def torn(descriptor: int) -> None:
        nonlocal seen
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        seen += 1
        if seen == number * 2:
            if name.endswith(".done"):
                os.truncate(name, os.path.getsize(name) - 3)
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    if number % 2:
        os.pwrite = half
    else:
        os.fsync = torn


if __name__ == "__main__":
    main()
