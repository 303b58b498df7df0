"""Every shipped YAML is a run: it loads, its data exists, its parts are built, its model too (tiny, same family)."""

from pathlib import Path

import pytest

from mmembed.config import load_config
from mmembed.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "configs" / "embedder").rglob("*.yaml"))
MINING = sorted((ROOT / "recipes" / "configs" / "mining").rglob("*.yaml"))
DISTIL = sorted((ROOT / "recipes" / "configs" / "distil").rglob("*.yaml"))  # read in test_distil.py
RERANKER = sorted((ROOT / "recipes" / "configs" / "reranker").rglob("*.yaml"))  # read in test_train_reranker.py
GENERATIVE = sorted(
    (ROOT / "recipes" / "configs" / "generative_reranker").rglob("*.yaml")
)  # and its own test reads these
SYNTHESIS = sorted((ROOT / "recipes" / "configs" / "synthesis").rglob("*.yaml"))
PIPELINES = sorted((ROOT / "recipes" / "configs" / "pipelines").rglob("*.yaml"))
FAMILIES = {  # the first part of a name that is in a model's name -> the tiny family that stands for it
    "Qwen3-VL": "qwen3_vl",
    "Qwen3-30B-A3B": "qwen3_moe",
    "mmembed-nano": "qwen3_vl",
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen2.5-Omni": "qwen2_5_omni",
    "Qwen2-VL": "qwen2_vl",
    "Qwen3": "qwen3",
    "Mistral": "mistral",
    "gemma-3": "gemma3",
    "nv_embed_stage1": "mistral",
}


def test_there_are_configs():
    assert len(FILES) >= 8 and MINING and RERANKER and GENERATIVE
    known = {*FILES, *MINING, *DISTIL, *RERANKER, *GENERATIVE, *SYNTHESIS, *PIPELINES}
    assert SYNTHESIS and PIPELINES and known == set((ROOT / "recipes" / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES + RERANKER + GENERATIVE, ids=lambda file: file.stem)
def test_config_opens_with_its_launch_command(file):
    first = file.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert str(file.relative_to(ROOT)) in first
    commands = ("recipes/train_embedder.py", "recipes.train_embedder", "train_rounds.py", "recipes/train_reranker.py")
    commands += ("recipes/train_generative_reranker.py",)
    assert any(command in first for command in commands)


@pytest.mark.parametrize("file", MINING, ids=lambda file: file.stem)
def test_mining_config_is_read_and_its_data_is_there(file):
    from data_tools.mining.settings import load_mining
    from mmembed.data.dataset import locate

    first = file.read_text().splitlines()[0]
    assert first == f"# python -m data_tools.mine_negatives --config {file.relative_to(ROOT)}"
    config = load_mining(file)
    for source in config.sources:
        assert locate(source.records, ROOT / config.root).exists()
        assert all((ROOT / config.root / path).exists() for path in source.corpus)


@pytest.mark.parametrize("file", SYNTHESIS, ids=lambda file: file.stem)
def test_synthesis_config_is_read_and_its_data_is_there(file):
    from data_tools.synthesis.settings import load_synthesis

    first = file.read_text().splitlines()[0]
    assert first.startswith(f"# python -m data_tools.synthesize --config {file.relative_to(ROOT)}")
    config = load_synthesis(file)
    if "sources=" in first:  # of files that only a user has
        return
    for source in config.sources:
        there = ROOT / (config.root or "") / source.path
        assert there.exists() or source.path.startswith("runs/"), source.path


@pytest.mark.parametrize("file", PIPELINES, ids=lambda file: file.stem)
def test_steps_of_a_pipeline_are_commands_whose_configs_are_read(file, tmp_path):
    from data_tools.mining.settings import load_mining
    from data_tools.synthesis.settings import load_synthesis
    from mmembed.config import load_blocks
    from mmembed.config.blocks import RerankerConfig
    from recipes.run_pipeline import PipelineConfig, command_of

    assert (
        file.read_text()
        .splitlines()[0]
        .startswith(f"# python -m recipes.run_pipeline --config {file.relative_to(ROOT)}")
    )
    job = load_blocks(PipelineConfig, file)
    readers = {
        "data_tools.synthesize": load_synthesis,
        "data_tools.mine_negatives": load_mining,
        "recipes.train_embedder": load_config,
        "recipes.train_reranker": lambda path, overrides: load_config(path, overrides, RerankerConfig),
    }
    read = 0
    for step in job.steps:
        command = command_of(step, job, tmp_path)
        if step.config is not None:
            readers[step.run](ROOT / step.config, command[command.index("--config") + 2 :])
            read += 1
    assert read >= 4


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_is_built(file, family_folder):
    from mmembed.data.dataset import locate
    from mmembed.models.embedding_model import build_embedding_model
    from mmembed.objectives import build_objective
    from mmembed.training.arguments import training_arguments

    config = load_config(file)
    for source in (*config.data.train, *config.data.dev):
        assert locate(source, ROOT / config.data.root).exists()
    training_arguments(config)
    family = next(tiny for part, tiny in FAMILIES.items() if part in config.model.name_or_path)
    overrides = [f"model.name_or_path={family_folder(family)}"]
    if isinstance(config.objective, dict) and "matryoshka" in config.objective:
        overrides.append("objective.matryoshka.dims=[64, 32]")  # the tiny model has 64 dimensions
    if config.pooling != "mean" and isinstance(config.pooling, dict) and "dim_head" in config.pooling:
        overrides.append("pooling.dim_head=16")
    tiny = load_config(file, overrides)
    model, preprocessor = build_embedding_model(tiny)
    build_objective(tiny.objective, model.embedding_size, model.depth)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert preprocessor.prompt


def test_a_key_that_does_nothing_is_an_error(tmp_path):
    """Walks the schema: a key that is not in it is refused in every block, with the nearest."""
    from pydantic import BaseModel

    from mmembed.config import _field_model, build_config
    from mmembed.config.blocks import EmbedderConfig

    blocks = [name for name, field in EmbedderConfig.model_fields.items() if isinstance(field.default, BaseModel)]
    assert {"model", "adapter", "lengths", "data", "training"} <= set(blocks)
    for block in blocks:
        for key in _field_model(EmbedderConfig, block).model_fields:
            with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
                build_config({block: {key + "x": 1}})
