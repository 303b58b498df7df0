"""Jobs of several commands, through the real command: done once, gone on with, and nothing left running."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmembed.locks import only_one
from recipes.run_pipeline import main

ROOT = Path(__file__).parents[2]
MINING = "recipes/configs/mining/demo.yaml"


def mining(name, records, **more):
    """A step that mines with BM25; each takes seconds, most of them imports."""
    settings = {
        "output": "{here}",
        "root": "{root}",
        "sources": [{"path": records, "name": "records"}],
        "retriever": "bm25",
    }
    settings |= {"search": {"depth": 4}, "rules": ["top_k"], "negatives": 2}
    return {"name": name, "run": "data_tools.mine_negatives", "config": MINING, "set": {**settings, **more}}


@pytest.fixture
def job(tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    records = [{"query": f"{word} bus", "documents": [{"content": f"a {word} bus goes"}]} for word in words]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    first = mining("first", "records.jsonl")
    second = mining("second", str(tmp_path / "out/first/records.jsonl"), seed="{seed}")
    tree = {"output": str(tmp_path / "out"), "values": {"root": str(tmp_path), "seed": 0}, "steps": [first, second]}

    def write(**changes):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({**tree, **changes}))
        return str(path)

    return write


def test_steps_run_once_and_again_where_something_has_changed(job, tmp_path, capfd):
    assert main(["--config", job()]) == 0
    out = tmp_path / "out"
    lines = (out / "second/records.jsonl").read_text().splitlines()
    assert len(lines) == 10 and len(json.loads(lines[0])["documents"]) == 5  # one, and two of each step
    capfd.readouterr()
    before = {name: (out / name / "records.jsonl").stat().st_mtime_ns for name in ("first", "second")}
    assert main(["--config", job()]) == 0
    assert capfd.readouterr().out.count("done before") == 2
    assert main(["--config", job(), "values.seed=3"]) == 0
    assert capfd.readouterr().out.count("done before") == 1
    after = {name: (out / name / "records.jsonl").stat().st_mtime_ns for name in ("first", "second")}
    assert after["first"] == before["first"] and after["second"] > before["second"]
    assert json.loads((out / "second/report.json").read_text())["settings"]["seed"] == 3


def test_a_step_that_fails_ends_the_job_with_its_status_and_is_tried_again(job, tmp_path, capfd):
    missing = mining("second", "nowhere.jsonl")
    good = yaml.safe_load(Path(job()).read_text())["steps"]
    assert main(["--config", job(steps=[good[0], missing])]) == 2
    error = capfd.readouterr().err
    assert "nowhere.jsonl" in error and "step 'second' ended with status 2" in error
    assert main(["--config", job()]) == 0
    assert "first: done before" in capfd.readouterr().out


@pytest.mark.slow
def test_a_killed_job_takes_its_step_with_it_and_goes_on(job, tmp_path):
    command = [sys.executable, "-m", "recipes.run_pipeline", "--config", job()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
        note = tmp_path / "out/step.pid"
        deadline = time.monotonic() + 120
        while not note.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if note.exists():
            guard = int(note.read_text())
            deadline = time.monotonic() + 20
            while Path(f"/proc/{guard}").exists() and time.monotonic() < deadline:
                time.sleep(0.1)
            assert not Path(f"/proc/{guard}").exists()
    assert subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    assert len((tmp_path / "out/second/records.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped_ends_its_step_first(job, tmp_path, number):
    command = [sys.executable, "-m", "recipes.run_pipeline", "--config", job()]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    note = tmp_path / "out/step.pid"
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    guard = int(note.read_text())
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "stopped; the same command goes on" in error and "Traceback" not in error
    assert not Path(f"/proc/{guard}").exists() and not note.exists()


def test_one_job_at_a_time_holds_a_folder(job, tmp_path, capsys):
    with only_one(tmp_path / "out"):
        assert main(["--config", job()]) == 2
    error = capsys.readouterr().err
    assert f"process {os.getpid()}" in error and "works there; wait for its end" in error
    assert not (tmp_path / "out/steps.json").exists() and not (tmp_path / "out/first").exists()


def test_an_output_that_cannot_be_is_refused_with_its_path(job, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--config", job(), f"output={tmp_path}/file/out"]) == 2
    assert f"error: {tmp_path}/file/out: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [{"name": "a", "run": "data_tools.mine"}]}, "did you mean 'data_tools.mine_negatives'"),
        ({"steps": [{"name": "a b", "run": "eval.run"}]}, "name"),
        ({"steps": [{"name": "a", "run": "eval.run", "set": {"x": 1}}]}, "'set' has no effect without 'config'"),
        ({"steps": [mining("a", "x"), mining("a", "y")]}, "'a' is there twice"),
        ({"steps": [mining("a", "{rooot}/x")]}, "did you mean 'root'"),
        ({"steps": [{**mining("a", "x"), "config": "recipes/none.yaml"}]}, "there is no recipes/none.yaml"),
        ({"steps": []}, "steps"),
        ({"stepps": []}, "did you mean 'steps'"),
    ],
)
def test_jobs_that_cannot_work_are_refused_before_anything_runs(job, tmp_path, capsys, change, message):
    assert main(["--config", job(**change)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
