"""A tiny vision-language backbone and a little data, shared by the recipe tests."""

import json
import os
import random
import signal

import pytest
from families import picture

WORDS = ("red", "blue", "bus", "train", "river", "bread", "engine", "letter", "forest", "tower", "bridge", "dog", "cup")


@pytest.fixture(scope="session")
def backbone(family_folder):
    """Folder of a tiny Qwen3-VL."""
    return family_folder("qwen3_vl")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder with `text.jsonl` (a hard negative each), `pictures.jsonl`, `mixed.jsonl` (every
    third positive has one), `dev.jsonl`, `sts.jsonl`."""
    folder = tmp_path_factory.mktemp("data")
    generator = random.Random(0)

    def sentence():
        return " ".join(generator.choices(WORDS, k=generator.randint(2, 14)))

    def text_record(index):
        return {
            "query": f"{sentence()} {index}",
            "documents": [
                {"content": f"{sentence()} {index} d"},
                {"content": f"{sentence()} {index} n", "relevance": 0},
            ],
        }

    def picture_record(index):
        picture(index, 60 + 7 * index, 60).save(folder / f"{index}.png")
        return {"query": f"{sentence()} {index}", "documents": [{"content": {"image": f"{index}.png"}}]}

    def mixed_record(index):
        record = text_record(index)
        if index % 3 == 0:
            record["documents"][0]["content"] = [{"image": f"{index % 10}.png"}, f"{sentence()} {index}"]
        return record

    files = {
        "text": [text_record(index) for index in range(40)],
        "pictures": [picture_record(index) for index in range(10)],
        "mixed": [mixed_record(index) for index in range(40)],
        "dev": [text_record(index) for index in range(100, 108)],
        "sts": [
            {"query": sentence(), "documents": [{"content": sentence(), "relevance": index / 8}], "task": "sts"}
            for index in range(8)
        ],
    }
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return folder


def write_reranker_config(path, backbone, data, output):
    """Four steps of 4 queries with two documents each; every third positive has a picture."""
    path.write_text(
        f"""
model: {{name_or_path: {backbone}, dtype: float32}}
head: {{type: yes_no, words: [a, b]}}
prompt: {{type: judge, words: [a, b]}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.0}}
lengths: {{query_max_length: 200, document_max_length: 100}}
objective: sft
data:
  root: {data}
  train_group_size: 2
  train: [{{path: mixed.jsonl}}]
  dev: [{{path: dev.jsonl, name: dev}}]
training:
  output_dir: {output}
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


@pytest.fixture(scope="session")
def reranker(tmp_path_factory, backbone, data):
    """Folder of a reranker trained for a few steps."""
    from recipes.train_reranker import main

    folder = tmp_path_factory.mktemp("reranker")
    config = write_reranker_config(folder / "run.yaml", backbone, data, folder / "out")
    assert main(["--config", str(config)]) == 0
    return folder / "out"


@pytest.fixture
def config_file(tmp_path, backbone, data):
    """A small run: four steps of 8 queries."""
    path = tmp_path / "run.yaml"
    path.write_text(
        f"""
model: {{name_or_path: {backbone}, dtype: float32}}
adapter: {{type: lora, r: 4, alpha: 8, dropout: 0.1}}
data:
  root: {data}
  train_group_size: 2
  train: [{{path: text.jsonl}}, {{path: pictures.jsonl}}]
  dev: [{{path: dev.jsonl, name: dev}}]
objective: {{type: contrastive, temperature: {{value: 0.1, learn: true}}}}
training:
  output_dir: {tmp_path / "out"}
  per_device_train_batch_size: 8
  max_steps: 4
  learning_rate: 1e-2
  logging_steps: 1
  save_strategy: "no"
  token_budget: 256
  disable_tqdm: true
"""
    )
    return path


@pytest.fixture
def stop_in_step(monkeypatch):
    """stop_in_step(n): SIGTERM reaches this process while step n is computed, once."""

    from mmembed.training.trainer import EmbedderTrainer

    def stop(*numbers, number=signal.SIGTERM):
        left, step = list(numbers), EmbedderTrainer.training_step

        def stopped(self, *arguments, **options):
            if left and self.state.global_step + 1 == left[0]:
                left.pop(0)
                os.kill(os.getpid(), number)
            return step(self, *arguments, **options)

        monkeypatch.setattr(EmbedderTrainer, "training_step", stopped)

    return stop
