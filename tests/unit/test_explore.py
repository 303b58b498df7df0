"""What `mmembed explore` shows, without the page: rankings, their marks, cards, the map, refusals."""

import io
import json
import socket
import sys

import numpy as np
import pytest
from families import build, picture

from mmembed import Embedder, Reranker
from mmembed.cli import main
from mmembed.errors import MmembedError
from mmembed.explore.cards import cards
from mmembed.explore.comparison import Answer, Explorer, Hit, Question, Ranking
from mmembed.explore.projection import figure, project
from mmembed.explore.sides import Side, open_folder, open_source
from mmembed.media import MediaStore

TEXTS = ["a red bus", "a blue train on the river", "bread", "a letter", "the <b>tower</b> and the bridge", "a dog"]
NANO = "mmembed-nano"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six texts and two pictures, as a JSON Lines file with its pictures beside it."""
    folder = tmp_path_factory.mktemp("documents")
    rows = [{"id": f"d{place}", "text": text} for place, text in enumerate(TEXTS)]
    for number in range(2):
        picture(number, 56, 56).save(folder / f"{number}.png")
        rows.append({"id": f"p{number}", "image": f"{number}.png"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def encoded(folder):
    target = folder / "corpus.enc"
    assert main(["encode", str(folder / "corpus.jsonl"), "--output", str(target), "--dtype", "float32"]) == 0
    return target


@pytest.fixture(scope="module")
def other(family_folder):
    """A model that knows nothing, and so finds other documents."""
    return str(family_folder("qwen3_vl"))


@pytest.fixture(scope="module")
def load(folder):
    loaded = {}

    def load(name, layers):
        if name not in loaded:
            loaded[name] = Embedder.from_pretrained(name, dtype="float32", device="cpu", media=MediaStore(folder))
        return loaded[name]

    return load


@pytest.fixture(scope="module")
def judge(family_folder, folder):
    words = ["a", "b"]
    parts = build(
        family_folder("qwen3_vl"),
        head={"type": "yes_no", "words": words},
        prompt={"type": "judge", "words": words},
        dtype="float32",
    )
    reranker = Reranker(*parts)
    reranker.preprocessor.media = MediaStore(folder)
    return reranker


def explorer(documents, depth=5, **options):
    return Explorer(documents, media=MediaStore(None), depth=depth, report=pytest.fail, **options)


def ids(ranking):
    return [hit.item["id"] for hit in ranking.hits]


def contents(folder):
    rows = [json.loads(line) for line in (folder / "corpus.jsonl").read_text().splitlines()]
    return [row["id"] for row in rows], [row.get("text") or {"image": str(folder / row["image"])} for row in rows]


def order(load, model, folder, query):
    """Ids by cosine, as Python's own interface gives them."""
    names, documents = contents(folder)
    embedder = Embedder(load(model, None).model, load(model, None).preprocessor)
    scores = embedder.similarity(embedder.encode([query], role="query"), embedder.encode(documents))[0]
    return [names[place] for place in np.argsort(-scores, kind="stable")]


@pytest.mark.parametrize("picture_too", [False, True])
def test_a_question_finds_what_the_embedder_ranks_first(folder, encoded, load, picture_too):
    image = (folder / "1.png").read_bytes() if picture_too else None
    query = {"text": "a dog", **({"image": str(folder / "1.png")} if picture_too else {})}
    answer = explorer(open_folder(encoded, [], load, pytest.fail)).ask(Question("a dog ", image, top_k=4))
    (ranking,) = answer.rankings
    assert ranking.by == NANO and ranking.against is None
    assert ids(ranking) == order(load, NANO, folder, query)[:4]
    assert [hit.rank for hit in ranking.hits] == [1, 2, 3, 4]


def test_an_image_alone_finds_itself(folder, encoded, load):
    answer = explorer(open_folder(encoded, [], load, pytest.fail)).ask(Question(image=(folder / "1.png").read_bytes()))
    assert ids(answer.rankings[0])[0] == "p1"


def test_an_instruction_reaches_the_query(encoded, load):
    asked = explorer(open_folder(encoded, [], load, pytest.fail))
    plain, told = (asked.ask(Question("a dog", instruction=one)).vectors[0] for one in (None, "Find vehicles"))
    expected = load(NANO, None).encode(["a dog"], role="query", instruction="Find vehicles")[0]
    assert told == pytest.approx(expected, abs=1e-5) and not np.allclose(plain, told, atol=1e-3)


def test_a_query_is_embedded_as_a_query(folder, family_folder):
    """Without an instruction by the model's own, which only queries have."""
    prompt = {"type": "instruct", "default_instruction": "Find vehicles"}
    embedder = Embedder(*build(family_folder("qwen3_vl"), prompt=prompt, dtype="float32"))
    embedder.preprocessor.media = MediaStore(folder)
    documents = open_source(folder / "corpus.jsonl", ["m"], lambda *_: embedder, pytest.fail, "raise")
    asked = explorer(documents).ask(Question("a dog")).vectors[0]
    query, document = (embedder.encode(["a dog"], role=role)[0] for role in ("query", "document"))
    assert asked == pytest.approx(query, abs=1e-5) and not np.allclose(query, document, atol=1e-3)


@pytest.mark.parametrize("whole", ["folder", "file"])
def test_two_models_say_where_the_other_ranks_a_document(folder, encoded, load, other, whole):
    if whole == "folder":
        documents = open_folder(encoded, [other, NANO], load, pytest.fail)
    else:
        documents = open_source(folder / "corpus.jsonl", [other, NANO], load, pytest.fail, "raise")
    orders = [order(load, model, folder, "a dog") for model in (other, NANO)]
    assert orders[0] != orders[1]
    answer = explorer(documents).ask(Question("a dog", top_k=2))
    for ranking, own, others in zip(answer.rankings, orders, orders[::-1], strict=True):
        ranks = {name: rank for rank, name in enumerate(others[:5], start=1)}
        assert ids(ranking) == own[:2]
        assert [hit.other for hit in ranking.hits] == [ranks.get(name) for name in own[:2]]
    assert [ranking.by for ranking in answer.rankings] == ["qwen3_vl", NANO]


def test_the_reranker_orders_what_was_found(folder, encoded, load, judge):
    asked = explorer(open_folder(encoded, [], load, pytest.fail), reranker=("judge", judge))
    before, after = asked.ask(Question("a dog", top_k=3)).rankings
    found = order(load, NANO, folder, "a dog")[:5]
    by_name = dict(zip(*contents(folder), strict=True))
    ranked = [found[one.index] for one in judge.rank("a dog", [by_name[name] for name in found])]
    assert ids(before) == found[:3] and ids(after) == ranked[:3]
    assert [hit.other for hit in after.hits] == [found.index(name) + 1 for name in ranked[:3]]
    assert len(asked.ask(Question("a dog", rerank=False)).rankings) == 1


def test_another_model_than_the_one_that_encoded_is_named(encoded, load, other):
    with pytest.raises(MmembedError, match=rf"encoded by '{NANO}', and '{other}' gives other vectors"):
        open_folder(encoded, [other], load, pytest.fail)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question("  "), "the query is empty"),
        (Question("x", b"not an image"), "the query's image: damaged, or no image"),
        (Question("x", top_k=0), "give at least 1"),
    ],
)
def test_a_bad_question(encoded, load, question, message):
    with pytest.raises(MmembedError, match=message):
        explorer(open_folder(encoded, [], load, pytest.fail)).ask(question)


def test_a_damaged_image_is_refused(encoded, load):
    whole = io.BytesIO()
    picture(0, 200, 200).save(whole, "PNG")
    with pytest.raises(MmembedError, match="damaged"):
        explorer(open_folder(encoded, [], load, pytest.fail)).ask(Question(image=whole.getvalue()[:5000]))


def test_a_model_of_texts_says_that_it_takes_no_image(folder, load, family_folder, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a dog"}\n')
    documents = open_source(file, [str(family_folder("qwen3"))], load, pytest.fail, "raise")
    with pytest.raises(MmembedError, match="image"):
        explorer(documents).ask(Question(image=(folder / "1.png").read_bytes()))


def hits(**item):
    return Hit(0, 1, 0.5, {"id": "d", **item})


def test_cards_show_pictures_and_take_texts_for_texts(folder):
    found = [
        hits(text="<script>alert(1)</script>"),
        Hit(1, 2, 0.4, {"id": "p", "image": "0.png"}),
        Hit(2, 3, 0.3, {"id": "gone", "image": "gone.png"}),
        Hit(3, 4, 0.2, {"id": "many", "text": "[...]", "content": [{"image": "0.png"}, {"image": "1.png"}]}),
    ]
    html = cards(Answer((Ranking("m", 0, tuple(found)),), (), 4, 5), MediaStore(folder))
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert html.count("data:image/jpeg;base64,") == 3 and "gone.png: cannot be opened" in html


@pytest.mark.parametrize(
    ("rank", "there", "reranked", "text"),
    [
        (1, 3, False, "▲ 2"),
        (3, 1, False, "▼ 2"),
        (2, 2, False, "="),
        (2, 4, False, "only here, 4 there"),
        (2, None, False, "only here"),
        (2, 4, True, "was 4"),
    ],
)
def test_a_card_is_marked(rank, there, reranked, text):
    ranking = Ranking("a", 0, (Hit(0, rank, 0.5, {"id": "d"}, there),), "b", reranked)
    assert f">{text}</span>" in cards(Answer((ranking,), (), 3, 5), MediaStore(None))


def side(vectors):
    return Side("m", None, np.asarray(vectors, np.float32), len(vectors[0]))


def test_the_map_is_the_plane_of_the_largest_variance():
    vectors = np.random.default_rng(0).normal(size=(60, 8)) * np.array([9, 5, 1, 1, 1, 1, 1, 1])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    plane = project(side(vectors))
    left, sizes, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    assert np.abs(plane.points) == pytest.approx(np.abs(left[:, :2] * sizes[:2]), abs=1e-5)
    assert plane.shown == pytest.approx((sizes[:2] ** 2).sum() / (sizes**2).sum(), abs=1e-6)
    assert "60 documents" in plane.title


def test_a_large_collection_is_sampled_and_says_so():
    vectors = np.random.default_rng(0).normal(size=(40, 4))
    plane = project(side(vectors), limit=10)
    assert len(plane.points) == len(set(plane.rows)) == 10
    assert "10 of 40 documents, drawn at random" in plane.title
    assert np.array_equal(project(side(vectors), limit=10).rows, plane.rows)


@pytest.mark.parametrize("vectors", [[[1.0, 0.0, 0.0]], [[1.0, 0.0]] * 3, [[1.0, 0.0], [0.0, 1.0]], [[1.0], [-1.0]]])
def test_the_map_of_next_to_nothing(vectors):
    plane = project(side(vectors))
    assert plane.points.shape == (len(vectors), 2) and np.isfinite(plane.points).all()


def test_hits_lie_on_their_documents_and_hovering_shows_texts(folder, encoded, load):
    documents = open_folder(encoded, [], load, pytest.fail)
    answer = explorer(documents).ask(Question("a dog", top_k=8))
    (only,) = documents.sides
    plane = project(only)
    drawn = figure(plane, only, documents.items(range(8)), answer.last(0).hits, answer.vectors[0])
    points, query, found = drawn["data"]
    assert json.loads(json.dumps(drawn)) == drawn
    for hit, x, y in zip(answer.last(0).hits[::-1], found["x"], found["y"], strict=True):
        assert (x, y) == pytest.approx((points["x"][hit.row], points["y"][hit.row]), abs=2e-4)
    assert found["text"] == ["8", "7", "6", "5", "4", "3", "2", "1"] and len(query["x"]) == 1
    assert points["hovertext"][4] == "d4<br>the &lt;b&gt;tower&lt;/b&gt; and the bridge"
    assert points["hovertext"][6] == "p0<br>[0.png]"


def test_small_vectors_are_searched_and_drawn(folder, load, tmp_path, capsys):
    target, small = tmp_path / "small.enc", ["--precision", "binary", "--truncate-dim", "60", "--dtype", "float32"]
    assert main(["encode", str(folder / "corpus.jsonl"), "--output", str(target), *small]) == 0
    capsys.readouterr()
    assert main(["search", str(target), "a dog", "--json", "--dtype", "float32"]) == 0
    found = [hit["id"] for hit in json.loads(capsys.readouterr().out)["results"][0]["hits"]]
    documents = open_folder(target, [], load, pytest.fail)
    answer = explorer(documents).ask(Question("a dog"))
    assert ids(answer.rankings[0]) == found
    (only,) = documents.sides
    drawn = figure(project(only), only, documents.items(range(8)), answer.last(0).hits, answer.vectors[0])
    assert [len(trace["x"]) for trace in drawn["data"]] == [8, 1, 8]


def refused(capsys, *arguments):
    assert main(["explore", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mmembed explore: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", NANO, NANO], "give one model, or two different ones"),
        (["--model", "a", "b", "c"], "give one model, or two different ones"),
        (["--top-k", "0"], "--top-k: found 0"),
        (["--depth", "20"], "--depth: no effect"),
        (["--rerank", "r", "--depth", "5"], "--depth: found 5, below --top-k 10"),
        (["--on-bad-record", "skip"], "--on-bad-record skip: no effect"),
        (["--port", "70000"], "--port 70000: cannot listen on 127.0.0.1"),
    ],
)
def test_options_that_cannot_act(encoded, capsys, flags, message):
    assert message in refused(capsys, encoded, *flags)


def test_a_port_in_use(encoded, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: cannot listen on 127.0.0.1" in refused(capsys, encoded, "--port", port)


def test_without_gradio_one_line_says_what_to_install(encoded, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "mmembed.explore.page", raising=False)
    assert "pip install 'mmembed[explore]'" in refused(capsys, encoded, "--port", "0")
