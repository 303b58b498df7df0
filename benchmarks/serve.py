"""Requests a second and their latency, of `mmembed serve` and of vLLM's server, at a fixed load on loopback.

    python -m benchmarks.serve --json [--connections 16] [--requests 400]
    python -m benchmarks.serve --json --minutes 30

The load is closed: so many connections, each with one request open at a time, from a process of its own on the same
cores. Both servers hold the nano in float32 with mean pooling and must give the same vectors before anything is timed.

    ours   mmembed serve --engine mmembed
    peer   mmembed serve --engine vllm: vLLM's server, as our command starts it
    limit  Embedder.encode of the same contents in one call, with nothing around it

Rows are requests of one text, of 32 texts, and of one picture; p50 and p99 of both servers, in milliseconds, are in
their details. Goal: 0.8 of the limit where a request has 32 texts, and to be no slower than the peer.

With `--minutes` there is one row: requests of all kinds, every third of them bad, for so long. It meets its goal where
the server lives, answers every bad request with the right 4xx and every good one with a vector, and its memory at the
end is within 5 % of what it was after the first sixth of the time.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._common import Row, environment, images, parser, set_up, show, texts, told

ROOT = Path(__file__).resolve().parents[1]
GOAL_TO_PEER, GOAL_TO_LIMIT = 1.0, 0.8
GROWTH = 0.05
LONGEST = 1200  # characters: below the length where either side would cut a text
CHAT = {"type": "chat", "mask_instruction": False, "add_generation_prompt": False}  # what vLLM makes of messages
OF_VLLM = ("--vllm", "max_model_len=1024", "enforce_eager=true")
EMBEDDINGS = "/v1/embeddings"
Body = dict[str, Any]


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--connections", type=int, default=16, help="requests that are open at once (default 16)")
    options.add_argument("--requests", type=int, default=400, help="of a round, of one text (default 400)")
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="rows (default all)")
    options.add_argument("--minutes", type=float, help="the long row instead: mixed requests for so long")
    options.add_argument("--client", type=int, metavar="PORT", help="used by the benchmark itself")
    options.set_defaults(rounds=3)
    arguments = options.parse_args()
    if arguments.client:
        print(json.dumps(load(arguments.client, json.load(sys.stdin), arguments.connections)))
        return
    threads = set_up(arguments.threads)
    if arguments.minutes:
        show([told(soak(arguments.minutes * 60, arguments.connections))], arguments.json)
        return
    rows = []
    for pictures in (False, True):
        cases = [case for case in arguments.only if (case in OF_PICTURES) is pictures]
        if cases:
            rows += measure(cases, pictures, arguments.requests, arguments.connections, arguments.rounds, threads)
    show(rows, arguments.json)


# Speed --------------------------------------------------------------------------------------------------------------


def one_text(requests: int) -> list[Body]:
    return [{"input": text} for text in short_texts(requests)]


def many_texts(requests: int) -> list[Body]:
    drawn = short_texts(32 * max(1, requests // 16))
    return [{"input": drawn[start : start + 32]} for start in range(0, len(drawn), 32)]


def one_picture(requests: int) -> list[Body]:
    return [{"messages": [conversation(one)]} for one in images(max(1, requests // 2))]


CASES: dict[str, Callable[[int], list[Body]]] = {
    "one text a request": one_text,
    "32 texts a request": many_texts,
    "one picture a request": one_picture,
}


OF_PICTURES = ("one picture a request",)


def measure(
    cases: Sequence[str], pictures: bool, requests: int, connections: int, rounds: int, threads: int
) -> list[Row]:
    """Rows of one model: the servers take turns, the limit in this process between them."""
    from mmembed import Embedder

    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = save_chat(Path(folder) / "chat") if pictures else "mmembed-nano"
        embedder = Embedder.from_pretrained(model, dtype="float32")
        ports = {"ours": stack.enter_context(server(model, "mmembed")).port}
        with contextlib.suppress(NoServer):
            ports["peer"] = stack.enter_context(server("mmembed-nano", "vllm", *OF_VLLM)).port
        for case in cases:
            bodies = CASES[case](requests)
            contents = [content for body in bodies for content in contents_of(body)]
            expected = embedder.encode(contents, show_progress=False)
            found: dict[str, list[Mapping[str, Any]]] = {name: [] for name in ports}
            limits = []
            for port in ports.values():
                check_equal(port, bodies, expected)
                run_client(port, bodies, connections)
            for turn in range(rounds):
                for name in sorted(ports, reverse=bool(turn % 2)):
                    found[name].append(run_client(ports[name], bodies, connections))
                start = time.perf_counter()
                embedder.encode(contents, show_progress=False)
                limits.append(len(contents) / (time.perf_counter() - start))
            inputs = len(contents) / len(bodies)
            rows.append(told(row_of(case, found, limits, inputs, connections, threads)))
    return rows


def row_of(
    case: str,
    found: Mapping[str, Sequence[Mapping[str, Any]]],
    limits: Sequence[float],
    inputs: float,
    connections: int,
    threads: int,
) -> Row:
    """Args: inputs: of a request."""
    rates = {name: [one["rate"] for one in runs] for name, runs in found.items() if runs}
    speed = {name: round(statistics.median(runs), 1) for name, runs in rates.items()}
    to_limit = statistics.median(one * inputs / limit for one, limit in zip(rates["ours"], limits, strict=True))
    to_peer = None
    if "peer" in rates:
        to_peer = round(statistics.median(a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)), 3)
    goal = GOAL_TO_LIMIT if inputs > 1 else None
    details: dict[str, Any] = {"connections": connections, "threads": threads, "inputs a request": inputs}
    for name, runs in found.items():
        for key in ("p50_ms", "p99_ms") if runs else ():
            details[f"{key} {name}"] = round(statistics.median(one[key] for one in runs), 2)
    meets = (goal is None or to_limit >= goal) and (to_peer is None or to_peer >= GOAL_TO_PEER)
    return Row(
        case, "requests/s", speed["ours"], peer=speed.get("peer"), peer_name="vLLM's server",
        limit=round(statistics.median(limits) / inputs, 1), ratio_to_peer=to_peer, goal_to_peer=GOAL_TO_PEER,
        ratio_to_limit=round(to_limit, 3), goal_to_limit=goal, meets=meets, details={**details, **environment()},
    )  # fmt: skip


def short_texts(count: int) -> list[str]:
    return [text[:LONGEST] for text in texts(count)]


def conversation(picture: bytes) -> list[Body]:
    url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


def contents_of(body: Body) -> list[Any]:
    """What Embedder.encode takes for the same."""
    if "input" in body:
        return body["input"] if isinstance(body["input"], list) else [body["input"]]
    urls = [turns[0]["content"][0]["image_url"]["url"] for turns in body["messages"]]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def save_chat(folder: Path) -> str:
    """The nano with the prompt that vLLM's chat template writes."""
    from mmembed import Embedder
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", pooling="mean", prompt=CHAT))).save(folder)
    return str(folder)


def check_equal(port: int, bodies: Sequence[Body], expected: np.ndarray) -> None:
    """Raises SystemExit unless a server gives the vectors of the first requests."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    vectors: list[Any] = []
    for body in bodies[:8]:
        status, answer = send(connection, EMBEDDINGS, body)
        if status != 200:
            raise SystemExit(f"a server answered {status}: {answer!r:.500}")
        vectors += [one["embedding"] for one in json.loads(answer)["data"]]
    difference = float(np.abs(np.array(vectors) - expected[: len(vectors)]).max())
    if difference > 1e-3:
        raise SystemExit(f"vectors differ by {difference:.2g}, more than 1e-3; the timing would mean nothing")


# Servers ------------------------------------------------------------------------------------------------------------


class NoServer(Exception):
    """There is no vLLM here."""


class Server:
    """A server in a process of its own.

    Attributes:
        pid: of the process that listens.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port, self.pid = process, port, process.pid

    @property
    def rss_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@contextlib.contextmanager
def server(model: str, engine: str, *further: str) -> Iterator[Server]:
    """Raises NoServer where the engine is not installed."""
    from mmembed.serving.vllm import find

    if engine == "vllm" and find(None) is None:
        raise NoServer
    port = free_port()
    command = [sys.executable, "-m", "mmembed", "serve", model, "--engine", engine, "--port", str(port)]
    command += ["--dtype", "float32", "--served-model-name", "nano", *further]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING"}
        )
        try:
            wait_for(process, port, log)
            yield Server(process, port)
        finally:
            process.terminate()
            process.wait(90)


def wait_for(process: subprocess.Popen[bytes], port: int, log: Any, seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.2)
    process.kill()
    log.seek(0)
    raise SystemExit(f"a server did not start: {log.read().decode(errors='replace')[-2000:]}")


def free_port() -> int:
    import socket

    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return int(chosen.getsockname()[1])


# Load ---------------------------------------------------------------------------------------------------------------


def run_client(port: int, bodies: Sequence[Body], connections: int) -> dict[str, Any]:
    """`load` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serve", "--client", str(port), "--connections", str(connections)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(bodies), text=True, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout))


def load(port: int, bodies: Sequence[Body], connections: int) -> dict[str, Any]:
    """Sends all bodies over so many connections; requests a second, latency in milliseconds."""
    waiting, latencies = collections.deque(json.dumps(body).encode() for body in bodies), list[float]()
    failures: list[str] = []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        while True:
            try:
                body = waiting.popleft()
            except IndexError:
                return
            start = time.perf_counter()
            status, answer = send(connection, EMBEDDINGS, body)
            latencies.append(time.perf_counter() - start)
            if status != 200:
                failures.append(f"{status}: {answer!r:.200}")

    workers = [threading.Thread(target=work) for _ in range(connections)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    if failures:
        raise SystemExit(f"{len(failures)} of {len(bodies)} requests failed, the first with {failures[0]}")
    p50, p99 = np.percentile(latencies, (50, 99)) * 1000
    return {"rate": len(bodies) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def send(connection: http.client.HTTPConnection, path: str, body: Any) -> tuple[int, bytes]:
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, encoded, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


# A long time --------------------------------------------------------------------------------------------------------


def soak(seconds: float, connections: int) -> Row:
    """Mixed requests for a while; the memory of the server is read every five seconds."""
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    memory: list[tuple[float, float]] = []
    with server("mmembed-nano", "mmembed", "--max-waiting", "300") as one:
        begin = time.monotonic()
        end = begin + seconds
        workers = [
            threading.Thread(target=mixed, args=(one.port, end, seed, counts, wrong), daemon=True)
            for seed in range(connections)
        ]
        for worker in workers:
            worker.start()
        while time.monotonic() < end and one.process.poll() is None:
            memory.append((time.monotonic() - begin, one.rss_mb))
            time.sleep(5)
        alive = one.process.poll() is None
        for worker in workers:
            worker.join(90)
        memory.append((time.monotonic() - begin, one.rss_mb if alive else 0.0))
    code = one.process.returncode
    settled = statistics.median(mb for at, mb in memory if seconds / 6 <= at <= seconds / 3)
    last = statistics.median(mb for at, mb in memory if at >= seconds * 5 / 6)
    details = {
        "minutes": round(seconds / 60, 1), "connections": connections, "answers": dict(sorted(counts.items())),
        "wrong": wrong[:10], "rss_mb_begin": round(memory[0][1]), "rss_mb_settled": round(settled),
        "rss_mb_end": round(last), "rss_mb_most": round(max(mb for _, mb in memory)),
        "rss_mb_by_tenth": [round(memory[at * (len(memory) - 1) // 10][1]) for at in range(11)],
        "exit_code_of_sigterm": code,
    }  # fmt: skip
    meets = alive and code == 0 and not wrong and last <= settled * (1 + GROWTH)
    rate = round(sum(counts.values()) / seconds, 1)
    return Row("mixed requests for a long time", "requests/s", rate, meets=meets, details={**details, **environment()})


def mixed(port: int, end: float, seed: int, counts: collections.Counter[str], wrong: list[str]) -> None:
    """Requests one after the other, two good ones and a bad one in the mean."""
    draw = random.Random(seed)
    good, bad = good_bodies(draw), bad_bodies()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    while time.monotonic() < end:
        kind = draw.randrange(30)
        try:
            if kind == 0:
                leave_early(port, good[draw.randrange(len(good))])
                counts["left"] += 1
                continue
            if kind < 10:
                body, allowed = bad[draw.randrange(len(bad))]
            else:
                body, allowed = good[draw.randrange(len(good))], (200, 429)
            status, answer = send(connection, EMBEDDINGS, body)
            counts[str(status)] += 1
            if status not in allowed:
                wrong.append(f"{status} instead of {allowed}: {answer!r:.200}")
        except (OSError, http.client.HTTPException) as error:  # of what is too long the connection may close early
            counts[type(error).__name__] += 1
            connection.close()


def leave_early(port: int, body: Body) -> None:
    """Sends a request, and closes before the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", EMBEDDINGS, json.dumps(body), {"Content-Type": "application/json"})
    connection.close()


def good_bodies(draw: random.Random) -> list[Body]:
    seed = draw.randrange(1000)
    drawn, pictures = [text[:6000] for text in texts(300, seed)], images(24, seed)
    bodies: list[Body] = [{"input": text, "encoding_format": "base64"} for text in drawn[:100]]
    bodies += [{"input": drawn[at : at + 1 + at % 40], "prompt_name": "query"} for at in range(100, 200, 5)]
    bodies += [{"input": text, "dimensions": 1 + len(text) % 256, "instruction": "find it"} for text in drawn[200:]]
    return bodies + [{"messages": [conversation(one)]} for one in pictures]


def bad_bodies() -> list[tuple[Any, tuple[int, ...]]]:
    """What must be refused, with the status."""

    def pictured(url: str) -> Body:
        return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}

    whole = images(1)[0]
    cut = f"data:image/png;base64,{base64.b64encode(whole[: len(whole) // 2]).decode()}"
    bomb = (
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (60_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(99)
    )
    return [
        (b"{", (400,)), (b"[" * 50_000, (400,)), (b"\xff\x00" * 500, (400,)), ({}, (400,)), ({"input": None}, (400,)),
        ({"input": [1, 2]}, (400,)), ({"input": "a", "field": 1}, (400,)), ({"input": ["a", ""]}, (400,)),
        ({"input": "a", "dimensions": 9999}, (400,)), ({"input": "a", "model": "other"}, (404,)),
        ({"input": "word " * 2_000_000}, (413,)), ({"input": ["a"] * 1000}, (413,)),
        (pictured("/etc/passwd"), (400,)), (pictured("http://127.0.0.1:1/x"), (400,)), (pictured(cut), (400,)),
        (pictured(f"data:image/png;base64,{base64.b64encode(bomb).decode()}"), (400, 413)),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
