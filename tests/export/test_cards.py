"""The model card says what the folder is, and its Python runs; the folder reaches a Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mmembed.export import export
from mmembed.export.card import PLACE, read_metrics
from mmembed.export.subject import load_subject
from tests.export.hub import FakeHub
from tests.export.making import JUDGE, save

pytest.importorskip("sentence_transformers")


def blocks(folder):
    return re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)


def run(code, folder):
    """In a process of its own, as a reader of the card would; without the repository in front of it."""
    code = code.replace(PLACE, str(folder))
    code = "import mmembed.backbones  # torchvision beside a CPU build of torch\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_card_of_an_embedder(family_folder, tmp_path):
    results = {
        "models": {"m": {"kind": "embedder"}, "bm25": {"kind": "baseline"}},
        "tasks": {
            "xquad/en": {"main_score": "ndcg_at_10", "scores": {"m": {"main": 0.51234}, "bm25": {"main": 0.4}}},
            "left": {"main_score": "ap", "scores": {"m": None, "bm25": None}},
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    path = save(tmp_path / "saved", family_folder("qwen3_vl"), pooling="last_token", prompt="instruct")
    subject = load_subject(
        str(path), instructions={"query": "Find it."}, dims=[16], licence="apache-2.0", data=("owner/set",),
        metrics=read_metrics([tmp_path / "results.json"]),
    )  # fmt: skip
    export(subject, "sentence-transformers", tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0" and head["datasets"] == ["owner/set"]
    [measured] = head["model-index"][0]["results"]
    assert measured["metrics"] == [{"type": "ndcg_at_10", "value": 0.51234}] and "left" not in text
    assert "| xquad/en | ndcg_at_10 | 0.5123 |" in text and "| instruction of a query | `Find it.` |" in text
    assert "lora adapter merged" in text and "may be cut to | 16 numbers" in text
    [code] = blocks(tmp_path / "out")
    assert "torch.Size" not in (printed := run(code, tmp_path / "out")) and "(2, 64)" in printed


def test_the_card_of_a_model_with_our_modules_and_of_a_reranker(family_folder, tmp_path):
    pooling = {"type": "latent_attention", "num_latents": 8, "num_heads": 2}
    export(load_subject(str(save(tmp_path / "a", family_folder("qwen3"), pooling=pooling))),
           "sentence-transformers", tmp_path / "latent")  # fmt: skip
    assert "needs `pip install mmembed`" in (tmp_path / "latent/README.md").read_text()
    [code] = blocks(tmp_path / "latent")
    assert "tensor" in run(code, tmp_path / "latent")
    export(load_subject(str(save(tmp_path / "b", family_folder("qwen3"), **JUDGE))),
           "sentence-transformers", tmp_path / "judge")  # fmt: skip
    [code] = blocks(tmp_path / "judge")
    assert "corpus_id" in run(code, tmp_path / "judge")


def test_a_folder_goes_to_the_hub(family_folder, tmp_path):
    """The command, its own client, and a server that keeps what it is sent."""
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    with FakeHub() as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "mmembed", "export", str(path), "--to", "sentence-transformers"]
        command += ["--output", str(tmp_path / "out"), "--push-to-hub", "me/model", "--private"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"{hub.url}/me/model"
    assert (hub.created["organization"], hub.created["name"]) == ("me", "model")
    assert hub.created.get("private") is True or hub.created.get("visibility") == "private", "as the client says it"
    assert hub.token == "Bearer hf_secret"
    written = {str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert hub.files.keys() == written
    for name, content in hub.files.items():
        assert content == (tmp_path / "out" / name).read_bytes(), name


def test_a_hub_that_refuses(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    with FakeHub(refuses=True) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"}
        environment.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "mmembed", "export", str(path), "--to", "merged"]
        command += ["--output", str(tmp_path / "out"), "--push-to-hub", "me/model"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2 and "--push-to-hub me/model: " in done.stderr and "hf auth login" in done.stderr
    assert (tmp_path / "out/mmembed.json").exists(), "the folder stays"
