"""A teacher of many vectors a content: MaxSim of a real, tiny model over what BM25 or a model of one vector finds."""

import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from data_tools.mine_negatives import main
from data_tools.mining.teachers.late_interaction import LateInteraction
from data_tools.mining.tokens import TokenStore
from mmembed import Embedder
from mmembed.media import MediaStore
from mmembed.search import TokenVectors, rescore_maxsim
from mmembed.shards import Shards
from tests.mining.conftest import read_lines, save_multi_vector, write_lines


@pytest.fixture(scope="module")
def late(tmp_path_factory, family_folder):
    """Folder of a model of 24 dimensions a token and patch."""
    return save_multi_vector(family_folder("qwen3_vl"), tmp_path_factory.mktemp("late") / "model")


@pytest.fixture
def mixed(texts):
    """The texts, with pictures, and both together, on either side."""
    rng = np.random.default_rng(0)
    for row in range(12):
        PIL.Image.fromarray(rng.integers(0, 255, (40, 40 + 8 * row, 3), np.uint8)).save(texts / f"{row}.png")
    records, corpus = read_lines(texts / "train.jsonl"), read_lines(texts / "corpus.jsonl")
    for row in range(4):
        records[row]["documents"][0]["content"] = {"image": f"{row}.png"}
        records[4 + row]["query"] = {"image": f"{4 + row}.png", "text": records[4 + row]["query"]}
        corpus[row] = {"id": f"d{row}", "image": f"{8 + row}.png", "text": "a red bus"}
    write_lines(texts / "train.jsonl", records)
    write_lines(texts / "corpus.jsonl", corpus)
    return texts


@pytest.fixture
def encoded(monkeypatch):
    """What was encoded, an item a line; `encoded.limit`: calls until the process is interrupted."""

    class Seen(list):
        limit = 1000

    encode, seen = LateInteraction.encode, Seen()

    def noted(self, items, role):
        seen.limit -= 1
        if not seen.limit:
            raise KeyboardInterrupt
        seen.extend((role, json.dumps(item.content)) for item in items if item.where != "the probe")
        return encode(self, items, role)

    monkeypatch.setattr(LateInteraction, "encode", noted)
    return seen


def run(file, *overrides):
    return main(["--config", str(file), *overrides])


def refused(capsys, file, *overrides):
    capsys.readouterr()
    assert run(file, *overrides) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "Traceback" not in error
    return error[error.index("error:") :]


def maxsim(query, document):
    """(T, E), (S, E) lists of floats -> the sum of the best cosines, in loops."""

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5

    return sum(max(cosine(one, other) for other in document) for one in query)


@pytest.mark.parametrize(("precision", "error"), [("float32", 1e-4), ("float16", 5e-3), ("int8", 0.3)])
def test_the_choice_is_by_maxsim_of_the_model(mining, tmp_path, mixed, late, precision, error, family_folder):
    """All 89 candidates are judged: the negatives are the three best of a loop over the public embedder's vectors."""
    retriever = {"type": "mmembed", "model": str(family_folder("qwen3_vl"))}
    teacher = {"type": "late_interaction", "model": late, "dtype": "float32", "precision": precision}
    assert run(mining(retriever=retriever, teacher=teacher, scores="teacher", search={"depth": 89})) == 0
    embedder = Embedder.from_pretrained(late, dtype="float32", media=MediaStore(mixed))
    before = read_lines(mixed / "train.jsonl")
    corpus = [record["documents"][0]["content"] for record in before]
    for row in read_lines(mixed / "corpus.jsonl"):
        corpus.append({key: value for key, value in row.items() if key != "id"})
    documents = [one.tolist() for one in embedder.encode(corpus)]
    ids = [*(f"p{row}" for row in range(30)), *(f"d{row}" for row in range(60))]
    after = read_lines(tmp_path / "out" / "train.jsonl")
    for row in (0, 5, 17):
        query = embedder.encode([before[row]["query"]], role="query")[0].tolist()
        scores = dict(zip(ids, (maxsim(query, one) for one in documents), strict=True))
        given = {one["id"]: one["score"] for one in after[row]["documents"]}
        assert given == pytest.approx({one: scores[one] for one in given}, abs=error)
        best = sorted((score for one, score in scores.items() if one != f"p{row}"), reverse=True)[:3]
        assert [given[one["id"]] for one in after[row]["documents"][1:]] == pytest.approx(best, abs=error)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_scores_are_those_of_rescore_maxsim_bit_by_bit(mining, tmp_path, texts, late, precision):
    from data_tools.mining.collection import Collection

    teacher = {"type": "late_interaction", "model": late, "precision": precision}
    assert run(mining(teacher=teacher, shard=16)) == 0
    work = tmp_path / "out" / "work" / "train"
    found = Collection(next(work.glob("collection-*")))
    (name,) = {file.name.split("-")[0] for file in work.glob("teacher-*-tokens/*.safetensors")}
    stores = {side: TokenStore(work / f"teacher-{side}-tokens", name) for side in ("queries", "corpus")}
    empty = np.ones((1, 24), stores["queries"].take([found.query_digests[0].tobytes()]).vectors.dtype)
    vectors = {
        side: TokenVectors.joined(
            [stores[side].take([key.tobytes()]).vectors if key.tobytes() in stores[side] else empty for key in keys]
        )
        for side, keys in (("queries", found.query_digests), ("corpus", found.corpus_digests))
    }
    journal = read_lines(work / "found.done")
    rows = Shards(work, "found", 30, 4096, [journal[1][1]]).read(0)
    known = np.isin(rows["row"][:, :-1], -1) | (rows["row"][:, :-1] == found.positives)
    candidates = np.stack([row[~own][:10] for row, own in zip(rows["row"][:, :-1], known, strict=True)])
    asked = np.concatenate([candidates, found.positives], axis=1)
    hits = rescore_maxsim(vectors["queries"], vectors["corpus"], asked)
    keys = [key for _, key in read_lines(work / "candidates-00000.done")[1:]]
    scores = Shards(work, "candidates-00000", 30, 30, keys).read(0)
    for query in range(30):
        wanted = dict(zip(hits.indices[query].tolist(), hits.scores[query].tolist(), strict=True))
        assert scores[query].tolist() == [wanted[row] for row in asked[query].tolist()]


def test_a_content_is_encoded_once_whatever_changes_around_it(mining, tmp_path, texts, late, encoded):
    teacher = {"type": "late_interaction", "model": late}
    file = mining(teacher=teacher, shard=7)
    assert run(file) == 0
    candidates = len([one for one in encoded if one[0] == "document"])
    assert len(encoded) == len(set(encoded)) == 30 + candidates and candidates <= 90
    first, before = (tmp_path / "out" / "train.jsonl").read_bytes(), set(encoded)
    encoded.clear()
    assert run(file, "rules=[random]", "seed=3") == 0 and encoded == []
    corpus = [{"id": "new", "text": "red blue bus train river"}, *read_lines(texts / "corpus.jsonl")]
    write_lines(texts / "corpus.jsonl", corpus)  # every row has moved
    assert run(file, "search.depth=20") == 0
    assert encoded and not before & set(encoded)
    encoded.clear()
    for tokens in (tmp_path / "out" / "work" / "train").glob("teacher-*-tokens/*"):
        tokens.unlink()
    assert run(file, "search.depth=20") == 0 and encoded == []  # the scores are there
    write_lines(texts / "corpus.jsonl", corpus[1:])
    assert run(file) == 0 and (tmp_path / "out" / "train.jsonl").read_bytes() == first


@pytest.mark.parametrize("limit", [3, 5, 9])
def test_interrupted_it_encodes_the_rest_alone(mining, tmp_path, late, encoded, limit):
    teacher = {"type": "late_interaction", "model": late}
    assert run(mining(teacher=teacher, shard=8)) == 0
    whole, everything = (tmp_path / "out" / "train.jsonl").read_bytes(), sorted(encoded)
    encoded.clear()
    encoded.limit = limit
    file = mining(teacher=teacher, shard=8, output=str(tmp_path / "killed"))
    assert run(file) == 130
    assert 0 < len(encoded) < len(everything)
    assert run(file) == 0
    assert sorted(encoded) == everything and (tmp_path / "killed" / "train.jsonl").read_bytes() == whole


def test_only_what_was_chosen_is_encoded_for_the_report(mining, tmp_path, late, encoded):
    teacher = {"type": "late_interaction", "model": late}
    assert run(mining(teacher=teacher, rescore="chosen")) == 0
    written = read_lines(tmp_path / "out" / "train.jsonl")
    wanted = {json.dumps(document["content"]) for record in written for document in record["documents"]}
    assert {content for role, content in encoded if role == "document"} == wanted


def test_the_report_and_percent_of_positive_take_scores_above_one(mining, tmp_path, late):
    teacher = {"type": "late_interaction", "model": late}
    rules = [{"type": "percent_of_positive", "percent": 20}, "random_fill"]
    assert run(mining(teacher=teacher, scores="teacher", rules=rules)) == 0
    (source,) = json.loads((tmp_path / "out" / "report.json").read_text())["sources"]
    scores = source["teacher_scores"]
    written = source["negatives"]["written"]
    assert scores["bins"][-1] > 2 and sum(scores["counts"]["positives"]) == 30
    assert sum(scores["counts"]["negatives"]) == written == source["false_negatives"]["judged"]
    judged = [[one["score"] for one in record["documents"]] for record in read_lines(tmp_path / "out" / "train.jsonl")]
    assert scores["bins"][-1] == pytest.approx(max(map(max, judged)), abs=1e-5)
    found = written - source["negatives"]["random"]
    assert found > 0 and sum(score <= own * 0.8 for own, *others in judged for score in others) >= found
    page = (tmp_path / "out" / "report.html").read_text()
    (chart,) = re.findall(r"By the teacher</h3>\s*(<svg.*?</svg>)", page, flags=re.S)
    shown = [float(one) for one in re.findall(r">(-?[\d.]+)</text>", chart)]
    assert max(shown) > 1 and "nan" not in chart


# What is refused ------------------------------------------------------------------------------------------------------


def test_models_of_one_vector_and_of_many_in_each_others_place(mining, capsys, late):
    missing = "sources.0.path=nowhere.jsonl"  # it is said before anything is read
    error = refused(capsys, mining(teacher={"type": "late_interaction", "model": "mmembed-nano"}), missing)
    assert "mmembed-nano gives one vector a content" in error
    assert "teacher={type: embedder, retriever: {type: mmembed, model: mmembed-nano}}" in error
    many = {"type": "mmembed", "model": late}
    for changes in ({"retriever": many}, {"teacher": {"type": "embedder", "retriever": many}}):
        error = refused(capsys, mining(**changes), missing)
        assert "many vectors a content" in error and f"teacher={{type: late_interaction, model: {late}}}" in error


def test_a_model_that_only_its_weights_tell(mining, capsys, late, monkeypatch):
    """A name of a hub says nothing of its pooling."""
    monkeypatch.setattr("data_tools.mining.retrievers.mmembed_model.model_folder", lambda model: Path("nowhere"))
    assert "many vectors" in refused(capsys, mining(retriever={"type": "mmembed", "model": late}))
    file = mining(teacher={"type": "late_interaction", "model": "mmembed-nano"})
    assert "one vector" in refused(capsys, file, "overwrite=true")


@pytest.mark.parametrize(
    ("value", "precision"), [(np.nan, "float32"), (np.nan, "int8"), (np.inf, "bfloat16"), (1e5, "float16")]
)
def test_a_content_without_finite_vectors_is_named(mining, capsys, texts, late, monkeypatch, value, precision):
    from data_tools.mining.retrievers.mmembed_model import MmembedModel

    vectors = MmembedModel.vectors

    def broken(self, items, role):
        given = vectors(self, items, role)
        for item, one in zip(items, given, strict=True):
            if item.id == "p17":
                one[-1, 3] = value
        return given

    monkeypatch.setattr(MmembedModel, "vectors", broken)
    teacher = {"type": "late_interaction", "model": late, "precision": precision}
    error = refused(capsys, mining(teacher=teacher))
    assert "train.jsonl:18 (p17): the teacher gives NaN or infinity" in error and "float32" in error


def test_another_model_is_refused_and_replaced_only_when_told(mining, tmp_path, capsys, family_folder):
    model = save_multi_vector(family_folder("qwen3_vl"), tmp_path / "model")
    file = mining(teacher={"type": "late_interaction", "model": model}, scores="teacher")
    assert run(file) == 0
    work = tmp_path / "out" / "work" / "train"
    old = {one.name for one in work.glob("teacher-corpus-tokens/*")}
    first = (tmp_path / "out" / "train.jsonl").read_bytes()
    assert "another teacher" in refused(capsys, file, "teacher.precision=float32")
    save_multi_vector(family_folder("qwen3_vl"), tmp_path / "model", seed=1)
    error = refused(capsys, file)
    assert "another teacher" in error and "overwrite: true" in error
    assert run(file, "overwrite=true") == 0
    assert not old & {one.name for one in work.glob("teacher-corpus-tokens/*")}
    assert (tmp_path / "out" / "train.jsonl").read_bytes() != first


def test_a_broken_file_of_tokens_is_named(mining, tmp_path, capsys, late):
    teacher = {"type": "late_interaction", "model": late}
    assert run(mining(teacher=teacher)) == 0
    (file,) = (tmp_path / "out" / "work" / "train" / "teacher-corpus-tokens").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    error = refused(capsys, mining(teacher=teacher, search={"depth": 20}))
    assert str(file) in error and "delete it" in error
    file.unlink()
    assert run(mining(teacher=teacher, search={"depth": 20})) == 0
