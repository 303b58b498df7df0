"""Servers that are slow, busy, broken, gone or refuse: over real sockets, with an oracle that knows right answers."""

import base64
import email.utils
import io
import json
import socket
import threading
import time
from pathlib import Path

import PIL.Image
import pytest

from data_tools.generators import GENERATORS, GeneratorDown, Request, RequestFailed, Sampling
from data_tools.generators.line import Line
from mmembed.errors import ConfigError
from mmembed.media import MediaStore
from tests.synthesis.servers import ChatServer, FaultyProxy, Handler, completion, oracle, right_text

ROOT = Path(__file__).parents[2]
NESTED = b"[" * 200_000 + b"]" * 200_000


@pytest.fixture
def server():
    running = ChatServer(oracle)
    yield running
    running.close()


@pytest.fixture
def ask(server, tmp_path):
    """ask(request, **options) -> the future of a new generator; `ask.generator(**options)` gives that."""
    begun = []

    def generator(**options):
        built = GENERATORS.build({"type": "openai", "model": "oracle", "url": server.url, "patience": 5.0} | options)
        begun.append(built)
        built.start(MediaStore(tmp_path))
        return built

    def once(request, **options):
        return generator(concurrency=1, **options).submit(request)

    once.generator = generator
    yield once
    for built in begun:
        built.close()


def question(number, text=None, **sampling):
    messages = ({"role": "user", "content": text or f"question {number}"},)
    return Request(str(number), messages, Sampling(seed=number, **sampling))


def right(request):
    return right_text(list(request.messages), request.sampling.seed)


def problem(status, message, **more):
    return status, {"error": {"message": message, **more}}


def test_every_request_gets_one_right_answer_through_a_proxy_that_spoils_a_fifth(server, ask):
    proxy = FaultyProxy(server.port, share=0.2, seed=7)
    generator = ask.generator(url=proxy.url, concurrency=32, timeout=20.0, patience=60.0)
    requests = [question(number) for number in range(400)]
    answers = [future.result(60) for future in [generator.submit(request) for request in requests]]
    proxy.close()
    assert [answer.text for answer in answers] == [right(request) for request in requests]
    assert all(proxy.counts[kind] for kind in FaultyProxy.KINDS), proxy.counts
    assert proxy.counts["whole"] + proxy.counts["delay"] == 400, "no answer is asked for twice"


def test_a_server_that_dies_and_comes_back_is_waited_for(server, ask):
    generator = ask.generator(concurrency=8, patience=30.0)
    futures = [generator.submit(question(number)) for number in range(50)]
    futures[20].result(10)
    server.close()
    for line in generator._lines:
        line.hang_up()  # a server that dies takes its connections along; this one is a thread
        line._hung_up = False
    futures += [generator.submit(question(number)) for number in range(50, 100)]
    time.sleep(1)
    assert not futures[-1].done()
    again = ChatServer(oracle, port=server.port)
    assert [future.result(30).text for future in futures] == [right(question(number)) for number in range(100)]
    again.close()


def test_a_server_that_stays_away_ends_all_after_the_patience(server, ask):
    generator = ask.generator(concurrency=4, patience=1.5)
    server.close()
    for line in generator._lines:
        line.hang_up()
        line._hung_up = False
    began = time.monotonic()
    futures = [generator.submit(question(number)) for number in range(40)]
    for future in futures:
        with pytest.raises(GeneratorDown, match="no good answer for .* start the server, then the same command"):
            future.result(20)
    assert 1.5 <= time.monotonic() - began < 8, "the other 36 are not tried as long"


def test_nobody_there_at_the_start(ask):
    began = time.monotonic()
    with pytest.raises(GeneratorDown, match="127.0.0.1:9/v1: no good answer"):
        ask.generator(url="http://127.0.0.1:9/v1", patience=0.8)
    assert time.monotonic() - began < 5


def test_a_wrong_name_of_a_model_is_told_at_the_start_with_the_nearest(ask):
    with pytest.raises(GeneratorDown, match="no model 'oracel'; did you mean 'oracle'?"):
        ask.generator(model="oracel")


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (problem(401, "Incorrect API key provided"), "refuses the key in A_KEY .401 Incorrect API key"),
        (problem(403, "not yours"), "refuses the key in A_KEY"),
        (problem(404, "The model `oracle` does not exist"), r"404 The model .* correct url .* or model \('oracle'\)"),
        (problem(429, "You exceeded your quota", code="insufficient_quota"), "no credit left"),
        ((429, {}, {"Retry-After": "3600"}), "asks to wait 3600 s .* longer than patience"),
    ],
    ids=["401", "403", "404", "no credit", "an hour"],
)
def test_what_no_other_try_would_mend_ends_all_at_once(server, ask, monkeypatch, reply, says):
    monkeypatch.setenv("A_KEY", "secret-of-mine")
    server.answer = lambda body: reply
    began = time.monotonic()
    with pytest.raises(GeneratorDown, match=says) as raised:
        ask(question(1), key_variable="A_KEY").result(10)
    assert time.monotonic() - began < 2 and "secret-of-mine" not in str(raised.value)
    assert server.headers[0]["Authorization"] == "Bearer secret-of-mine" and len(server.bodies) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        (
            problem(400, "context length is 512"),
            "rejected by the server",
            "7: .* rejects it: 400 context length is 512",
        ),
        (problem(413, "too large"), "rejected by the server", "413"),
        (problem(422, "no such schema"), "rejected by the server", "422"),
        (problem(400, "flagged", code="content_filter"), "refused", "7: a filter of the server refused it"),
    ],
    ids=["400", "413", "422", "filter"],
)
def test_what_concerns_one_request_leaves_the_others(server, ask, reply, kind, says):
    generator = ask.generator()
    server.instead = [reply]
    with pytest.raises(RequestFailed, match=says) as raised:
        generator.submit(question(7)).result(10)
    assert raised.value.kind == kind
    assert generator.submit(question(8)).result(10).text == right(question(8))
    assert len(server.bodies) == 2


def test_answers_that_a_filter_cut_are_refused(server, ask):
    server.answer = lambda body: (200, completion("half of", "content_filter"))
    assert ask(question(1)).result(10).finish == "refused"
    refusal = completion(None)
    refusal["choices"][0]["message"]["refusal"] = "I would rather not"
    server.answer = lambda body: (200, refusal)
    answer = ask(question(1)).result(10)
    assert (answer.finish, answer.text) == ("refused", "I would rather not")


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{}", b"[]", b'{"choices": []}', b'{"choices": [{"message": {}, "finish_reason": "stop"}]}',
     json.dumps(completion(None)).encode(), json.dumps(completion("x", "tool_calls")).encode(),
     json.dumps(completion("caf\u00e9"), ensure_ascii=False).encode("latin-1"), b'{"choices": "\0"}', NESTED,
     json.dumps(completion("x", tokens=0)).replace('"completion_tokens": 0', '"completion_tokens": 1e999').encode()],
)  # fmt: skip
def test_what_is_no_answer_is_asked_again_and_then_given_up(server, ask, body):
    server.instead = [(200, body)]
    assert ask(question(1)).result(10).text == right(question(1))
    server.answer = lambda _: (200, body)
    with pytest.raises(RequestFailed, match="no answer of .* after 2 tries") as raised:
        ask(question(1), retries=1).result(10)
    assert raised.value.kind == "no answer" and len(server.bodies) == 4


@pytest.mark.parametrize("status", [400, 429, 500])
def test_an_error_that_cannot_be_read_counts_by_its_status(server, ask, status):
    server.instead = [(status, NESTED)]
    future = ask(question(1))
    if status == 400:
        with pytest.raises(RequestFailed, match=r"rejects it: 400 \[\[\["):
            future.result(10)
    else:
        assert future.result(10).text == right(question(1))


def test_a_list_of_models_that_cannot_be_read_is_none(server, ask, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.reply(200, NESTED))
    assert ask(question(1)).result(10).text == right(question(1))


def test_a_query_of_the_address_goes_with_every_request(server, ask, monkeypatch):
    paths, reply = [], Handler.reply
    monkeypatch.setattr(Handler, "reply", lambda handler, *said: (paths.append(handler.path), reply(handler, *said)))
    future = ask(question(1), url=f"http://127.0.0.1:{server.port}/openai/?api-version=2024-10-21&a=%20b")
    assert future.result(10).text == right(question(1))
    query = "?api-version=2024-10-21&a=%20b"
    assert paths == [f"/openai/models{query}", f"/openai/chat/completions{query}"]


@pytest.mark.parametrize("date", [False, True], ids=["seconds", "date"])
def test_all_threads_wait_as_long_as_the_server_asks(server, ask, date):
    wish = email.utils.formatdate(time.time() + 3, usegmt=True) if date else "2"
    server.instead = [(429, {}, {"Retry-After": wish})]
    generator = ask.generator(concurrency=4)
    generator.submit(question(0))
    time.sleep(0.5)
    began = time.monotonic()
    assert [generator.submit(question(n)).result(10).text for n in (1, 2)] == [right(question(n)) for n in (1, 2)]
    assert time.monotonic() - began > 1


def test_a_request_that_hangs_is_asked_again_while_others_are_answered(server, ask):
    hung = threading.Event()

    def answer(body):
        if body["seed"] == 3 and not hung.is_set():
            hung.set()
            time.sleep(3)
        return oracle(body)

    server.answer = answer
    generator = ask.generator(concurrency=4, timeout=1.0)
    futures = [generator.submit(question(number)) for number in range(8)]
    assert [future.result(20).text for future in futures] == [right(question(number)) for number in range(8)]


def test_what_is_asked_for_is_what_is_sent(server, ask, tmp_path):
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    PIL.Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    PIL.Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    parts = [{"type": "image", "image": name} for name in ("red.png", "clear.webp")]
    messages = (
        {"role": "system", "content": "s"},
        {"role": "user", "content": [*parts, {"type": "text", "text": "t"}]},
    )
    sampling = Sampling(max_tokens=9, temperature=0.3, top_p=0.8, seed=5, stop=("END",))
    ask(
        Request("k", messages, sampling, schema), options={"top_k": 20, "max_tokens": None, "max_completion_tokens": 9}
    ).result(10)
    body = server.bodies[0]
    sent = body["messages"][1]["content"]
    assert body["messages"][0] == {"role": "system", "content": "s"} and sent[2] == {"type": "text", "text": "t"}

    urls = [part["image_url"]["url"].partition(",") for part in sent[:2]]
    assert base64.b64decode(urls[0][2]) == (tmp_path / "red.png").read_bytes()
    opened = PIL.Image.open(io.BytesIO(base64.b64decode(urls[1][2])))
    assert opened.mode == "RGB" and opened.getpixel((0, 0)) == (255, 255, 255), "transparent is white, as in training"
    del body["messages"]
    wanted = {"json_schema": {"name": "answer", "schema": schema, "strict": True}, "type": "json_schema"}
    assert body == {
        "model": "oracle", "temperature": 0.3, "top_p": 0.8, "seed": 5, "stop": ["END"], "top_k": 20,
        "max_completion_tokens": 9, "response_format": wanted,
    }  # fmt: skip


def test_a_missing_key_is_told_before_anything_is_sent(server):
    generator = GENERATORS.build({"type": "openai", "model": "oracle", "url": server.url, "key_variable": "NO_KEY"})
    with pytest.raises(ConfigError, match="the environment has no NO_KEY"):
        generator.fingerprint()
    with pytest.raises(ConfigError, match="NO_KEY"):
        generator.start(MediaStore())


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({}, "either url .* or serve"),
        ({"url": "http://a/v1", "serve": {}}, "either url .* or serve"),
        ({"url": "a/v1"}, "give an http or https address"),
        ({"url": "http:///v1"}, "give an http or https address"),
        ({"url": "http://a:b/v1"}, "give an http or https address"),
        ({"url": "http://a/v1#models"}, "found '#models', which no server gets to see"),
        ({"url": "http://me:secret@a/v1"}, "url: it names a user; .* key_variable"),
        ({"serve": {"optoins": {}}}, "serve: unknown option 'optoins'; did you mean 'options'"),
        ({"url": "http://a/v1", "concurrency": 0}, "concurrency"),
    ],
)
def test_blocks_that_cannot_be(block, says):
    with pytest.raises(ConfigError, match=says):
        GENERATORS.build({"type": "openai", "model": "m", **block})


def test_closing_ends_what_is_waited_for(server, ask):
    server.answer = lambda body: time.sleep(30)
    generator = ask.generator(concurrency=2)
    futures = [generator.submit(question(number)) for number in range(10)]
    time.sleep(0.3)
    began = time.monotonic()
    generator.close()
    assert time.monotonic() - began < 5
    for future in futures:
        with pytest.raises(GeneratorDown, match="closed"):
            future.result(1)


class Tunnel(threading.Thread):
    """A proxy that knows CONNECT alone, and one machine, by any name."""

    def __init__(self):
        super().__init__(daemon=True)
        self.listening, self.asked = socket.create_server(("127.0.0.1", 0)), []
        self.start()

    def run(self):
        client, _ = self.listening.accept()
        head = client.recv(65536).decode()
        self.asked.append([*head.split()[:2], *(line for line in head.splitlines() if line.startswith("Proxy-"))])
        server = socket.create_connection(("127.0.0.1", int(head.split()[1].partition(":")[2])))
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")

        def pump(source, target):
            while more := source.recv(65536):
                target.sendall(more)

        threading.Thread(target=pump, args=(server, client), daemon=True).start()
        pump(client, server)


@pytest.fixture
def no_exceptions(monkeypatch):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)


@pytest.mark.parametrize(
    ("form", "headers"),
    [
        ("http://127.0.0.1:{}", []),
        ("127.0.0.1:{}", []),
        ("http://me:p%40ss@127.0.0.1:{}/", [f"Proxy-Authorization: Basic {base64.b64encode(b'me:p@ss').decode()}"]),
    ],
    ids=["address", "no scheme", "password"],
)
def test_a_proxy_of_the_environment_is_gone_through(server, ask, monkeypatch, no_exceptions, form, headers):
    tunnel = Tunnel()
    monkeypatch.setenv("http_proxy", form.format(tunnel.listening.getsockname()[1]))
    future = ask(question(1), url=f"http://oracle.invalid:{server.port}/v1")
    assert future.result(10).text == right(question(1))
    assert tunnel.asked == [["CONNECT", f"oracle.invalid:{server.port}", *headers]]
    assert "Proxy-Authorization" not in server.headers[0], "the password is the proxy's"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_never_asked_through_a_proxy(server, ask, monkeypatch, no_exceptions, host):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nobody there
    future = ask(question(1), url=f"http://{host}:{server.port}/v1")
    assert future.result(10).text == right(question(1))


def test_addresses_of_this_machine_and_of_others(monkeypatch, no_exceptions):
    monkeypatch.setenv("http_proxy", "http://proxy.invalid")
    line = Line({}, 1.0)
    here = [line._to("http", f"{host}:8000").host for host in ("127.8.0.1", "[::1]", "LOCALHOST")]
    assert here == ["127.8.0.1", "::1", "LOCALHOST"]
    others = [line._to("http", f"{host}:8000") for host in ("128.0.0.1", "[::2]", "localhost.invalid")]
    assert [(one.host, one.port) for one in others] == [("proxy.invalid", 80)] * 3


@pytest.mark.parametrize("proxy", ["socks5://me:secret@a:1080", "http://me:secret@a:b"])
def test_a_proxy_that_cannot_be_used_is_named_without_its_password(server, ask, monkeypatch, no_exceptions, proxy):
    monkeypatch.setenv("http_proxy", proxy)
    with pytest.raises(GeneratorDown, match="http_proxy of the environment is no address") as raised:
        ask(question(1), url=f"http://oracle.invalid:{server.port}/v1")
    assert "secret" not in str(raised.value)
