"""`mmembed verify` and `mmembed export` as commands."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmembed.cli import main
from mmembed.export import export
from mmembed.export.comparison import compare_all
from mmembed.export.subject import load_subject
from tests.export.making import JUDGE, save

pytest.importorskip("sentence_transformers")


def test_the_nano_and_runtimes_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mmembed.export.comparison.find_vllm", lambda: None)
    path = save(tmp_path / "saved", "mmembed-nano", pooling="last_token", prompt="instruct")
    assert main(["verify", str(path), "--json"]) == 0
    rows = {row["runtime"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["recorded", "reloaded", "merged", "sentence-transformers", "vllm", "vllm-server"]
    assert rows["sentence-transformers"]["difference"] < 1e-5 and rows["sentence-transformers"]["inputs"] > 40
    assert rows["vllm"]["note"].startswith("left out: there is no environment with vLLM")
    assert main(["verify", str(path), "--runtimes", "vllm"]) == 2
    assert "--runtimes vllm: there is no environment with vLLM; run `make vllm-env`" in capsys.readouterr().err


def test_a_reranker_whose_refusal_is_a_line(family_folder, tmp_path, capsys):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="multi_vector")
    assert main(["verify", str(path), "--runtimes", "sentence-transformers"]) == 0
    assert "refused: pooling 'multi_vector'" in capsys.readouterr().out
    path = save(tmp_path / "judge", family_folder("qwen3"), **JUDGE)
    assert main(["verify", str(path), "--runtimes", "sentence-transformers"]) == 0
    assert "refused" not in capsys.readouterr().out


def test_a_runtime_that_differs_ends_with_an_error(family_folder, tmp_path, capsys, monkeypatch):
    """A folder whose weights are another model's: the adapter's effect is lost on the way."""

    def spoilt(subject, target, folder, overwrite=False):
        export(subject, target, folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("layers.0.self_attn.v_proj.weight"))
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr("mmembed.export.comparison.export", spoilt)
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    assert main(["verify", str(path), "--runtimes", "sentence-transformers"]) == 2
    assert "sentence-transformers differs by" in (error := capsys.readouterr().err) and "do not serve it" in error


def test_export_by_command(family_folder, tmp_path, capsys):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token", prompt="instruct")
    out = ["--output", str(tmp_path / "out")]
    told = ["--query-instruction", "Find.", "--dims", "32", "16"]
    assert main(["export", str(path), "--to", "vllm", *out, *told]) == 0
    assert "for vllm, float32, lora merged; see README.md" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out/mmembed_export.json").read_text())
    assert manifest["target"] == "vllm" and manifest["serve"] == ["--runner", "pooling", "--convert", "embed"]
    assert manifest["instructions"] == {"query": "Find."} and manifest["matryoshka_dimensions"] == [32, 16]
    assert main(["export", str(path), "--to", "vllm", *out]) == 2
    assert "exists; give another --output, or --overwrite" in capsys.readouterr().err
    assert main(["export", str(path), "--to", "merged", *out, "--overwrite"]) == 0
    assert json.loads((tmp_path / "out/mmembed_export.json").read_text())["target"] == "merged"
    assert not (tmp_path / "out/modules.json").exists(), "the old folder is gone"


@pytest.mark.parametrize(
    ("further", "reason"),
    [
        (["--private"], "--private: no effect without --push-to-hub"),
        (["--push-to-hub", "name"], "--push-to-hub: found 'name'; give OWNER/NAME"),
        (["--metrics", "{missing}"], "is no results file of eval.run"),
        (["--dims", "0"], "--dims 0: a vector of this model has 64 dimensions"),
    ],
)
def test_options_without_sense(further, reason, family_folder, tmp_path, capsys):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    further = [one.format(missing=tmp_path / "missing.json") for one in further]
    assert main(["export", str(path), "--to", "vllm", "--output", str(tmp_path / "out"), *further]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_checkpoint_whose_backbone_is_gone(family_folder, tmp_path, capsys):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    described = json.loads((path / "mmembed.json").read_text())
    described["settings"]["name_or_path"] = str(tmp_path / "gone")
    (path / "mmembed.json").write_text(json.dumps(described))
    assert main(["export", str(path), "--to", "vllm", "--output", str(tmp_path / "out")]) == 2
    assert "its backbone cannot be loaded" in (error := capsys.readouterr().err) and "gone" in error


def test_prompt_tuning_is_refused_everywhere(family_folder, tmp_path):
    adapter = {"type": "prompt", "num_virtual_tokens": 4}
    path = save(tmp_path / "saved", family_folder("qwen3"), adapter=adapter, pooling="last_token")
    rows = compare_all(load_subject(str(path), merge=False), ["sentence-transformers"])
    assert all(row.note.startswith("refused: adapter 'prompt'") for row in rows) and len(rows) == 2
