"""Measures the papers' claims again: trains the arms of each with the nano backbone, and says what holds.

    python -m eval.claims --plan                                     # arms, seeds, hours; starts nothing
    python -m eval.claims --seeds 3 --data-root DATA --work runs/claims --write docs/claims.md
    python -m eval.claims --only mw_auc dcl_small_batch --seeds 2 --budget 50

Each arm and seed is trained by `python -m recipes.train_embedder` and measured by `python -m eval.claims.measuring`, in
processes of their own, --jobs at a time, and kept as one JSON file in --work. The same command after a stop computes
what is missing; a result of another config or data is computed again, and one of other code unless --any-code is given.
The table, written after each run, follows the rule in `eval.claims.verdicts`.

Exit status: 0 done, 1 some runs failed (the others are in the table), 2 refused, 130 stopped.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from eval.claims import page
from eval.claims.declaration import DECLARED, Claim, read_claims
from eval.claims.runs import Results, Run, RunFailed, Workers, data_of, distinct, estimate, lacking, planned
from eval.files import DATA
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

STEPS = 60


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        claims = with_enough_data(read_claims(options.only, options.claims), options)
        runs = planned(claims, options.seeds, options.budget, options.data_root)
        results = Results(options.work, page.results_beside(options.write) if options.write else None, options.any_code)
        show_plan(runs, results, options.jobs)
        if options.plan:
            return 0
        failed = work_through(claims, runs, results, options)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on with what is missing", file=sys.stderr)
        return 130
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failed else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m eval.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CLAIM", help="names of claims (default: all)")
    parser.add_argument("--claims", type=Path, default=DECLARED, metavar="FOLDER",
                        help="YAML files of other claims (default: those of the papers)")  # fmt: skip
    parser.add_argument("--seeds", type=_positive, default=3, help="runs of each arm (default 3)")
    parser.add_argument(
        "--budget", type=_positive, default=STEPS, metavar="STEPS", help=f"of each run (default {STEPS})"
    )
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N",
                        help="runs at a time, which share the cores: one a core is fastest (default 1)")  # fmt: skip
    parser.add_argument("--data-root", type=Path, default=DATA,
                        help="folder of the data sets (default: the slice in the repository)")  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/claims"), help="keeps results (default runs/claims)")
    parser.add_argument("--write", type=Path, metavar="PAGE",
                        help="the table as Markdown; plots and results in a folder beside it")  # fmt: skip
    parser.add_argument("--any-code", action="store_true", help="keep the results of other versions of the code, too")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--plan", action="store_true", help="say what would run and for how long, and end")
    action.add_argument("--no-runs", action="store_true", help="the table of the results that are kept; train nothing")
    options = parser.parse_args(arguments)
    options.work, options.data_root = options.work.absolute(), options.data_root.absolute()
    return options


def with_enough_data(claims: Sequence[Claim], options: argparse.Namespace) -> list[Claim]:
    """The claims that the data root is enough for; the others are named.

    Raises:
        ConfigError: a folder is missing, or a claim that was asked for by name has too little.
    """
    enough = []
    for claim in claims:
        reason = lacking(claim, options.data_root)
        if reason is None:
            data_of(claim, options.data_root)  # refuses what is missing before the first hour
            enough.append(claim)
        elif options.only:
            raise ConfigError(reason)
        else:
            print(f"left out: {reason}")
    return enough


def show_plan(runs: Sequence[Run], results: Results, jobs: int) -> None:
    """Claims, arms and seeds, what is there already, and the hours of the rest."""
    pairs = [(run, results.of(run)) for run in runs]
    for claim in dict.fromkeys(run.claim.name for run in runs):
        of_claim = [(run, result) for run, result in pairs if run.claim.name == claim]
        arms, seeds = (dict.fromkeys(getattr(run, key) for run, _ in of_claim) for key in ("arm", "seed"))
        done = sum(result is not None for _, result in of_claim)
        print(f"{claim:24s} {len(seeds)} seeds x {', '.join(arms)}; {done} of {len(of_claim)} runs are there")
    done_results = [result for _, result in pairs if result is not None]
    missing = distinct(run for run, result in pairs if result is None)
    basis = (
        "the runs that are there" if any(result["steps"] for result in done_results) else "the demo, on two quiet cores"
    )
    hours = estimate(missing, done_results) / 3600 / jobs
    print(f"{len(missing)} runs to do, about {hours:.1f} hours (estimated from {basis})", flush=True)


def work_through(
    claims: Sequence[Claim], runs: Sequence[Run], results: Results, options: argparse.Namespace
) -> list[RunFailed]:
    """Runs what is missing; the page after each run. Returns the failures."""
    failed: list[RunFailed] = []
    missing = [] if options.no_runs else [run for run in runs if results.of(run) is None]
    waiting = {claim.name: {run.key for run in missing if run.claim is claim} for claim in claims}
    about = about_runs(options)
    for claim in claims:
        if not waiting[claim.name]:
            show(found(claim, runs, results))
    total = len(distinct(missing))
    with Workers(options.jobs, options.work) as workers:
        for number, (run, outcome) in enumerate(workers.finished(missing), start=1):
            if isinstance(outcome, RunFailed):
                failed.append(outcome)
            seconds = "failed" if isinstance(outcome, RunFailed) else f"{sum(outcome['seconds'].values()):.0f} s"
            print(f"[{number}/{total}] {run.name}  {seconds}", flush=True)
            if options.write:
                page.write(options.write, [found(claim, runs, results) for claim in claims], about)
            for claim in (claim for claim in claims if run.key in waiting[claim.name]):
                waiting[claim.name].discard(run.key)
                if not waiting[claim.name]:
                    show(found(claim, runs, results))
    if options.write:
        page.write(options.write, [found(claim, runs, results) for claim in claims], about)
    return failed


def found(claim: Claim, runs: Sequence[Run], results: Results) -> page.Finding:
    """What the results that are kept say of a claim."""
    kept: dict[str, dict[int, dict[str, Any]]] = {}  # arm -> seed -> result
    for run in runs:
        result = results.of(run) if run.claim is claim else None
        if result is not None:
            kept.setdefault(run.arm, {})[run.seed] = result
    return page.found(claim, kept)


def about_runs(options: argparse.Namespace) -> list[str]:
    """What the page says of how its numbers were made, beside what its results say of themselves."""
    from eval.circumstances import versions

    root = (
        "; DATA stands for a folder of the whole data sets, the source of each being in the README of its folder in "
        "`data/`. Without `--data-root DATA` the command reads `data/`, which holds parts of some, and numbers differ"
    )
    return [
        f"- Command: `{command_of(options)}`{root if options.data_root != DATA else ''}.",
        f"- {platform.machine()}, {os.cpu_count()} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions().items())
        + ".",
    ]


def command_of(options: argparse.Namespace) -> str:
    """What gives these numbers elsewhere; the data root is told by the fingerprints of its folders."""
    command = ["python", "-m", "eval.claims", "--seeds", str(options.seeds), "--budget", str(options.budget)]
    command += ["--only", *options.only] if options.only else []
    command += ["--claims", options.claims.name] if options.claims != DECLARED else []
    command += ["--data-root", "DATA"] if options.data_root != DATA else []
    command += ["--write", str(options.write)] if options.write else []
    return shlex.join(command)


def show(finding: page.Finding) -> None:
    print(f"{finding.claim.name}: {finding.verdict}")
    for outcome in finding.outcomes:
        bounds = "" if outcome.low is None else f" [{outcome.low:+.4f}, {outcome.high:+.4f}]"
        difference = "-" if outcome.difference is None else f"{outcome.difference:+.4f}{bounds}"
        comparison = outcome.comparison
        print(f"    {page.title(outcome)}: {comparison.arm} - {comparison.than} = {difference}  {outcome.verdict}: "
              f"{outcome.reason}", flush=True)  # fmt: skip


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _stop(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: the running command ends with this one
    sys.exit(main())
