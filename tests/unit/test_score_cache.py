"""Scores that `--cache` keeps: the same results, nothing evaluated twice, nothing of another run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eval import evaluation, run, scoring
from eval.files import fingerprint
from eval.rows import rows_file

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = ["mbpp", "stsb-en", "odex"]
COMMON = ["--model", "mmembed-nano", "--no-baselines", "--dtype", "float32", "--layers", "1", "--limit", "20"]


def told(file):
    """What a run found, without when and how long."""
    results = json.loads(file.read_text())
    for key in ("created", "seconds", "machine"):
        results.pop(key)
    for entry in results["tasks"].values():
        for score in entry["scores"].values():
            score.pop("seconds")
    return results, json.loads(rows_file(file).read_text())


@pytest.fixture
def evaluated(monkeypatch):
    """The names of tasks that are really evaluated."""
    names = []

    def noting(model, task, row, **given):
        names.append(row.name)
        return scoring.score(model, task, row, **given)

    monkeypatch.setattr(evaluation, "score", noting)
    return names


def test_a_second_run_evaluates_nothing_and_writes_the_same(tmp_path, evaluated, capsys):
    files = [tmp_path / f"{number}.json" for number in range(3)]
    more = [["--mteb", str(tmp_path / f"mteb{number}"), "--rankings", str(tmp_path / f"rankings{number}")]
            for number in range(3)]  # fmt: skip
    for number, cache in enumerate(([], ["--cache", str(tmp_path / "kept")], ["--cache", str(tmp_path / "kept")])):
        evaluated.clear()
        flags = ["--tasks", *TASKS, *cache, "--output", str(files[number]), *more[number]]
        assert run.main([*COMMON, *flags]) == 0
        assert evaluated == ([] if number == 2 else TASKS)
    assert told(files[0]) == told(files[1]) == told(files[2])
    assert "3 scores of tasks read" in capsys.readouterr().out
    for folder in ("mteb", "rankings"):
        written = [{path.relative_to(tmp_path / f"{folder}{number}"): path.read_bytes()
                    for path in (tmp_path / f"{folder}{number}").rglob("*.json")} for number in (1, 2)]  # fmt: skip
        assert written[0] and written[0].keys() == written[1].keys()
        assert folder == "mteb" or written[0] == written[1]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (["--tasks", "odex"], []),
        (["--tasks", "odex", "--instructions", "always"], ["odex"]),
        (["--tasks", "odex", "--truncate-dim", "32"], ["odex"]),
        (["--tasks", "odex", "mbpp", "--limit", "19"], ["odex", "mbpp"]),
    ],
)
def test_what_makes_other_scores_is_evaluated(tmp_path, evaluated, change, again):
    cache = ["--cache", str(tmp_path / "kept"), "--output", str(tmp_path / "out.json")]
    assert run.main([*COMMON, "--tasks", "odex", *cache]) == 0
    evaluated.clear()
    assert run.main([*COMMON, *change, *cache]) == 0
    assert evaluated == again


def test_other_data_and_damaged_files_are_evaluated_again(tmp_path, evaluated):
    root = tmp_path / "data"
    folder = root / "mbpp"
    (folder / "qrels").mkdir(parents=True)
    for file in ("corpus.jsonl", "queries.jsonl", "qrels/dev.tsv"):
        (folder / file).write_bytes((REPOSITORY / "data/mbpp" / file).read_bytes())
    cache = ["--data-root", str(root), "--cache", str(tmp_path / "kept"), "--output", str(tmp_path / "out.json")]
    assert run.main([*COMMON, *cache]) == 0 and evaluated == ["mbpp"]
    (kept,) = (tmp_path / "kept/scores").glob("*.json")
    kept.write_text(kept.read_text()[:100])
    assert run.main([*COMMON, *cache]) == 0 and evaluated == ["mbpp"] * 2
    lines = (folder / "qrels/dev.tsv").read_text().splitlines()
    (folder / "qrels/dev.tsv").write_text("\n".join(lines[:-1]) + "\n")
    fingerprint.cache_clear()
    assert run.main([*COMMON, *cache]) == 0 and evaluated == ["mbpp"] * 3


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_numbers(tmp_path):
    """SIGKILL once the first task is written, in a real process; the same command again."""
    whole, file = tmp_path / "whole.json", tmp_path / "killed.json"
    command = [sys.executable, "-m", "eval.run", *COMMON, "--tasks", *TASKS, "xquad/de"]
    subprocess.run([*command, "--output", str(whole)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    command += ["--cache", str(tmp_path / "kept"), "--output", str(file)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not file.is_file():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was killed while it ran"
    done = len(json.loads(file.read_text())["tasks"])
    assert 1 <= done < 4
    again = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    read = re.search(r"^(\d+) scores of tasks read", again.stdout, re.MULTILINE)
    assert read and done <= int(read[1]) < 4
    assert told(file) == told(whole)
