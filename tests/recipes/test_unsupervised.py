"""Training on raw documents by the real command: every maker learns, a stop changes nothing, the plan is the run's."""

import json
import random

import pytest
import torch

from mmembed.cli import main as mmembed
from mmembed.config import load_config
from mmembed.content import Text
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.errors import ConfigError
from recipes.train_embedder import main
from tests.recipes.conftest import WORDS
from tests.recipes.test_configs import ROOT
from tests.recipes.test_resume import assert_same_outcome, command
from tests.runs import build_trainer, in_two_processes, losses

COUNTS = {"representative_words": ", min_count: 1"}
MAKERS = {name: f"{{type: {name}{COUNTS.get(name, '')}}}" for name in PAIR_MAKERS.classes()}


@pytest.fixture
def documents(tmp_path):
    """24 paragraphs of three sentences, and a line that is too short for most makers."""
    generator = random.Random(0)

    def sentence():
        return " ".join(generator.choices(WORDS, k=6)).capitalize() + "."

    path = tmp_path / "documents.jsonl"
    texts = [f"{sentence()} {sentence()} {sentence()}" for _ in range(24)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return path


def source(documents, pairs, **options):
    more = "".join(f", {key}: {value}" for key, value in options.items())
    return f"data.train=[{{path: {documents}, pairs: {pairs}{more}}}]"


@pytest.mark.parametrize("maker", MAKERS)
def test_a_run_on_raw_documents(config_file, documents, tmp_path, capsys, maker):
    assert main(["--config", str(config_file), source(documents, MAKERS[maker])]) == 0
    report = capsys.readouterr().out
    assert f"{documents}: 24 documents (retrieval), 3 of 3 batches an epoch, in-batch negatives on" in report
    assert f"pairs by {maker}, drawn anew" in report
    bags = maker == "representative_words"  # short ones, of few words: some are equal, and ties have no negative
    pictured = 8 if maker == "rendered_text" else 0
    assert bags or f"16 distinct inputs ({pictured} with images)" in report
    assert ("): 0.0 hard negatives a query" in report) is not bags
    log = [
        entry
        for entry in json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]
    assert len(log) == 4 and all(0 < entry["loss"] < 20 and entry["grad_norm"] > 0 for entry in log)
    assert bags or all(entry["masked_duplicate"] == entry["masked_known_positive"] == 0 for entry in log)


def test_the_likelier_words_come_with_a_hard_negative(config_file, documents):
    trainer = build_trainer(load_config(config_file, [source(documents, MAKERS["representative_words"])]))
    batch = trainer.collator([trainer.train_dataset[draw] for draw in next(iter(trainer.plan))])
    assert batch.n_queries == 8
    assert batch.labels.relevance.sum() == 8 and batch.n_documents > 12  # ties have none


@pytest.mark.parametrize("share_prefix", ["auto", "off"])
@pytest.mark.parametrize("budget", [64, 4096])
def test_a_dropout_pair_is_two_encodings(config_file, documents, share_prefix, budget):
    """Two inputs, no beginning of which is computed once, although a batch of four pairs would have them share theirs;
    other vectors in training, the same in evaluation; and the positive counts."""
    overrides = [f"training.share_prefix={share_prefix}", f"training.token_budget={budget}", "adapter.dropout=0.3"]
    overrides.append("training.per_device_train_batch_size=4")
    config = load_config(config_file, [source(documents, "dropout"), *overrides])
    trainer = build_trainer(config)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    batch = trainer.collator([trainer.train_dataset[draw] for draw in next(iter(trainer.plan))])
    assert len(set(batch.place.tolist())) == 8 and batch.saved_tokens == 0
    assert torch.equal(batch.labels.query_keys, batch.labels.document_keys[:, 0])

    def sides(training):
        trainer.model.train(training)
        torch.manual_seed(0)
        vectors = torch.zeros(8, 64)
        with torch.no_grad():
            for chunk in batch.chunks:
                vectors[chunk.index] = trainer._encode(trainer.model, chunk).vectors
        return vectors[batch.place].split(4)

    queries, positives = sides(training=True)
    assert ((queries - positives).norm(dim=1) > 0.05 * queries.norm(dim=1)).all()
    torch.testing.assert_close(*sides(training=False), atol=1e-4, rtol=1e-4)
    similarities = torch.nn.functional.cosine_similarity(queries[:, None], positives[None], dim=-1) / 0.1
    expected = torch.nn.functional.cross_entropy(similarities, torch.arange(4))  # no column is masked
    from mmembed.embeddings import Embeddings

    objective = trainer.model.objective
    loss, _ = objective(Embeddings(queries), Embeddings(positives), batch.labels)
    torch.testing.assert_close(loss, expected)


def test_other_sources_share_their_prefixes_beside_it(config_file, documents, data):
    """Only what differs by dropout is encoded apart."""
    prompt = "prompt={type: plain, query_prefix: 'Find the one that fits: ', document_prefix: 'The one that fits is: '}"
    crops, drop = (f"{{path: {documents}, name: {name}, pairs: {name}}}" for name in ("random_crops", "dropout"))
    trainer = build_trainer(load_config(config_file, [f"data.train=[{crops}, {drop}]", prompt]))
    saved = {"random_crops": 0, "dropout": 0}
    for draws in trainer.plan:
        batch = trainer.collator([trainer.train_dataset[draw] for draw in draws])
        saved[batch.labels.source] += batch.saved_tokens
    assert saved["random_crops"] > 0 == saved["dropout"]


NO_DROPOUT = "pairs 'dropout' are a text and itself, and nothing in this model drops values"


@pytest.mark.parametrize("adapter", ["adapter.dropout=0.0", "adapter={type: none}", "adapter={type: prefix}"])
def test_dropout_pairs_need_dropout(config_file, documents, capsys, monkeypatch, adapter):
    """Said before data or weights are read, by the plan as well; and once more of the model that is trained."""

    def read(*arguments, **options):
        raise AssertionError("data was read")

    overrides = [source(documents, "dropout"), adapter]
    trainer_of = load_config(config_file, overrides)
    with monkeypatch.context() as patched:
        patched.setattr("mmembed.data.dataset.RecordDataset", read)
        assert main(["--config", str(config_file), *overrides]) == 2
        assert NO_DROPOUT in capsys.readouterr().err
        assert mmembed(["plan", "--config", str(config_file), *overrides]) == 2
        assert NO_DROPOUT in capsys.readouterr().err
    with pytest.raises(ConfigError, match=NO_DROPOUT):
        build_trainer(trainer_of)


def test_dropout_of_the_backbone_will_do_and_that_of_its_eyes_will_not(config_file, backbone, documents, tmp_path):
    import shutil

    for part, refused in (("text_config", False), ("vision_config", True)):
        folder = tmp_path / part
        shutil.copytree(backbone, folder)
        config = json.loads((folder / "config.json").read_text())
        config[part] |= {"attention_dropout": 0.1}
        (folder / "config.json").write_text(json.dumps(config))
        overrides = [f"model.name_or_path={folder}", "adapter={type: none}", source(documents, "dropout")]
        config = load_config(config_file, overrides)
        if refused:
            with pytest.raises(ConfigError, match=NO_DROPOUT):
                build_trainer(config)
        else:
            build_trainer(config)


@pytest.mark.parametrize(
    ("maker", "options", "overrides"),
    [
        ("random_crops", {}, ["training.dataloader_num_workers=2"]),
        ("representative_words", {}, []),
        ("dropout", {"streaming": "true", "shuffle_buffer": 5}, ["training.dataloader_num_workers=1"]),
        ("rendered_text", {"streaming": "true", "shuffle_buffer": 5}, []),
    ],
)
def test_a_stop_changes_nothing(config_file, documents, tmp_path, stop_in_step, maker, options, overrides):
    """Over the border of an epoch: what is drawn at a visit does not depend on when it was begun."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train = [source(documents, MAKERS[maker], **options), "data.dev=[]", "training.max_steps=5", *overrides]
    train.append("training.save_strategy=steps")
    assert main(command(config_file, whole, *train)) == 0
    stop_in_step(2, 4)
    assert [main(command(config_file, stopped, *train)) for _ in range(3)] == [75, 75, 0]
    assert_same_outcome(whole, stopped)


def test_two_processes_draw_what_one_does(config_file, documents, tmp_path):
    train = [source(documents, "random_crops"), "data.dev=[]", "adapter.dropout=0.0"]
    assert main(command(config_file, tmp_path / "one", *train)) == 0
    shares = [*train, "training.per_device_train_batch_size=4"]
    in_two_processes("recipes.train_embedder", *command(config_file, tmp_path / "two", *shares))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)


def test_other_pairs_are_another_run(config_file, documents, tmp_path, capsys):
    saved = ["training.save_strategy=steps", "training.save_steps=2", "data.dev=[]", "training.max_steps=2"]
    assert main(command(config_file, tmp_path / "out", source(documents, "random_crops"), *saved)) == 0
    other = source(documents, "{type: random_crops, delete: 0.2}")
    assert main(command(config_file, tmp_path / "out", other, *saved)) == 2
    assert "data.train.0.pairs" in capsys.readouterr().err


@pytest.mark.parametrize("maker", ["random_crops", "rendered_text", "dropout"])
def test_the_plan_is_the_runs(config_file, documents, capsys, maker):
    options = [source(documents, MAKERS[maker]), "data.dev=[]"]
    assert mmembed(["plan", "--config", str(config_file), "--sample", "99", *options, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    trainer = build_trainer(load_config(config_file, options))
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in trainer.plan]
    assert plan["tokens"] == pytest.approx(sum(batch.tokens for batch in batches) / len(batches))
    assert (plan["visual_tokens"] > 0) == (maker == "rendered_text")
    assert (plan["unshared"] is not None) == (maker == "dropout")


def test_kept_features_of_pictures_that_never_come_again_are_refused(config_file, documents, capsys):
    overrides = [source(documents, "rendered_text"), "training.vision_cache=auto"]
    assert main(["--config", str(config_file), *overrides]) == 2
    assert "'rendered_text' + training.vision_cache: its pictures are drawn anew each time" in capsys.readouterr().err


def test_a_text_backbone_cannot_read_pictures(config_file, documents, family_folder, capsys):
    overrides = [source(documents, "rendered_text"), f"model.name_or_path={family_folder('qwen3')}"]
    assert main(["--config", str(config_file), *overrides]) == 2
    assert "carries 'image', which this text backbone cannot read" in capsys.readouterr().err


def test_words_need_room_for_the_negative(config_file, documents, capsys):
    overrides = [source(documents, MAKERS["representative_words"]), "data.train_group_size=1"]
    assert main(["--config", str(config_file), *overrides]) == 2
    assert "carries 'negatives', which data.train_group_size leaves no room for" in capsys.readouterr().err
    assert main(["--config", str(config_file), *overrides, "data.ignore_fields=[negatives]"]) == 0


def test_the_shipped_run_finds_its_pairs(tmp_path, monkeypatch):
    """Two steps of the packaged config on the tiny data that it names."""
    monkeypatch.chdir(ROOT)
    overrides = ["training.max_steps=2", f"training.output_dir={tmp_path / 'out'}", "data.dev=[]"]
    config = ROOT / "recipes" / "configs" / "embedder" / "unsupervised.yaml"
    assert main(["--config", str(config), *overrides, "training.per_device_train_batch_size=8"]) == 0
    assert all(loss > 0 for loss in losses(tmp_path / "out"))


def test_crops_of_one_document_are_one_document(config_file, documents, tmp_path):
    """Twice in one batch (a stream's pass ends there): they are no negatives of each other."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(documents.read_text().splitlines()[:9]) + "\n")
    streamed = source(few, "random_crops", streaming="true")
    trainer = build_trainer(load_config(config_file, [streamed, "data.dev=[]"]))
    batches = [trainer.collator([trainer.train_dataset[draw] for draw in draws]) for draws in trainer.plan]
    twice = [batch for batch in batches if len(set(batch.labels.document_keys[:, 1].tolist())) < 8]
    assert twice
    labels = twice[0].labels
    contents, ids = labels.document_keys.T.tolist()
    assert len(set(contents)) == 8 > len(set(ids))
    from mmembed.objectives.relations import Relations

    relations = Relations.gather(labels, False)
    _, valid = relations.matrix(slice(None), slice(None), True)
    for row in range(8):
        for column in range(8):
            assert bool(valid[row, column]) == (row == column or ids[row] != ids[column])


def test_an_example_of_each_side_is_a_text(config_file, documents):
    trainer = build_trainer(load_config(config_file, [source(documents, "random_crops"), "data.dev=[]"]))
    example = trainer.train_dataset[next(iter(trainer.plan))[0]]
    assert all(isinstance(part, Text) for part in (*example.query, *example.documents[0].content))
