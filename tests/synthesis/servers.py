"""Servers of the chat API that tests talk to over real sockets, and a proxy that damages what passes."""

import base64
import hashlib
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from data_tools.generators import Request, RequestFailed, Sampling


class ChatServer(ThreadingHTTPServer):
    """Answers with `answer(body)`: (status, object or bytes) or (status, object or bytes, headers).

    `bodies`, `headers`: of all requests. `instead`: answers that come first, taken from the front.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer, model="oracle", port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.answer, self.model = answer, model
        self.bodies, self.headers, self.instead = [], [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def close(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that hung up is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self):
        self.reply(200, {"data": [{"id": self.server.model}]})  # also of /health

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.headers.append(dict(self.headers))
        self.reply(*(self.server.instead.pop(0) if self.server.instead else self.server.answer(body)))

    def reply(self, status, content, headers=None):
        encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_):
        pass


def completion(text, finish="stop", prompt_tokens=3, tokens=2):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"choices": [choice], "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}}


def right_text(messages, seed):
    """What an oracle says: nothing but the right request gives it."""
    return hashlib.sha256(json.dumps([messages, seed]).encode()).hexdigest()


def oracle(body):
    return 200, completion(right_text(body["messages"], body.get("seed")))


def answering_with(generator):
    """A server's `answer` that asks a generator: a real model behind HTTP."""

    def answer(body):
        sampling = {key: body[key] for key in ("max_tokens", "temperature", "top_p", "seed") if key in body}
        schema = body["response_format"]["json_schema"]["schema"] if "response_format" in body else None
        messages = tuple({**message, "content": _own(message["content"])} for message in body["messages"])
        request = Request("served", messages, Sampling(**sampling, stop=tuple(body.get("stop", ()))), schema)
        try:
            said = generator.submit(request).result()
        except RequestFailed as error:
            return 400, {"error": {"message": str(error), "code": 400}}
        return 200, completion(said.text, said.finish, said.prompt_tokens, said.tokens)

    return answer


def _own(content):
    if isinstance(content, str):
        return content
    return [
        part if part["type"] == "text" else {"type": "image", "image": _bytes(part["image_url"]["url"])}
        for part in content
    ]


def _bytes(url):
    kind, _, encoded = url.partition(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return base64.b64decode(encoded)


class FaultyProxy:
    """Stands before a server and spoils `share` of the responses, each in a way that is drawn; counts them by kind.

    Only responses to POST are spoiled. What it corrupts is always visible: one bit turned makes ASCII no UTF-8.
    """

    KINDS = ("drop", "delay", "truncate", "corrupt", "close early", "429", "500", "503", "empty", "html")

    def __init__(self, port, share, seed, delay=0.3):
        self.port, self.share, self.delay = port, share, delay
        self.draw, self.lock = random.Random(seed), threading.Lock()
        self.counts = dict.fromkeys((*self.KINDS, "whole"), 0)
        self.listening = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.pool = ThreadPoolExecutor(64)
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.listening.getsockname()[1]}/v1"

    def accept(self):
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            self.pool.submit(self.carry, client)

    def carry(self, client):
        with client, socket.create_connection(("127.0.0.1", self.port)) as server:
            while True:
                asked = read_message(client)
                if not asked:
                    return
                server.sendall(asked)
                response = read_message(server)
                if asked.startswith(b"POST") and not self.pass_on(client, response, asked):
                    return
                if not asked.startswith(b"POST"):
                    client.sendall(response)

    def pass_on(self, client, response, asked):
        """Whether the connection lives on."""
        with self.lock:
            kind = self.draw.choice(self.KINDS) if self.draw.random() < self.share else "whole"
            self.counts[kind] += 1
            place = self.draw.randrange(len(response))
        head = response.index(b"\r\n\r\n") + 4
        if kind == "drop":
            return False
        if kind == "truncate":
            client.sendall(response[: max(head, len(response) - 20)])
            return False
        if kind == "close early":
            client.sendall(response[: place % head])
            return False
        if kind == "delay":
            threading.Event().wait(self.delay)
        if kind == "corrupt":
            place = head + place % (len(response) - head)
            response = response[:place] + bytes([response[place] ^ 0x80]) + response[place + 1 :]
        if kind in ("429", "500", "503"):
            response = f"HTTP/1.1 {kind} Trouble\r\nContent-Length: 2\r\nRetry-After: 0\r\n\r\n{{}}".encode()
        if kind in ("empty", "html"):
            page = b"" if kind == "empty" else b"<html><h1>It works!</h1></html>"
            response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(page) + page
        client.sendall(response)
        return True

    def close(self):
        self.listening.close()
        self.pool.shutdown(wait=False)


class RecordingProxy(FaultyProxy):
    """Spoils nothing and keeps all: `exchanges` are [body, status, reply]."""

    def __init__(self, port):
        super().__init__(port, share=0.0, seed=0)
        self.exchanges = []

    def pass_on(self, client, response, asked):
        reply = json.loads(content(response))
        with self.lock:
            self.exchanges.append([json.loads(content(asked)), int(response.split()[1]), reply])
        client.sendall(response)
        return True


def content(message):
    return message[message.index(b"\r\n\r\n") + 4 :]


def read_message(stream):
    """One HTTP message with a Content-Length; nothing where the stream has ended."""
    read = b""
    while b"\r\n\r\n" not in read:
        more = stream.recv(65536)
        if not more:
            return b""
        read += more
    head = read.index(b"\r\n\r\n") + 4
    lengths = [line for line in read[:head].lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].split(b":")[1]) if lengths else 0
    while len(read) < head + length:
        more = stream.recv(65536)
        if not more:
            return b""
        read += more
    return read
