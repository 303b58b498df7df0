"""A guide that is another embedder: its vectors are those it gives itself, found by data workers, kept in the cache."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from test_resume import command

from mmembed.config import load_config
from mmembed.errors import MmembedError
from mmembed.inference.embedder import Embedder
from mmembed.objectives import build_objective
from mmembed.plan import plan_run
from mmembed.preprocess import Item
from mmembed.training.guide_vectors import guide_of
from recipes.train_embedder import main
from tests.runs import build_trainer, losses

GUIDED = "objective={type: infonce, guide: {model: mmembed-nano, margin: 0.02}}"
BOTH = ["data.train=[{path: text.jsonl, instruction: find it}, {path: pictures.jsonl}]", "data.dev=[]"]
SETTINGS = [GUIDED, *BOTH, "prompt=instruct"]


def test_each_input_has_the_vector_that_the_guide_gives_it(config_file):
    trainer = build_trainer(load_config(config_file, SETTINGS))
    assert "guide of text.jsonl: mmembed-nano" in str(trainer.report())
    embedder = Embedder.from_pretrained("mmembed-nano", device="cpu", dtype="float32", media=trainer.preprocessor.media)
    for source in (0, 1):
        draws = [(source, row, 0) for row in range(6)]
        examples = [trainer.train_dataset[draw] for draw in draws]
        queries, documents = pickle.loads(pickle.dumps(trainer.collator))(examples).labels.guide
        contents = [document.content for example in examples for document in example.documents]
        own = embedder.encode([one.query for one in examples], role="query", instruction=examples[0].instruction)
        assert torch.cosine_similarity(queries, torch.tensor(own)).min() > 0.999
        assert torch.cosine_similarity(documents, torch.tensor(embedder.encode(contents))).min() > 0.999
    other = Item(examples[0].query, "query", "another instruction")
    with pytest.raises(MmembedError, match="an input of source 'pictures.jsonl' has no vector"):
        trainer.collator.guides["pictures.jsonl"]([other])


def test_a_guided_run_logs_what_is_masked_and_encodes_once(config_file, tmp_path, monkeypatch):
    workers = "training.dataloader_num_workers=1"
    assert main(command(config_file, tmp_path / "guided", *SETTINGS)) == 0
    history = json.loads((tmp_path / "guided" / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("masked_guide", 0) for entry in history) > 0
    monkeypatch.setattr("mmembed.training.guide_vectors.encode_all", None)  # the cache has it
    assert main(command(config_file, tmp_path / "again", *SETTINGS, workers)) == 0
    assert losses(tmp_path / "guided") == losses(tmp_path / "again")
    plain = SETTINGS[0].replace(", guide: {model: mmembed-nano, margin: 0.02}", "")
    assert main(command(config_file, tmp_path / "plain", plain, *SETTINGS[1:])) == 0
    assert not np.allclose(losses(tmp_path / "guided"), losses(tmp_path / "plain"))


def test_a_plan_measures_the_comparison_with_the_guide(config_file):
    config = load_config(config_file, SETTINGS)
    assert guide_of(build_objective(config.objective)) == "mmembed-nano"
    assert plan_run(config, sample=1).steps == 4
