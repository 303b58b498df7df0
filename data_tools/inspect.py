"""What is in data, before anything is trained on it: report.json and report.html.

    python -m data_tools.inspect data/squad-en --format beir --output runs/squad
    python -m data_tools.inspect texts.jsonl --format documents
    python -m data_tools.inspect --config recipes/configs/embedder/demo.yaml
    python -m data_tools.inspect records.jsonl --models runs/trained mmembed-nano

PATH is a source as `data.train` of a training config has it: records or raw documents, in any format that is read. With
--config it is all train sources of a training run, and the page says of each what the objective would use, what would
go unused or be refused, and how many positives and negatives a query meets. With --models it is also what a language
model that was trained on the data writes and its base does not (`data_tools.inspection.exploration`).

Cost: one pass; 0.3 ms a record with two documents (200,000 in 61 s), so three quarters of an hour for ten million, and
each picture is read once. Memory does not grow with the source (410 MB at 50,000 records, 420 MB at 200,000): of torch,
of the model of languages, of the sample, and 80 MB at most for digests. Languages and near-duplicates are those of
--sample texts a side: 1 ms each. With --config the sources are cached as training
caches them. Exploration costs two models one token at a time.

Exit status: 0 done, 2 refused, 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.command import only_one, stop
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

if TYPE_CHECKING:
    from mmembed.config.blocks import DataConfig, EmbedderConfig

SAMPLE = 5000


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns its exit status."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        _check(options)
        for name in ("page", "reading", "statistics"):  # seconds: before the folder is held
            importlib.import_module(f"data_tools.inspection.{name}")
        with only_one(Path(options.output)):
            print(inspect(options))
    except OSError as error:
        print(f"error: {error.filename or options.output}: {error.strerror}", file=sys.stderr)
        return 2
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def inspect(options: argparse.Namespace) -> str:
    """Reads, counts and writes; returns what to print. The output folder is this process's alone."""
    from data_tools.inspection.page import samples, write_report
    from data_tools.inspection.reading import Reading
    from data_tools.inspection.statistics import Statistics

    output, config = Path(options.output), _config(options)
    data = config.data if config is not None else _data(options)
    usage = {} if config is None else _usage(config)
    entries, statistics = list[dict[str, Any]](), list[Statistics]()
    for source in data.train:
        statistics.append(Statistics(Reading(source, data), output, options.sample, options.seed))
        statistics[-1].read()
        entries.append({**statistics[-1].as_dict(), "samples": samples(statistics[-1])})
        if config is not None:
            entries[-1]["use"] = usage[source.name]
    explored = _explored(options)
    title = Path(options.config).name if config is not None else Path(options.path).name
    write_report(output, title, entries, statistics, explored)
    lines = [_line(entry) for entry in entries]
    return "\n".join([*lines, f"{output / 'report.html'}"])


def _parser() -> Parser:
    parser = Parser(
        prog="python -m data_tools.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="?", help="a file or folder of records or raw documents")
    parser.add_argument("--config", help="a training config: its train sources, and what its objective does with them")
    parser.add_argument("--format", default="jsonl", help="of PATH: jsonl (default), beir, parquet, documents, ...")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="key=value", help="of the format; with --config, of the config"
    )
    parser.add_argument("--root", help="where PATH, or the paths of the config, start")
    parser.add_argument("--media-root", help="where relative paths of pictures start; default the folder of the file")
    parser.add_argument("--output", default="runs/inspect", help="folder of the report (default runs/inspect)")
    parser.add_argument("--sample", type=int, default=SAMPLE, help=f"texts looked at closely (default {SAMPLE:,})")
    parser.add_argument("--models", nargs=2, metavar=("TRAINED", "BASE"), help="language models to compare")
    parser.add_argument("--generate", type=int, default=64, metavar="N", help="texts by them (default 64)")
    parser.add_argument("--start", default="", help="what these begin with (default nothing)")
    parser.add_argument("--device", default="cpu", help="of the models (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and texts (default 0)")
    return parser


def _check(options: argparse.Namespace) -> None:
    """Raises ConfigError for arguments that cannot go together, or have no effect."""
    if (options.path is None) == (options.config is None):
        raise ConfigError("give either a PATH, or a training run's --config")
    given = {"--format": options.format != "jsonl", "--media-root": options.media_root is not None}
    for flag in (flag for flag, there in given.items() if there and options.config is not None):
        raise ConfigError(f"{flag}: no effect with --config, whose sources say it themselves; remove it")
    if options.models is None and (options.generate != 64 or options.start or options.device != "cpu"):
        raise ConfigError("--generate, --start and --device have no effect without --models; remove them")
    for flag, value in (("--sample", options.sample), ("--generate", options.generate)):
        if value < 1:
            raise ConfigError(f"{flag}: found {value}; give a number above 0")


def _config(options: argparse.Namespace) -> EmbedderConfig | None:
    if options.config is None:
        return None
    from mmembed.plan import load_run

    root = [] if options.root is None else [f"data.root={options.root}"]
    config = load_run(options.config, [*options.options, *root])
    if not config.data.train:
        raise ConfigError(f"{options.config}: data.train: there is no source to inspect; add one")
    return config


def _data(options: argparse.Namespace) -> DataConfig:
    """PATH as the one source of a run."""
    import yaml

    from mmembed.config.blocks import DataConfig, SourceConfig

    settings = {}
    for one in options.options:
        key, equals, value = one.partition("=")
        if not equals or not key:
            raise ConfigError(f"--options: found '{one}'; write key=value, for example split=test")
        settings[key] = yaml.safe_load(value)
    source = SourceConfig(path=options.path, format=options.format, options=settings)
    return DataConfig(root=options.root, media_root=options.media_root, train=(source,))


def _usage(config: EmbedderConfig) -> dict[str, Any]:
    from data_tools.inspection.usage import usage_of

    found = usage_of(config)
    return {name: one if isinstance(one, str) else dataclasses.asdict(one) for name, one in found.items()}


def _explored(options: argparse.Namespace) -> dict[str, Any] | None:
    if options.models is None:
        return None
    from data_tools.inspection.exploration import Exploring, explore, load_pair

    trained, base = options.models
    how = Exploring(samples=options.generate, start=options.start, seed=options.seed, device=options.device)
    return {"trained": trained, "of": base, **explore(load_pair(trained, base, options.device), how)}


def _line(entry: dict[str, Any]) -> str:
    said = f"{entry['source']}: {entry['records']:,} records, {entry['bad']['count']:,} bad"
    use = entry.get("use")
    if use is None:
        return said
    if isinstance(use, str) or use["refused"]:
        return f"{said}; refused: {use if isinstance(use, str) else use['refused'][0]}"
    return (
        f"{said}; a query meets {use['positives']:g} positives, {use['own_negatives']:g} own and "
        f"{use['in_batch_negatives']:g} in-batch negatives"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)  # as Ctrl-C
    sys.exit(main())
