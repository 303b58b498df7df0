"""Workers of a local Ray cluster: what they make is what one process makes, byte for byte, also where one is killed."""

import contextlib
import json
import os
import signal

import psutil
import pytest
import yaml

from data_tools.mine_negatives import main as mine
from data_tools.synthesize import main as synthesize
from mmembed.errors import MmembedError
from mmembed.workers import Workers, spread
from tests.corpora import Dying, encode
from tests.synthesis.servers import ChatServer, completion

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'mmembed[ray]'")
pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TWO = Workers("local", 2)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One for all tests: it takes seconds to start."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    options = {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    for _ in range(3):  # Ray gives a busy machine 30 s to start
        with contextlib.suppress(Exception):
            ray.init(address="local", **options)
            break
        ray.shutdown()
    assert ray.is_initialized()
    yield
    ray.shutdown()


@pytest.mark.parametrize("format", ["npy", "parquet"])
def test_encoding_with_a_worker_killed(tmp_path, format):
    source = tmp_path / "corpus.jsonl"
    source.write_text("".join(json.dumps({"id": f"d{n}", "text": f"passage {n}"}) + "\n" for n in range(60)))
    encode(tmp_path / "one", source, format=format)
    flag = tmp_path / "killed"
    encode(tmp_path / "two", source, Dying("passage 33", flag), format=format, workers=TWO)
    assert flag.exists()
    for file in (tmp_path / "one").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "two" / file.relative_to(tmp_path / "one")).read_bytes(), file


def test_errors_of_workers_are_those_of_one_process(tmp_path):
    source = tmp_path / "corpus.jsonl"
    source.write_text('{"text": "a"}\n{"image": "gone.png"}\n')
    with pytest.raises(MmembedError, match=r"corpus.jsonl:2: no such image: gone.png"):
        encode(tmp_path / "out", source, workers=TWO)


def test_more_workers_than_the_cluster_has_cores_are_refused():
    with pytest.raises(MmembedError, match="3 workers of 1 CPU each; the cluster at local has 2"):
        list(spread([0], lambda: abs, Workers("local", 3)))


def test_mining(tmp_path, family_folder):
    words = ["red", "blue", "bus", "train", "river", "bread", "engine", "letter", "forest", "tower"]
    texts = [f"{words[n % 10]} {words[n // 7 % 10]} {words[n // 3 % 10]} {n}" for n in range(60)]
    records = [{"query": f"{one}?", "documents": [{"content": one}]} for one in texts[:12]]
    for name, rows in (("train.jsonl", records), ("corpus.jsonl", [{"text": one} for one in texts[12:]])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"type": "mmembed", "model": str(family_folder("qwen3_vl")), "dtype": "float32"}
    config = {
        "root": str(tmp_path), "sources": [{"path": "train.jsonl", "corpus": ["corpus.jsonl"]}], "retriever": model,
        "teacher": {"type": "embedder", "retriever": model}, "search": {"depth": 5}, "rules": ["top_k"], "negatives": 2,
        "shard": 8, "scores": "teacher",
    }  # fmt: skip
    for name, more in (("one", {}), ("two", {"ray": {"address": "local", "workers": 2}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**config, **more, "output": str(tmp_path / name)}))
        assert mine(["--config", str(tmp_path / f"{name}.yaml")]) == 0
    for file in ("train.jsonl", "work/train/retriever-corpus.rows", "work/train/teacher-queries.rows"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_synthesis_with_a_worker_killed(tmp_path, request):
    """Over real sockets: at the 15th question one of the two workers dies; only what was in flight is asked again."""
    rows = [{"_id": f"q{number}", "text": f"query number {number}"} for number in range(40)]
    (tmp_path / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    killed, asked = [], []

    def answer(body):
        asked.append(body["seed"])
        if len(asked) == 15 and killed == [None]:
            workers = [one for one in psutil.Process().children(recursive=True) if "MapWorker" in one.name()]
            workers = workers or [
                one for one in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(one.cmdline())
            ]
            killed[0] = workers[0].pid
            os.kill(workers[0].pid, signal.SIGKILL)
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        return 200, completion(json.dumps({key: f"{key} {body['seed']} " + "word " * 40 for key in properties}))

    server = ChatServer(answer)
    request.addfinalizer(server.close)
    config = {
        "sources": [{"path": str(tmp_path / "queries.jsonl"), "kind": "queries"}], "stages": ["graded_passages"],
        "generator": {"type": "openai", "model": "oracle", "url": server.url, "concurrency": 2},
    }  # fmt: skip
    for name, more in (("one", {}), ("two", {"ray": {"address": "local", "workers": 2}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**config, **more, "output": str(tmp_path / name)}))
        asked.clear()
        killed += [None] if name == "two" else []
        assert synthesize(["--config", str(tmp_path / f"{name}.yaml")]) == 0
    assert isinstance(killed[0], int) and 40 <= len(asked) <= 40 + 2
    for file in ("records.jsonl", "left_out.jsonl"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not list((tmp_path / "two/work/asked").iterdir())
