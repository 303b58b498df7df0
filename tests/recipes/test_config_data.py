"""The data of every shipped YAML suits its objective: what the command checks before weights are loaded."""

import pytest

from mmembed.config import load_config
from mmembed.data.dataset import RecordDataset
from mmembed.objectives import build_objective
from mmembed.training.batch_report import check_sources
from tests.recipes.test_configs import FILES, ROOT


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_field_of_the_data_is_used_or_named(file):
    config = load_config(file)
    data = [RecordDataset(source, root=ROOT / config.data.root) for source in config.data.train]
    check_sources(data, config, build_objective(config.objective))
