"""Negatives that a run mines with itself: the corpus, the schedule, what becomes of a record, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from mmembed.config import build_config
from mmembed.config.blocks import MiningConfig
from mmembed.content import Text
from mmembed.data.dataset import RecordDataset
from mmembed.errors import CheckpointError, ConfigError, MmembedError
from mmembed.objectives import build_objective
from mmembed.training import refresh as module
from mmembed.training.data_vectors import Encoder
from mmembed.training.refresh import Mined, Refresh, check_mining, corpus_of, mine_sources, write_mined
from mmembed.training.supply import check_supply

RECORDS = [
    {"query": "q0", "documents": [{"content": "a"}, {"content": "n0", "relevance": 0}]},
    {"query": "q1", "documents": [{"content": "b", "id": "class"}, {"content": "a", "relevance": 0}]},
    {"query": "q2", "documents": [{"content": "c", "id": "class"}]},
    {"query": "q0", "documents": [{"content": "d"}, {"content": "b", "relevance": 0}]},
    {"query": "e", "documents": [{"content": "f"}, {"content": "n1", "relevance": 0}]},
    {"query": "q5", "documents": [{"content": "e", "relevance": 2}, {"content": "a"}]},
]
PLACES = {"a": [0, 0], "n0": [0, 1], "b": [1, 0], "c": [2, 0], "d": [3, 0], "f": [4, 0], "n1": [4, 1], "e": [5, 0]}


def settings(**mining) -> dict:
    return {
        "data": {
            "train": [{"path": "r.jsonl"}],
            "train_group_size": 3,
            "mining": {"depth": 4, "negatives": 2, **mining},
        }
    }


@pytest.fixture
def source(tmp_path):
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + "\n")
    config = build_config(settings())
    return RecordDataset(config.data.train[0], root=tmp_path, cache_dir=tmp_path / "cache")


def letters(corpus, numbers) -> set[str]:
    names = list(PLACES)
    assert corpus.place.tolist() == list(PLACES.values())
    return {names[number] for number in numbers if number >= 0}


def test_the_corpus_holds_each_content_once_and_knows_all_positives_of_a_query(source) -> None:
    corpus = corpus_of(source)
    known = [letters(corpus, row) for row in corpus.positives_of(np.arange(6)).tolist()]
    assert known == [{"a", "d"}, {"b"}, {"c"}, {"a", "d"}, {"f"}, {"e", "a"}]
    assert [letters(corpus, [row]) for row in corpus.own[corpus.query].tolist()] == [*[set()] * 4, {"e"}, set()]
    assert corpus.contents[2] == corpus.contents[3] and len({*corpus.contents.tolist()}) == 7  # one class
    assert corpus.query.tolist() == [0, 1, 2, 0, 3, 4] and corpus.known.tolist() == [2, 1, 1, 2, 1, 2]


def vectors(monkeypatch, source, seed=0, size=6):
    """Random vectors in place of a model's: of the queries, and of the documents."""
    generator = np.random.default_rng(seed)
    counts = (len(source), len(PLACES))
    found = [generator.normal(size=(count, size)).astype(np.float32) for count in counts]
    found = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in found]
    monkeypatch.setattr(module, "_vectors", lambda *of: tuple(found))
    return found


def test_what_is_mined_is_the_nearest_that_answers_no_such_query(source, monkeypatch) -> None:
    corpus, (queries, documents) = corpus_of(source), vectors(monkeypatch, source)
    mining = MiningConfig(rules=("top_k",), depth=4, negatives=2)
    mined = mine_sources(mining, {3: source}, {3: corpus}, Encoder(None, None, 0, ""), step=7, seed=0)
    assert mined.step == 7 and mined.rows.keys() == {3}
    scores = queries @ documents.T
    for query, row in enumerate(mined.rows[3].tolist()):
        gone = [*corpus.positives_of(np.array([query]))[0].tolist(), int(corpus.own[corpus.query[query]])]
        barred = {corpus.contents[number] for number in gone if number >= 0}
        allowed = [number for number in range(len(documents)) if corpus.contents[number] not in barred]
        best: list[int] = []
        for number in sorted(allowed, key=lambda one: -scores[query, one]):
            if corpus.contents[number] not in {corpus.contents[one] for one in best}:
                best.append(number)
        assert row == best[:2]


def source_of(tmp_path, records) -> RecordDataset:
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    config = build_config({"data": {"train": [{"path": "some.jsonl"}]}})
    return RecordDataset(config.data.train[0], root=tmp_path, cache_dir=tmp_path / "cache")


def names(source, corpus, numbers) -> list[str]:
    places = [corpus.place[number].tolist() for number in numbers if number >= 0]
    return [source[row].documents[index].content[0].text for row, index in places]


@pytest.mark.parametrize("cells", [module.CELLS, 40])
def test_no_positive_of_a_query_with_hundreds_is_its_negative(tmp_path, monkeypatch, cells) -> None:
    """Two records share 150 positives, nearest to their query; the others' are searched as deep as before."""
    monkeypatch.setattr(module, "CELLS", cells)
    halves = [[{"content": f"p{number}"} for number in range(start, start + 75)] for start in (0, 75)]
    records = [{"query": "many", "documents": half} for half in halves]
    records += [{"query": f"q{number}", "documents": [{"content": f"d{number}"}]} for number in range(30)]
    source = source_of(tmp_path, [records[2], *records[:2], *records[3:]])
    corpus, depths = corpus_of(source), []
    assert corpus.known.tolist() == [1, 150, 150, *[1] * 29] and len(corpus.positives) == 180
    generator = np.random.default_rng(0)
    queries = generator.normal(size=(32, 8)).astype(np.float32)
    documents = generator.normal(size=(180, 8)).astype(np.float32)
    many = [place for place, name in enumerate(names(source, corpus, range(180))) if name.startswith("p")]
    queries[2] = queries[1]
    documents[many] = queries[1] + documents[many] / 9
    monkeypatch.setattr(module, "_vectors", lambda *of: (queries, documents))
    retrieve = module.retrieve
    monkeypatch.setattr(module, "retrieve", lambda *given, **more: depths.append(given[3]) or retrieve(*given, **more))
    mining = MiningConfig(rules=("top_k",), depth=20, negatives=8)
    rows = mine_sources(mining, {0: source}, {0: corpus}, Encoder(None, None, 0, ""), 0, 0).rows[0]
    assert (rows >= 0).all() and (rows[1] == rows[2]).all()
    for record, row in enumerate(rows):
        found = names(source, corpus, row)
        assert not any(name.startswith("p") for name in found) or record not in (1, 2)
        assert not {document.content[0].text for document in source[record].documents} & {*found}
    assert sorted({*depths}) == [22, 171] and (len(depths) > 2) is (cells == 40)


def test_a_query_all_of_whose_documents_are_answers_keeps_its_own(tmp_path, monkeypatch) -> None:
    records = [{"query": "all", "documents": [{"content": one} for one in "abcd"]}, *RECORDS[1:3]]
    records[1] = {"query": "q1", "documents": [{"content": "b"}]}
    source = source_of(tmp_path, records)
    corpus = corpus_of(source)
    generator = np.random.default_rng(0)
    found = generator.normal(size=(3, 4)).astype(np.float32), generator.normal(size=(4, 4)).astype(np.float32)
    monkeypatch.setattr(module, "_vectors", lambda *of: found)
    mining = MiningConfig(rules=("top_k",), depth=4, negatives=3)
    rows = mine_sources(mining, {0: source}, {0: corpus}, Encoder(None, None, 0, ""), 0, 0).rows[0]
    assert (rows < 0).tolist() == [[True] * 3, [False] * 3, [False] * 3]
    every = source_of(tmp_path, [records[0], {"query": "q", "documents": [{"content": one} for one in "dcba"]}])
    with pytest.raises(MmembedError, match="has 4 documents, at least 4 of them positives of each query"):
        mine_sources(mining, {0: every}, {0: corpus_of(every)}, Encoder(None, None, 0, ""), 0, 0)


def test_a_document_that_shows_a_query_is_nobodys_for_that(tmp_path, monkeypatch) -> None:
    """`x0` .. are queries, and documents that answer none: owner_similarity chooses positives of others alone."""
    records = [
        {"query": f"q{one}", "documents": [{"content": f"d{one}"}, {"content": f"x{one}", "relevance": 0}]}
        for one in range(6)
    ]
    records += [{"query": f"x{one}", "documents": [{"content": f"e{one}"}]} for one in range(6)]
    source = source_of(tmp_path, records)
    corpus, generator = corpus_of(source), np.random.default_rng(1)
    found = [generator.normal(size=(count, 8)).astype(np.float32) for count in (12, 18)]
    monkeypatch.setattr(module, "_vectors", lambda *of: found)
    mining = MiningConfig(rules=("owner_similarity",), depth=12, negatives=8)
    rows = mine_sources(mining, {0: source}, {0: corpus}, Encoder(None, None, 0, ""), 0, 0).rows[0]
    chosen = [names(source, corpus, row) for row in rows]
    assert not any(name.startswith("x") for row in chosen for name in row)
    mining = MiningConfig(rules=("top_k",), depth=18, negatives=16)
    rows = mine_sources(mining, {0: source}, {0: corpus}, Encoder(None, None, 0, ""), 0, 0).rows[0]
    assert [{*names(source, corpus, rows[6 + one])} & {f"x{one}", f"e{one}"} for one in range(6)] == [set()] * 6


def test_mined_ones_take_the_place_of_a_records_own(source) -> None:
    run = Refresh(build_config(settings()), {0: source}, 0, source._folder)
    assert run.applied((0, 0, 0), source[0]) == source[0], "nothing is mined yet"
    rows = np.array([[7, 3], [-1, -1], [0, -1], [1, 2], [1, 2], [3, 4]], np.int32)
    run.mined = Mined(0, {0: rows})
    found = run.applied((0, 0, 5), source[0]).documents
    assert [(one.content, one.relevance, one.id) for one in found] == [
        ((Text("a"),), 1, None),
        ((Text("e"),), 0, None),
        ((Text("c"),), 0, "class"),
    ]
    assert run.applied((0, 1, 0), source[1]) == source[1], "none was found: its own stay"
    assert run.applied((1, 0, 0), source[0]) == source[0], "another source"
    assert [one.relevance for one in run.applied((0, 5, 0), source[5]).documents] == [2, 1, 0, 0]


@pytest.mark.parametrize(
    ("mining", "expected"),
    [
        ({}, [0] * 9),
        ({"every": 3}, [0, 0, 0, 3, 3, 3, 6, 6, 6]),
        ({"every": 3, "asynchronous": True}, [0, 0, 0, 0, 0, 0, 3, 3, 3]),
    ],
)
def test_which_weights_mine_for_a_step(source, mining, expected) -> None:
    run = Refresh(build_config(settings(**mining)), {0: source}, 0, source._folder)
    assert [run.weights_of(step) for step in range(9)] == expected


def test_a_result_comes_back_and_one_of_other_documents_or_rules_does_not(source, tmp_path) -> None:
    run = Refresh(build_config(settings()), {0: source}, 0, tmp_path)
    run.mined = Mined(4, {0: np.arange(12, dtype=np.int32).reshape(6, 2)})
    run.save(tmp_path)
    back = run.read(tmp_path)
    assert back.step == 4 and back.rows[0].tolist() == run.mined.rows[0].tolist()
    assert run.overlap(back) == 1.0 and run.overlap(Mined(0, {0: back.rows[0][:, ::-1] - 1})) == 0.5
    other = Refresh(build_config(settings(rules=["random"])), {0: source}, 0, tmp_path)
    with pytest.raises(CheckpointError, match=r"mined.safetensors: was mined of other documents, or by other rules"):
        other.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no mined.safetensors"):
        run.read(tmp_path / "cache")


def test_a_process_that_fails_ends_the_run_with_what_it_said(source, tmp_path) -> None:
    run = Refresh(build_config(settings(every=3, asynchronous=True)), {0: source}, 0, tmp_path)
    with pytest.raises(CheckpointError, match=r"step-3: holds neither .* steps after 6 .*before that step"):
        run.wait(3)
    folder = run.folder(3)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("first\nValueError: no such thing\n")
    run._process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
    with pytest.raises(MmembedError, match=r"step 3 ended with status 5: first / ValueError: no such thing"):
        run.wait(3)


def test_a_result_that_lies_there_is_taken(source, tmp_path) -> None:
    run = Refresh(build_config(settings(every=3, asynchronous=True)), {0: source}, 0, tmp_path)
    (run.folder(3) / "model").mkdir(parents=True)
    write_mined(run.folder(3), Mined(3, {0: np.zeros((6, 2), np.int32)}), run.fingerprint)
    run.go_on(3)
    assert run._process is None, "there is nothing left to do"
    run.wait(3)
    assert run.mined.step == 3 and not (run.folder(3) / "model").exists()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (settings(asynchronous=True), "'asynchronous' has no effect without 'every'"),
        (settings(device="cpu"), "'device' has no effect without 'asynchronous'"),
        (settings(negatives=5), "negatives 5 is above depth 4"),
        (settings(rules=[{"percent": 3}]), "rules: a block has no 'type'"),
        ({"data": {**settings()["data"], "train_group_size": 1}}, "leaves no room for negatives beside 1 positives"),
        ({"data": {**settings()["data"], "train": [{"path": "a", "pairs": "dropout"}]}}, "mining .*'a' .pairs"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(tree, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(tree)


@pytest.mark.parametrize(
    ("mining", "objective", "message"),
    [
        ({"rules": ["saha"]}, "infonce", r"data.mining.rules.saha: makes groups of pairs.*data.batch_order"),
        (
            {"rules": ["debcse"]},
            "infonce",
            r"data.mining.rules.debcse: reads surface, which the candidates do not have",
        ),
        ({"rules": ["top_k", "random"]}, "infonce", "data.mining.rules: top_k and random both pick the negatives"),
        ({"rules": ["topk"]}, "infonce", "mining: there is no 'topk'"),
        ({}, "rafa", "data.mining has no effect: objective 'rafa' compares no query with hard negatives"),
        ({}, "margin_mse", r"data.mining . objective 'margin_mse': it reads a teacher's 'score' of each negative"),
        ({"every": 2, "asynchronous": True, "device": "cuda:99"}, "infonce", "data.mining.device: 'cuda:99', of"),
        ({"every": 2, "asynchronous": True, "device": "gpu"}, "infonce", "data.mining.device: there is no 'gpu'"),
    ],
)
def test_a_run_that_cannot_mine_is_refused(mining, objective, message) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mining(build_config(settings(**mining)), build_objective(objective))


def test_records_need_no_negatives_where_they_are_mined(tmp_path) -> None:
    records = [{"query": letter, "documents": [{"content": 2 * letter}]} for letter in "abcd"]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    mining = build_config(settings())
    plain = build_config({"data": {**settings()["data"], "mining": None}})
    source = RecordDataset(plain.data.train[0], root=tmp_path, cache_dir=tmp_path / "cache")
    part = build_objective("negclip")
    assert part.needs_negatives
    with pytest.raises(ConfigError, match="have no negative"):
        check_supply(source, plain, part, 1)
    check_supply(source, mining, part, 1)
