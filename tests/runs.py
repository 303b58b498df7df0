"""Starting training runs in tests, and reading what they logged."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests import warm

ROOT = Path(__file__).parents[1]


def two_processes(module, *arguments, python=sys.executable):
    """The command that starts two processes of a module."""
    command = [python, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    return [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", module, *arguments]


def in_two_processes(module, *arguments, timeout=180):
    """Runs `python -m module arguments` under torchrun, one thread a process; it has to succeed."""
    command = two_processes(module, *arguments, python=warm.python())
    environment = {**os.environ, **warm.environment(), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def launch(
    strategy, *arguments, timeout=300, succeeds=True, processes=2, command="recipes/train_embedder.py", cold=False
):
    """`accelerate launch` with the shipped YAML of a strategy: two processes, gloo, one thread each.

    Args:
        cold: by the interpreter itself, as a user starts it, instead of by one that has imported everything.
    """
    launched = [
        sys.executable if cold else warm.python(),
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"recipes/accelerate/{strategy}.yaml",
        "--num_processes",
        str(processes),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {} if cold else warm.environment()
    launched += [command, *arguments]
    done = subprocess.run(launched, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert (done.returncode == 0) == succeeds, done.stdout[-2000:] + done.stderr[-5000:]
    return done


def losses(folder):
    """The logged loss of each step."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def build_trainer(config, objective=None):
    """The trainer of a config, as the recipe builds it, or with another objective."""
    from mmembed.data.dataset import RecordDataset, media_store
    from mmembed.data.streaming import open_source
    from mmembed.models.embedding_model import build_embedding_model
    from mmembed.objectives import build_objective
    from mmembed.training.arguments import set_seed, training_arguments
    from mmembed.training.trainer import EmbedderTrainer

    media = media_store(config.data)
    set_seed(0)
    model, preprocessor = build_embedding_model(config, media)
    objective = objective or build_objective(config.objective, model.embedding_size)
    train = [open_source(source, config.data, media) for source in config.data.train]
    dev = [RecordDataset(source, media, root=config.data.root) for source in config.data.dev]
    return EmbedderTrainer(config, training_arguments(config), model, preprocessor, objective, train, dev)
