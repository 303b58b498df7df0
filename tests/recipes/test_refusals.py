"""What the training command refuses, and how early: with key and remedy, before what would take hours."""

import re
import sys

import pytest

from mmembed.cli import main as plan
from recipes.train_embedder import main


def refused(config_file, capsys, overrides):
    """The error of a run, and what it printed before."""
    assert main(["--config", str(config_file), *overrides]) == 2
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return found.err


@pytest.fixture
def no_model(monkeypatch):
    """Loading weights fails the test."""

    def load(*arguments, **options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("mmembed.models.continuing.build_for_training", load)


@pytest.fixture
def no_data(monkeypatch):
    """Reading data fails the test."""

    def read(*arguments, **options):
        raise AssertionError("data was read")

    import mmembed.data.streaming  # noqa: F401  declares a type of the class, before that is replaced

    monkeypatch.setattr("mmembed.data.dataset.RecordDataset", read)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rates={vision: 1e-5}"], "training.learning_rates.vision: model.freeze [audio, vision]"),
        (
            ["training.learning_rates={objective: 1e-3}", "objective=contrastive"],
            "training.learning_rates.objective: this run trains no parameter",
        ),
        (["objective.temperatur=0.1"], "contrastive: unknown option 'temperatur'; did you mean 'temperature'?"),
        (["objective.symmetric='no'"], "contrastive.symmetric: found 'no'"),
        (["pooling=latent"], "pooling: there is no 'latent'; did you mean 'latent_attention'?"),
        (["prompt={type: instruct, templat: x}"], "instruct: unknown option 'templat'; did you mean 'template'?"),
        (["data.train.0.format=jsonlines"], "data source 'text.jsonl': formats: there is no 'jsonlines'"),
        (["data.dev.0.options={splt: dev}"], "data source 'dev': formats.jsonl: unknown option 'splt'"),
        (["adapter.target_modules=[q_pro]"], "no layer outside frozen towers ends in 'q_pro'; did you mean 'q_proj'?"),
        (
            ["objective.matryoshka={dims: [4096]}"],
            "objective 'contrastive'.matryoshka.dims: 4096 is above the embedding size 64",
        ),
        (
            ["objective={type: infonce, matryoshka: {layers: [7, -1]}}"],
            "objective 'infonce'.matryoshka.layers: found 7; the decoder has 2 layers",
        ),
        (
            ["objective=[infonce, {type: infonce, layer: 3}]"],
            "objective[1].layer: found 3; the decoder has 2 layers",
        ),
        (["data.train=[]"], "data.train: there is no source"),
        (["model.attn_implementation=foo"], "model.attn_implementation: there is no 'foo'; known: eager, "),
        (["model.attn_implementation=spda"], "model.attn_implementation: there is no 'spda'; did you mean 'sdpa'?"),
        (
            ["training.lr_scheduler_kwargs={num_cycle: 1}", "training.lr_scheduler_type=cosine"],
            "training.lr_scheduler_kwargs: lr_scheduler_type 'cosine' takes no 'num_cycle'; did you mean 'num_cycles'?",
        ),
        (["training.lr_scheduler_kwargs={foo: 1}"], "'linear' takes no 'foo'; it takes none: remove"),
        (["training.lr_scheduler_kwargs=[1]"], "training.lr_scheduler_kwargs: found [1]; give"),
        (["training.lr_scheduler_type=warmup_stable_decay"], "num_decay_steps"),
        (
            [
                "training.lr_scheduler_type=greedy",
                "training.lr_scheduler_kwargs={patiense: 1}",
                "training.eval_strategy=steps",
            ],
            "takes no 'patiense'; did you mean 'patience'?",
        ),
        (["training.deepspeed=nope.json"], "training.deepspeed: there is no file 'nope.json'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_before_data_is_read(config_file, capsys, no_data, overrides, message):
    """By the run and by its plan."""
    assert message in refused(config_file, capsys, overrides)
    assert plan(["plan", "--config", str(config_file), *overrides]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flash_attention_2", "'flash_attention_2' needs FlashAttention 2, which is not installed"),
        ("kernels-community/flash-attn2", "needs the package kernels, which is not installed"),
    ],
)
def test_attention_whose_package_is_not_there(config_file, capsys, no_data, monkeypatch, name, message):
    absent = {"pkg_availability_check": lambda: False}
    matrix = "transformers.modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX"
    monkeypatch.setattr(matrix, {2: absent})
    monkeypatch.setattr("transformers.utils.import_utils.is_kernels_available", lambda: False)
    error = refused(config_file, capsys, [f"model.attn_implementation={name}"])
    assert f"model.attn_implementation: {message}" in error.replace(f"'{name}' is a kernel of the hub and ", "")


def test_attention_that_cannot_be_loaded_is_named(config_file, capsys, monkeypatch):
    """What only shows while the model is made: its support, a kernel of the hub, a missing device."""

    def fail(*arguments, **options):
        raise ImportError("FlashAttention2 has been toggled on, but it cannot be used")

    monkeypatch.setattr("mmembed.training.preflight._check_attention", lambda name: None)
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", fail)
    error = refused(config_file, capsys, ["model.attn_implementation=flash_attention_2"])
    assert "model.attn_implementation: cannot load" in error and "with 'flash_attention_2' (FlashAttention2" in error


def test_a_chat_prompt_without_a_template_before_data_is_read(config_file, capsys, no_data, family_folder):
    overrides = [f"model.name_or_path={family_folder('paligemma')}", "prompt=one_word"]
    assert "prompt: the style 'one_word' writes a chat" in refused(config_file, capsys, overrides)


@pytest.mark.parametrize(
    ("family", "override", "message"),
    [
        ("gemma3", "adapter={type: prefix}", "adapter.type 'prefix': 'gemma3' lets tokens attend by type"),
        ("paligemma", "adapter={type: prefix}", "adapter.type 'prefix': 'paligemma' lets tokens attend by type"),
        ("smolvlm", "lengths={max_pixels: 50176}", "lengths.max_pixels: 'smolvlm' has no free image size"),
        ("qwen3", "lengths={min_pixels: 3136}", "'qwen3' has no free image size"),
    ],
)
def test_what_a_backbone_cannot_have_before_data_is_read(
    config_file, capsys, no_data, family_folder, family, override, message
):
    assert message in refused(config_file, capsys, [f"model.name_or_path={family_folder(family)}", override])


def test_a_frozen_tower_that_is_not_there_before_data_is_read(config_file, capsys, no_data, monkeypatch):
    """A vision-language model of a family whose towers no file names."""
    monkeypatch.setattr("mmembed.backbones.qwen_vl.QwenVL.vision_modules", "eyes")
    error = refused(config_file, capsys, ["adapter={type: none}"])
    assert "model.freeze: 'vision' matches no parameter of 'qwen3_vl'" in error


def test_pictures_for_a_text_backbone_before_weights_are_loaded(config_file, capsys, no_model, family_folder):
    overrides = [f"model.name_or_path={family_folder('qwen3')}"]
    error = refused(config_file, capsys, overrides)
    assert "data source 'pictures.jsonl' carries 'image', which this text backbone cannot read" in error
    error = refused(config_file, capsys, [*overrides, "data.ignore_fields=[image]"])
    assert "pictures.jsonl:1: documents[0] holds nothing but image, which data.ignore_fields leaves out" in error


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter={type: qlora}", "model.dtype=bfloat16"],
            "adapter.type 'qlora': needs bitsandbytes, .* pip install 'mmembed\\[quant\\]'",
        ),
        (["training.optimizer=adamw_8bit"], "optimizer 'adamw_8bit': needs bitsandbytes"),
        (["training.optim=paged_adamw_32bit"], "optimizer 'paged_adamw_32bit': needs bitsandbytes"),
        (["training.report_to=wandb"], "training.report_to: 'wandb' is not installed"),
        (["training.report_to=[tensorboard, wand]"], "training.report_to: there is no 'wand'; did you mean 'wandb'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_libraries_that_are_not_there_before_data_is_read(
    config_file, capsys, no_data, monkeypatch, overrides, message
):
    for name in ("bitsandbytes", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert re.search(message, refused(config_file, capsys, overrides))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            "eval_ndcg_10",
            "training.metric_for_best_model: dev evaluation gives no 'ndcg_10'; did you mean 'ndcg_at_10'",
        ),
        ("spearman", "training.metric_for_best_model: dev evaluation gives no 'spearman'"),
        ("eval_seconds", "known: dev_ndcg_at_10, dev_recall_at_10, ndcg_at_10, recall_at_10"),
    ],
)
def test_an_unknown_metric_before_weights_are_loaded(config_file, capsys, no_model, metric, message):
    overrides = ["training.eval_strategy=steps", "training.early_stopping_patience=2"]
    assert message in refused(config_file, capsys, [*overrides, f"training.metric_for_best_model={metric}"])


@pytest.mark.parametrize("tower", ["projector", "pooling"])
def test_a_rate_of_a_tower_without_trained_weights(config_file, capsys, tower):
    error = refused(config_file, capsys, [f"training.learning_rates={{{tower}: 1e-3}}"])
    assert f"training.learning_rates.{tower}: this run trains no parameter" in error
    assert "trained: language, objective" in error


@pytest.mark.parametrize(
    ("source", "row", "objective", "message"),
    [
        ("", '"documents": [{"content": "d", "score": NaN}]', "infonce", "documents[0].score is nan. Give a finite"),
        ("", '"documents": [{"content": "d", "relevance": 0}]', "infonce", "no document has a relevance above 0"),
        (
            ", format: pairs",
            '"sentence1": "a", "sentence2": "b", "score": NaN',
            "pearson",
            "'score' is nan. Give a num",
        ),
        (", format: pairs", '"sentence1": "a", "sentence2": "b", "score": 7', "pearson", "outside 0.0 to 5.0"),
    ],
)
def test_a_bad_record_names_its_source_and_objective(
    config_file, capsys, no_model, tmp_path, source, row, objective, message
):
    (tmp_path / "bad.jsonl").write_text('{"query": "q", ' + row + "}\n")
    train = f"data.train=[{{path: {tmp_path / 'bad.jsonl'}, name: bad{source}}}]"
    error = refused(config_file, capsys, [train, f"objective={objective}"])
    assert message in error and "bad.jsonl:1: " in error
    assert f"(data source 'bad', objective '{objective}')" in error
