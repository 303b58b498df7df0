"""Interpreters that start warm: a launch pays for torch, transformers and DeepSpeed once, not in every process of it.

A server has imported them and waits; `python()` is a program that stands for the interpreter. What is started with it
(`accelerate launch`, and through PYTHON_EXEC each process that torchrun starts) is a process of its own, forked from
the server, with the caller's arguments, environment, folder and open files; signals reach it, it dies with the program,
and its status is the program's. There are two servers, of different hash seeds, for even and odd ranks: what hangs on
the order of a set still differs between two processes of a launch.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENT = Path(__file__).with_name("warm_client.py")


@functools.cache
def python() -> str:
    """The program that stands for the interpreter; starts the servers of this process, which end with it."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for seed in (0, 1):
        command = [sys.executable, "-m", "tests.warm", str(folder / f"{seed}.sock")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed + 1)}
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
        atexit.register(server.kill)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{CLIENT}" "{folder}" "$@"\n')
    program.chmod(0o755)
    return str(program)


def environment() -> dict[str, str]:
    """What a launch by `python()` needs besides: torchrun starts its processes by it."""
    return {"PYTHON_EXEC": python(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def serve(path: str) -> dict | None:
    """Forks a process for each connection. Returns in that process, with what to run; None when the owner has gone."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path + ".new")
    listening.listen()
    os.rename(path + ".new", path)  # there once it listens
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ, "owner")
    waiting.register(listening, selectors.EVENT_READ, "listening")
    while True:
        for key, _ in waiting.select():
            if key.data == "owner":
                return None
            if key.data == "listening":
                connection = listening.accept()[0]
                job, files = received(connection)
                child = os.fork()
                if child == 0:
                    waiting.close()
                    listening.close()
                    connection.close()
                    become(job, files)
                    return job
                for file in files:
                    os.close(file)
                connection.sendall(b"%d\n" % child)
                waiting.register(connection, selectors.EVENT_READ, child)
                waiting.register(os.pidfd_open(child), selectors.EVENT_READ, (child, connection))
            elif isinstance(key.data, int):  # the program sent a signal on, or was killed
                number = (key.fileobj.recv(1) or bytes([signal.SIGKILL]))[0]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(key.data, number)
                if number == signal.SIGKILL:
                    waiting.unregister(key.fileobj)
            else:
                child, connection = key.data
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                with contextlib.suppress(OSError):
                    connection.sendall(b"%d\n" % status)
                with contextlib.suppress(KeyError):
                    waiting.unregister(connection)
                connection.close()
                waiting.unregister(key.fd)
                os.close(key.fd)


def received(connection: socket.socket) -> tuple[dict, array.array]:
    """A line of JSON, and the program's open files."""
    files = array.array("i")
    text, ancillary, *_ = connection.recvmsg(1 << 16, socket.CMSG_SPACE(3 * files.itemsize))
    for _, _, data in ancillary:
        files.frombytes(data)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 16)
    return json.loads(text), files


def become(job: dict, files: array.array) -> None:
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])


def run(arguments: list[str]) -> None:
    """`python -m module ...` or `python [-u] script ...`, as the interpreter would."""
    while arguments[0] == "-u":
        arguments = arguments[1:]
    added = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if arguments[0] == "-m":
        sys.path[:1] = [os.getcwd(), *added]
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[:1] = [str(Path(arguments[0]).resolve().parent), *added]
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def prepare() -> None:
    """What every launch imports; first what keeps the libraries quiet."""
    for module in ("mmembed.training.trainer", "accelerate.commands.launch", "deepspeed", "torch.distributed.run"):
        importlib.import_module(module)


if __name__ == "__main__":
    prepare()
    task = serve(sys.argv[1])
    if task is not None:
        run(task["arguments"])
