"""How proxies go with whole tasks: scipy's correlations, files that do not go together, what a run says."""

import itertools
import json

import numpy as np
import pytest
from scipy.stats import kendalltau, spearmanr

from eval import proxy, run
from eval.sets import PROXY
from eval.summary import notes


def write(path, scores, cut=None, benchmark="local"):
    tasks = {name: {"group": "text retrieval", "main_score": "ndcg_at_10",
                    "scores": {model: {"main": own[name]} for model, own in scores.items()}}
             for name in next(iter(scores.values()))}  # fmt: skip
    means = {model: float(np.mean(list(own.values()))) for model, own in scores.items()}
    told = {"benchmark": benchmark, "proxy": cut, "models": {model: {"kind": "mmembed"} for model in scores},
            "tasks": tasks, "averages": {"text retrieval": means}}  # fmt: skip
    path.write_text(json.dumps(told))
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Seven systems in three files: proxies are higher, and of one task in another order."""
    generator = np.random.default_rng(3)
    whole = {f"m{number}": {"a": 0.1 * number, "b": float(generator.uniform())} for number in range(7)}
    cut = {name: {"a": own["a"] ** 0.5 + 0.1, "b": float(generator.uniform())} for name, own in whole.items()}
    found = []
    for number, names in enumerate((["m0", "m1", "m2"], ["m3", "m4"], ["m5", "m6"])):
        sides = [{name: side[name] for name in names} for side in (whole, cut)]
        other = write(tmp_path / f"{number}-proxy.json", sides[1], PROXY.told())
        found.append((write(tmp_path / f"{number}.json", sides[0]), other))
    return whole, cut, found


def test_agreement_is_scipys(files, tmp_path, monkeypatch, capsys):
    whole, cut, found = files
    monkeypatch.setattr(proxy, "MEASURED", tmp_path / "proxies.json")
    flags = ["--whole", *(one for one, _ in found), "--proxy", *(other for _, other in found), "--write"]
    assert proxy.main(flags) == 0
    kept = json.loads((tmp_path / "proxies.json").read_text())["local"]
    assert kept["systems"] == list(whole) and kept["proxy"] == PROXY.told()
    assert kept["agreement"]["a"] == {**kept["agreement"]["a"], "spearman": 1.0, "ordered": 1.0, "systems": 7}
    assert kept["agreement"]["a"]["pearson"] < 1
    ours, b = kept["agreement"]["b"], [[own["b"] for own in side.values()] for side in (whole, cut)]
    assert ours["spearman"] == pytest.approx(spearmanr(*b).statistic, abs=1e-4)
    assert ours["ordered"] == pytest.approx((kendalltau(*b).statistic + 1) / 2, abs=1e-4)  # nothing ties
    assert ours["low"] < ours["spearman"] < ours["high"]
    assert "average, text retrieval" in capsys.readouterr().out
    results = {"benchmark": "local", "proxy": PROXY.told(), "averages": {"text retrieval": {}}, "limit": None,
               "tasks": {}, "missing": {}, "left_out": {}}  # fmt: skip
    value = kept["agreement"]["average, text retrieval"]["spearman"]
    assert any(f"over 7 systems: text retrieval {value:.2f}" in line for line in notes(results))
    for other in ({"benchmark": "BEIR"}, {"proxy": {**PROXY.told(), "queries": 7}}):
        assert any("was not measured on" in line for line in notes({**results, **other}))


def test_files_that_do_not_go_together_are_refused(files, tmp_path, capsys):
    (one, other), *_ = files[2]
    fewer = write(tmp_path / "fewer.json", {"m0": {"a": 0.1}}, PROXY.told())
    beir = write(tmp_path / "beir.json", {"m0": {"a": 0.1}}, PROXY.told(), "BEIR")
    for whole, cut, message in (
        ([one], [other, other], "--whole has 1 files, --proxy 2"),
        ([one], [one], "the second of a proxy"),
        ([one], [fewer], "there is no m1"),
        ([one], [beir], "other benchmarks or proxies"),
        ([one], [other], "3 systems say nothing of an order; give at least 5"),
        ([str(tmp_path / "none.json")], [other], "no results of eval.run"),
    ):
        assert proxy.main(["--whole", *whole, "--proxy", *cut]) == 2
        assert message in capsys.readouterr().err


def test_a_run_with_a_proxy_keeps_its_size_and_says_how_it_goes_with_the_whole(tmp_path, capsys):
    output = tmp_path / "out.json"
    assert run.main(["--model", "bm25", "--tasks", "mbpp", "medquad", "--proxy", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["proxy"] == PROXY.told()
    assert results["tasks"]["medquad"]["queries"] == 100 and results["tasks"]["mbpp"]["queries"] == 90
    assert "a proxy of each task; " in capsys.readouterr().out


def test_a_proxy_measured_is_one_of_this_size():
    """What runs state was measured with the cut that runs make."""
    for name, kept in json.loads(proxy.MEASURED.read_text()).items():
        assert kept["proxy"] == PROXY.told(), name
        assert len(kept["systems"]) >= proxy.FEWEST
        for one, other in itertools.pairwise(kept["systems"]):
            assert one != other
