"""The model card says how the weights were made: the command in it is the one, with every option that matters."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import mmembed
from recipes import build_nano
from recipes.nano.card import Built, render
from recipes.nano.train import GPU_PLAN, Plan, chosen_plan

SHIPPED = (Path(mmembed.__file__).parent / "nano" / "README.md").read_text(encoding="utf-8")


def command_of(card):
    """The one command that a card names."""
    (command,) = re.findall(r"`(python recipes/build_nano.py[^`]*)`", card)
    return command


def plan_of(command, monkeypatch):
    """(plan, device, threads) that the recipe takes a command for."""
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    options = build_nano.arguments()
    return chosen_plan(torch.device(options.device), options.seed, options.set), options.device, options.threads


@pytest.mark.parametrize(
    ("plan", "device", "threads"),
    [
        (Plan(), "cpu", 2),
        (Plan(seed=3, word_steps=7, language_rate=2e-3), "cpu", 16),
        (GPU_PLAN, "cuda", 8),
    ],
    ids=["as shipped", "other settings", "gpu"],
)
def test_the_command_of_a_card_is_that_of_its_run(plan, device, threads, monkeypatch):
    model = torch.nn.Linear(2, 2)
    model.config = Sizes()
    card = render(Built(model, plan, torch.device(device), threads, taught=5, seen=7, size=9), {"a": 0.5})
    assert plan_of(command_of(card), monkeypatch) == (plan, device, threads)
    assert ("16 CPU cores" in card) == (threads == 16)
    assert ("one CUDA device" in card) == (device == "cuda")


class Sizes:
    vocab_size = 11

    def get_text_config(self):
        return self


def test_the_shipped_card_has_the_command_of_its_settings(monkeypatch):
    (settings,) = re.findall(r"Settings: `(.*)`", SHIPPED)
    found, device, threads = plan_of(command_of(SHIPPED), monkeypatch)
    assert ", ".join(f"{key}={value}" for key, value in vars(found).items()) == settings
    assert (device, threads) == ("cuda", 2)


def test_the_recipe_reads_on_three_screens():
    """Its parts are under recipes/nano."""
    assert len(Path(build_nano.__file__).read_text(encoding="utf-8").splitlines()) <= 150
