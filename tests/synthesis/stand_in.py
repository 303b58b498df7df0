"""Stands in for the interpreter that has vLLM: an oracle behind the command line of its server, or a worker that
replays what the real one said. `executable` writes a program of it, which is what `python:` of a generator names.

What it does wrong is in the environment: DIES (after how many requests it ends without a word), LIVES (how many lives
end so), REFUSES (it does not start), LOADS (it is never ready). Its process ids go to the file PIDS: its own, and that
of a child in a session of its own, as engines have them.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDED = Path(__file__).parent / "recorded.json"


def executable(folder):
    """A program that runs `main` in our interpreter with the arguments that it is given."""
    program = folder / "stand-in"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.synthesis.stand_in import main\nmain(sys.argv[1:])\n"
    )
    program.chmod(0o755)
    return str(program)


def main(arguments):
    child = subprocess.Popen(["sleep", "300"], start_new_session=True)
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    if "REFUSES" in os.environ:
        print("ImportError: cannot import the engine", file=sys.stderr)
        sys.exit(1)
    if "LOADS" in os.environ:
        time.sleep(300)
    lives = len(Path(os.environ["PIDS"]).read_text().splitlines())
    left = int(os.environ["DIES"]) if "DIES" in os.environ and lives <= int(os.environ["LIVES"]) else 1 << 60
    if arguments[0] == "-m":
        serve(arguments, left)
    else:
        replay(left)


def serve(arguments, left):
    from tests.synthesis.servers import ChatServer, oracle

    def answer(body):
        if len(server.bodies) > left:
            os._exit(1)
        return oracle(body)

    options = dict(zip(arguments[2::2], arguments[3::2], strict=False))
    server = ChatServer(answer, model=options["--served-model-name"], port=int(options["--port"]))
    time.sleep(300)


def replay(left):
    """Says to each request what the worker of `recorded.json` said to it."""
    recorded = json.loads(RECORDED.read_text())["worker"]
    first = json.loads(sys.stdin.readline())
    assert {**first["engine"], **recorded["first"]["engine"]} == first["engine"], first  # besides our defaults
    print(json.dumps(recorded["ready"]), flush=True)
    for number, line in enumerate(sys.stdin):
        if number == left:
            sys.stdout.write('{"id": 0, "te')
            sys.stdout.flush()
            os._exit(1)
        asked = json.loads(line)
        name = asked.pop("id")
        [said] = [said for question, said in recorded["exchanges"] if question == asked]
        print(json.dumps({"id": name, **said}), flush=True)
