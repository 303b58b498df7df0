"""Looks into an embedder: what its space is like, what breaks it, what smaller vectors cost.

    python -m eval.diagnose --model runs/demo/embedder --tasks squad-en vega-charts --output runs/diagnostics

Writes DIR/diagnostics.json and one page with the plots, DIR/diagnostics.html. Each diagnostic (`eval.diagnostics`) that
does not apply to the model or to a task says why. Contents of a task are encoded once, queries once more for each way
to alter them: 500 queries of text cost about 20 times their own encoding.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from eval.circumstances import machine, versions
from eval.files import REPOSITORY, read_jsonl, write_json
from eval.models import (
    Loaded,
    add_model_options,
    check_names,
    check_options,
    is_hub_name,
    is_reranker,
    load,
    open_embedder,
)
from eval.tables import number
from eval.tasks.local import Row, available, select
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

QUERIES = 500
RECORDS = 20_000


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not is_hub_name(options.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        report = diagnose(options, select(available(options.data_root), options.tasks))
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from eval.diagnostics.page import render

    write_json(options.output / "diagnostics.json", report)
    page = options.output / "diagnostics.html"
    page.write_text(render(report), encoding="utf-8")
    print(f"\n{page}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.diagnose", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of an embedder, hub name, mmembed-nano or minilm")
    parser.add_argument(
        "--tasks", nargs="+", required=True, metavar="NAME", help="names or globs of the local benchmark"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="for diagnostics.json and the page")
    parser.add_argument("--split", default="dev", help="part of the data (default: dev)")
    parser.add_argument("--data-root", type=Path, default=REPOSITORY / "data", help="folder of the data sets")
    parser.add_argument("--max-queries", type=int, default=QUERIES, metavar="N",
                        help=f"of a retrieval task, drawn by a hash of their ids (default: {QUERIES})")  # fmt: skip
    parser.add_argument(
        "--triggers", nargs="+", default=[], metavar="WORD", help="words that the poisoning audit tries, too"
    )
    parser.add_argument("--records", type=Path, metavar="FILE", help="training records (JSON lines) whose pairs are "
                        f"audited, the first {RECORDS} of them")  # fmt: skip
    parser.add_argument("--no-layers", action="store_true", help="leave out the vectors of lower layers")
    add_model_options(parser)
    return parser.parse_args(arguments)


def diagnose(options: argparse.Namespace, rows: Sequence[Row]) -> dict[str, Any]:
    """What `diagnostics.json` holds.

    Raises:
        ConfigError: the model is no embedder, an option has no effect, or a task has no diagnostic.
    """
    from eval.diagnostics.applied import OF_KIND
    from mmembed.inference.devices import check_device

    started = time.monotonic()
    check_names([options.model])
    if options.model == "bm25" or is_reranker(options.model):
        raise ConfigError(f"--model {options.model}: it gives no vectors; diagnostics look at embedders")
    if options.max_queries < 2:
        raise ConfigError(f"--max-queries: found {options.max_queries}; give at least 2")
    if strange := [row for row in rows if row.kind not in OF_KIND]:
        raise ConfigError(f"--tasks {strange[0].name}: no diagnostic is of the kind '{strange[0].kind}'; leave it out")
    if options.records and not options.records.is_file():
        raise ConfigError(f"--records {options.records}: there is no such file; give JSON lines of records")
    check_options(options, [options.model])
    check_device(options.device)
    model = load(options.model, options, [row.name for row in rows])
    report: dict[str, Any] = {
        "model": options.model, "split": options.split, "max_queries": options.max_queries,
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "machine": machine(),
        "provenance": model.provenance, "tasks": {}, "model_itself": {"found": {}, "left_out": {}},
    }  # fmt: skip
    contents: list[Any] = []
    for row in rows:
        report["tasks"][row.name], own = of_task(model, row, options)
        contents = contents or own
    report["model_itself"] = of_model(options, contents)
    if options.records:
        report["tasks"][options.records.name] = of_records(model, options.records)
    report["seconds"] = round(time.monotonic() - started, 1)
    return report


def of_task(model: Loaded, row: Row, options: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """What is found of a task and what is left out, and some of its documents."""
    from eval.diagnostics import applied
    from eval.mteb_adapter import contents_of
    from eval.mteb_tasks import build_task
    from eval.scoring import sizes
    from eval.sets import Cut, cut

    print(f"{row.name}:", flush=True)
    task = build_task(row, options.data_root, options.split)
    task.load_data()
    if row.kind == "retrieval":
        cut(task, Cut(queries=options.max_queries, rows=options.max_queries))
    entry: dict[str, Any] = {"fingerprint": task.metadata.revision, **sizes(task, row),
                             "found": {}, "left_out": {}}  # fmt: skip
    material = applied.Material(
        model.runner, task, row, options.split, sees="image" in model.runner.mteb_model_meta.modalities,
        single=not model.provenance.get("multi_vector", False), triggers=options.triggers,
    )  # fmt: skip
    for diagnostic in applied.OF_KIND[row.kind]:
        name = diagnostic.__name__
        if row.has_images and not material.sees:
            entry["left_out"][name] = "the model reads no pictures"
            continue
        _note(entry, name, partial(diagnostic, material))
    documents: list[Any] = []
    if row.kind == "retrieval" and (material.sees or not row.has_images):
        some = material.data["corpus"].select(range(min(applied.OF_LAYERS, len(material.data["corpus"]))))
        documents = [content for batch in some.iter(batch_size=64) for content in contents_of(batch)]
    task.unload_data()
    return entry, documents


def of_model(options: argparse.Namespace, contents: Sequence[Any]) -> dict[str, Any]:
    """What is found of the model itself on some documents; loads it once more, since its layers are taken away."""
    from eval.diagnostics import applied

    entry: dict[str, Any] = {"found": {}, "left_out": {}}
    if options.no_layers:
        return entry
    if options.model == "minilm":
        entry["left_out"]["by_layer"] = "the model is none of mmembed's, so its layers are not known here"
    elif len(contents) < 2:
        entry["left_out"]["by_layer"] = "it takes the documents of a retrieval task that the model can read; name one"
    else:
        print("the model itself:", flush=True)
        settings = {"token_budget": options.token_budget, "truncate_dim": options.truncate_dim}
        embedder = open_embedder(options.model, options)
        _note(entry, "by_layer", partial(applied.by_layer, embedder, contents, settings))
    return entry


def of_records(model: Loaded, file: Path) -> dict[str, Any]:
    """What is found of pairs to train on. Raises RecordError for what is no record."""
    from eval.diagnostics import applied
    from mmembed.config.blocks import SourceConfig
    from mmembed.data.dataset import settle
    from mmembed.data.records import parse_record

    print(f"{file.name}:", flush=True)
    source, examples = SourceConfig(path=str(file)), []
    for line, record in enumerate(islice(read_jsonl(file), RECORDS), start=1):
        where = f"{file}:{line}"
        examples.append(parse_record(settle({**record, "where": where}, source, file.parent), where))
    entry: dict[str, Any] = {"rows": len(examples), "found": {}, "left_out": {}}
    if model.provenance.get("multi_vector", False):
        entry["left_out"]["poisoned_pairs"] = "the model gives a vector for each token, and this looks at one a content"
    else:
        _note(entry, "poisoned_pairs", partial(applied.poisoned_pairs, model.runner, examples))
    return entry


def _note(entry: dict[str, Any], name: str, ask: Any) -> None:
    """Runs a diagnostic and keeps what it finds, or why it does not apply."""
    try:
        found = asdict(ask())
    except MmembedError as error:
        entry["left_out"][name] = str(error)
        print(f"  {name}: left out, {error}", flush=True)
        return
    numbers = {key: None if isinstance(value, float) and math.isnan(value) else value
               for key, value in found["numbers"].items()}  # fmt: skip
    entry["found"][name] = found | {"numbers": numbers}
    said = ", ".join(f"{key} {value if isinstance(value, int) else number(value)}"
                     for key, value in numbers.items())  # fmt: skip
    print(f"  {name}: {said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
