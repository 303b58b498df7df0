"""Every value of losses.json, which were computed outside this repository, against the code that gives it."""

from pathlib import Path

import pytest

from tests.golden.case import GOLDEN, NOT_COVERED, Case, Compared, check, every_case, reason, tensor, uncovered
from tools.golden_table import PAGE, main, table

CASES = every_case()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_golden(case):
    for one in case.compare():
        assert one.got == pytest.approx(one.expected, rel=0, abs=one.tolerance), one.what


def test_each_entry_has_a_case_or_a_reason():
    assert not [(slug, name) for slug, name, why in uncovered() if why is None]
    needless = [(case.slug, case.entry["name"]) for case in CASES if reason(case.slug, case.entry["name"])]
    assert not needless, "NOT_COVERED says so of what a case computes"
    for slug, begin in NOT_COVERED:
        assert any(entry["name"].startswith(begin) for entry in GOLDEN[slug]), (slug, begin)


def wrong(entry):
    """A case whose loss is right and whose gradient is not."""
    leaf = tensor([entry["loss"]])
    yield from check(entry, leaf.sum() * 2 - leaf.detach().sum(), x=leaf)


def silent(entry):
    """A case that passes the gradient over."""
    yield Compared("loss", [entry["loss"]], [entry["loss"]])


ENTRY = {"name": "n", "loss": 3.0, "grad_norms": {"x": 1.0}}


def test_a_wrong_gradient_fails_and_a_missing_one_is_refused():
    loss, gradient = Case("s", ENTRY, "b", wrong, trains=True).compare()
    assert loss.agrees and not gradient.agrees
    assert gradient.got == [2.0]
    with pytest.raises(ValueError, match="s: n, b: gradients of .. are compared"):
        Case("s", ENTRY, "b", silent, trains=True).compare()
    assert not Compared("loss", [1.0], [float("nan")]).agrees


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == table(CASES)[0], "python -m tools.golden_table --write"


def test_the_command_fails_with_a_case(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    assert main(["--write", str(page)]) == 0
    assert page.read_text(encoding="utf-8") == Path(PAGE).read_text(encoding="utf-8")
    monkeypatch.setattr("tools.golden_table.every_case", lambda: [Case("s", ENTRY, "b", wrong, trains=True)])
    assert main([]) == 1
    assert "| s | n | b | 3.000000000 | 3.000000000 | 1e-06 | x | **no**: gradient of x |" in capsys.readouterr().out
