"""The program of `tests.warm`: hands its arguments, environment and files to a server and waits for the process there.

Started in every process of a launch, so it imports next to nothing.
"""

import array
import json
import os
import signal
import socket
import sys
import time


def connect(folder: str) -> socket.socket:
    """To the server of this rank's parity, once it is there."""
    path = f"{folder}/{int(os.environ.get('RANK', 0)) % 2}.sock"
    until = time.monotonic() + 120
    while not os.path.exists(path):
        if time.monotonic() > until:
            sys.exit(f"no server at {path}")
        time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    return connection


def main() -> int:
    connection = connect(sys.argv[1])
    job = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
    text = json.dumps(job).encode() + b"\n"
    files = array.array("i", [0, 1, 2])
    sent = connection.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(text[sent:])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda number, _: connection.send(bytes([number])))
    with connection.makefile() as answers:
        answers.readline()  # the process's id
        status = int(answers.readline() or 70)
    if status < 0:  # died of a signal: so does this
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main())
