"""Runs the command in processes that die of SIGKILL, with a generator that answers by a digest of the question.

    python -m tests.synthesis.killing_stages CONFIG LOG '[["OUTPUT", DEATH], ...]'

Imports cost most of a start, so this process imports everything once and forks: each life is a real process. LOG.n gets
the key of every request that life n submits. DEATH is the number of the request at which it kills itself: before it is
logged where even, within the answer where odd; with 0 it goes on to the end. Prints how each life ended, and which
answers were on the disk before it.
"""

import hashlib
import importlib
import json
import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from data_tools import generators
from data_tools.generators import Answer, Generator, Request

WORDS = ("river", "bread", "cell", "energy", "market", "law", "plant", "force", "city", "number", "theory", "people")


class Dying(Generator):
    """Answers wrongly now and then, so that questions are asked again."""

    name = "dying"
    reads = frozenset({"text", "image"})
    log = -1
    death = 0
    submitted = 0

    @property
    def capacity(self) -> int:
        return 6

    def fingerprint(self):
        return self.name

    def start(self, media) -> None:
        self.pool = ThreadPoolExecutor(6)

    def submit(self, request: Request) -> Future[Answer]:
        cls = type(self)
        cls.submitted += 1
        dies = cls.submitted == cls.death
        if dies and cls.death % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(cls.log, f"{request.key}\n".encode())
        return self.pool.submit(answer, request, dies)

    def close(self) -> None:
        self.pool.shutdown()


def answer(request: Request, dies: bool) -> Answer:
    time.sleep(random.random() * 0.004)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    seen = json.dumps([request.messages, request.sampling.seed])
    draw = random.Random(hashlib.sha256(seen.encode()).digest())
    if draw.random() < 0.2:
        return Answer("this is no JSON", "stop", 50, 4)
    if "queries" in request.schema["properties"]:
        count = request.schema["properties"]["queries"]["minItems"]
        text = json.dumps({"queries": [" ".join(draw.choices(WORDS, k=8)) for _ in range(count)]})
    else:
        text = json.dumps({"relevance": draw.randrange(4)})
    return Answer(text, "stop", 50, 10)


def main() -> None:
    config, log, job = sys.argv[1:]
    generators.GENERATORS._classes = {**generators.GENERATORS.classes(), "dying": Dying}
    for name in ("data_tools.synthesis.pipeline", "data_tools.mining.models", "data_tools.mining.retrievers.bm25"):
        importlib.import_module(name)
    from data_tools.synthesize import main as synthesize

    assert threading.active_count() == 1, "a fork would lose the other threads"
    ends = []
    for number, (output, death) in enumerate(json.loads(job)):
        kept, child = keys_kept(Path(output)), os.fork()
        if not child:
            os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
            Dying.log, Dying.death = os.open(f"{log}.{number}", os.O_WRONLY | os.O_CREAT), death
            os._exit(synthesize(["--config", config, f"output={output}"]))
        ends.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), kept])
    print(json.dumps(ends))


def keys_kept(output: Path) -> list[str]:
    """Of the answers that are whole on the disk."""
    file = output / "work" / "answers.jsonl"
    rows = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    return [json.loads(row)["key"] for row in rows]


if __name__ == "__main__":
    main()
