"""What /v1/embeddings and /rerank answer is what Embedder and Reranker give."""

import base64

import numpy as np
import pytest
from families import build, picture

from mmembed import Reranker
from mmembed.serving.models import ServedReranker
from tests.serving.running import asked, data_url, encoded, running, said, seen

TEXTS = ["a red bus", "Die Ernte kam spät.", "what is the capital of France? " * 40, "x"]


def assert_equal(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_texts(client, embedder):
    status, answer = client.post("/v1/embeddings", {"input": TEXTS, "model": "nano", "user": "somebody"})
    assert status == 200 and answer["object"] == "list" and answer["model"] == "nano"
    assert_equal([one["embedding"] for one in answer["data"]], embedder.encode(TEXTS))
    tokens = sum(map(len, embedder.prepare(TEXTS)))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert_equal(client.embed(input="a red bus"), embedder.encode(["a red bus"]))


def test_base64_and_dimensions(client, embedder):
    status, answer = client.post(
        "/v1/embeddings", {"input": TEXTS, "encoding_format": "base64", "dimensions": 64, "prompt_name": "query"}
    )
    found = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in answer["data"]]
    assert status == 200
    assert_equal(found, embedder.encode(TEXTS, role="query", truncate_dim=64))


def test_roles_and_instructions(client, embedder):
    told = "Find a passage that answers"
    expected = embedder.encode(TEXTS, role="query", instruction=told)
    assert np.abs(expected - embedder.encode(TEXTS)).max() > 0.01
    assert_equal(client.embed(input=TEXTS, prompt_name="query", instruction=told), expected)
    system = {"role": "system", "content": told}
    turns = [[system, {"role": "query", "content": text}] for text in TEXTS]
    assert_equal(client.embed(messages=turns), expected)
    assert_equal(client.embed(input=turns), expected)
    assert_equal(client.embed(messages=turns[0]), expected[:1])
    mixed = [turns[0], [{"role": "query", "content": TEXTS[1]}]]
    assert_equal(client.embed(messages=mixed), [expected[0], embedder.encode([TEXTS[1]], role="query")[0]])


def test_pictures(client, embedder, photo):
    url = data_url(encoded(photo))
    turns = [asked(seen(url), said("what is it")), asked(said("look"), seen(url)), asked(seen(url), said(""))]
    expected = embedder.encode([{"image": photo, "text": "what is it"}, ["look", photo], photo])
    assert_equal(client.embed(messages=turns), expected)
    assert_equal(client.embed(messages=turns[0]), expected[:1])
    jpeg = encoded(picture(5, 200, 120), "JPEG")
    assert_equal(client.embed(messages=asked(seen(data_url(jpeg, "jpeg")))), embedder.encode([jpeg]))


def test_a_request_that_is_larger_than_a_batch(served, embedder):
    texts = [f"{number} {TEXTS[number % 4]}" for number in range(60)]
    with running(served, budget=300) as client:
        assert_equal(client.embed(input=texts), embedder.encode(texts))
        assert client.metric("mmembed_batch_inputs_count") > 5


def test_requests_at_once_share_batches_and_change_nothing(served, embedder):
    texts = [f"number {number} {TEXTS[number % 4]}" for number in range(48)]
    expected = embedder.encode(texts)
    with running(served, wait=0.05) as client:
        for (status, _, answer), vector in zip(
            client.together([{"input": text} for text in texts]), expected, strict=True
        ):
            assert status == 200
            assert_equal(answer["data"][0]["embedding"], vector)
        batches, requests = (client.metric(f"mmembed_batch_requests_{one}") for one in ("count", "sum"))
    assert requests == 48 and batches <= 16


def test_reranking(client, reranker, photo):
    documents = ["a blue train", "a red bus", photo]
    sent = ["a blue train", "a red bus", {"content": [seen(data_url(encoded(photo)))]}]
    expected = reranker.rank("bus", documents, instruction="find it")
    for path in ("/rerank", "/v1/rerank"):
        status, answer = client.post(path, {"query": "bus", "documents": sent, "instruction": "find it"})
        assert status == 200 and answer["model"] == "judge" and answer["usage"]["total_tokens"] > 20
        assert [one["index"] for one in answer["results"]] == [one.index for one in expected]
        assert_equal([one["relevance_score"] for one in answer["results"]], [one.score for one in expected])
        shown = {one["index"]: one["document"] for one in answer["results"]}
        assert shown == {0: {"text": sent[0]}, 1: {"text": sent[1]}, 2: {"multi_modal": sent[2]["content"]}}
    body = {"query": {"content": [said("bus")]}, "documents": sent[:2], "top_n": 1, "return_documents": False}
    status, answer = client.post("/rerank", body)
    (best,) = reranker.rank("bus", documents[:2], top_k=1)
    assert status == 200
    assert answer["results"] == [{"index": best.index, "relevance_score": pytest.approx(best.score, abs=1e-6)}]


def test_queries_at_once_of_a_reranker(client, reranker):
    queries = [f"what is {number}?" for number in range(8)]
    documents = [f"it is the number {number}" for number in range(5)]
    bodies = [{"query": query, "documents": documents} for query in queries]
    for query, (status, _, answer) in zip(queries, client.together(bodies, "/rerank"), strict=True):
        scores = {one["index"]: one["relevance_score"] for one in answer["results"]}
        assert status == 200
        assert_equal([scores[at] for at in range(5)], reranker.score([(query, one) for one in documents]))


def test_a_reranker_of_lists_reads_each_request_alone(family_folder):
    settings = {"head": {"type": "attention", "layer": 1, "offset": 512}, "prompt": {"type": "in_context"}}
    reranker = Reranker(*build(family_folder("qwen3"), **settings))
    documents = [f"it is the number {number} " * (number + 1) for number in range(5)]
    queries = [f"what is {number}?" for number in range(4)]
    with running(ServedReranker("lists", reranker), wait=0.1) as client:
        bodies = [{"query": query, "documents": documents} for query in queries]
        for query, (status, _, answer) in zip(queries, client.together(bodies, "/rerank"), strict=True):
            expected = reranker.rank(query, documents)
            assert status == 200
            assert [one["index"] for one in answer["results"]] == [one.index for one in expected]
            assert_equal([one["relevance_score"] for one in answer["results"]], [one.score for one in expected])
        assert client.metric("mmembed_batch_requests_count") == len(queries)


def test_what_else_is_answered(client):
    status, _, body = client.request("GET", "/health")
    assert (status, body) == (200, b"")
    models = client.request("GET", "/v1/models")[2]
    assert b'"id":"nano"' in models and b'"id":"judge"' in models and b'"dimensions":256' in models
    described = client.request("GET", "/openapi.json")[2]
    assert b'"RerankRequest":{' in described and b"#/components/schemas/Message" in described
    assert client.metric('mmembed_requests_total{endpoint="/health",status="200"}') >= 1
    assert client.metric("process_resident_memory_bytes") > 1e8


def test_openais_own_client(client, embedder, photo):
    openai = pytest.importorskip("openai")
    own = openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0)
    answer = own.embeddings.create(model="nano", input=TEXTS)
    assert_equal([one.embedding for one in answer.data], embedder.encode(TEXTS))
    answer = own.embeddings.create(model="nano", input=TEXTS, dimensions=32, encoding_format="float")
    assert_equal([one.embedding for one in answer.data], embedder.encode(TEXTS, truncate_dim=32))
    told = {"messages": asked(seen(data_url(encoded(photo))))}
    answer = own.post("/embeddings", body={"model": "nano", **told}, cast_to=openai.types.CreateEmbeddingResponse)
    assert_equal(answer.data[0].embedding, embedder.encode([photo])[0])
    with pytest.raises(openai.BadRequestError, match="token ids are not taken"):
        own.embeddings.create(model="nano", input=[[1, 2]])
    with pytest.raises(openai.NotFoundError, match="there is no 'other' here"):
        own.embeddings.create(model="other", input="a")
