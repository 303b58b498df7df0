"""Every command names the flag that was meant, also beside a missing required one."""

import pytest

from eval.run import parse
from recipes.demo import parse as parse_demo
from recipes.train_embedder import main


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (main, ["--confg", "x.yaml"], "unknown argument '--confg'; did you mean '--config'?"),
        (main, ["--config", "x.yaml", "--overides", "y"], "unknown argument '--overides'"),
        (main, ["--conf", "x.yaml"], "did you mean '--config'?"),
        (main, [], "required: --config"),
        (parse, ["--modle", "bm25"], "unknown argument '--modle'; did you mean '--model'?"),
        (parse, ["--model", "bm25", "--task=x"], "unknown argument '--task'; did you mean '--tasks'?"),
        (parse_demo, ["--ouput", "x"], "unknown argument '--ouput'; did you mean '--output'?"),
        (parse, ["--model", "bm25", "--dtype", "float23"], "there is no 'float23'; did you mean 'float32'?"),
    ],
)
def test_a_wrong_flag_names_the_nearest(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
