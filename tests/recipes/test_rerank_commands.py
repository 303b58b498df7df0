"""`mmembed search --rerank` and `mmembed rerank` with a trained reranker: orders, media, files, refusals."""

import json
import shutil

import numpy as np
import pytest
from families import picture

from mmembed import Embedder, Reranker
from mmembed.cli import main
from mmembed.models.checkpoint import save_checkpoint
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

TEXTS = ["a red bus", "a blue train on the river", "bread", "a letter", "the tower and the bridge", "a dog", "forest"]


@pytest.fixture(scope="module")
def judge(reranker):
    return Reranker.from_pretrained(reranker, dtype="float32", device="cpu")


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(TEXTS)))
    return file


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(number, 56, 56).save(folder / f"{number}.png")
    return folder


def search(capsys, *arguments):
    assert main(["search", *map(str, arguments), "--dtype", "float32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["results"]


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_search_orders_what_the_embedder_found(backbone, reranker, judge, corpus, capsys):
    embedder = Embedder.from_pretrained(backbone, dtype="float32", device="cpu")
    query, told = "a bus in the town", "Find vehicles"
    cosines = embedder.similarity(embedder.encode([query], role="query", instruction=told), embedder.encode(TEXTS))[0]
    found = np.argsort(-cosines)[:4]
    scores = judge.score([(query, TEXTS[row]) for row in found], instruction=told)
    expected = [f"d{found[place]}" for place in np.argsort(-scores)]
    options = ["--model", backbone, "--rerank", reranker, "--rerank-depth", "4", "--instruction", told]
    (result,) = search(capsys, corpus, query, *options, "--top-k", "3")
    hits = result["hits"]
    assert [hit["id"] for hit in hits] == expected[:3] and [hit["rank"] for hit in hits] == [1, 2, 3]
    assert [hit["score"] for hit in hits] == pytest.approx(sorted(scores.tolist(), reverse=True)[:3], abs=1e-5)
    for hit in hits:
        row = int(hit["id"][1:])
        assert found[hit["first_rank"] - 1] == row and hit["first_score"] == pytest.approx(cosines[row], abs=1e-4)
    assert main(["search", str(corpus), query, *map(str, options), "--top-k", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["rank", "score", "was", "id", "content"]


def test_pictures_of_an_encoded_folder_are_found_again(
    backbone, reranker, judge, photos, tmp_path, capsys, monkeypatch
):
    encoded = tmp_path / "photos.enc"
    assert main(["encode", str(photos), "--output", str(encoded), "--model", str(backbone)]) == 0
    asked = tmp_path / "elsewhere"
    asked.mkdir()
    picture(9, 56, 56).save(asked / "query.png")
    monkeypatch.chdir(asked)
    capsys.readouterr()
    query = ["--image", "query.png", "--rerank", reranker]
    (result,) = search(capsys, encoded, *query)
    pairs = [({"image": str(asked / "query.png")}, {"image": str(photos / hit["id"])}) for hit in result["hits"]]
    scores = judge.score(pairs)
    np.testing.assert_allclose([hit["score"] for hit in result["hits"]], scores, atol=1e-5)
    assert len(scores) == 4 and (np.diff(scores) <= 1e-6).all()

    moved = photos.rename(tmp_path / "moved")
    assert main(["search", str(encoded), *map(str, query)]) == 2
    assert ".png: there is no such file" in capsys.readouterr().err
    assert search(capsys, encoded, *query, "--media-root", moved)[0]["hits"] == result["hits"]
    (moved / "2.png").unlink()
    flags = ["--media-root", moved, "--on-bad-record", "skip"]
    assert {hit["id"] for hit in search(capsys, encoded, *query, *flags)[0]["hits"]} == {"0.png", "1.png", "3.png"}

    described = json.loads((encoded / "encoding.json").read_text())
    (encoded / "encoding.json").write_text(
        json.dumps({key: described[key] for key in described if key != "media_root"})
    )
    assert main(["search", str(encoded), *map(str, query)]) == 2
    assert "does not say where its images lie" in capsys.readouterr().err


def test_a_content_whose_order_matters_is_kept_by_an_encoded_folder(
    backbone, reranker, judge, photos, tmp_path, capsys
):
    source, encoded = photos / "records.jsonl", tmp_path / "out"
    content = [{"text": "see"}, {"image": "1.png"}]
    documents = [{"content": content, "id": "a"}, {"content": {"image": "2.png", "text": "x"}, "id": "b"}]
    source.write_text(json.dumps({"query": "q", "documents": documents}) + "\n")
    assert main(["encode", str(source), "--output", str(encoded), "--model", str(backbone)]) == 0
    items = lines((encoded / "items.jsonl").read_text())
    assert items[0]["content"] == content and items[1] == {"id": "b", "image": "2.png", "text": "x"}
    capsys.readouterr()
    hits = {hit["id"]: hit["score"] for hit in search(capsys, encoded, "a bus", "--rerank", reranker)[0]["hits"]}
    there = [["see", {"image": str(photos / "1.png")}], {"image": str(photos / "2.png"), "text": "x"}]
    expected = judge.score([("a bus", content) for content in there])
    assert [hits["a"], hits["b"]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_rerank_records_and_plain_candidates(reranker, judge, photos, tmp_path, capsys):
    source, output = photos / "records.jsonl", tmp_path / "ranked.jsonl"
    canonical = {
        "id": "q1",
        "query": "a red bus",
        "instruction": "Find it",
        "documents": [
            {"content": "a bus", "id": "x", "relevance": 2, "score": 0.3},
            {"content": {"image": "1.png"}, "relevance": 0},
        ],
    }
    plain = {"query": {"text": "a dog"}, "documents": ["a cup", {"text": "the dog", "id": "y"}, ["a", "dog"]]}
    source.write_text(json.dumps(canonical) + "\n" + json.dumps(plain) + "\n")
    command = ["rerank", str(source), "--model", str(reranker), "--dtype", "float32"]
    assert main([*command, "--output", str(output), "--instruction", "Other"]) == 0
    assert f"{output}: 2 queries reranked" in capsys.readouterr().out
    first, second = lines(output.read_text())
    scores = judge.score(
        [("a red bus", "a bus"), ("a red bus", {"image": str(photos / "1.png")})], instruction="Find it"
    )
    best = int(np.argmax(scores))
    assert (first["id"], first["query"], first["instruction"]) == ("q1", "a red bus", "Find it")
    assert [one["index"] for one in first["documents"]] == [best, 1 - best]
    by_index = {one["index"]: one for one in first["documents"]}
    assert by_index[0] == {"rank": 1 + best, "score": pytest.approx(scores[0], abs=1e-5), "index": 0, "id": "x",
                           "relevance": 2, "content": "a bus"}  # fmt: skip
    assert by_index[1]["content"] == {"image": "1.png"} and "id" not in by_index[1]
    asked = [("a dog", one) for one in ("a cup", "the dog", ["a", "dog"])]
    told = judge.score(asked, instruction="Other", scale="logit")
    assert "id" not in second and [one["index"] for one in second["documents"]] == np.argsort(-told).tolist()

    assert main([*command, "--top-k", "1", "--scale", "logit", "--instruction", "Other"]) == 0
    printed = lines(capsys.readouterr().out)
    assert [len(one["documents"]) for one in printed] == [1, 1]
    assert printed[1]["documents"][0]["score"] == pytest.approx(told.max(), abs=1e-4)
    assert main([*command, "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--output", str(output), "--overwrite", "--top-k", "1"]) == 0
    assert len(lines(output.read_text())[0]["documents"]) == 1


def test_rerank_a_whole_source_for_one_query(reranker, judge, photos, corpus, capsys):
    command = ["--model", str(reranker), "--dtype", "float32"]
    assert main(["rerank", str(corpus), "a red bus", *command, "--top-k", "2"]) == 0
    (line,) = lines(capsys.readouterr().out)
    scores = judge.score([("a red bus", text) for text in TEXTS])
    assert [one["id"] for one in line["documents"]] == [f"d{place}" for place in np.argsort(-scores)[:2]]
    assert main(["rerank", str(photos), "--image", str(photos / "1.png"), *command]) == 0
    (line,) = lines(capsys.readouterr().out)
    assert {one["id"] for one in line["documents"]} == {f"{number}.png" for number in range(4)}


def test_what_cannot_be_scored_is_named_or_left_out(reranker, photos, tmp_path, capsys):
    source = photos / "records.jsonl"
    (photos / "3.png").write_bytes(b"broken")
    rows = [
        {"query": "a", "documents": ["b", {"image": "3.png"}]},
        {"query": "a", "documents": [{"image": "../outside.png"}]},
        {"query": "a", "documents": [{"content": "b", "relevanc": 1}]},
        {"query": "a", "documents": []},
        {"query": "a"},
        {"query": "a", "documents": ["b"], "documetns": []},
        {"query": "a", "documents": [{"content": "b", "relevance": "high"}]},
    ]
    expected = [
        "records.jsonl:1: documents[1]: 3.png: not a readable image",
        "records.jsonl:2: documents[0]: ../outside.png",
        "records.jsonl:3: documents[0]: unknown key 'relevanc'. Did you mean 'relevance'?",
        "records.jsonl:4: 'documents' is not a list with at least one entry",
        "records.jsonl:5: the record has no 'documents'",
        "records.jsonl:6: unknown key 'documetns'. Did you mean 'documents'?",
        "records.jsonl:7: documents[0]: 'relevance' is a str",
    ]
    command = ["rerank", str(source), "--model", str(reranker)]
    for row, message in zip(rows, expected, strict=True):
        source.write_text("\n" * (int(message.split(":")[1]) - 1) + json.dumps(row) + "\n")
        assert main(command) == 2
        assert message in capsys.readouterr().err
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "ranked.jsonl"
    assert main([*command, "--on-bad-record", "skip", "--output", str(output)]) == 0
    streams = capsys.readouterr()
    (line,) = lines(output.read_text())
    assert [one["index"] for one in line["documents"]] == [0] and "1 queries reranked" in streams.out
    assert all(f"skipped: {source.parent}/{message}" in streams.err for message in expected)
    assert "records.jsonl:2: no document is left" in streams.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "{corpus}", "a", "--rerank", "{backbone}"], "is an embedder: it has no head"),
        (["search", "{corpus}", "a", "--model", "{reranker}"], "is a reranker: it scores pairs"),
        (["search", "{corpus}", "a", "--rerank-depth", "9"], "--rerank-depth: no effect without --rerank"),
        (["search", "{corpus}", "a", "--rerank", "{reranker}", "--rerank-depth", "9"], "below --top-k 10"),
        (["rerank", "{corpus}", "a", "--model", "{backbone}"], "is an embedder: it has no head"),
        (["rerank", "{photos}", "--model", "{reranker}"], "a folder holds no queries"),
        (["rerank", "{corpus}x", "--model", "{reranker}"], "there is no such file; did you mean 'corpus.jsonl'?"),
        (["rerank", "{corpus}", "--model", "{reranker}"], "for one query, give its text"),
        (["rerank", "{corpus}", "a", "--model", "{reranker}", "--top-k", "0"], "--top-k: found 0"),
        (["rerank", "{corpus}", "a", "--model", "{reranker}", "--overwrite"], "no effect without --output"),
    ],
)
def test_refusals(backbone, reranker, corpus, photos, capsys, arguments, message):
    filled = [one.format(backbone=backbone, reranker=reranker, corpus=corpus, photos=photos) for one in arguments]
    assert main(filled) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.fixture
def in_context(tmp_path, backbone):
    """A reranker that reads a query's documents together, untrained."""
    head = {"type": "attention", "layer": 2, "offset": 512}
    settings = EmbedderSettings(str(backbone), dtype="float32", head=head, prompt={"type": "in_context"})
    folder = tmp_path / "lists"
    save_checkpoint(folder, *build_from_settings(settings))
    return folder


def test_lists_of_one_query_stay_apart(in_context, tmp_path, capsys):
    """A reranker of lists finds them by their query; two records may ask the same."""
    source = tmp_path / "records.jsonl"
    lists = [["a bus", "the river", "bread"], ["a dog", "a red bus"], ["a letter"]]
    source.write_text("".join(json.dumps({"query": "a bus", "documents": one}) + "\n" for one in lists))
    assert main(["rerank", str(source), "--model", str(in_context), "--dtype", "float32"]) == 0
    judge = Reranker.from_pretrained(in_context, dtype="float32", device="cpu")
    for line, documents in zip(lines(capsys.readouterr().out), lists, strict=True):
        shares = judge.score([("a bus", one) for one in documents])
        assert [one["index"] for one in line["documents"]] == np.argsort(-shares, kind="stable").tolist()
        assert [one["score"] for one in line["documents"]] == pytest.approx(sorted(shares, reverse=True), abs=1e-5)
        assert sum(one["score"] for one in line["documents"]) == pytest.approx(1, abs=1e-4)
    assert main(["rerank", str(source), "--model", str(in_context), "--dtype", "float32", "--scale", "logit"]) == 0
    assert lines(capsys.readouterr().out)[2]["documents"][0]["score"] == 500


def test_an_interrupted_rerank_leaves_no_file(reranker, tmp_path, capsys):
    source = tmp_path / "records.jsonl"
    source.write_text('{"query": "a", "documents": ["b"]}\n{"query": "a"}\n')
    output = tmp_path / "folder" / "ranked.jsonl"
    assert main(["rerank", str(source), "--model", str(reranker), "--output", str(output)]) == 2
    assert not list(output.parent.iterdir())
    shutil.rmtree(output.parent)
