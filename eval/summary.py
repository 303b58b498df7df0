"""What the results of a run come to: averages of groups, and the table that stands at its end."""

from collections.abc import Mapping
from typing import Any

from eval.proxy import statement
from eval.rows import DIGITS
from eval.tables import aligned, number, reach


def averages(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """group -> model -> mean of the main scores, of a set that is several tasks the mean of theirs; None where the
    model cannot do every task of the group."""
    groups: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for name, entry in results["tasks"].items():
        groups.setdefault(entry["group"], []).append((entry.get("set", name), entry["scores"]))
    for name, entry in results["tasks"].items():
        for wider in entry.get("overall", ()):
            groups.setdefault(wider, []).append((entry.get("set", name), entry["scores"]))
    means: dict[str, dict[str, float | None]] = {}
    for group, rows in groups.items():
        means[group] = {}
        for model in results["models"]:
            sets: dict[str, list[float]] = {}
            for name, scores in rows:
                if scores[model] is not None:
                    sets.setdefault(name, []).append(scores[model]["main"])
            done = sum(map(len, sets.values())) == len(rows)
            own = [sum(values) / len(values) for values in sets.values()]
            means[group][model] = round(sum(own) / len(own), DIGITS) if done else None
    return {**{group: own for group, own in means.items() if group != "all"},
            **{group: own for group, own in means.items() if group == "all"}}  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Tasks by models, group after group, each group with its average; below it what a reader has to know."""
    models = list(results["models"])
    lines = [["task", "score", *models]]
    for group, means in results["averages"].items():
        entries = {name: entry for name, entry in results["tasks"].items() if entry["group"] == group}
        for name, entry in entries.items():
            lines.append([name, entry["main_score"], *(cell(entry, model) for model in models)])
        if len(entries) != 1:
            lines.append([f"average, {group}", "", *(number(means[model]) for model in models)])
    return "\n".join([aligned(lines, left=2), *notes(results)])


def notes(results: Mapping[str, Any]) -> list[str]:
    """Limits, data that differ, sets that are missing, and why there are dashes."""
    lines = []
    if results.get("proxy"):
        lines += statement(results)
    if results["limit"] is not None:
        lines.append(f"at most {results['limit']} queries of a task: these numbers compare with no others")
    for name, entry in results["tasks"].items():
        if entry.get("differs"):
            lines.append(f"{name} has {entry['differs']}: compare it with no published number")
    if results["missing"]:
        lines.append(f"missing, {len(results['missing'])} of {len(results['missing']) + len(results['tasks'])} tasks; "
                     "averages are without them:")  # fmt: skip
        lines += [f"  {name}: {reason.removeprefix(f'{name}: ')}" for name, reason in results["missing"].items()]
    for model, tasks in results["left_out"].items():
        for reason in dict.fromkeys(tasks.values()):
            names = [name for name, other in tasks.items() if other == reason]
            lines.append(f"{model} leaves out {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}: {reason}")
    return ["", *lines] if lines else []


def cell(entry: dict[str, Any], model: str) -> str:
    """The main score, and half the width of its interval."""
    scores = entry["scores"][model]
    return number(None) if scores is None else number(scores["main"]) + reach(scores)
