"""What each family of components promises, asked of every class that is registered: a new file is picked up by itself.

Written against the base classes alone. What a component computes is tested beside it, in tests/unit and tests/golden.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import MODEL_TYPES, build, items, vectors

from mmembed.backbones import FAMILIES
from mmembed.content import Text, to_content
from mmembed.data.format_base import FORMATS
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.errors import ConfigError
from mmembed.losses import LOSSES, Loss, Scores
from mmembed.mining import MINERS
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.objectives import OBJECTIVES
from mmembed.pooling import POOLINGS
from mmembed.preprocess import Item
from mmembed.prompts import PROMPTS

EXTEND = Path(__file__).parents[2] / "docs" / "extend.md"


def documented_loss() -> type[Loss]:
    """The class that docs/extend.md shows as the smallest case."""
    (code,) = re.findall(r"^```python\n(.*?)^```", EXTEND.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {"__name__": "documented"}
    exec(code, names)
    return next(one for one in names.values() if isinstance(one, type) and issubclass(one, Loss) and one is not Loss)


LOSS_CLASSES = {**LOSSES.classes(), "docs/extend.md": documented_loss()}


@pytest.mark.parametrize(
    ("registry", "name"),
    [
        (registry, name)
        for registry in (POOLINGS, LOSSES, OBJECTIVES, PROMPTS, FORMATS, PAIR_MAKERS, MINERS)
        for name in registry.classes()
    ],
    ids=lambda value: value if isinstance(value, str) else value.package,
)
def test_options_that_it_does_not_have_are_refused(registry, name: str) -> None:
    """Nothing is swallowed by **options."""
    with pytest.raises(ConfigError, match=f"{name}: unknown option 'no_such_option'"):
        registry.build({"type": name, "no_such_option": 1}, hidden_size=8)


# Poolings -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POOLINGS.classes())
def test_a_pooling_sees_the_mask_and_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    pooling = POOLINGS.build(name, hidden_size=8)
    hidden = torch.randn(3, 6, 8, requires_grad=True)  # (B, T, H)
    mask = torch.tensor([[True] * 6, [False, True, False, True, False, False], [False] * 5 + [True]])  # (B, T)
    pooled = pooling(hidden, mask)
    assert pooled.shape == ((3, 6) if pooling.multi_vector else (3,)) + (pooling.embedding_size,)
    assert pooled.dtype == torch.float32
    assert pooling(hidden.bfloat16(), mask).dtype == torch.float32
    (pooled * torch.randn_like(pooled)).sum().backward()
    assert torch.isfinite(hidden.grad).all()
    assert not hidden.grad[~mask].any()  # neither padding nor instruction reaches the vector
    assert all(hidden.grad[row].any() for row in range(3))
    for parameter_name, parameter in pooling.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), parameter_name
    other = torch.where(mask.unsqueeze(-1), hidden, torch.full_like(hidden, 1e4))
    torch.testing.assert_close(pooling(other, mask), pooled)


@pytest.mark.parametrize("name", POOLINGS.classes())
def test_a_pooling_comes_back_from_disk(name: str, family_folder, tmp_path) -> None:
    model, preprocessor = build(family_folder("qwen3"), pooling=name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    reloaded, preprocessor_of_it = load_checkpoint(tmp_path / "saved")
    batch = items("qwen3")
    assert torch.equal(vectors(model, preprocessor, batch), vectors(reloaded, preprocessor_of_it, batch))


# Losses ---------------------------------------------------------------------------------------------------------------


def scores(grades: bool = True, seed: int = 2) -> Scores:
    """Rows with graded positives, with one positive; without a positive, without a negative, without a candidate.

    seed: of the teacher's scores, which some candidates lack.
    """
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relevance = torch.tensor(
        [[2.0, 1, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 2, 0, 1, 1], [1, 0, 0, 0, 0, 0]]
    ).double()
    valid = torch.tensor([[True] * 5 + [False], [True] * 6, [True] * 6, [True] * 3 + [False] + [True] * 2, [False] * 6])
    targets = torch.rand(5, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    targets[:, 4] = float("nan")
    return Scores(values.requires_grad_(), relevance if grades else (relevance > 0).double(), valid, targets, 0.5)


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_is_finite_and_sees_valid_candidates_only(name: str) -> None:
    given, loss = scores(), LOSS_CLASSES[name]()
    found = loss(given)
    assert found.shape == (5,)
    assert torch.isfinite(found).all()
    found.sum().backward()
    assert torch.isfinite(given.values.grad).all()
    assert not given.values.grad[~given.valid].any()
    for filler in (-50.0, 50.0):
        other = replace(given, values=given.values.detach().masked_fill(~given.valid, filler))
        torch.testing.assert_close(loss(other), found.detach())


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_does_not_know_the_order_of_candidates(name: str) -> None:
    given, loss = scores(), LOSS_CLASSES[name]()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mixed = Scores(*(of[:, order] for of in (given.values, given.relevance, given.valid, given.targets)), 0.5)
    torch.testing.assert_close(loss(mixed), loss(given))


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_pulls_the_positive_up_and_pushes_the_negative_down(name: str) -> None:
    values = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
    loss = LOSS_CLASSES[name]()
    relevance = torch.tensor([[1.0] + [0.0] * 7]).double()
    targets = torch.tensor([[0.9] + [0.1] * 7]).double()
    loss(Scores(values, relevance, torch.ones(1, 8, dtype=torch.bool), targets)).sum().backward()
    positive, *negatives = values.grad[0].tolist()
    assert positive < 0 < min(negatives)


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_reads_grades_if_and_only_if_it_says_so(name: str) -> None:
    """`reads` decides whether graded data is accepted: a wrong word there is an option that is ignored."""
    loss = LOSS_CLASSES[name]()
    graded, flat = loss(scores()), loss(scores(grades=False))
    assert ("relevance" in loss.reads) == (not torch.allclose(graded, flat))


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_reads_a_teachers_scores_if_and_only_if_it_says_so(name: str) -> None:
    loss = LOSS_CLASSES[name]()
    assert ("score" in loss.reads) == (not torch.allclose(loss(scores()), loss(scores(seed=3))))
    if "score" in loss.reads:
        with pytest.raises(ConfigError, match=f"losses.{name}: .*score"):
            loss(replace(scores(), targets=None))


@pytest.mark.parametrize("name", LOSS_CLASSES)
def test_a_loss_couples_rows_if_and_only_if_it_says_so(name: str) -> None:
    """An objective gives rows of all processes to those that say so; another one would depend on their number."""
    loss, given = LOSS_CLASSES[name](), scores()
    halves = [
        Scores(*(of[rows] for of in (given.values, given.relevance, given.valid, given.targets)), given.temperature)
        for rows in (slice(0, 1), slice(1, 5))
    ]
    apart = torch.cat([loss(half) for half in halves])
    assert loss.couples_rows == (not torch.allclose(apart, loss(given)))


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, style in PROMPTS.classes().items() if not style.reads_pairs])
def test_a_prompt_keeps_the_content_and_masks_the_instruction(name: str, family_folder, tmp_path) -> None:
    model, preprocessor = build(family_folder("qwen3_vl"), prompt=name, pooling="mean")
    decode, image = preprocessor.tokenizer.decode, preprocessor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    batch = items("qwen3_vl")
    plain = build(family_folder("qwen3_vl"), prompt="plain")[1].tokenize(batch)
    for row, bare in zip(preprocessor.tokenize(batch), plain, strict=True):
        assert list(row.ids).count(image) == list(bare.ids).count(image)
    asked = Item(to_content("a red bus"), "query", "Find it")
    (row,) = preprocessor.tokenize([asked])
    assert "Find it" in decode(row.ids) and "a red bus" in decode(row.ids)
    pooled = preprocessor([asked]).pool_mask[0].tolist()
    assert decode([token for token, counts in zip(row.ids, pooled, strict=True) if counts]).strip() == "a red bus"
    unmasked = build(family_folder("qwen3_vl"), prompt={"type": name, "mask_instruction": False}, pooling="mean")[1]
    assert unmasked([asked]).pool_mask.all()
    (document,) = preprocessor.tokenize([Item(to_content("a red bus"))])
    assert "a red bus" in decode(document.ids) and "Find it" not in decode(document.ids)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    assert load_checkpoint(tmp_path / "saved")[1].tokenize([*batch, asked]) == preprocessor.tokenize([*batch, asked])


# Formats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS.classes())
def test_a_format_reads_with_its_defaults_and_names_a_missing_source(name: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path / "nowhere"))):
        list(FORMATS.build(name).read(tmp_path / "nowhere" / "x.parquet"))


# Pairs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIR_MAKERS.classes())
def test_a_maker_of_pairs_draws_what_it_says(name: str, tmp_path) -> None:
    """By its generator alone, after a trip through pickle too; and nothing from a document that lacks something."""
    maker = PAIR_MAKERS.build({"type": name, "min_count": 1} if name == "representative_words" else name)
    text = " ".join(f"Bus {n} stands at the old bridge over the river. Train {n} comes from a town." for n in range(8))
    maker.count(text)
    maker.keep(tmp_path)
    maker.use(tmp_path)
    assert maker.lacks(text) is None
    pairs = [
        one.draw(text, np.random.default_rng(seed))
        for one in (maker, pickle.loads(pickle.dumps(maker)))
        for seed in range(5)
    ]
    for first, second in zip(pairs[:5], pairs[5:], strict=True):
        assert first == second
        contents = [first.query, first.positive, *first.negatives]
        kinds = {type(part).__name__.lower() for content in contents for part in content} - {"text"}
        assert kinds | ({"negatives"} if first.negatives else set()) == maker.gives
        assert all(part.text.strip() for content in contents for part in content if isinstance(part, Text))
    assert len({repr(pair) for pair in pairs[:5]}) == (1 if name == "dropout" else 5)
    assert set(maker.grades) == {1.0, *(0.0 for pair in pairs for _ in pair.negatives)}


# Backbones ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES.classes())
def test_a_backbone_family_has_a_tiny_model_that_the_tests_run(name: str) -> None:
    """The tests of families go over tests/families.py, which needs a few lines to build the new one."""
    assert set(FAMILIES.get(name).model_types) <= MODEL_TYPES
