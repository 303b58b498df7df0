"""What a server refuses: requests that ask too much, are malformed, or mean harm. Afterwards it lives as before."""

import base64
import io
import json
import re
import socket
import struct
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from families import picture
from PIL import Image

from mmembed.errors import ConfigError
from mmembed.media_limits import MediaLimits
from mmembed.serving.limits import ServeLimits
from tests.serving.running import asked, data_url, encoded, running, said, seen


def bomb(width, height):
    """A PNG of a few bytes that says it has so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
DEEP = b'{"input":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
USER = {"role": "user", "content": "a"}

BAD = {  # name -> (body, status, message)
    "no JSON": (b"{", 400, "the body is no JSON that can be read"),
    "nothing": (b"", 400, "no JSON"),
    "no UTF-8": (b'{"input": "\xff"}', 400, "no JSON"),
    "half a surrogate pair": (b'{"input": "a \\ud800"}', 400, "no JSON|surrogate"),
    "nesting": (DEEP, 400, "no JSON"),
    "no object": ([1], 400, "Input should be an object"),
    "unknown field": ({"input": "a", "inputs": "b"}, 400, "inputs: no such field; did you mean 'input'"),
    "field of vLLM": ({"input": "a", "truncate_prompt_tokens": 5}, 400, "truncate_prompt_tokens: no such field; the"),
    "unknown field of a part": (
        {"messages": asked({**said("a"), "cache": 1})}, 400, "messages.0.0.content.0.cache: no such field; remove it"
    ),
    "no input": ({}, 400, "found neither"),
    "input and messages": ({"input": "a", "messages": [USER]}, 400, "found both"),
    "number": ({"input": 3}, 400, "input: give a text, a list of texts, or chat messages; found a number"),
    "null in a list": ({"input": ["a", None]}, 400, "entry 1 is null"),
    "token ids": ({"input": [1, 2]}, 400, "token ids are not taken"),
    "lists of token ids": ({"input": [[1, 2], [3]]}, 400, "token ids are not taken"),
    "empty list": ({"input": []}, 400, "an empty list has nothing to embed"),
    "empty text": ({"input": ["a", ""]}, 400, "input.1: an empty text has nothing to embed"),
    "empty conversation": ({"messages": [[]]}, 400, "turns of nobody"),
    "two turns": ({"messages": [USER, USER]}, 400, "turns of user, user"),
    "assistant": ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "Input should be 'system', 'user'"),
    "instruction twice": (
        {"messages": [{"role": "system", "content": "x"}, USER], "instruction": "y"}, 400, "is another"
    ),
    "picture as instruction": (
        {"messages": [{"role": "system", "content": [seen("data:,")]}, USER]}, 400, "an instruction is text"
    ),
    "queries and documents": (
        {"messages": [[{"role": "query", "content": "a"}], [{"role": "document", "content": "b"}]]}, 400, "for each"
    ),
    "NaN dimensions": (b'{"input": "a", "dimensions": NaN}', 400, "dimensions: .*; found a number (nan)"),
    "half a dimension": ({"input": "a", "dimensions": 1.5}, 400, "dimensions: Input should be a valid integer"),
    "no dimensions": ({"input": "a", "dimensions": 0}, 400, "Input should be greater than or equal to 1"),
    "negative dimensions": ({"input": "a", "dimensions": -1}, 400, "Input should be greater than or equal to 1"),
    "too many dimensions": ({"input": "a", "dimensions": 257}, 400, "the vectors have 256"),
    "huge dimensions": (b'{"input": "a", "dimensions": 1' + b"0" * 3000 + b"}", 400, "dimensions: Input should be le"),
    "true dimensions": ({"input": "a", "dimensions": True}, 400, "found a truth value"),
    "unknown format": ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format: Input should be 'float'"),
    "unknown role": ({"input": "a", "prompt_name": "passage"}, 400, "prompt_name: Input should be 'query' or"),
    "another model": ({"input": "a", "model": "x" * 9999}, 404, "there is no 'xxx"),
    "long instruction": ({"input": "a", "instruction": "find it " * 600, "prompt_name": "query"}, 400, "prompt alone"),
    "10 MB of text": ({"input": "word " * 2_000_000}, 413, "10000000 characters; the limit is 100000"),
    "many inputs": ({"input": ["a"] * 257}, 413, "257 inputs; the limit of a request is 256"),
    "video": ({"messages": asked({"type": "video_url"})}, 400, "Input tag 'video_url' found"),
    "path": ({"messages": asked(seen("/etc/passwd"))}, 400, "'/etc/passwd' is no data URL"),
    "relative path": ({"messages": asked(seen("a.png"))}, 400, "is no data URL"),
    "row of a table": ({"messages": asked(seen("images.parquet#1"))}, 400, "is no data URL"),
    "file URL": ({"messages": asked(seen("file:///etc/passwd"))}, 400, "is no data URL"),
    "no host": ({"messages": asked(seen("http://[/x"))}, 400, "is no data URL"),
    "no base64": ({"messages": asked(seen("data:image/png;base64,(((("))}, 400, "not base64"),
    "data URL of text": ({"messages": asked(seen("data:text/plain,hello"))}, 400, "of base64 is needed"),
    "no picture": ({"messages": asked(seen(data_url(b"hello")))}, 400, "5 bytes that are no picture"),
    "no bytes": ({"messages": asked(seen(data_url(b"")))}, 400, "0 bytes that are no picture"),
    "EPS": ({"messages": asked(seen(data_url(EPS)))}, 400, "that are no picture of PNG"),
    "bomb": ({"messages": asked(seen(data_url(bomb(5000, 5000))))}, 413, "messages.0: .*5000 x 5000 pixels; the limit"),
    "gigantic bomb": ({"messages": asked(seen(data_url(bomb(2**30, 2**30))))}, 413, "gigantic"),
    "cut picture": (
        {"messages": [asked(said("a")), asked(seen(data_url(encoded(picture(1))[:-2000])))]},
        400, "messages.1: .*truncated or damaged",
    ),
    "many pictures": ({"messages": asked(*[seen(data_url(bomb(8, 8)))] * 65)}, 413, "65 pictures; the limit"),
    "many pixels": (
        {"messages": [asked(seen(data_url(bomb(4000, 4000))))] * 7}, 413, "pictures of 112000000 pixels together"
    ),
}  # fmt: skip
BAD_RERANKINGS = {
    "no query": ({"documents": ["a"]}, 400, "query: is missing"),
    "no documents": ({"query": "a", "documents": []}, 400, "documents: List should have at least 1"),
    "documents as a text": ({"query": "a", "documents": "b"}, 400, "documents: Input should be a valid array"),
    "empty document": ({"query": "a", "documents": ["b", " "]}, 400, "documents.1: an empty text"),
    "empty query": ({"query": "", "documents": ["b"]}, 400, "an empty text"),
    "negative top_n": ({"query": "a", "documents": ["b"], "top_n": -1}, 400, "top_n: Input should be greater"),
    "field of Jina": ({"query": "a", "documents": ["b"], "max_chunks": 1}, 400, "max_chunks: no such field"),
    "many documents": ({"query": "a", "documents": ["b"] * 257}, 413, "257 documents"),
    "long query": ({"query": "a" * 100_001, "documents": ["b"]}, 413, "query: 100001 characters"),
    "path": ({"query": "a", "documents": [{"content": [seen("/etc/passwd")]}]}, 400, "no data URL"),
}


@pytest.fixture(autouse=True)
def still_alive(request):
    """After each test the shared server, where it was used, answers as before."""
    yield
    if "client" in request.fixturenames:
        client = request.getfixturevalue("client")
        assert client.request("GET", "/health")[0] == 200
        assert client.embed(input="a").shape == (1, 256)
        assert client.metric("mmembed_waiting_inputs") == 0


def assert_refused(client, path, body, status, message):
    found, answer = client.post(path, body)
    error = answer["error"]
    assert found == status and error["code"] == status, answer
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), error["message"]), error["message"]
    assert len(json.dumps(answer)) < 1500 and error["type"].endswith("Error")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request(client, name):
    assert_refused(client, "/v1/embeddings", *BAD[name])


@pytest.mark.parametrize("name", BAD_RERANKINGS)
def test_a_bad_reranking(client, name):
    assert_refused(client, "/rerank", *BAD_RERANKINGS[name])


def test_other_methods_paths_and_types(client):
    assert client.request("GET", "/v1/embeddings")[0] == 405
    assert client.post("/nothing", {})[0] == 404
    assert client.post("/v1/embeddings", {"input": "a"}, **{"Content-Type": "text/plain"})[0] == 415
    assert client.post("/v1/embeddings", b"\x1f\x8b", **{"Content-Encoding": "gzip"})[0] == 415
    assert client.request("GET", "/docs")[0] == 404  # its page would load scripts from elsewhere


def test_a_server_without_the_model(served):
    with running(served) as client:
        assert_refused(client, "/rerank", {"query": "a", "documents": ["b"]}, 404, "the model of this server is an emb")


def test_a_body_that_is_too_long(served):
    with running(served, body_bytes=10_000) as client:
        for length in (10_001, 25_000, 2_000_000):
            with socket.create_connection(("127.0.0.1", client.port)) as sent:
                head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
                sent.sendall(f"{head}{length}\r\n\r\n".encode() + b" " * min(length, 25_000))
                assert sent.recv(4096).startswith(b"HTTP/1.1 413 ")
        endless = iter([b" " * 4000] * 5)
        status, _, answer = client.request("POST", "/v1/embeddings", endless)
        assert status == 413 and b"longer than 10000 bytes" in answer
        assert client.service._open_bytes == 0


def test_a_body_that_does_not_arrive(served):
    with running(served, upload_seconds=0.2) as client, socket.create_connection(("127.0.0.1", client.port)) as sent:
        sent.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        assert sent.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_many_bytes_at_once(served):
    with running(served, body_bytes=100_000, open_bytes=150_000) as client:
        answers = client.together([{"input": "a", "user": "x" * 90_000}] * 8)
        statuses = {status for status, _, _ in answers}
        assert statuses <= {200, 429} and 200 in statuses
        assert client.service._open_bytes == 0 and client.embed(input="a").shape == (1, 256)


def test_no_picture_is_fetched_unless_its_host_is_allowed(served, embedder, photo):
    asked_for = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked_for.append(self.path)
            self.send_response(302 if self.path == "/elsewhere" else 200)
            if self.path == "/elsewhere":
                self.send_header("Location", "/secret")
            self.end_headers()
            self.wfile.write(b"x" * 60_000 if self.path == "/large" else encoded(photo))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{host.server_port}"
        with running(served) as client:
            assert_refused(client, "/v1/embeddings", {"messages": asked(seen(f"{address}/a"))}, 400, "not allowed")
        assert asked_for == []
        with running(served, hosts=["127.0.0.1"], media=MediaLimits(max_bytes=50_000)) as client:
            found = client.embed(messages=asked(seen(f"{address}/a")))
            np.testing.assert_allclose(found, embedder.encode([photo]), rtol=0, atol=1e-6)
            for path, status, message in (
                ("/elsewhere", 400, "answered 302; redirects"),
                ("/large", 413, "50001 bytes"),
            ):
                body = {"messages": asked(seen(address + path))}
                assert_refused(client, "/v1/embeddings", body, status, message)
            other = {"messages": asked(seen(f"http://localhost:{host.server_port}/b"))}
            assert_refused(client, "/v1/embeddings", other, 400, "not allowed")
            dead = {"messages": asked(seen("http://127.0.0.1:1/b"))}
            assert_refused(client, "/v1/embeddings", dead, 400, "cannot be fetched")
        assert asked_for == ["/a", "/elsewhere", "/large"]
        host.shutdown()


def test_a_damaged_picture_fails_its_own_request_alone(served, embedder):
    damaged = {"messages": [asked(said("b")), asked(seen(data_url(encoded(picture(1))[:-2000])))]}
    bodies = [{"input": "a"}, damaged, {"input": ["c", "d"]}]
    with running(served, wait=0.3) as client:
        (first, _, one), (second, _, other), (third, _, two) = client.together(bodies)
        assert (first, second, third) == (200, 400, 200)
        assert "messages.1: encoded image of" in other["error"]["message"]
        found = [answer["embedding"] for answer in one["data"] + two["data"]]
        np.testing.assert_allclose(found, embedder.encode(["a", "c", "d"]), rtol=0, atol=1e-6)
        assert client.metric("mmembed_batch_inputs_sum") == 3  # what was computed, each alone behind the failure


def test_a_full_queue(served, embedder):
    texts = [f"{number} {'a long text about many things ' * 80}" for number in range(4)]
    expected = embedder.encode(texts)
    with running(served, inputs=4, waiting_inputs=8, budget=600) as client:
        answers = client.together([{"input": texts}] * 24)
        assert {status for status, _, _ in answers} == {200, 429}
        for status, headers, answer in answers:
            if status == 429:
                assert 1 <= int(headers["retry-after"]) <= 60 and "try again in" in answer["error"]["message"]
            else:
                found = [one["embedding"] for one in answer["data"]]
                np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert client.embed(input="a").shape == (1, 256)


def test_a_request_whose_time_is_over(served):
    texts = ["a long text about many things " * 80] * 256
    with running(served, seconds=0.3, upload_seconds=0.3) as client:
        status, answer = client.post("/v1/embeddings", {"input": texts})
        assert status == 504 and "no answer within 0.3 s" in answer["error"]["message"]
        until = time.monotonic() + 20
        while client.metric("mmembed_waiting_inputs") and time.monotonic() < until:
            time.sleep(0.01)
        assert client.metric("mmembed_waiting_inputs") == 0
        assert client.metric("mmembed_batch_inputs_sum") < len(texts)  # the rest was not computed


def test_a_model_that_fails(served, monkeypatch):
    def fails(rows):
        raise RuntimeError("CUDA error")

    with running(served) as client:
        run = served.run
        monkeypatch.setattr(served, "run", fails)
        for _ in range(3):
            assert_refused(client, "/v1/embeddings", {"input": "a"}, 500, "the server failed (RuntimeError); its log")
        assert client.request("GET", "/health")[0] == 503
        monkeypatch.setattr(served, "run", lambda rows: run(rows) * np.float32("nan"))
        assert_refused(client, "/v1/embeddings", {"input": "a"}, 500, "numbers that are none (NaN or infinite)")
        monkeypatch.undo()
        assert client.embed(input="a").shape == (1, 256) and client.request("GET", "/health")[0] == 200


def test_a_client_that_goes_away(served):
    texts = ["a long text about many things " * 80] * 256
    body = json.dumps({"input": texts}).encode()
    with running(served) as client:
        with socket.create_connection(("127.0.0.1", client.port)) as sent:
            head = "POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            sent.sendall(f"{head}{len(body)}\r\n\r\n".encode() + body)
            until = time.monotonic() + 20
            while not client.metric("mmembed_waiting_inputs") and time.monotonic() < until:
                time.sleep(0.01)
        while client.metric("mmembed_waiting_inputs") and time.monotonic() < until:
            time.sleep(0.01)
        assert client.metric('mmembed_requests_total{endpoint="/v1/embeddings",status="499"}') == 1
        assert client.metric("mmembed_batch_inputs_sum") < len(texts)
        assert client.embed(input="a").shape == (1, 256)


def test_many_connections(served):
    with running(served, connections=4) as client:
        idle = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
        try:
            assert client.request("GET", "/health")[0] == 503
        finally:
            for one in idle:
                one.close()
        until = time.monotonic() + 10
        while client.request("GET", "/health")[0] != 200:
            assert time.monotonic() < until


def test_a_key(served):
    with running(served, key="s3cret") as client:
        assert client.embed(input="a").shape == (1, 256)
        client.key = "s3cret2"
        assert_refused(client, "/v1/embeddings", {"input": "a"}, 401, "Authorization: Bearer KEY")
        client.key = None
        assert client.request("GET", "/metrics")[0] == client.request("GET", "/v1/models")[0] == 401
        assert client.request("GET", "/health")[0] == 200
        basic = base64.b64encode(b"s3cret:").decode()
        assert client.post("/v1/embeddings", {"input": "a"}, Authorization=f"Basic {basic}")[0] == 401


def test_limits_that_nothing_could_pass():
    with pytest.raises(ConfigError, match="seconds: found 0"):
        ServeLimits(seconds=0)
    with pytest.raises(ConfigError, match="inputs: found nan"):
        ServeLimits(inputs=float("nan"))
    with pytest.raises(ConfigError, match="waiting_inputs: found 8, below the 256 of `inputs`"):
        ServeLimits(waiting_inputs=8)


def test_pictures_of_all_formats_that_are_taken(client, embedder):
    for kind in ("png", "jpeg", "webp", "gif", "bmp"):
        content = encoded(picture(2, 40, 30).quantize(64) if kind == "gif" else picture(2, 40, 30), kind)
        found = client.embed(messages=asked(seen(data_url(content, kind))))
        np.testing.assert_allclose(found, embedder.encode([content]), rtol=0, atol=1e-6)
    tiff = io.BytesIO()
    Image.new("RGB", (9, 9)).save(tiff, "TIFF")
    body = {"messages": asked(seen(data_url(tiff.getvalue())))}
    assert_refused(client, "/v1/embeddings", body, 400, "no picture of PNG, JPEG, WEBP, GIF, BMP")
