"""Runs a pipeline again and again in processes that die of SIGKILL, until one reaches the end.

    python -m tests.synthesis.killing '{"seed": 0, "lives": 20, "arguments": [...], "output": ..., "log": ...}'

This process imports everything once and forks: each life is a real process that begins with `main(arguments)`. Of three
lives one dies at a moment that is drawn, one with a half of an answer's line on the disk, and one before a file is
moved to its place. Every key that is asked for is a line of the log. Prints what each life left: whole answers.
"""

import importlib
import json
import os
import random
import signal
import sys
import threading
import time
import zlib
from pathlib import Path

MOST = 0.5  # seconds until a life is killed from outside
HOWS = ("time", "write", "move")


def main() -> None:
    job = json.loads(sys.argv[1])
    draw = random.Random(job["seed"])
    for name in (
        "data_tools.synthesis.pipeline",
        "data_tools.synthesis.estimate",
        "mmembed.data.dataset",
        "jsonschema",
    ):
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose the other threads"
    left = []
    for number in range(job["lives"] + 1):
        how = "" if number == job["lives"] else HOWS[number % len(HOWS)]
        status = life(job, how, draw)
        answers = Path(job["output"]) / "work" / "answers.jsonl"
        whole = answers.read_bytes().count(b"\n") if answers.exists() else 0
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        left.append({"how": how, "killed": killed, "status": os.waitstatus_to_exitcode(status), "answers": whole})
    print(json.dumps(left))


def life(job, how: str, draw: random.Random) -> int:
    number, seconds = draw.randint(1, 12), draw.uniform(0.05, MOST)
    child = os.fork()
    if child:
        if how == "time":
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1]
    from data_tools.synthesize import main as synthesize

    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
    register(job["log"])
    if how == "write":
        die_within_an_answer(number)
    if how == "move":
        die_before_a_move(1 + number % 4)
    os._exit(synthesize(job["arguments"]))


def register(log: str) -> None:
    """The scripted generator, which answers by the request's seed: a quarter of the answers cannot be used."""
    from data_tools import generators
    from tests.synthesis.scripted import Scripted

    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def script(request):
        os.write(descriptor, f"{request.key}\n".encode())
        if zlib.crc32(str(request.sampling.seed).encode()) % 4 == 0:
            return '{"level_3": '
        text = f"{request.sampling.seed} " + "word " * 40
        return json.dumps({key: f"{key} {text}" for key in request.schema["properties"]})

    kind = type("Scripted", (Scripted,), {"name": "scripted", "asked": [], "script": staticmethod(script)})
    generators.GENERATORS._classes = {**generators.GENERATORS.classes(), "scripted": kind}


def die_within_an_answer(number: int) -> None:
    """With a half of the n-th answer on the disk."""
    from data_tools.synthesis.answers import Answers

    add, seen = Answers.add, 0

    def half(self, key, answer) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.write(self._file.fileno(), b'{"key": "half of')
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, key, answer)

    Answers.add = half


def die_before_a_move(number: int) -> None:
    """Before the n-th file is moved to its place."""
    replace, seen = os.replace, 0

    def dead(*paths) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = dead


if __name__ == "__main__":
    main()
