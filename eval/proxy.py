"""How numbers of `--proxy` go with those of whole tasks: correlations over systems that were evaluated both ways.

    python -m eval.run --model A --output a.json;  python -m eval.run --model A --proxy --output a-proxy.json;  ...
    python -m eval.proxy --whole a.json b.json --proxy a-proxy.json b-proxy.json

A proxy is easier than its task, since it has fewer documents, so its numbers are not those of the task; what counts is
whether it puts systems in the same order. Of each average and each task: Spearman's and Pearson's correlation over the
systems, a 95 % interval of Spearman's (bootstrap of systems), and the share of pairs of systems in the same order.

`--write` keeps that in `eval/proxies.json`, by benchmark: what a run with `--proxy` of the same size states.
Systems that are variants of one model go together more than strangers do; the file names them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from eval.files import read_json, write_json
from eval.tables import markdown_table
from mmembed.arguments import Parser
from mmembed.errors import ConfigError, MmembedError

MEASURED = Path(__file__).with_name("proxies.json")
FEWEST = 5  # systems that a correlation is stated for
SAMPLES, SEED = 2000, 0


@dataclass(frozen=True)
class Agreement:
    """How a proxy goes with its whole.

    Attributes:
        low, high: the interval of Spearman's correlation.
        ordered: share of pairs of systems in the same order.
    """

    systems: int
    spearman: float
    low: float
    high: float
    pearson: float
    ordered: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m eval.proxy", description="Say how well a proxy stands for whole tasks.")
    parser.add_argument("--whole", nargs="+", type=Path, required=True, metavar="FILE", help="results of eval.run")
    parser.add_argument("--proxy", nargs="+", type=Path, required=True, metavar="FILE",
                        help="of the same models in the same order, with --proxy")  # fmt: skip
    parser.add_argument("--write", action="store_true", help="keep it in eval/proxies.json, for runs to state")
    options = parser.parse_args(arguments)
    try:
        about, found = measure(options.whole, options.proxy)
    except MmembedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(found))
    if options.write:
        kept = read_json(MEASURED) if MEASURED.is_file() else {}
        kept[about["benchmark"]] = {**about, "agreement": {name: asdict(one) for name, one in found.items()}}
        write_json(MEASURED, kept)
        print(f"\n{MEASURED}")
    return 0


def measure(whole: Sequence[Path], proxies: Sequence[Path]) -> tuple[dict[str, Any], dict[str, Agreement]]:
    """What was compared, and the agreement of each average and each task.

    Raises:
        ConfigError: the files are not of the same models and benchmark, or of fewer than `FEWEST` systems.
    """
    if len(whole) != len(proxies):
        raise ConfigError(f"--whole has {len(whole)} files, --proxy {len(proxies)}; give one of each for every run")
    scores: dict[str, list[tuple[float, float]]] = {}
    systems: list[str] = []
    about: dict[str, Any] = {}
    for files in zip(whole, proxies, strict=True):
        one, other = (_results(file) for file in files)
        if one.get("proxy") is not None or other.get("proxy") is None:
            raise ConfigError(f"{files[0]} and {files[1]}: the first has to be of whole tasks, the second of a proxy")
        kept = {"benchmark": one["benchmark"], "proxy": other["proxy"]}
        if one["benchmark"] != other["benchmark"] or (about and about != kept):
            raise ConfigError(f"{files[0]} and {files[1]}: other benchmarks or proxies than the files before them")
        about = kept
        for model in one["models"]:
            if model not in other["models"]:
                raise ConfigError(f"{files[1]}: there is no {model}, which {files[0]} has")
            systems.append(_label(model, one["models"][model]))
            for name, pair in _pairs(one, other, model).items():
                scores.setdefault(name, []).append(pair)
    if len(systems) < FEWEST:
        raise ConfigError(f"{len(systems)} systems say nothing of an order; give at least {FEWEST}")
    found = {name: agreement(pairs) for name, pairs in scores.items() if len(pairs) >= FEWEST}
    return {**about, "systems": systems}, found


def agreement(pairs: Sequence[tuple[float, float]]) -> Agreement:
    """Of (whole, proxy) of each system.

    >>> agreement([(0.1, 0.2), (0.2, 0.4), (0.3, 0.6), (0.4, 0.7), (0.5, 0.9)]).ordered
    1.0
    """
    from scipy.stats import bootstrap, pearsonr, spearmanr

    whole, proxy = np.array(pairs, dtype=np.float64).T
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samples that hold one system alone have no correlation
        bounds = bootstrap(
            (whole, proxy), lambda a, b: spearmanr(a, b).statistic, paired=True, vectorized=False,
            n_resamples=SAMPLES, method="percentile", rng=np.random.default_rng(SEED),
        ).bootstrap_distribution  # fmt: skip
    low, high = np.nanpercentile(bounds, [2.5, 97.5])
    alike = [(whole[a] - whole[b]) * (proxy[a] - proxy[b]) > 0 for a, b in combinations(range(len(whole)), 2)]
    values = (spearmanr(whole, proxy).statistic, low, high, pearsonr(whole, proxy).statistic, np.mean(alike))
    return Agreement(len(pairs), *(round(float(value), 4) for value in values))


def table(found: Mapping[str, Agreement]) -> str:
    lines = [["", "systems", "Spearman [95 %]", "Pearson", "same order"]]
    lines += [[name, str(one.systems), f"{one.spearman:.3f} [{one.low:.3f}, {one.high:.3f}]", f"{one.pearson:.3f}",
               f"{one.ordered:.3f}"] for name, one in found.items()]  # fmt: skip
    return markdown_table(lines)


def statement(results: Mapping[str, Any]) -> list[str]:
    """What a run with `--proxy` says of its numbers."""
    kept = (read_json(MEASURED) if MEASURED.is_file() else {}).get(results["benchmark"])
    if kept is None or kept["proxy"] != results["proxy"]:
        return [f"a proxy of each task; how it goes with the whole was not measured on {results['benchmark']}: "
                "python -m eval.proxy does"]  # fmt: skip
    stated = [f"{group} {kept['agreement'][key]['spearman']:.2f}" for group in results["averages"]
              if (key := f"average, {group}") in kept["agreement"]]  # fmt: skip
    return [f"a proxy of each task; rank correlation of its averages with those of whole tasks, over "
            f"{len(kept['systems'])} systems: {', '.join(stated)}"]  # fmt: skip


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any], model: str) -> dict[str, tuple[float, float]]:
    """Averages and main scores of one model in both results, where both have them."""
    sides = []
    for results in (one, other):
        own = {f"average, {group}": means[model] for group, means in results["averages"].items()}
        tasks = {name: entry["scores"].get(model) for name, entry in results["tasks"].items()}
        sides.append({**own, **{name: score and score["main"] for name, score in tasks.items()}})
    return {name: (value, sides[1][name]) for name, value in sides[0].items()
            if value is not None and sides[1].get(name) is not None}  # fmt: skip


def _label(model: str, provenance: Mapping[str, Any]) -> str:
    cuts = [f"{key} {provenance[key]}" for key in ("truncate_dim", "layers") if provenance.get(key) is not None]
    return ", ".join([Path(model).name, *cuts])


def _results(file: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = read_json(file)
        results["models"].keys(), results["tasks"].keys(), results["averages"].keys(), results["benchmark"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: no results of eval.run ({error}); give what --output wrote") from error
    return results


if __name__ == "__main__":
    sys.exit(main())
