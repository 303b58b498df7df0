"""A server in a thread of the test, on a free port of loopback: real sockets, real HTTP, a real model."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from mmembed.serving.app import Service
from mmembed.serving.limits import ServeLimits
from mmembed.serving.server import build_server, listen


class Client:
    """Requests to one server."""

    def __init__(self, port, service=None, key=None):
        self.port, self.service, self.key = port, service, key

    def request(self, method, path, body=b"", **headers):
        """(status, headers, body) of one connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            given = {
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            }
            connection.request(method, path, body, {**given, **headers})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def post(self, path, body, **headers):
        """(status, JSON)."""
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", path, encoded, **headers)
        return status, json.loads(answer)

    def embed(self, **body):
        """Vectors (N, E) of a request that has to work."""
        status, answer = self.post("/v1/embeddings", body)
        assert status == 200, answer
        assert [one["index"] for one in answer["data"]] == list(range(len(answer["data"])))
        return np.array([one["embedding"] for one in answer["data"]], dtype=np.float32)

    def together(self, bodies, path="/v1/embeddings"):
        """(status, headers, JSON) of each, all sent at once."""
        barrier = threading.Barrier(len(bodies))

        def send(body):
            barrier.wait()
            status, headers, answer = self.request("POST", path, json.dumps(body).encode())
            return status, headers, json.loads(answer)

        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(send, bodies))

    def metric(self, line):
        """The number behind the beginning of a line of /metrics; 0 where there is none."""
        text = self.request("GET", "/metrics")[2].decode()
        return next((float(one.rpartition(" ")[2]) for one in text.splitlines() if one.startswith(line)), 0.0)


@contextmanager
def running(*models, key=None, hosts=(), wait=0.003, budget=None, **limits):
    """A client of a server with these models and limits."""
    service = Service(models, ServeLimits(**limits), hosts=hosts, wait=wait, budget=budget)
    bound, ready = listen("127.0.0.1", 0), threading.Event()
    server = build_server(service, bound, key=key, ready=lambda _: ready.set())
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])))
    thread.start()
    try:
        assert ready.wait(30)
        yield Client(bound.getsockname()[1], service, key)
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive()


def encoded(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def seen(url):
    """The part of a message that shows a picture."""
    return {"type": "image_url", "image_url": {"url": url}}


def said(text):
    return {"type": "text", "text": text}


def asked(*parts, role="user"):
    """A conversation of one turn."""
    return [{"role": role, "content": list(parts)}]
