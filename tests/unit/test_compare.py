"""eval.compare on results made of known rows; eval.run's rows and mteb's files of a real run."""

import csv
import json

import numpy as np
import pytest
import scipy.stats

from eval import compare, run
from eval.rows import Kept, Rows, agreeing, rows_file


def results(folder, name, rows, *, fingerprint="f" * 16, model=None, **more):
    """A results file of `eval.run`, of task -> scores of its rows, with the rows beside it."""
    model = model or f"runs/{name}"
    tasks = {
        task: {"group": "text retrieval", "main_score": "ndcg_at_10", "fingerprint": fingerprint,
               "queries": len(values),
               "scores": {model: {"main": round(float(np.mean(values)), 5), "interval": [0.1, 0.2]}}}
        for task, values in rows.items()
    }  # fmt: skip
    file = folder / f"{name}.json"
    models = {model: {"kind": "mmembed", "prompt": name}}
    file.write_text(json.dumps({"benchmark": "local", "split": "dev", "models": models, "tasks": tasks, **more}))
    kept = {task: {"statistic": "mean", "scores": {model: {str(n): float(v) for n, v in enumerate(values)}}}
            for task, values in rows.items()}  # fmt: skip
    rows_file(file).write_text(json.dumps({"tasks": kept}))
    return file


@pytest.fixture
def two(tmp_path):
    generator = np.random.default_rng(0)
    before = {name: generator.random(60) for name in ("gains", "loses", "noise")}
    moved = {"gains": 0.2, "loses": -0.2, "noise": 0.0}
    after = {name: values + moved[name] + generator.normal(0, 0.1, 60) for name, values in before.items()}
    return results(tmp_path, "before", before), results(tmp_path, "after", after), before, after


def test_what_differs_beyond_noise_is_said_with_scipys_p(two, tmp_path, capsys):
    first, second, before, after = two
    page, table = tmp_path / "x" / "page.html", tmp_path / "x" / "table.csv"
    assert compare.main([str(first), str(second), "--html", str(page), "--csv", str(table)]) == 0
    lines = {line["task"]: line for line in csv.DictReader(table.open()) if line["system"] == "after"}
    assert {name: line["verdict"] for name, line in lines.items()} == {
        "gains": "better", "loses": "worse", "noise": "no difference beyond noise"
    }  # fmt: skip
    theirs = {}
    for name, line in lines.items():
        test = scipy.stats.permutation_test(
            (after[name], before[name]), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", rng=0
        )
        theirs[name] = test.pvalue
        assert float(line["difference"]) == pytest.approx((after[name] - before[name]).mean())
        assert float(line["p"]) == pytest.approx(test.pvalue, abs=0.02)
    assert float(lines["gains"]["p_holm"]) == pytest.approx(3 * theirs["gains"], abs=2e-3)
    said = capsys.readouterr().out
    assert "1 better, 1 worse, 1 without a difference beyond noise" in said
    html = page.read_text()
    assert html.count("<svg") == 1 and "http" not in html.split("<body>")[1] and "after less before" in html


def test_results_that_do_not_compare_are_refused_by_name(two, tmp_path, capsys):
    first, second, _, after = two
    other = results(tmp_path, "other", after, fingerprint="e" * 16)
    assert compare.main([str(first), str(other)]) == 2
    error = capsys.readouterr().err
    assert "measure different things" in error and f"gains: fingerprint {'f' * 16} and {'e' * 16}" in error
    limited = results(tmp_path, "limited", after, limit=50)
    assert compare.main([str(first), str(limited)]) == 2
    assert "limit None and 50" in capsys.readouterr().err
    assert compare.main([str(first)]) == 2
    assert "alone; give another file" in capsys.readouterr().err
    first.write_text('{"models": {}}')
    assert compare.main([str(first), str(second)]) == 2
    assert "no results of eval.run" in capsys.readouterr().err
    strange = results(tmp_path, "strange", {"elsewhere": [0.1, 0.2]})
    assert compare.main([str(strange), str(second)]) == 2
    assert "no task is in all of them" in capsys.readouterr().err


def test_rows_of_another_run_are_refused(two, capsys):
    first, second, *_ = two
    kept = json.loads(rows_file(second).read_text())
    kept["tasks"]["gains"]["scores"]["runs/after"] = {str(n): 0.0 for n in range(60)}
    rows_file(second).write_text(json.dumps(kept))
    assert compare.main([str(first), str(second)]) == 2
    assert "rows of gains are of another run" in capsys.readouterr().err


def test_without_rows_nothing_is_claimed(two, capsys):
    first, second, *_ = two
    rows_file(second).unlink()
    assert compare.main([str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "0 better, 0 worse, 0 without a difference beyond noise, 3 not tested" in said and "not tested |" in said


def test_one_model_of_two_files_and_a_baseline_of_both(tmp_path, capsys):
    values = {"task": [0.2, 0.4, 0.9]}
    files = [results(tmp_path, name, values, model="runs/same") for name in ("a", "b")]
    for file in files:
        content = json.loads(file.read_text())
        content["models"]["bm25"] = {"kind": "baseline"}
        content["tasks"]["task"]["scores"]["bm25"] = {"main": 0.3, "interval": None}
        file.write_text(json.dumps(content))
    _, systems = compare.read(files)
    assert [system.label for system in systems] == ["same (a)", "same (b)", "bm25"]


def test_a_real_run_keeps_rows_whose_means_are_mtebs_and_files_that_mteb_reads(tmp_path):
    from mteb.cache import ResultCache

    output, folder = tmp_path / "results.json", tmp_path / "mteb"
    arguments = ["--model", "bm25", "--tasks", "mbpp", "dbpedia-entity/judged", "--mteb", str(folder)]
    assert run.main([*arguments, "--output", str(output)]) == 0
    found, kept = json.loads(output.read_text()), json.loads(rows_file(output).read_text())["tasks"]
    for name, entry in found["tasks"].items():
        own, values = entry["scores"]["bm25"], list(kept[name]["scores"]["bm25"].values())
        assert np.mean(values) == pytest.approx(own["main"], abs=1e-4) and len(values) == entry["queries"]
        low, high = own["interval"]
        theirs = scipy.stats.bootstrap((values,), np.mean, method="percentile", rng=0).confidence_interval
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    assert found["seed"] == 0
    read = ResultCache(folder).load_results(validate_and_filter=False, only_main_score=False)
    (model,) = read.model_results
    assert model.model_name == "baseline/bm25"
    assert {one.task_name: one.get_score() for one in model} == pytest.approx(
        {name.replace("/", "-"): entry["scores"]["bm25"]["main"] for name, entry in found["tasks"].items()}, abs=1e-4
    )


def test_rows_that_do_not_give_the_score_are_not_kept():
    rows = Rows("mean", {"a": 0.5, "b": 0.7})
    assert agreeing(rows, 0.6) is rows and agreeing(rows, 0.61) is None and agreeing(None, 0.6) is None
    assert Rows("mean", {"a": 0.5}).interval() is None
    kept = Kept()
    kept.add("task", "model", None)
    kept.write()
    assert kept.tasks == {}
