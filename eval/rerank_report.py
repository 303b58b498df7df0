"""What `eval.rerank` writes for people: a table in markdown and one page in HTML, from its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.tables import markdown_table, number
from eval.tasks import mrb
from mmembed.charts import page_environment, reliability

TEMPLATE = Path(__file__).with_name("rerank_template.html")
NAMES = {"ndcg_at_10": "nDCG@10", "mrr": "MRR", "map": "MAP", "p_at_1": "P@1", "auc": "AUC", "ece": "ECE"}
FIRST = "first_stage"  # as a column beside the models


def markdown(results: Mapping[str, Any]) -> str:
    """The tables as markdown: of MRB its columns first."""
    shown = short_names(results)
    first = results["first_stage"]
    parts = [f"# Rerankers over {first['depth']} candidates of {first['name']}\n"]
    if results["benchmark"] == "mrb":
        parts += [markdown_table([["nDCG@10", *mrb.COLUMNS, "all"], *mrb_rows(results)]) + "\n", *mrb_notes(results)]
    head = ["task", "stage", *NAMES.values(), "gain [95 %]", "ceiling"]
    rows = [row for group in results["averages"] for row in _group(results, group, shown)]
    parts.append(markdown_table([head, *rows]) + "\n")
    parts.append(
        f"{len(results['tasks'])} tasks, {results.get('seconds', 0)} s. Gain: nDCG@10 over the first stage, interval "
        "by a bootstrap of the queries. Ceiling: nDCG@10 of the best order of the candidates.\n"
    )
    parts += [f"* left out: {name} ({reason})" for name, reason in results["left_out"].items()]
    return "\n".join(parts) + "\n"


def _group(results: Mapping[str, Any], group: str, shown: Mapping[str, str]) -> list[list[str]]:
    """Rows of the tasks of a group, then of its average."""
    rows = []
    entries = {name: entry for name, entry in results["tasks"].items() if entry["group"] == group}
    for name, entry in entries.items():
        label = f"{name} (stands in)" if entry["stands_in"] else name
        for stage, score in {results["first_stage"]["name"]: entry[FIRST], **entry["scores"]}.items():
            rows.append([label, shown.get(stage, stage), *_cells(score), _gain(score), number(entry["ceiling"])])
    mean = results["averages"][group]
    if len(entries) != 1 and len(results["tasks"]) > 1:
        for stage, score in {results["first_stage"]["name"]: mean[FIRST], **mean["scores"]}.items():
            label = f"**average, {group}**"
            rows.append([label, shown.get(stage, stage), *_cells(score), _gain(score), number(mean["ceiling"])])
    return rows


def _cells(score: Mapping[str, Any] | None) -> list[str]:
    return [number(None if score is None else score.get(key)) for key in NAMES]


def _gain(score: Mapping[str, Any] | None) -> str:
    if score is None or score.get("gain") is None:
        return "–"
    if score.get("gain_low") is None:
        return f"{score['gain']:+.3f}"
    return f"{score['gain']:+.3f} [{score['gain_low']:+.3f}, {score['gain_high']:+.3f}]"


def mrb_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """First stage and models by the columns of MRB, and over all columns' sets; a column of stand-ins has a star."""
    shown = short_names(results)
    stages = {results["first_stage"]["name"]: None, **{name: name for name in results["models"]}}
    rows = []
    for label, model in stages.items():
        row = [shown.get(label, label)]
        for group in [*(f"{kind}, {column}" for column, (kind, _) in mrb.COLUMNS.items()), "all"]:
            mean = results["averages"].get(group)
            score = None if mean is None else mean[FIRST] if model is None else mean["scores"][model]
            text = number(None if score is None else score["ndcg_at_10"])
            row.append(f"{text}*" if text != "–" and _stands_in(results, group) else text)
        rows.append(row)
    return rows


def _stands_in(results: Mapping[str, Any], group: str) -> bool:
    return any(entry["stands_in"] for entry in results["tasks"].values() if group in (entry["group"], "all"))


def mrb_notes(results: Mapping[str, Any]) -> list[str]:
    """What each column was measured on."""
    notes = []
    for column, (kind, _) in mrb.COLUMNS.items():
        entries = {name: one for name, one in results["tasks"].items() if one["group"] == f"{kind}, {column}"}
        of = sum(one.column == column for one in mrb.SETS)
        unread = f"none of its {of} sets was read" if of > 1 else "its set was not read"
        sets = sorted({one["set"] for one in entries.values() if not one["stands_in"]})
        if sets:
            notes.append(f"* {column}: {len(sets)} of its {of} sets: {', '.join(sets)}")
        elif entries:
            notes.append(f"* {column}: {unread}; \\* local sets stand in: {', '.join(entries)}")
        else:
            notes.append(f"* {column}: {unread}, and no local set stands in")
    depth, name = results["first_stage"]["depth"], results["first_stage"]["name"]
    return [*notes, f"* candidates: the first {depth} of {name}; the paper's are the first 100 of GME-2B\n"]


def short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """model -> the last part of its path, where these differ."""
    short = {name: " > ".join(Path(part).name for part in name.split(" > ")) for name in results["models"]}
    return short if len(set(short.values())) == len(short) else {name: name for name in short}


# The page -------------------------------------------------------------------------------------------------------------


def render(results: Mapping[str, Any], examples: Sequence[Mapping[str, Any]] = ()) -> str:
    """The page as one HTML document.

    Args:
        examples: `task`, `text` and `image` of queries, and `sides`, a `name` and `documents` each.
    """
    environment = page_environment()
    environment.filters |= {"number": number, "gain": _gain}
    shown = short_names(results)
    groups = [
        {"name": group, **mean,
         "rows": {name: one for name, one in results["tasks"].items() if one["group"] == group}}
        for group, mean in results["averages"].items()
    ]  # fmt: skip
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results, groups=groups, shown=shown, names=NAMES, plots=plots(results), examples=examples,
        mrb=mrb_rows(results) if results["benchmark"] == "mrb" and results["tasks"] else None,
        mrb_columns=list(mrb.COLUMNS), mrb_notes=[note.strip("* \n") for note in mrb_notes(results)],
    )  # fmt: skip


def plots(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A reliability plot a model, of the pairs of all tasks together."""
    drawn = []
    for model in results["models"]:
        bins = pooled([one["scores"][model]["bins"] for one in results["tasks"].values() if one["scores"][model]])
        chart = reliability(bins)
        if chart is not None:
            pairs = sum(count for count, _, _ in bins)
            error = sum(count * abs(mean - share) for count, mean, share in bins) / pairs
            relevant = sum(count * share for count, _, share in bins) / pairs
            drawn.append({"model": model, "chart": chart, "pairs": pairs, "ece": error, "relevant": relevant})
    return drawn


def pooled(tasks: Sequence[Sequence[Sequence[float]]]) -> list[tuple[int, float, float]]:
    """The bins of several tasks as one."""
    together = []
    for own in zip(*tasks, strict=True):
        count = int(sum(one[0] for one in own))
        mean, share = (sum(one[0] * one[part] for one in own) / max(count, 1) for part in (1, 2))
        together.append((count, mean, share))
    return together
