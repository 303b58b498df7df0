"""Turns a finished demo run into `report.json` and a page to look at, `report.html`.

    python -m eval.report --run runs/demo

Reads what the steps left in the run's folder (results and rankings of before and after, the trainer's state, what the
reranker did, the steps' times) and the pictures of the data root. The page is one file: charts are drawn as SVG,
pictures are inlined as small JPEGs, nothing is fetched. The queries that it shows are drawn by a hash of their id, not
by how well they went.
"""

import io
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet

from eval.examples import by_hash, inlined
from eval.files import REPOSITORY, read_json, read_jsonl, write_json
from eval.rows import DIGITS
from eval.tables import number
from mmembed.arguments import Parser
from mmembed.charts import curve, page_environment
from mmembed.errors import ConfigError, MmembedError

TEMPLATE = Path(__file__).with_name("report_template.html")
COLUMNS = ("before", "after", "bm25", "minilm")
QUERIES_A_TASK = 3
SHOWN = 5  # pictures a query
CUT = 100  # rankings are kept to this rank
EXAMPLES = 6  # queries whose documents before and after reranking are shown
STAGES = ("found by the embedder", "ordered by the reranker")  # the sides of each
SCORE_NAMES = {
    "ndcg_at_10": "nDCG@10",
    "map_at_1000": "MAP",
    "cosine_spearman": "Spearman",
    "v_measure": "V-measure",
    "accuracy": "accuracy",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.report", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a demo run")
    parser.add_argument("--data-root", type=Path, default=REPOSITORY / "data", help="where the pictures are")
    options = parser.parse_args(arguments)
    try:
        report = collect(options.run)
        pictures = picture_page(options.run, options.data_root, report)
        examples = read_json(options.run / "reranked/examples.json")[:EXAMPLES] if report["reranked"] else []
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(options.run / "report.json", report)
    page = options.run / "report.html"
    page.write_text(render(report, pictures, examples), encoding="utf-8")
    parts = [table(report), *([reranked_table(report)] if report["reranked"] else []), summary(report)]
    print("\n" + "\n\n".join(parts) + f"\n\nReport: {page}")
    return 0


def collect(run: Path) -> dict[str, Any]:
    """The numbers of a run: `before`, `after`, `bm25`, `minilm` by task, averages, cost, the curve of the loss.

    Raises:
        ConfigError: a step has left no result.
    """
    before, after = (read_json(needed(run / f"{name}.json")) for name in ("before", "after"))
    columns = {"before": ours(before), "after": ours(after)} | {
        name: name for name in ("bm25", "minilm") if name in before["models"]
    }
    source = {"after": after}
    tasks: dict[str, dict[str, Any]] = {}
    for name, entry in before["tasks"].items():
        scores = {column: main_score(source.get(column, before), name, model) for column, model in columns.items()}
        tasks[name] = {
            "group": entry["group"], "score": entry["main_score"], **dict.fromkeys(COLUMNS), **scores,
            **{key: entry[key] for key in ("documents", "queries", "rows") if key in entry},
            "data": entry["data"], "fingerprint": entry["fingerprint"],
        }  # fmt: skip
    steps = read_json(run / "steps.json") if (run / "steps.json").exists() else {}
    return {
        **{column: {name: task[column] for name, task in tasks.items()} for column in COLUMNS},
        "tasks": tasks,
        "averages": averages(tasks),
        **reranking(run / "reranked/results.json"),
        "seconds": round(sum(step["seconds"] for step in steps.values()), 1),
        "peak_rss_mb": max((step["peak_rss_mb"] for step in steps.values()), default=None),
        **training(run / "embedder/trainer_state.json"),
        "steps": {name: {key: step[key] for key in ("seconds", "peak_rss_mb")} for name, step in steps.items()},
        "models": {"before": before["models"], "after": after["models"]},
        "split": before["split"], "versions": before["versions"], "machine": before["machine"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def needed(path: Path) -> Path:
    if not path.exists():
        raise ConfigError(f"--run: there is no {path}; run recipes/demo.py, which ends with this report")
    return path


def ours(results: Mapping[str, Any]) -> str:
    """The name of the one model in the results that is no baseline."""
    return next(name for name, model in results["models"].items() if model["kind"] != "baseline")


def main_score(results: Mapping[str, Any], task: str, model: str) -> float | None:
    scores = results["tasks"][task]["scores"][model]
    return None if scores is None else float(scores["main"])


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """group -> mean of each column; None where a column lacks a task of the group."""
    means: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(task["group"] for task in tasks.values()):
        rows = [task for task in tasks.values() if task["group"] == group]
        means[group] = {"tasks": len(rows)}
        for column in COLUMNS:
            values = [row[column] for row in rows if row[column] is not None]
            means[group][column] = round(sum(values) / len(rows), DIGITS) if len(values) == len(rows) else None
    return means


def reranking(file: Path) -> dict[str, Any]:
    """What the reranker does to the candidates of the trained model, by task; nothing where none was trained."""
    if not file.exists():
        return {"reranked": {}}
    results = read_json(file)
    return {
        "reranked": {name: two_stages(entry) for name, entry in results["tasks"].items()},
        "reranked_average": two_stages(results["averages"]["all"]), "depth": results["first_stage"]["depth"],
    }  # fmt: skip


def two_stages(entry: Mapping[str, Any]) -> dict[str, Any]:
    """nDCG@10 of a task, or of an average: of the first stage, of the reranker, and of the best order."""
    (score,) = entry["scores"].values()
    return {
        "retrieved": entry["first_stage"]["ndcg_at_10"], "reranked": score["ndcg_at_10"], "ceiling": entry["ceiling"],
        "gain": score["gain"], "interval": [score.get("gain_low"), score.get("gain_high")],
    }  # fmt: skip


def training(state: Path) -> dict[str, Any]:
    """The course of the training from the trainer's own log: losses, dev scores, pairs a second (the median)."""
    history = read_json(needed(state))["log_history"]
    speeds = sorted(entry["pairs_per_second"] for entry in history if "pairs_per_second" in entry)
    return {
        "loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "dev": [[entry["step"], entry["eval_ndcg_at_10"]] for entry in history if "eval_ndcg_at_10" in entry],
        "pairs_per_second": speeds[len(speeds) // 2] if speeds else None,
    }


# Texts ----------------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Tasks by columns, each group followed by its average."""
    lines = [["task", "score", *COLUMNS]]
    for group, mean in report["averages"].items():
        rows = {name: task for name, task in report["tasks"].items() if task["group"] == group}
        lines += [
            [name, SCORE_NAMES.get(row["score"], row["score"]), *(number(row[column]) for column in COLUMNS)]
            for name, row in rows.items()
        ]
        if len(rows) > 1:
            lines.append([f"average, {group}", "", *(number(mean[column]) for column in COLUMNS)])
    return _laid_out(lines, 2)


def reranked_table(report: Mapping[str, Any]) -> str:
    """What the reranker does to the candidates of the trained model."""
    rows = {**report["reranked"], "average": report["reranked_average"]}
    lines = [[f"best {report['depth']} of the embedder", "retrieved", "reranked", "gain", "ceiling"]]
    lines += [
        [name, *(number(row[key]) for key in ("retrieved", "reranked")), f"{row['gain']:+.3f}", number(row["ceiling"])]
        for name, row in rows.items()
    ]
    return _laid_out(lines, 1)


def _laid_out(lines: Sequence[Sequence[str]], left: int) -> str:
    """Columns, the first `left` of them ragged on the right, under a line."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        padded = zip(line, widths, range(len(line)), strict=True)
        cells = (cell.ljust(width) if place < left else cell.rjust(width) for cell, width, place in padded)
        text.append("  ".join(cells))
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def summary(report: Mapping[str, Any]) -> str:
    parts = [f"{minutes(report['seconds'])} in all"]
    if report["peak_rss_mb"] is not None:
        parts.append(f"peak memory {report['peak_rss_mb'] / 1024:.2f} GB")
    if report["pairs_per_second"] is not None:
        parts.append(f"{report['pairs_per_second']:.0f} training pairs/s")
    return ", ".join(parts)


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


# Pictures -------------------------------------------------------------------------------------------------------------


def picture_page(run: Path, root: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For some queries of each text-to-image task: the first pictures before and after, and the right one."""
    rankings = [rankings_of(run / name) for name in ("before", "after")]
    shown = []
    for name, task in report["tasks"].items():
        if task["group"] != "image retrieval" or any(name not in ranking for ranking in rankings):
            continue
        before, after = (ranking[name] for ranking in rankings)
        documents = {row["_id"]: row.get("image") for row in read_jsonl(root / task["data"] / "corpus.jsonl")}
        queries = by_hash(before)[:QUERIES_A_TASK]
        wanted = {before[query]["relevant"][0] for query in queries}
        wanted |= {key for query in queries for side in (before, after) for key, _ in side[query]["top"][:SHOWN]}
        thumbnails = read_thumbnails(root / task["data"] / "images.parquet", {documents[key] for key in wanted})
        for query in queries:
            right = before[query]["relevant"]
            shown.append({
                "task": name, "text": before[query]["text"], "wanted": thumbnails[documents[right[0]]],
                "sides": [
                    {"name": side, "rank": ranking[query]["rank"],
                     "pictures": [{"source": thumbnails[documents[key]], "right": key in right}
                                  for key, _ in ranking[query]["top"][:SHOWN]]}
                    for side, ranking in (("before", before), ("after", after))
                ],
            })  # fmt: skip
    return shown


def rankings_of(folder: Path) -> dict[str, Any]:
    """The rankings of the model in a folder that is no baseline."""
    files = [path for path in sorted(folder.glob("*.json")) if path.stem not in ("bm25", "minilm")]
    if not files:
        raise ConfigError(f"--run: {folder} holds no rankings; run recipes/demo.py, which writes them")
    return dict(read_json(files[0]))


def read_thumbnails(table: Path, wanted: set[str | None]) -> dict[str | None, str]:
    """image id -> small JPEG as a data URL, transparent parts on white."""
    rows = pyarrow.parquet.read_table(table, columns=["image_id", "image"], filters=[("image_id", "in", list(wanted))])
    return {row["image_id"]: thumbnail(row["image"]["bytes"]) for row in rows.to_pylist()}


def thumbnail(encoded: bytes) -> str:
    return inlined(PIL.Image.open(io.BytesIO(encoded)))


# The page -------------------------------------------------------------------------------------------------------------


def render(
    report: Mapping[str, Any], pictures: Sequence[Mapping[str, Any]], examples: Sequence[Mapping[str, Any]] = ()
) -> str:
    """The page as one HTML document."""
    environment = page_environment()
    environment.filters |= {"number": number, "minutes": minutes}
    stages = {side["name"]: label for query in examples for side, label in zip(query["sides"], STAGES, strict=True)}
    groups = []
    for group, mean in report["averages"].items():
        rows = {name: task for name, task in report["tasks"].items() if task["group"] == group}
        groups.append({"name": group, **mean, "rows": rows})
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report, groups=groups, pictures=pictures, columns=COLUMNS, score_names=SCORE_NAMES, cut=CUT,
        loss=curve(report["loss"]), examples=examples, stages=stages,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
