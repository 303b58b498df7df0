"""The generator of docs/methods: what an entry must have, and which measurements it lists."""

import pytest

import mmembed.losses.dcl as dcl
from eval.claims import page
from eval.claims.declaration import Claim
from tools import methods_tables
from tools.methods_tables import FAMILIES, entries

DOC = dcl.__doc__


def entry(text, component):
    """The entry of one component on a page."""
    return next(part for part in text.split("\n## ") if part.startswith(f"{component}\n"))


@pytest.mark.parametrize(
    ("doc", "said"),
    [
        (DOC.replace("L_i = ", "the loss is "), "needs an equation"),
        (DOC.replace("arXiv 2110.06848", "a paper"), "names a paper, or NO_PAPER"),
        (DOC.replace("When: ", ""), "one paragraph 'When: ...'"),
    ],
)
def test_an_entry_without_equation_paper_or_when_is_refused(monkeypatch, doc, said):
    monkeypatch.setattr(dcl, "__doc__", doc)
    with pytest.raises(SystemExit, match=said):
        entries("losses", FAMILIES["losses"])


def test_a_method_has_a_paper_or_a_reason_not_both(monkeypatch):
    assert "**Paper**: none: a frame for losses" in entry(entries("objectives", FAMILIES["objectives"]), "contrastive")
    monkeypatch.setitem(methods_tables.NO_PAPER, "dcl", "there is one")
    with pytest.raises(SystemExit, match="not both"):
        entries("losses", FAMILIES["losses"])


def claim(arms, base=None):
    return Claim(
        name="thing",
        paper="A paper",
        sentence="One is better.",
        base=base or {},
        arms=arms,
        comparisons=[{"arm": "one", "than": "other", "task": "mbpp"}],
    )


@pytest.mark.parametrize(
    ("arms", "family", "listed"),
    [
        ({"one": {"objective": "dcl"}, "other": {"objective": "infonce"}}, "losses", {"dcl", "infonce"}),
        (
            {
                "one": {"objective": {"type": "contrastive", "loss": "dcl"}},
                "other": {"objective": {"type": "contrastive", "loss": {"type": "infonce"}}},
            },
            "losses",
            {"dcl", "infonce"},
        ),
        (
            {"one": {"objective": [{"type": "infonce"}, {"type": "uniformity"}]}, "other": {"objective": "infonce"}},
            "objectives",
            {"uniformity"},
        ),
        (
            {
                "one": {"objective": {"type": "infonce", "matryoshka": {"dims": [64]}}},
                "other": {"objective": {"type": "infonce"}},
            },
            "losses",
            set(),
        ),
        (
            {"one": {"objective": {"type": "cacr", "alpha": 2}}, "other": {"objective": {"type": "cacr"}}},
            "objectives",
            {"cacr"},
        ),
        (
            {
                "one": {"objective": {"by_task": {"sts": "pearson"}}},
                "other": {"objective": {"by_task": {"sts": "pro"}}},
            },
            "losses",
            {"pearson", "pro"},
        ),
        ({"one": {"prompt": "hierarchical"}, "other": {"prompt": "plain"}}, "poolings", set()),
        ({"one": {"pooling": "mean"}, "other": {"pooling": "last_token"}}, "poolings", {"mean", "last_token"}),
    ],
    ids=[
        "loss",
        "loss of contrastive",
        "part of a list",
        "not its option",
        "its option",
        "by task",
        "constant",
        "pooling",
    ],
)
def test_a_claim_stands_where_its_arms_differ_and_nowhere_else(monkeypatch, arms, family, listed):
    results = {arm: {0: {"scores": {"mbpp": {"ndcg_at_10": 0.5}}}} for arm in arms}
    found = page.found(claim(arms, {"pooling": "mean", "data": {"train": [{"path": "mbpp"}]}}), results)
    monkeypatch.setattr(methods_tables, "findings", lambda: [found])
    text = entries(family, FAMILIES[family])
    classes = FAMILIES[family].registry.classes()
    assert {name for name in classes if "[thing](../claims.md#thing)" in entry(text, name)} == listed


def test_cost_and_quality_are_lines_of_their_own():
    losses = entries("losses", FAMILIES["losses"])
    assert "**Cost here**: 4,096 queries with 32,768 documents" in entry(losses, "dcl")
    assert "**Quality here**: not measured" in entry(losses, "dclw")
    quality = entry(losses, "mann_whitney").split("**Quality here**:")[1]
    assert "[mw_auc]" in quality and "MB" not in quality
    makers = entry(entries("pair_makers", FAMILIES["pair_makers"]), "random_crops")
    assert "(../log.md#2026-11-26-pairs-of-raw-documents-on-the-nano)" in makers and ".579" in makers
    assert "**Cost here**" not in makers


@pytest.mark.parametrize(
    ("quoted", "said"),
    [
        ({"2026-11-26 No such section": {"dcl": "better"}}, "no section '2026-11-26 No such section'"),
        (
            {"2026-11-26 Pairs of raw documents on the nano": {"dcl": "gained .999"}},
            r"\.999 is not in the log's section",
        ),
        ({"2026-11-26 Pairs of raw documents on the nano": {"no_such": "gained"}}, "there is no no_such"),
    ],
)
def test_what_the_log_does_not_say_is_no_quote_of_it(monkeypatch, tmp_path, quoted, said):
    path = tmp_path / "quoted.yaml"
    path.write_text(methods_tables.yaml.safe_dump(quoted))
    monkeypatch.setattr(methods_tables, "IN_LOG", path)
    methods_tables.in_log.cache_clear()
    try:
        with pytest.raises(SystemExit, match=said):
            entries("losses", FAMILIES["losses"])
    finally:
        methods_tables.in_log.cache_clear()
