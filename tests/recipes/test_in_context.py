"""An in-context reranker through the real command and API, on a tiny vision-language model, with pictures."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmembed import Reranker
from mmembed.config import load_config
from mmembed.config.blocks import RerankerConfig
from mmembed.errors import ConfigError, MmembedError
from mmembed.generation.orders import read_order
from mmembed.inference.answering import completed
from recipes import train_embedder
from recipes.train_reranker import main
from tests.runs import losses


@pytest.fixture
def config_file(tmp_path, backbone, data):
    """Lists of two documents; every third positive has a picture."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {{name_or_path: {backbone}, dtype: float32}}
head: {{type: attention, layer: 2, offset: 512}}
prompt: in_context
adapter: {{type: lora, r: 8, alpha: 16, dropout: 0.0}}
lengths: {{query_max_length: 100, document_max_length: 100}}
objective: [{{type: answer}}, {{type: ranking, loss: infonce, temperature: 0.05}}]
data:
  root: {data}
  train_group_size: 2
  train: [{{path: mixed.jsonl}}]
  dev: [{{path: dev.jsonl, name: dev}}]
training:
  output_dir: {tmp_path / "out"}
  per_device_train_batch_size: 4
  max_steps: 4
  learning_rate: 1e-2
  warmup_steps: 0
  logging_steps: 1
  save_strategy: "no"
  token_budget: 4096
  disable_tqdm: true
"""
    )
    return path


def run(config_file, *overrides):
    assert main(["--config", str(config_file), *overrides]) == 0


def test_main_job(config_file, tmp_path, data, capsys):
    run(config_file, "training.max_steps=16", "training.eval_strategy=steps", "training.eval_steps=8")
    out = tmp_path / "out"
    assert "each query with its own documents" in capsys.readouterr().out
    found = losses(out)
    assert len(found) == 16 and np.mean(found[-4:]) < np.mean(found[:4])
    final = json.loads((out / "metrics.json").read_text())
    assert 0.5 <= final["final_dev_ndcg_at_10"] <= 1
    described = json.loads((out / "mmembed.json").read_text())["settings"]
    assert described["head"] == {"type": "attention", "layer": 2, "offset": 512}

    reranker = Reranker.from_pretrained(out, dtype="float32", device="cpu")
    records = [json.loads(line) for line in (data / "mixed.jsonl").read_text().splitlines()[:6]]

    def there(content):
        parts = content if isinstance(content, list) else [content]
        return [{"image": str(data / part["image"])} if isinstance(part, dict) else part for part in parts]

    documents = [there(document["content"]) for one in records for document in one["documents"]]
    query, other = records[0]["query"], records[1]["query"]
    shares = reranker.score([(query, one) for one in documents])
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    ranked = reranker.rank(query, documents, top_k=3)
    assert [one.index for one in ranked] == np.argsort(-shares, kind="stable")[:3].tolist()
    logits = reranker.score([(query, one) for one in documents], scale="logit")
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), shares, atol=1e-6)

    mixed = [pair for one in documents for pair in ((query, one), (other, one))]  # two lists, one within the other
    both = reranker.score(mixed)
    np.testing.assert_allclose(both[::2], shares, atol=1e-6)
    assert both[1::2].sum() == pytest.approx(1, abs=1e-5) and not np.allclose(both[1::2], shares)
    told = reranker.score([({"text": query, "instruction": "Other"}, one) for one in documents])
    assert not np.allclose(told, shares)

    order = reranker.answer(query, documents)
    assert sorted(order) == list(range(len(documents)))
    with pytest.raises(MmembedError, match="query: an in-context reranker"):
        reranker.score(
            [({"image": str(data / "bus.png")}, "text")] if (data / "bus.png").exists() else [(documents[0], "a")]
        )


def test_a_stopped_run_goes_on_as_if_it_had_not_been(config_file, tmp_path, stop_in_step):
    run(config_file, f"training.output_dir={tmp_path / 'whole'}")
    stop_in_step(3)
    assert main(["--config", str(config_file)]) == train_embedder.TRY_AGAIN
    run(config_file)
    ours, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt=judge"], "the head reads a list of documents.*take prompt in_context"),
        (["head=linear"], "the prompt writes a list of documents.*take head attention"),
        (["head={type: attention, layer: 7}"], "layer 7 of a backbone with 2"),
        (["head={type: attention, offset: 100000}"], "knows positions below"),
        (["head={type: attention, layers: 2}"], "did you mean 'layer'"),
        (["prompt={type: in_context, chat: false, system: x}"], "a system turn is a chat's"),
        (["model.attention=bidirectional", "objective=ranking"], "cannot read lists"),
    ],
)
def test_refusals(config_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        train_embedder.train(load_config(config_file, overrides, RerankerConfig))


def test_an_answer_needs_a_list(config_file):
    overrides = ["prompt=judge", "head={type: yes_no, words: [a, b]}"]
    with pytest.raises(ConfigError, match="goes with head attention"):
        train_embedder.train(load_config(config_file, overrides, RerankerConfig))


@pytest.mark.parametrize(
    ("text", "order"),
    [("3, 1", [2, 0, 1, 3]), ("[2] > [2] > [9]", [1, 3, 2, 0]), ("none", [1, 3, 2, 0]), ("0, 4, 1", [3, 0, 1, 2])],
)
def test_what_an_answer_leaves_out_follows_by_its_share(text, order):
    assert completed(read_order(text, 4), [0.1, 0.4, 0.2, 0.3]) == order
