"""The examples in the docstrings of losses, objectives, makers of pairs and others give what they say."""

import doctest
import importlib
import pkgutil

import pytest

MODULES = [
    f"{package}.{module.name}"
    for package in ("mmembed.losses", "mmembed.objectives", "mmembed.data.pair_makers")
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__)
]
MODULES += ["mmembed.data.words", "mmembed.explore.sides"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed
