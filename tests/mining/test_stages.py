"""MCL's stages through the command: clusters of earlier runs are joined with its own."""

import json

import numpy as np
import PIL.Image
import pytest

from data_tools.mining.collection import collect
from data_tools.mining.settings import load_mining
from data_tools.mining.stages import joined
from mmembed.errors import MmembedError
from mmembed.mining.mcl import composite, next_stage
from tests.mining.conftest import read_lines, write_lines
from tests.mining.test_mine_negatives import encoded, refused, run

CLUSTERS = (3, 2, 4)  # of the stages
NEGATIVES = 3


@pytest.fixture
def stage(mining, tmp_path):
    """stage(number, ...) -> the config of a stage that is found by vectors of its own, and these by id."""

    def write(number, documents=60, **changes):
        rng = np.random.default_rng(number)
        queries, ids = [f"q{row}" for row in range(30)], [f"p{row}" for row in range(30)]
        ids += [f"d{row}" for row in range(documents)]
        vectors = {"q": rng.normal(size=(30, 8)), "c": rng.normal(size=(len(ids), 8))}
        folders = {side: tmp_path / f"{side}{number}.enc" for side in vectors}
        if not folders["q"].exists():
            for side, names in (("q", queries), ("c", ids)):
                encoded(folders[side], names, vectors[side])
        by_id = {
            name: vector / np.linalg.norm(vector)
            for side, names in (("q", queries), ("c", ids))
            for name, vector in zip(names, np.load(folders[side] / "vectors.npy"), strict=True)
        }
        tree = {
            "retriever": {"type": "vectors", "queries": str(folders["q"]), "corpus": str(folders["c"])},
            "search": {"depth": 60},
            "rules": ["mcl"],
            "negatives": NEGATIVES,
            "clusters": CLUSTERS[number],
            "earlier": [str(tmp_path / f"out{one}") for one in range(number)],
            "output": str(tmp_path / f"out{number}"),
        }
        return mining(**{**tree, **changes}), by_id

    return write


def own_clusters(by_id, ids, count):
    """The numbers that a stage gives its documents, in the order in which its run has them."""
    numbers = next_stage(np.stack([by_id[one] for one in ids]).astype(np.float32), 0, count)
    return dict(zip(ids, numbers.tolist(), strict=True))


def check_negatives(output, by_id, number_of):
    """With loops: of each query the nearest documents whose number is that of its positive."""
    written = 0
    for row, record in enumerate(read_lines(output / "train.jsonl")):
        query, positive = by_id[f"q{row}"], f"p{row}"
        scores = sorted((-float(query @ by_id[one]), one) for one in number_of if one != positive)[:60]
        wanted = [one for _, one in scores if number_of[one] == number_of[positive]][:NEGATIVES]
        assert [one["id"] for one in record["documents"][1:]] == wanted
        written += len(wanted)
    assert written > 30  # most queries have some


def summary(output):
    return json.loads((output / "report.json").read_text())["sources"][0]["clusters"]


def test_three_stages_are_the_composite_of_their_clusters(stage, tmp_path, capsys):
    ids = [*(f"p{row}" for row in range(30)), *(f"d{row}" for row in range(60))]
    stages = []
    for number in range(3):
        file, by_id = stage(number)
        assert run(file) == 0
        own = own_clusters(by_id, ids, CLUSTERS[number])
        stages.append(np.array([own[one] for one in ids]))
        by_hand = composite(stages, max(CLUSTERS)).tolist()
        check_negatives(tmp_path / f"out{number}", by_id, dict(zip(ids, by_hand, strict=True)))
        new = {str(tmp_path / f"out{one}"): 0 for one in range(number)}
        assert summary(tmp_path / f"out{number}") == {"stages": number + 1, "count": len({*by_hand}), "new": new}
        assert f"negatives, {len({*by_hand})} clusters of {number + 1} stage(s)" in capsys.readouterr().out
    assert f"Clusters of 3 stages: {len({*by_hand})}." in (tmp_path / "out2" / "report.html").read_text()


def test_a_corpus_in_another_order_that_has_grown(stage, tmp_path, texts):
    """Documents are known again by content, with other spaces, case and ids too; new ones are a cluster more."""
    first, of_first = stage(0)
    assert run(first) == 0
    corpus = read_lines(texts / "corpus.jsonl")
    new = [{"id": f"d{60 + row}", "text": f"red cup bread {row}"} for row in range(12)]
    changed = [*new, *reversed(corpus)]
    changed[20]["text"] = changed[20]["text"].upper() + "  "
    write_lines(texts / "corpus.jsonl", changed)
    second, of_second = stage(1, documents=72)
    assert run(second) == 0
    positives = [f"p{row}" for row in range(30)]
    earlier = own_clusters(of_first, [*positives, *(f"d{row}" for row in range(60))], CLUSTERS[0])
    earlier |= {one["id"]: CLUSTERS[0] for one in new}
    own = own_clusters(of_second, [*positives, *(one["id"] for one in changed)], CLUSTERS[1])
    number_of = {one: (earlier[one], own[one]) for one in own}
    check_negatives(tmp_path / "out1", of_second, number_of)
    found = summary(tmp_path / "out1")
    assert found["count"] == len({*number_of.values()}) and found["new"] == {str(tmp_path / "out0"): 12}


def test_pictures_are_known_again_in_another_folder(mining, tmp_path, texts):
    keys = []
    for folder in (texts, tmp_path / "moved"):
        folder.mkdir(exist_ok=True)
        for row in range(4):
            PIL.Image.new("RGB", (40, 40), (60 * row, 0, 0)).save(folder / f"{row}.png")
        write_lines(
            folder / "train.jsonl",
            [{"query": f"{row}", "documents": [{"content": {"image": f"{row}.png"}}]} for row in range(4)],
        )
        config = load_mining(mining(root=str(folder), sources=[{"path": "train.jsonl"}], retriever="mmembed"))
        keys.append(collect(config, config.sources[0], folder)[0].corpus_keys.tolist())
    assert keys[0] == keys[1] and len({*keys[0]}) == 4


def test_another_run_of_a_stage_writes_the_same_bytes_and_one_without_clusters_none(stage, tmp_path):
    assert run(stage(0)[0]) == 0
    clusters = tmp_path / "out0" / "train.clusters.npz"
    first = clusters.read_bytes()
    assert run(stage(0)[0]) == 0 and clusters.read_bytes() == first
    assert run(stage(0, clusters=None, rules=["top_k"])[0]) == 0 and not clusters.exists()


def test_earlier_runs_that_cannot_be_joined(stage, tmp_path, texts, capsys, monkeypatch):
    from data_tools.mining.retrievers.vectors import Vectors

    assert run(stage(0)[0]) == 0
    monkeypatch.setattr(Vectors, "encode", None)  # all is refused before anything is encoded
    nowhere = [str(tmp_path / "nowhere")]
    assert "nowhere holds no clusters of source 'train' (there are none)" in refused(
        capsys, stage(1, earlier=nowhere)[0]
    )
    other = [{"path": "train.jsonl", "name": "other", "corpus": ["corpus.jsonl"]}]
    assert "holds no clusters of source 'other' (there are 'train')" in refused(capsys, stage(1, sources=other)[0])
    file = tmp_path / "out0" / "train.clusters.npz"
    whole = file.read_bytes()
    for broken in (b"", whole[:100], whole[:-30], b"no archive"):
        file.write_bytes(broken)
        assert "train.clusters.npz: no readable clusters" in refused(capsys, stage(1)[0])
    file.write_bytes(whole)
    for name, content in (("train", "documents"), ("corpus", "text")):
        rows = read_lines(texts / f"{name}.jsonl")
        for row in rows:
            if name == "train":
                row[content][0]["content"] += " other"
            else:
                row[content] += " other"
        write_lines(texts / f"{name}.jsonl", rows)
    assert "has clustered none of the 90 documents of source 'train'" in refused(capsys, stage(1)[0])


def test_joined_tells_apart_what_composite_does_for_any_number_of_stages():
    rng = np.random.default_rng(0)
    stages = [rng.integers(0, 3, 500) for _ in range(5)]
    pairs = {*zip(joined(stages).tolist(), composite(stages, 3).tolist(), strict=True)}
    assert len(pairs) == len({one for one, _ in pairs}) == len({one for _, one in pairs}) == joined(stages).max() + 1
    many = [rng.integers(0, 1000, 500) for _ in range(40)]
    assert sorted(joined(many).tolist()) == list(range(500))
    with pytest.raises(MmembedError, match="exceed 64 bits"):
        composite(many, 1000)
