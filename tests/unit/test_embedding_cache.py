"""Vectors that evaluation keeps: the same numbers, nothing encoded twice, nothing lost but a block."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from eval import embedding_cache, run
from eval.embedding_cache import Caching
from mmembed.content import Image, Text

TEXTS = [(Text(f"text {number % 7}"),) for number in range(20)]


class Counting:
    """Vectors that depend on everything that an encoder is given; notes what it encodes."""

    def __init__(self, tokens=None, fails_after=None):
        self.tokens, self.fails_after, self.encoded = tokens, fails_after, []

    def encode(self, contents, *, role, instruction):
        if self.fails_after is not None and len(self.encoded) >= self.fails_after:
            raise KeyboardInterrupt
        self.encoded += contents
        seeds = [hash((str(content), role, instruction)) % 2**32 for content in contents]
        shape = (4,) if self.tokens is None else (self.tokens, 4)
        vectors = [np.random.default_rng(seed).normal(size=shape).astype(np.float32) for seed in seeds]
        return vectors if self.tokens else np.stack(vectors)

    def similarity(self, a, b):
        return a @ b.T


def caching(folder, embedder, share=(0, 1), alone=lambda: False, **made_by):
    return Caching(embedder, folder, 10**9, {"fingerprint": "one", **made_by}, share, alone)


@pytest.mark.parametrize("tokens", [None, 3], ids=["single", "multi-vector"])
def test_vectors_are_the_embedders_and_computed_once(tmp_path, tokens):
    plain = Counting(tokens).encode(TEXTS, role="query", instruction="find")
    for computed in (7, 0):
        embedder = Counting(tokens)
        found = caching(tmp_path, embedder).encode(TEXTS, role="query", instruction="find")
        assert len(embedder.encoded) == computed
        assert type(found) is type(plain) and all(map(np.array_equal, found, plain))


def test_side_instruction_and_model_make_other_vectors(tmp_path):
    embedder = Counting()
    one = caching(tmp_path, embedder)
    for role, instruction in (("query", None), ("document", None), ("query", "find"), ("query", None)):
        one.encode(TEXTS[:1], role=role, instruction=instruction)
    assert len(embedder.encoded) == 3 and (one.read, one.computed) == (1, 3)
    caching(tmp_path, embedder, truncate_dim=2).encode(TEXTS[:1], role="query", instruction=None)
    assert len(embedder.encoded) == 4


def test_pictures_count_by_their_pixels(tmp_path):
    embedder = Counting()
    red, blue = (PIL.Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    contents = [(Image(red),), (Image(blue),), (Image(red.copy()),), (Image(red), Text("red"))]
    caching(tmp_path, embedder).encode(contents, role="document", instruction=None)
    assert len(embedder.encoded) == 3


def test_a_stopped_run_goes_on_behind_its_last_block(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_cache, "BLOCK", 3)
    stopped = caching(tmp_path, Counting(fails_after=6))
    with pytest.raises(KeyboardInterrupt):
        stopped.encode(TEXTS, role="query", instruction=None)
    embedder = Counting()
    caching(tmp_path, embedder).encode(TEXTS, role="query", instruction=None)
    assert len(embedder.encoded) == 1, "two blocks of three were kept"


def test_what_is_no_number_is_not_kept(tmp_path):
    class Broken(Counting):
        def encode(self, contents, **told):
            return np.full_like(super().encode(contents, **told), np.nan)

    caching(tmp_path, Broken()).encode(TEXTS[:1], role="query", instruction=None)
    embedder = Counting()
    assert np.isfinite(caching(tmp_path, embedder).encode(TEXTS[:1], role="query", instruction=None)).all()


MANY = [(Text(f"text {number}"),) for number in range(300)]


def test_processes_divide_the_work_and_all_get_everything(tmp_path):
    embedders = [Counting() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(
            lambda part: caching(tmp_path, embedders[part], (part, 3)).encode(MANY, role="query", instruction=None),
            range(3),
        ))  # fmt: skip
    encoded = [len(one.encoded) for one in embedders]
    assert sum(encoded) == 300 and min(encoded) > 60
    plain = Counting().encode(MANY, role="query", instruction=None)
    assert all(np.array_equal(one, plain) for one in found)


@pytest.mark.parametrize("how", ["the others ended", "nothing comes"])
def test_what_the_others_leave_is_encoded_here(tmp_path, monkeypatch, how):
    if how == "nothing comes":
        monkeypatch.setattr(embedding_cache, "PATIENCE", 0.3)
    embedder = Counting()
    one = caching(tmp_path, embedder, (0, 2), alone=lambda: how == "the others ended")
    found = one.encode(MANY, role="query", instruction=None)
    assert len(embedder.encoded) == one.computed == 300
    assert np.array_equal(found, Counting().encode(MANY, role="query", instruction=None))


def numbers(file):
    return {name: entry["scores"]["mmembed-nano"]["ndcg_at_10"]
            for name, entry in json.loads(file.read_text())["tasks"].items()}  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_devices_divide_a_run(tmp_path, capsys):
    """Two real processes; what one computes the other reads, and the numbers are those of one alone."""
    common = ["--model", "mmembed-nano", "--no-baselines", "--tasks", "mbpp", "odex", "--dtype", "float32"]
    assert run.main([*common, "--output", str(tmp_path / "one.json")]) == 0
    capsys.readouterr()
    kept = tmp_path / "kept"
    two = ["--devices", "cpu", "cpu", "--cache", str(kept), "--output", str(tmp_path / "two.json")]
    assert run.main([*common, *two]) == 0
    assert numbers(tmp_path / "two.json") == pytest.approx(numbers(tmp_path / "one.json"), abs=1e-4)
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "vectors read" in line]
    read, computed = (int(word.replace(",", "")) for word in re.findall(r"[\d,]+(?= vectors| computed)", said))
    assert read > 300 and computed > 300, said
    assert "[2/2] odex" in (kept / "worker-1.log").read_text()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_process_that_cannot_start_costs_no_result(tmp_path, caplog):
    arguments = ["--model", "mmembed-nano", "--no-baselines", "--tasks", "odex", "--dtype", "float32"]
    file = tmp_path / "out.json"
    devices = ["--devices", "cpu", "cuda:97", "--cache", str(tmp_path / "kept")]
    assert run.main([*arguments, *devices, "--output", str(file)]) == 0
    assert numbers(file)["odex"] > 0.4
    assert "worker-1.log: a process ended with status 2; going on without it" in caplog.text
    assert "cuda:97" in (tmp_path / "kept/worker-1.log").read_text()


@pytest.mark.slow
def test_a_second_run_encodes_nothing_and_scores_the_same(tmp_path, capsys):
    common = ["--model", "mmembed-nano", "--no-baselines", "--tasks", "odex"]
    results = []
    for number, cache in enumerate(([], ["--cache", str(tmp_path / "kept")], ["--cache", str(tmp_path / "kept")])):
        file = tmp_path / f"{number}.json"
        assert run.main([*common, *cache, "--output", str(file)]) == 0
        (entry,) = json.loads(file.read_text())["tasks"].values()
        results.append({key: value for key, value in entry["scores"]["mmembed-nano"].items() if key != "seconds"})
    assert results[0] == results[1] == results[2]
    said = [line for line in capsys.readouterr().out.splitlines() if "vectors read" in line]
    assert " 0 vectors read" in said[0] and said[1].endswith(" 0 computed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "bm25", "--cache", "kept"], "--cache: keeps vectors, and no model here makes any"),
        (["--model", "mmembed-nano", "--cache-gb", "2"], "--cache-gb: needs --cache FOLDER and a number above 0"),
        (["--model", "mmembed-nano", "--cache", "kept", "--cache-gb", "0"], "--cache-gb: needs --cache"),
        (["--model", "bm25", "--devices", "cpu", "cpu"], "--devices: divides what embedders encode"),
        (["--model", "mmembed-nano", "--devices", "cpu", "--device", "cpu"], "--devices: names the devices"),
        (["--model", "mmembed-nano", "--cache", "setup.py/kept", "--tasks", "odex"], "cannot be used as a cache"),
    ],
)
def test_wrong_options_are_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").touch()
    assert run.main(options) == 2
    assert message in capsys.readouterr().err
