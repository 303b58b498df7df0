"""Says which tasks of two evaluations differ beyond noise, and puts any number of them into one table.

    python -m eval.compare before.json after.json --html compare.html --csv compare.csv

Systems are the models of all files, baselines last. The first is compared with each other one, task by task, on the
rows that `eval.run` keeps beside its results: a paired bootstrap gives the interval of the difference, a paired
randomization test its p (`eval.significance`), corrected over the tasks of a pair by Holm's method. A task differs
where that p is below .05. Results of other data, another part of them or other limits are no comparison: they are
refused, by name. A baseline that gives the same in several files stands once.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.files import read_json
from eval.rows import rows_file
from eval.significance import CONFIDENCE, Paired, holm, interval_of_means, paired, score
from eval.tables import markdown_table, number, reach
from mmembed.arguments import Parser
from mmembed.charts import differences, page_environment
from mmembed.errors import ConfigError, MmembedError

TEMPLATE = Path(__file__).with_name("compare_template.html")
LIMITS = ("benchmark", "split", "limit", "languages", "proxy")  # of a results file: what is evaluated, and how much
ABOUT = ("fingerprint", "main_score", "documents", "queries", "rows")  # of a task
LEVEL = 1 - CONFIDENCE
BETTER, WORSE, SAME, UNTESTED = "better", "worse", "no difference beyond noise", "not tested"
MARKS = {BETTER: "▲", WORSE: "▼", SAME: "", UNTESTED: "?"}


@dataclass(frozen=True)
class System:
    """A model of a results file.

    Attributes:
        scores: task -> its entry in the results, None where the model cannot do it.
        rows: task -> `statistic` and `values` of its rows, where they are kept.
    """

    label: str
    file: Path
    model: str
    provenance: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, Any] | None]
    rows: Mapping[str, tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Difference:
    """A system less the first one, on one task.

    Attributes:
        found: of the paired tests; None where one of the two has no rows, or not the same.
        p: of `found`, corrected over the tasks.
    """

    task: str
    difference: float
    found: Paired | None
    p: float | None
    verdict: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.compare", description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="results of eval.run; the first leads")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with the differences and their intervals")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a line for each task and system")
    options = parser.parse_args(arguments)
    try:
        tasks, systems = read(options.results)
        compared = {other.label: compare(systems[0], other, tasks) for other in systems[1:]}
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(tasks, systems, compared))
    if options.csv:
        write_csv(options.csv, tasks, systems, compared)
    if options.html:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        options.html.write_text(render(tasks, systems, compared), encoding="utf-8")
    return 0


# Reading --------------------------------------------------------------------------------------------------------------


def read(files: Sequence[Path]) -> tuple[dict[str, dict[str, Any]], list[System]]:
    """The tasks that all files have, and the systems of all of them.

    Raises:
        ConfigError: a file is none of `eval.run`, two were measured on different things, they share no task, there is
            one system alone, or rows are of another run than the results beside them.
    """
    results = [_results(file) for file in files]
    for file, one in zip(files[1:], results[1:], strict=True):
        check_comparable(files[0], results[0], file, one)
    shared = [name for name in results[0]["tasks"] if all(name in one["tasks"] for one in results)]
    if not shared:
        raise ConfigError(f"{' and '.join(map(str, files))}: no task is in all of them")
    tasks = {name: results[0]["tasks"][name] for name in shared}
    found: list[System] = []
    for file, one in zip(files, results, strict=True):
        found += [_system(file, one, model, shared) for model in one["models"]]
    systems = _labelled(_once(found))
    if len(systems) < 2:
        raise ConfigError(f"{files[0]}: holds {systems[0].model} alone; give another file, or evaluate two models")
    return tasks, systems


def check_comparable(first: Path, one: Mapping[str, Any], second: Path, other: Mapping[str, Any]) -> None:
    """Raises ConfigError naming everything that makes two results no comparison."""
    wrong = [f"{key} {one.get(key)} and {other.get(key)}" for key in LIMITS if one.get(key) != other.get(key)]
    for name in one["tasks"].keys() & other["tasks"].keys():
        pair = one["tasks"][name], other["tasks"][name]
        wrong += [f"{name}: {key} {pair[0].get(key)} and {pair[1].get(key)}" for key in ABOUT
                  if pair[0].get(key) != pair[1].get(key)]  # fmt: skip
    if wrong:
        raise ConfigError(f"{first} and {second} measure different things ({'; '.join(sorted(wrong))}); evaluate again")


def _results(file: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = read_json(file)
        results["models"].keys(), results["tasks"].keys()
        for entry in results["tasks"].values():
            entry["group"], [own["main"] for own in entry["scores"].values() if own is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: no results of eval.run ({error}); give what --output wrote") from error
    return results


def _system(file: Path, results: Mapping[str, Any], model: str, tasks: Sequence[str]) -> System:
    beside = rows_file(file)
    try:
        kept: Mapping[str, Any] = read_json(beside)["tasks"] if beside.exists() else {}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{beside}: no rows of eval.run ({error}); remove it, or evaluate again") from error
    scores = {name: results["tasks"][name]["scores"].get(model) for name in tasks}
    rows = {}
    for name, own in scores.items():
        values = kept.get(name, {}).get("scores", {}).get(model)
        if own is None or values is None:
            continue
        statistic = kept[name]["statistic"]
        if abs(score(list(values.values()), statistic) - own["main"]) > 1e-3:
            raise ConfigError(f"{beside}: rows of {name} are of another run than {file}; evaluate again")
        rows[name] = (statistic, values)
    return System(model, file, model, results["models"][model], scores, rows)


def _once(systems: Sequence[System]) -> list[System]:
    """Without baselines that gave the same before."""
    kept: list[System] = []
    for one in systems:
        mains = {name: own and own["main"] for name, own in one.scores.items()}
        if one.provenance["kind"] != "baseline" or not any(
            before.model == one.model and {name: own and own["main"] for name, own in before.scores.items()} == mains
            for before in kept
        ):
            kept.append(one)
    return kept


def _labelled(systems: Sequence[System]) -> list[System]:
    """Models before baselines; labels are names, with their file or the whole path where one name is several."""
    ordered = sorted(systems, key=lambda one: one.provenance["kind"] == "baseline")
    labels = [one.model.rstrip("/").split("/")[-1] for one in ordered]
    for longer in (lambda one: f" ({one.file.stem})", lambda one: f" ({one.model}, {one.file})"):
        taken = Counter(labels)
        labels = [label + longer(one) * (taken[label] > 1) for label, one in zip(labels, ordered, strict=True)]
    return [replace(one, label=label) for one, label in zip(ordered, labels, strict=True)]


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(first: System, other: System, tasks: Mapping[str, Any]) -> list[Difference]:
    """What the other system gains over the first, task by task where both have a score."""
    found: dict[str, tuple[float, Paired | None]] = {}
    for name in tasks:
        ours, theirs = other.scores[name], first.scores[name]
        if ours is not None and theirs is not None:
            found[name] = (ours["main"] - theirs["main"], _paired(other, first, name))
    corrected = holm({name: test.p for name, (_, test) in found.items() if test is not None})
    differences = []
    for name, (difference, test) in found.items():
        p = corrected.get(name)
        verdict = UNTESTED if p is None else SAME if p >= LEVEL else BETTER if difference > 0 else WORSE
        differences.append(Difference(name, difference, test, p, verdict))
    return differences


def _paired(one: System, other: System, task: str) -> Paired | None:
    if task not in one.rows or task not in other.rows:
        return None
    (statistic, ours), (_, theirs) = one.rows[task], other.rows[task]
    if ours.keys() != theirs.keys() or len(ours) < 2:
        return None
    return paired([ours[row] for row in theirs], list(theirs.values()), "mean" if statistic == "mean" else "spearman")


def overall(first: System, other: System, differences: Sequence[Difference]) -> dict[str, Any]:
    """The mean difference over tasks, with an interval over the rows of those whose score is a mean of rows."""
    tested = [one.task for one in differences if one.found and first.rows[one.task][0] == "mean"]
    rows = [[other.rows[task][1][row] - value for row, value in first.rows[task][1].items()] for task in tested]
    all_tested = len(tested) == len(differences)
    bounds = interval_of_means(rows) if rows and all_tested else None
    mean = sum(one.difference for one in differences) / len(differences) if differences else None
    counts = {verdict: sum(one.verdict == verdict for one in differences) for verdict in MARKS}
    return {"mean": mean, "interval": bounds, "tasks": len(differences), **counts}


def averages(tasks: Mapping[str, Any], system: System) -> dict[str, float | None]:
    """group -> mean of the main scores, None where the system lacks one of its tasks; `all` last."""
    groups: dict[str, list[float | None]] = {}
    for name, entry in tasks.items():
        own = system.scores[name]
        for group in (entry["group"], "all"):
            groups.setdefault(group, []).append(None if own is None else own["main"])
    everything = groups.pop("all")
    groups["all"] = everything
    return {
        group: None if None in values else sum(filter(None, values)) / len(values) for group, values in groups.items()
    }


# Tables ---------------------------------------------------------------------------------------------------------------

Compared = Mapping[str, Sequence[Difference]]


def leaderboard(tasks: Mapping[str, Any], systems: Sequence[System]) -> list[list[str]]:
    """Systems by groups of tasks, the best average first; those that lack tasks stand last."""
    means = {system.label: averages(tasks, system) for system in systems}
    groups = list(means[systems[0].label])
    ordered = sorted(means, key=lambda label: (means[label]["all"] is None, -(means[label]["all"] or 0.0)))
    head = ["system", *(f"{group} ({_count(tasks, group)})" for group in groups)]
    return [head, *([label, *(number(means[label][group]) for group in groups)] for label in ordered)]


def _count(tasks: Mapping[str, Any], group: str) -> int:
    return sum(group in ("all", entry["group"]) for entry in tasks.values())


def by_task(tasks: Mapping[str, Any], systems: Sequence[System], compared: Compared) -> list[list[str]]:
    """Tasks by systems; ▲ and ▼ differ from the first beyond noise, ? could not be tested."""
    verdicts = {label: {one.task: one.verdict for one in found} for label, found in compared.items()}
    lines = [["task", "score", *(system.label for system in systems)]]
    for name, entry in tasks.items():
        cells = []
        for system in systems:
            own, mark = system.scores[name], MARKS[verdicts.get(system.label, {}).get(name, SAME)]
            cells.append("–" if own is None else f"{number(own['main'])}{reach(own)}{' ' + mark if mark else ''}")
        lines.append([name, entry["main_score"], *cells])
    return lines


def by_difference(differences: Sequence[Difference]) -> list[list[str]]:
    """The tests of one pair."""
    lines = [["task", "difference", "95 % interval", "p", "p, Holm", "verdict"]]
    for one in differences:
        found = one.found
        bounds = "–" if found is None else f"{found.low:+.3f} to {found.high:+.3f}"
        tests = ["–", "–"] if found is None or one.p is None else [f"{found.p:.4f}", f"{one.p:.4f}"]
        lines.append([one.task, f"{one.difference:+.3f}", bounds, *tests, one.verdict])
    return lines


def markdown(tasks: Mapping[str, Any], systems: Sequence[System], compared: Compared) -> str:
    """The whole comparison."""
    parts = [markdown_table(leaderboard(tasks, systems)), markdown_table(by_task(tasks, systems, compared))]
    for system in systems[1:]:
        found = compared[system.label]
        parts.append(f"**{said(systems[0], system, found)}**\n\n{markdown_table(by_difference(found))}")
    changed = settings(systems)
    if changed:
        parts.append(markdown_table([["setting", *(system.label for system in systems)], *changed]))
    return "\n\n".join(parts)


def said(first: System, other: System, found: Sequence[Difference]) -> str:
    """The comparison in a sentence."""
    total = overall(first, other, found)
    if total["mean"] is None:
        return f"{other.label} and {first.label} share no task"
    bounds = "" if total["interval"] is None else f" ({total['interval'][0]:+.3f} to {total['interval'][1]:+.3f})"
    untested = f", {total[UNTESTED]} not tested" if total[UNTESTED] else ""
    count = f"{total['tasks']} task{'s' * (total['tasks'] > 1)}"
    return (
        f"{other.label} less {first.label}: {total['mean']:+.3f}{bounds} in the mean of {count}; "
        f"{total[BETTER]} better, {total[WORSE]} worse, {total[SAME]} without a difference beyond noise{untested}"
    )


def settings(systems: Sequence[System]) -> list[list[str]]:
    """What made the numbers and is not the same for all models of one kind."""
    ours = [system for system in systems if system.provenance["kind"] != "baseline"]
    keys = dict.fromkeys(key for system in ours for key in system.provenance)
    lines = []
    for key in keys:
        values = [str(system.provenance.get(key, "–")) for system in ours]
        if len(set(values)) > 1:
            shown = dict(zip((system.label for system in ours), values, strict=True))
            lines.append([key, *(shown.get(system.label, "–") for system in systems)])
    return lines


def write_csv(file: Path, tasks: Mapping[str, Any], systems: Sequence[System], compared: Compared) -> None:
    """One line for each task and system that has a score."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tested = {(label, one.task): one for label, found in compared.items() for one in found}
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["task", "group", "score", "system", "model", "value", "low", "high", "difference",
                         "difference_low", "difference_high", "p", "p_holm", "verdict"])  # fmt: skip
        for name, entry in tasks.items():
            for system in systems:
                own, test = system.scores[name], tested.get((system.label, name))
                if own is None:
                    continue
                about = [name, entry["group"], entry["main_score"], system.label, system.model, own["main"]]
                found = None if test is None else test.found
                said = ["", "", ""] if test is None else [found and found.p, test.p, test.verdict]
                writer.writerow([
                    *about, *(own.get("interval") or ["", ""]),
                    *(["", "", ""] if found is None else [found.difference, found.low, found.high]),
                    *said,
                ])  # fmt: skip


def render(tasks: Mapping[str, Any], systems: Sequence[System], compared: Compared) -> str:
    """The page as one HTML document."""
    pairs = []
    for system in systems[1:]:
        found = compared[system.label]
        drawn = [(one.task, one.difference, one.found.low, one.found.high, one.verdict) for one in found if one.found]
        pairs.append({"said": said(systems[0], system, found), "chart": differences(drawn),
                      "lines": by_difference(found), "label": system.label})  # fmt: skip
    return page_environment().from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        leaderboard=leaderboard(tasks, systems), tasks=by_task(tasks, systems, compared), pairs=pairs,
        first=systems[0].label, systems=[system.label for system in systems], settings=settings(systems),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
