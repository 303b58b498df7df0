"""The page of the claims: table, verdicts, the rule they follow, and a plot a claim."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from eval.claims.declaration import FIRST_STAGE, Claim, Comparison
from eval.claims.runs import MODULES, value
from eval.claims.verdicts import RULE, Outcome, compare, overall

WIDTH, ROW, LEFT, RIGHT = 720, 46, 250, 80
COLOURS = ("#2a7ab8", "#c2571a")  # readable on white and on black
INTRO = """\
# Claims of the papers, measured again

Written by `python -m eval.claims --write docs/claims.md`; do not edit. Each claim of a paper is trained again with the
packaged nano backbone (8 M parameters) on real data, its arms with the same steps, batches, tokens and sources, and
measured on the dev parts. That says whether a claim holds **at this scale**, with this backbone, and no more.
"""


@dataclass(frozen=True)
class Finding:
    """A claim, the results of its arms that are there (arm -> seed -> result) and the outcomes of its comparisons."""

    claim: Claim
    results: Mapping[str, Mapping[int, Mapping[str, Any]]]
    outcomes: Sequence[Outcome]

    @property
    def all_results(self) -> list[Mapping[str, Any]]:
        return [result for by_seed in self.results.values() for result in by_seed.values()]

    @property
    def verdict(self) -> str:
        return overall([outcome.verdict for outcome in self.outcomes])


def found(claim: Claim, results: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> Finding:
    """The comparisons of a claim, over the seeds that both arms have."""
    outcomes = []
    for comparison in claim.comparisons:
        arm, than = (
            {seed: value(result, comparison, name) for seed, result in results.get(trained, {}).items()}
            for name, trained in (
                (comparison.arm, comparison.arm),
                (comparison.than, comparison.arm if comparison.than == FIRST_STAGE else comparison.than),
            )
        )
        outcomes.append(compare(comparison, arm, than, None if claim.trained else _by_query(comparison, results)))
    return Finding(claim, results, outcomes)


def _by_query(
    comparison: Comparison, results: Mapping[str, Mapping[int, Mapping[str, Any]]]
) -> list[list[float]] | None:
    """Differences of the queries of each task, where both arms were measured."""
    arm, than = (results.get(name, {}).get(0) for name in (comparison.arm, comparison.than))
    if arm is None or than is None:
        return None
    pairs = [(arm["by_query"][task], than["by_query"][task]) for task in comparison.scores]
    return [[ours - theirs for ours, theirs in zip(*pair, strict=True)] for pair in pairs]


def write(path: Path, findings: Sequence[Finding], about: Sequence[str]) -> None:
    """The page; in a folder beside it a plot a claim, `claims/<name>.svg`, and the results, one a line."""
    measured = [finding for finding in findings if any(outcome.arm for outcome in finding.outcomes)]
    path.parent.mkdir(parents=True, exist_ok=True)
    for finding in measured:
        plot = path.with_suffix("") / f"{finding.claim.name}.svg"
        plot.parent.mkdir(exist_ok=True)
        plot.write_text(drawn(finding), encoding="utf-8")
    if measured:
        lines = [
            json.dumps({**result, "claim": finding.claim.name, "arm": arm}, sort_keys=True) + "\n"
            for finding in measured
            for arm, by_seed in finding.results.items()
            for result in by_seed.values()
        ]
        results_beside(path).write_text("".join(lines), encoding="utf-8")
    path.write_text(written(findings, about, path.stem), encoding="utf-8")


def results_beside(path: Path) -> Path:
    """Where the results of a page lie."""
    return path.with_suffix("") / "results.jsonl"


def written(findings: Sequence[Finding], about: Sequence[str], folder: str) -> str:
    """The page as Markdown; plots lie in `folder`."""
    measured = [finding for finding in findings if any(outcome.arm for outcome in finding.outcomes)]
    waiting = [
        (finding.claim, missing)
        for finding in findings
        if (missing := [arm for arm in finding.claim.arms if not finding.results.get(arm)])
    ]
    parts = [INTRO, "## Results\n"]
    parts.append(_summary(measured, about) if measured else "No run was made yet: there are no numbers here.\n")
    parts.append(f"## The rule of the verdicts\n\n{RULE}\n")
    parts += [_section(finding, folder) for finding in measured]
    if waiting:
        lines = [f"- `{claim.name}` ({claim.paper}), {', '.join(arms)}: {claim.sentence}" for claim, arms in waiting]
        parts.append("## Declared, not measured\n\nThese arms have no run yet. The command above with `--any-code` "
                     "measures them, and makes no run again that is there.\n\n" + "\n".join(lines) + "\n")  # fmt: skip
    return "\n".join(parts)


def _summary(findings: Sequence[Finding], about: Sequence[str]) -> str:
    results = {result["key"]: result for finding in findings for result in finding.all_results}.values()
    hours = sum(sum(result["seconds"].values()) for result in results) / 3600
    claims: dict[str, dict[str, None]] = {}
    for result in results:
        claims.setdefault(result["code"], {})[result["claim"]] = None
    seeds = sorted({seed for finding in findings for by_seed in finding.results.values() for seed in by_seed})
    steps = sorted({result["steps"] for result in results} - {0})
    data = sorted({pair for result in results for pair in result["data"].items()})
    lines = [*about, f"- Seeds {', '.join(map(str, seeds))}; {_steps(steps)}."]
    lines.append(f"- Data: {', '.join(f'{folder} {mark}' for folder, mark in data)}.")
    lines.append(f"- {len(results)} runs, {hours:.1f} hours of run time.")
    lines += [f"- Code {code}: {', '.join(of_code)}." for code, of_code in claims.items()]
    lines += ["", "| claim | paper | verdict |", "|---|---|---|"]
    for finding in findings:
        name = finding.claim.name
        lines.append(f"| [{name}](#{name}) | {finding.claim.paper} | {finding.verdict} |")
    return "\n".join(lines) + "\n"


def _steps(steps: Sequence[int]) -> str:
    """Of the runs, in their order; none where nothing was trained."""
    if not steps:
        return "nothing is trained"
    return f"{steps[0]} steps a run" if len(steps) == 1 else f"{steps[0]} to {steps[-1]} steps a run"


def _section(finding: Finding, folder: str) -> str:
    claim = finding.claim
    lines = [f"## {claim.name}", "", f"{claim.paper}: {claim.sentence}", ""]
    lines += [f"Verdict: **{finding.verdict}**. {claim.note}".rstrip(), ""]
    lines += ["| task, metric | arm | mean | other | mean | claimed | difference, 95 % interval | seeds | verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    lines += [_row(outcome) for outcome in finding.outcomes]
    lines += ["", f"![Each seed of each arm]({folder}/{claim.name}.svg)", "", "| arm | what it sets | steps |"]
    lines += ["|---|---|---|"]
    steps = {result["arm"]: result["steps"] for result in finding.all_results}
    for arm, tree in claim.arms.items():
        block = yaml.safe_dump(tree, default_flow_style=True, width=10_000, sort_keys=False).strip()
        taken = "made before" if claim.made(arm) else steps.get(arm, "-") if claim.trained else "not trained"
        lines.append(f"| {arm} | `{block}` | {taken} |")
    if claim.stages:
        lines += ["", "| made before the arms | by | from |", "|---|---|---|"]
    for name, stage in claim.stages.items():
        block = yaml.safe_dump(stage.config, default_flow_style=True, width=10_000, sort_keys=False).strip()
        lines.append(f"| {name} | `{MODULES[stage.command]}` | `{block}` |")
    return "\n".join(lines) + "\n"


def _row(outcome: Outcome) -> str:
    comparison = outcome.comparison
    bounds = "no interval" if outcome.low is None else f"{outcome.low:+.4f} to {outcome.high:+.4f}"
    difference = "-" if outcome.difference is None else f"{outcome.difference:+.4f} ({bounds})"
    negligible = "" if comparison.negligible == 0.005 else f", negligible {comparison.negligible:g}"
    return (
        f"| {title(outcome)} | {comparison.arm} | {_mean(outcome.arm)} | {comparison.than} | {_mean(outcome.than)} "
        f"| {comparison.direction.replace('_', ' ')}{negligible} | {difference} | {len(outcome.arm)} "
        f"| {outcome.verdict}: {outcome.reason} |"
    )


def title(outcome: Outcome) -> str:
    """`squad-en at 64 dimensions, ndcg_at_10`."""
    comparison = outcome.comparison
    cut = "" if comparison.dim is None else f" at {comparison.dim} dimensions"
    cut += "" if comparison.candidates is None else f" of candidates from {comparison.candidates}"
    mean = "mean of " * (len(comparison.tasks) > 1)
    return f"{mean}{', '.join(comparison.tasks)}{cut}, {comparison.metric}"


def _mean(numbers: Mapping[int, float]) -> str:
    return f"{statistics.fmean(numbers.values()):.4f}" if numbers else "-"


def drawn(finding: Finding) -> str:
    """An SVG: a row a comparison, on an axis of its own a dot a seed and a bar at the mean, for both arms."""
    outcomes = [outcome for outcome in finding.outcomes if outcome.arm]
    height = ROW * len(outcomes) + 16
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
             f'font-size="11" fill="#777" role="img"><title>{escape(finding.claim.sentence)}</title>']  # fmt: skip
    for place, outcome in enumerate(outcomes):
        parts.append(_panel(outcome, 8 + ROW * place))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(outcome: Outcome, top: int) -> str:
    values = [*outcome.arm.values(), *outcome.than.values()]
    low, spread = min(values), max(max(values) - min(values), 1e-6)

    def x(number: float) -> float:
        return round(LEFT + (number - low) / spread * (WIDTH - LEFT - RIGHT), 1)

    names = (outcome.comparison.arm, outcome.comparison.than)
    parts = [f'<text x="4" y="{top + 39}" font-size="9">{escape(title(outcome))}</text>']
    for line, (name, numbers) in enumerate(zip(names, (outcome.arm, outcome.than), strict=True)):
        y, colour, mean = top + 10 + 15 * line, COLOURS[line], statistics.fmean(numbers.values())
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#999" stroke-width=".5"/>')
        parts += [f'<circle cx="{x(number)}" cy="{y}" r="3.5" fill="{colour}" fill-opacity=".6"/>'
                  for number in numbers.values()]  # fmt: skip
        parts.append(f'<line x1="{x(mean)}" x2="{x(mean)}" y1="{y - 6}" y2="{y + 6}" stroke="{colour}" '
                     f'stroke-width="2"/>')  # fmt: skip
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4}" fill="{colour}">{mean:.4f}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end" fill="{colour}">{escape(name)}</text>')
    return "\n".join(parts)
