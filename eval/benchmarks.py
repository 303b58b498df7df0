"""Benchmarks by name: the tasks of each, and how one is opened.

    local               folders of data in the repository (`eval.tasks.local`)
    mmeb-v1, mmeb-v2    36 sets of images; these, 18 of video and 24 of pages (`eval.tasks.mmeb`)
    mrb                 40 sets of GMR's reranking benchmark (`eval.tasks.mrb`)
    any other           of mteb by its own name, `MTEB(eng, v2)`, or a short one, `mteb-eng-v2`

Listing opens no file and needs no network. Sets of all but `local` come from the hub or a folder of copies; one that
cannot be had is a `MissingSet`, which a run names and leaves out.
"""

import argparse
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eval.files import DATA
from eval.tasks import mmeb, mrb
from eval.tasks.local import MACROLANGUAGES, Row, available, select
from eval.tasks.rows import TaskRow
from mmembed.errors import ConfigError

LOCAL, HUB = "local", "hub"
OURS = (LOCAL, "mmeb-v1", "mmeb-v2", "mrb")
OWN_CANDIDATES = ("Reranking", "VisionCentricQA", "VideoCentricQA")  # ends of mteb's types whose queries have some


@dataclass(frozen=True)
class MtebRow:
    """A task of mteb.

    Attributes:
        set: tasks of one set are one number in averages.
        task: of mteb, shared by all that ask for it.
    """

    name: str
    folder: str
    kind: str
    category: str
    modalities: tuple[str, ...]
    languages: tuple[str, ...]
    main_score: str
    group: str
    set: str
    task: Any
    overall: tuple[str, ...] = ("all",)

    @property
    def has_images(self) -> bool:
        return "image" in self.modalities


@dataclass(frozen=True)
class Benchmark:
    """What a run goes through.

    Attributes:
        build: a row's mteb task, its data not loaded. load: loads them; raises MissingSet.
        of_local: its tasks are folders of the data root.
        shows_rankings: its tasks keep the best documents of each query.
    """

    name: str
    rows: Sequence[TaskRow]
    build: Callable[[Any], Any]
    load: Callable[[Any], None]
    of_local: bool = False
    shows_rankings: bool = False


def find(options: argparse.Namespace) -> Benchmark:
    """The benchmark that was asked for, with the rows that `--tasks` and `--languages` leave.

    Raises:
        ConfigError: there is no such benchmark, task or language, or an option has no effect on it; the nearest is
            named.
    """
    name = options.benchmark
    if name == LOCAL:
        found = _local(options)
    elif name in ("mmeb-v1", "mmeb-v2"):
        found = _mmeb(name, options)
    else:
        found = _mrb(options) if name == "mrb" else _mteb(name, options)
    if not found.of_local:
        check_options(options, found)
        if options.tasks:
            found = replace(found, rows=named(found.rows, options.tasks))
    if options.languages:
        found = replace(found, rows=speaking(found.rows, options.languages))
    return found


def check_options(options: argparse.Namespace, benchmark: Benchmark) -> None:
    """Raises ConfigError: an option acts on `local` alone, or on rankings that a benchmark does not keep, or the source
    is no folder."""
    if options.source not in (None, HUB) and not Path(options.source).is_dir():
        raise ConfigError(f"--source {options.source}: neither '{HUB}' nor a folder")
    if options.split != "dev":
        raise ConfigError(f"--split: acts on local, and {benchmark.name} says what is evaluated; remove it")
    if options.data_root is not None:
        raise ConfigError(f"--data-root: acts on local; {benchmark.name} is read from --source FOLDER or the hub")
    if options.rankings and not benchmark.shows_rankings:
        raise ConfigError(f"--rankings: acts on local and mmeb, not on {benchmark.name}; remove it")


def named(rows: Sequence[TaskRow], patterns: Iterable[str]) -> list[TaskRow]:
    """The rows that names or globs match, each once, in the order of the patterns. Raises ConfigError."""
    chosen: dict[str, TaskRow] = {}
    for pattern in patterns:
        matches = [row for row in rows if fnmatch.fnmatchcase(row.name, pattern)]
        if not matches:
            raise ConfigError(f"--tasks: no task '{pattern}' here; {near(pattern, [row.name for row in rows])}")
        chosen |= {row.name: row for row in matches}
    return list(chosen.values())


def speaking(rows: Sequence[TaskRow], languages: Sequence[str]) -> list[TaskRow]:
    """The rows in one of the languages, codes of two or three letters. Raises ConfigError: no row is in one."""
    known = {code for row in rows for code in row.languages}
    for code in languages:
        if not known & same_language(code):
            raise ConfigError(f"--languages: no task here is in '{code}'; {near(code, known)}")
    wanted = set().union(*map(same_language, languages))
    return [row for row in rows if wanted & set(row.languages)]


def same_language(code: str) -> set[str]:
    """The codes that data of a language may have: of two letters, of three, and of its parts (`zh`: also `cmn`).

    Raises:
        ConfigError: it looks like no code.
    """
    from mteb.languages.iso_mappings import _get_iso1_to_iso3  # it has no public table of two letters

    if not re.fullmatch("[a-z]{2,3}", code):
        raise ConfigError(f"--languages {code}: no code of two or three letters, such as en or eng")
    longer = _get_iso1_to_iso3()
    if code in MACROLANGUAGES:
        return {code, MACROLANGUAGES[code]}
    whole = longer.get(code, code)
    return {code, whole, *(two for two, three in longer.items() if three == whole),
            *(part for part, macro in MACROLANGUAGES.items() if macro == whole)}  # fmt: skip


def near(name: str, known: Iterable[str]) -> str:
    """The nearest of hundreds of names, whatever the case of letters; of longer ones the beginning is compared too."""

    def alike(other: str) -> float:
        wanted, there = name.lower(), other.lower()
        return max(difflib.SequenceMatcher(None, wanted, there[:end]).ratio() for end in (len(wanted), len(there)))

    best = max(sorted(known), key=alike, default="")
    return f"did you mean '{best}'?" if alike(best) >= 0.6 else "--list shows what there is"


def listed(benchmark: Benchmark) -> str:
    """The tasks of a benchmark with group, metric and where the data lie."""
    lines = [("task", "group", "metric", "data"),
             *((row.name, row.group, row.main_score, row.folder) for row in benchmark.rows)]  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    shown = ["  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]])
             for line in lines]  # fmt: skip
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:], "", f"{len(benchmark.rows)} tasks"])


# Benchmarks -----------------------------------------------------------------------------------------------------------


def _local(options: argparse.Namespace) -> Benchmark:
    if options.source is not None:
        raise ConfigError("--source: acts on public benchmarks; local is read from --data-root")
    root = options.data_root or DATA
    rows = available(root)

    def build(row: Row) -> Any:
        from eval.mteb_tasks import build_task

        return build_task(row, root, options.split)

    chosen = select(rows, options.tasks) if options.tasks else rows
    return Benchmark(LOCAL, chosen, build, lambda task: task.load_data(), of_local=True, shows_rankings=True)


def _mmeb(name: str, options: argparse.Namespace) -> Benchmark:
    def build(row: mmeb.Set) -> Any:
        from eval.mmeb import build_task

        return build_task(row, _source(options))

    rows = mmeb.V1 if name == "mmeb-v1" else mmeb.V2

    def load(task: Any) -> None:
        from eval.sets import check_rankings

        task.load_data()
        check_rankings(task)

    return Benchmark(name, rows, build, load, shows_rankings=True)


def _mrb(options: argparse.Namespace) -> Benchmark:
    import mteb

    rows = [
        replace(_row(mteb.get_task(row.name)), group=f"{mrb.COLUMNS[one.column][0]}, {one.column}", set=one.name)
        for one in mrb.SETS
        for row in one.rows
    ]
    return Benchmark("mrb", rows, lambda row: deepcopy(row.task), lambda task: _open(task, options))


def _mteb(name: str, options: argparse.Namespace) -> Benchmark:
    benchmark = of_mteb(name)
    rows = [_row(task) for task in benchmark.tasks]

    def build(row: MtebRow) -> Any:
        task = deepcopy(row.task)
        if options.languages and not task.is_aggregate:
            codes = {code for language in options.languages for code in same_language(language) if len(code) == 3}
            task.filter_languages(sorted(codes))
            task.hf_subsets = [subset for subset in task.hf_subsets if subset in row.task.hf_subsets]
        return task

    return Benchmark(benchmark.name, rows, build, lambda task: _open(task, options))


def of_mteb(name: str) -> Any:
    """A benchmark of mteb by its name, an alias or the short form of either. Raises ConfigError: there is none."""
    names = short_names()
    if short(name) not in names:
        known = [benchmark.name for benchmark in names.values()] if "(" in name else [*OURS, *names]
        raise ConfigError(f"--benchmark: there is no '{name}'; {near(name, known)}")
    return names[short(name)]


def short_names() -> Mapping[str, Any]:
    """short name -> benchmark of mteb; a name comes before an alias."""
    import mteb

    benchmarks = mteb.get_benchmarks()
    aliases = {short(alias): benchmark for benchmark in benchmarks for alias in benchmark.aliases or ()}
    return {**aliases, **{short(benchmark.name): benchmark for benchmark in benchmarks}}


def short(name: str) -> str:
    """A name as one types it: `MTEB(eng, v2)` is `mteb-eng-v2`."""
    return re.sub(r"[^a-z0-9.&+]+", "-", name.lower()).strip("-")


def _row(task: Any) -> MtebRow:
    from eval.sets import is_ranking, parts

    metadata = task.metadata
    modalities = tuple(metadata.modalities)
    kind = metadata.type.lower()
    if all(map(is_ranking, parts(task))):
        kind = "reranking" if metadata.type.endswith(OWN_CANDIDATES) else "retrieval"
    languages = sorted({code.split("-")[0] for code in task.languages})
    path = metadata.dataset["path"] if not task.is_aggregate else f"{len(metadata.tasks)} sets"
    return MtebRow(metadata.name, path, kind, metadata.category or "t2t", modalities, tuple(languages),
                   metadata.main_score, metadata.type, metadata.name, task)  # fmt: skip


def _open(task: Any, options: argparse.Namespace) -> None:
    from eval.sets import check_rankings, open_task

    open_task(task, _source(options))
    check_rankings(task)


def _source(options: argparse.Namespace) -> Any:
    from eval.sets import Source

    return Source(None if options.source in (None, HUB) else Path(options.source))
