"""`mmembed serve` as a user starts it."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from families import build

from mmembed import Embedder
from mmembed.cli import build_parser, main
from mmembed.models.checkpoint import save_checkpoint
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.serving.vllm import command_of, environment_of
from mmembed.vllm_environment import find_vllm
from tests.serving.running import Client, asked, data_url, encoded, said, seen

ROOT = Path(__file__).parents[2]
LONG = ["a long text about many things " * 80] * 24


@pytest.fixture(scope="module")
def judge(family_folder, tmp_path_factory):
    """Folder of a reranker."""
    words, folder = ["a", "b"], tmp_path_factory.mktemp("judge") / "judge"
    parts = build(
        family_folder("qwen3"), head={"type": "yes_no", "words": words}, prompt={"type": "judge", "words": words}
    )
    save_checkpoint(folder, *parts)
    return folder


def start(*arguments, output=subprocess.PIPE, **environment):
    command = [sys.executable, "-m", "mmembed", "serve", *map(str, arguments)]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(command, env=given, stdout=output, stderr=output, text=True)


def answers(client):
    try:
        return client.request("GET", "/health")[0] == 200
    except OSError:
        return False


def refused(capsys, *arguments):
    assert main(["serve", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_is_open_and_ends_with_0(judge, tmp_path, number):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    process = start("mmembed-nano", judge, "--port", 0, "--dtype", "float32", "--api-key-file", key)
    try:
        line = process.stdout.readline()
        found = re.fullmatch(
            r"http://127\.0\.0\.1:(\d+) serves mmembed-nano \(256 dimensions\), judge \(a reranker\); .*\n", line
        )
        assert found, line + process.stderr.read()
        client, answers = Client(int(found[1]), key="s3cret"), []
        texts = ["a red bus", "x"]
        expected = Embedder.from_pretrained("mmembed-nano", dtype="float32", device="cpu").encode(texts)
        np.testing.assert_allclose(client.embed(input=texts), expected, rtol=0, atol=1e-6)
        assert client.post("/rerank", {"query": "a", "documents": ["b", "c"]})[0] == 200
        opened = threading.Thread(target=lambda: answers.append(client.post("/v1/embeddings", {"input": LONG})))
        opened.start()
        until = time.monotonic() + 30
        while not client.metric("mmembed_waiting_inputs") and time.monotonic() < until:
            time.sleep(0.005)
        process.send_signal(number)
        opened.join(60)
        (answer,) = answers
        assert answer[0] == 200 and len(answer[1]["data"]) == len(LONG)
        assert process.wait(60) == 0
        with pytest.raises(ConnectionRefusedError):
            http.client.HTTPConnection("127.0.0.1", client.port).connect()
        assert process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_said_before_a_model_loads(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = refused(capsys, "/nonexistent", "--port", port)
        assert f"--port {port}: cannot listen on 127.0.0.1" in error
    assert "give another --port" in refused(capsys, "--port", 99999)


def test_models_that_are_not_served(family_folder, judge, tmp_path, capsys):
    backbone = family_folder("qwen3")
    save_checkpoint(tmp_path / "many", *build(backbone, pooling={"type": "multi_vector"}))
    assert "gives many vectors a content" in refused(capsys, tmp_path / "many", "--port", 0)
    assert "nonexistent" in refused(capsys, tmp_path / "nonexistent", "--port", 0)
    assert "give one embedder, one reranker, or one of each" in refused(
        capsys, judge, "mmembed-nano", judge, "--served-model-name", "a", "b", "c", "--port", 0
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--engine", "vllm", "--max-inputs", "3"], "--max-inputs: has no effect on vLLM's server"),
        (["--engine", "vllm", "--max-bytes", "3"], "--max-bytes: has no effect on vLLM's server"),
        (["--engine", "vllm", "--device", "cpu"], "--device: has no effect on vLLM's server"),
        (["--engine", "mmembed", "--vllm", "a=b"], "--vllm: has no effect on --engine mmembed"),
        (["--vllm-python", "x"], "--vllm-python: has no effect on --engine mmembed"),
        (["--max-inputs", "0"], "inputs: found 0; give a number above 0"),
        (["--max-waiting", "3"], "waiting_inputs: found 3, below the 256 of `inputs`"),
        (["--timeout", "nan"], "seconds: found nan"),
        (["--batch-wait", "-1"], "--batch-wait: found -1.0; give 0 or more"),
        (["--batch-tokens", "-1"], "--batch-tokens: found -1; give 0 or more"),
        (["--max-pixels-decoded", "0"], "max_pixels_decoded: found 0"),
        (["--served-model-name", "a", "b"], "2 names for 1 models"),
        (["a/x", "b/x"], "--served-model-name: both would be 'x'"),
        (["--api-key-file", "/nonexistent"], "--api-key-file /nonexistent: cannot be read"),
        (["--api-key-file", "/dev/null"], "--api-key-file /dev/null: holds no key"),
        (["--engine", "vllm", "--vllm-python", "/nonexistent"], "--vllm-python: /nonexistent is no interpreter"),
        (["a", "b", "--engine", "vllm"], "vLLM's server has one model"),
    ],
)
def test_options_that_cannot_work(capsys, flags, message):
    assert message in refused(capsys, "--port", 0, *flags)


def test_an_empty_key_is_no_key(capsys, monkeypatch):
    monkeypatch.setenv("MMEMBED_API_KEY", " ")
    assert "MMEMBED_API_KEY: holds no key" in refused(capsys, "--port", 0)


def test_folders_that_vllm_would_read_otherwise(judge, tmp_path, capsys):
    usual = ["--engine", "vllm", "--vllm-python", sys.executable]
    assert "a checkpoint of mmembed, whose prompt" in refused(capsys, judge, *usual)
    (tmp_path / "mmembed_export.json").write_text('{"target": "sentence-transformers"}')
    assert "an export for sentence-transformers" in refused(capsys, tmp_path, *usual)
    (tmp_path / "mmembed_export.json").write_text("[")
    assert "mmembed_export.json: cannot be read" in refused(capsys, tmp_path, *usual)


def test_an_export_for_others_is_not_served_as_a_bare_backbone(tmp_path, capsys):
    (tmp_path / "mmembed_export.json").write_text('{"target": "vllm"}')
    error = refused(capsys, tmp_path, "--engine", "mmembed", "--port", 0)
    assert "an export for vllm" in error and "serve the checkpoint" in error


def arguments_of(model, **given):
    usual = {"host": "127.0.0.1", "port": 8000, "dtype": "auto", "trust_remote_code": False, "hosts": [], "further": []}
    return command_of("python", str(model), "name", **{**usual, **given})


def pairs(command):
    """flag -> what stands behind it, up to the next one."""
    found = {}
    for word in command:
        if word.startswith("--"):
            flag = word
            found[flag] = []
        elif found:
            found[flag].append(word)
    return found


def test_the_command_line_of_vllm(tmp_path):
    options = pairs(arguments_of("mmembed-nano"))
    assert options["--pooler-config"] == ['{"seq_pooling_type": "MEAN"}'] and options["--convert"] == ["embed"]
    assert options["--allowed-media-domains"] == ["none.invalid"] and options["--host"] == ["127.0.0.1"]
    assert "--dtype" not in options and "--trust-remote-code" not in options
    told = {"target": "vllm", "serve": ["--runner", "pooling", "--chat-template", "score.jinja"]}
    (tmp_path / "mmembed_export.json").write_text(json.dumps(told))
    (tmp_path / "score.jinja").write_text("x")
    further = ["max_model_len=512", "enforce_eager=true", "port=9", 'limit_mm_per_prompt={"image": 2}']
    options = pairs(arguments_of(tmp_path, dtype="float32", hosts=["a.org", "b.org"], further=further))
    assert options["--chat-template"] == [str(tmp_path / "score.jinja")] and options["--runner"] == ["pooling"]
    assert options["--allowed-media-domains"] == ["a.org", "b.org"] and options["--dtype"] == ["float32"]
    assert options["--max-model-len"] == ["512"] and options["--enforce-eager"] == [] and options["--port"] == ["9"]
    assert json.loads(options["--limit-mm-per-prompt"][0]) == {"image": 2}


def test_vllm_is_told_the_key_where_no_process_list_shows_it(monkeypatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    environment = environment_of(sys.executable, "s3cret")
    assert environment["VLLM_API_KEY"] == "s3cret" and environment["VLLM_NO_USAGE_STATS"] == "0"
    assert environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert "VLLM_API_KEY" not in environment_of(sys.executable, None) or "VLLM_API_KEY" in os.environ


def test_every_limit_has_a_flag_that_says_its_default():
    from mmembed.commands.serve import LIMITS, PICTURES
    from mmembed.serving.limits import ServeLimits

    usual, shown = ServeLimits(), build_parser()[1]["serve"].format_help()
    assert {name for name, _, _ in LIMITS.values()} == set(vars(usual)) - {"media"} and usual.media == PICTURES
    for flag, (name, kind, text) in LIMITS.items():
        default = int(re.search(r"default ([\d,]+)", text)[1].replace(",", ""))
        assert default == vars(usual)[name] and type(vars(usual)[name]) is kind and f"--{flag}" in shown


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(find_vllm() is None, reason="no environment with vLLM here; make vllm-env makes it")
def test_vllms_server_gives_the_same_vectors_to_the_same_client(tmp_path, photo):
    """Texts and pictures; the picture's prompt is that of vLLM's chat template."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    flags = [
        "--engine",
        "vllm",
        "--port",
        port,
        "--dtype",
        "float32",
        "--vllm",
        "max_model_len=512",
        "enforce_eager=true",
    ]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = start("mmembed-nano", *flags, output=output, MMEMBED_API_KEY="s3cret")
    try:
        client = Client(port, key="s3cret")
        until = time.monotonic() + 900
        while not answers(client):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(1)
        texts = ["a red bus", "what is the capital of France? " * 9]
        bare = Embedder.from_pretrained("mmembed-nano", dtype="float32", device="cpu")
        np.testing.assert_allclose(client.embed(input=texts, model="mmembed-nano"), bare.encode(texts), atol=1e-5)
        prompt = {"type": "chat", "mask_instruction": False, "add_generation_prompt": False}
        chat = Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", prompt=prompt, dtype="float32")))
        turn = asked(seen(data_url(encoded(photo))), said("what is it"))
        np.testing.assert_allclose(client.embed(messages=turn), chat.encode([[photo, "what is it"]]), atol=1e-3)
        status, answer = client.post("/v1/embeddings", {"messages": asked(seen("http://127.0.0.1:9/x.png"))})
        assert status == 400 and "none.invalid" in answer["error"]["message"]
        client.key = None
        assert client.post("/v1/embeddings", {"input": "a"})[0] == 401
    finally:
        process.terminate()
        process.wait(60)
