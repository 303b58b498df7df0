"""Which name an error takes for the one that was meant."""

import pytest

from mmembed.errors import nearest


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("latent", ["last_token", "latent_attention", "mean"], "latent_attention"),
        ("maen", ["last_token", "mean"], "mean"),
        ("lora", ["dora", "lora", "lora_r", "qlora"], "lora"),
        ("query_max", ["query_max_length", "document_max_length"], "query_max_length"),
    ],
)
def test_nearest(name, known, meant):
    assert nearest(name, known) == f"did you mean '{meant}'?"


def test_without_a_near_name_all_are_listed():
    assert nearest("xyz", ["mean", "last"]) == nearest("", ["mean", "last"]) == "known: last, mean"
