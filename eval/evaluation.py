"""What `eval.run` does with its options: every system on every task, the results written after each.

A system is a model, or with `--rerank` a model with the reranker behind it, `first > reranker`, which orders the best
documents that the first found while it was evaluated itself. With `--cache` what was scored before is read
(`eval.score_cache`), and a task whose scores are all there is not even opened.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from eval.benchmarks import HUB, Benchmark, MtebRow
from eval.circumstances import machine, versions
from eval.cost import Estimate, Work, declared_work, duration, read_work, work_of, write_work
from eval.embedding_cache import Caching
from eval.files import write_json
from eval.models import Loaded, file_name, load
from eval.mteb_tasks import EmptyTask
from eval.rows import Kept
from eval.score_cache import NEWEST, ScoreCache
from eval.scoring import Scored, score, sizes
from eval.sets import PROXY, Cut, MissingSet, cut
from eval.significance import SEED
from eval.stages import cut as best_of
from eval.stages import only_part
from eval.summary import averages, cell
from eval.tasks.mmeb import FRAMES, Set
from eval.tasks.rows import RANKINGS, TaskRow

DEPTH = 100  # candidates of a query that a reranker orders


class Evaluation:
    """One run.

    Args:
        options: of `eval.run`, checked.
        benchmark: with the rows that are evaluated.
        names: of the models, baselines last.

    Raises:
        MmembedError: a model cannot be loaded.
    """

    def __init__(self, options: argparse.Namespace, benchmark: Benchmark, names: Sequence[str]) -> None:
        self.options, self.benchmark, self.rows = options, benchmark, benchmark.rows
        self.started = time.monotonic()
        self.depth: int = options.depth or DEPTH
        self.cut = PROXY if options.proxy else Cut(queries=options.limit, rows=options.limit)
        self.tasks = {row.name: benchmark.build(row) for row in self.rows}
        self.systems = self._systems(names)
        self.results: dict[str, Any] = {
            "benchmark": benchmark.name, **({"split": options.split} if benchmark.of_local else {}), "seed": SEED,
            "limit": options.limit, "languages": options.languages, "proxy": PROXY.told() if options.proxy else None,
            "created": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(), "machine": machine(),
            "models": {system.name: system.provenance for system in self.systems},
            "tasks": {}, "missing": {}, "left_out": {}, "averages": {},
        }  # fmt: skip
        self.kept = Kept(options.output, options.mteb)
        self.scores = ScoreCache(options.cache, versions()) if options.cache is not None else None
        self.abouts = {(system.name, row.name): about for row in self.rows for system in self.systems
                       if self.scores is not None and (about := self._about(system, row)) is not None}  # fmt: skip
        self.known = {place: found for place, about in self.abouts.items()
                      if self.scores is not None and (found := self.scores.get(about)) is not None}  # fmt: skip
        self.works: dict[str, Work | None] = {}
        self.computed: set[str] = set()  # tasks that were not read from the cache alone
        self.rankings: dict[str, dict[str, Any]] = {system.name: {} for system in self.systems}
        self.shown: list[dict[str, Any]] = []

    def _systems(self, names: Sequence[str]) -> list[Loaded]:
        tasks, options = [row.name for row in self.rows], self.options
        found = [load(name, options, tasks) for name in names]
        if options.share[0] > 0:
            return [model for model in found if caching(model) is not None]
        if options.rerank is None:
            if any(model.reranks for model in found) and any(row.kind == "retrieval" for row in self.rows):
                print("rerankers leave retrieval tasks out: give what finds their documents as --model and the "
                      "reranker as --rerank", file=sys.stderr)  # fmt: skip
            return found
        reranker = load(options.rerank, options, tasks)
        systems = []
        for model in found:
            systems.append(model)
            if not model.reranks and model.name in options.model:
                systems.append(behind(model, reranker, self.depth))
        return systems

    # Before the start -------------------------------------------------------------------------------------------------

    def estimate(self) -> Estimate:
        """What the tasks ask of the systems. Reads the data of `local` where nothing is known of them yet."""
        does = {system.name: {row.name for row in self.rows if self._computes(system, row)} for system in self.systems}
        wanted = set().union(*does.values())
        self.works = {row.name: self._work(row) for row in self.rows if row.name in wanted}
        models = [(system, does[system.name], store.encoded() if (store := caching(system)) is not None else None)
                  for system in self.systems]  # fmt: skip
        return Estimate(self.works, models, self.options.share[1])

    def _computes(self, system: Loaded, row: TaskRow) -> bool:
        return left_out(system, row) is None and (system.name, row.name) not in self.known

    def _work(self, row: TaskRow) -> Work | None:
        """Counted before, now, or declared by mteb; None: nobody knows."""
        task, key = self.tasks[row.name], self._work_key(row)
        work = read_work(key)
        if work is None and self.benchmark.of_local:
            try:
                task.load_data()
            except EmptyTask:
                write_work(key, Work({}))
                return Work({})
            work = self._count(task, row)
            task.unload_data()
        elif work is None and isinstance(row, MtebRow):
            work = declared_work(task, self.depth, self.cut.queries)
        return work

    def _count(self, task: Any, row: TaskRow) -> Work:
        """Of a task whose data are loaded: what is left of them, counted."""
        cut(task, self.cut)
        work = work_of(task, self.depth)
        write_work(self._work_key(row), work)
        return work

    def _work_key(self, row: TaskRow) -> list[Any]:
        return [self._about_task(row), self.depth, str(self.options.source)]

    # Running ----------------------------------------------------------------------------------------------------------

    def run(self, estimate: Estimate | None) -> dict[str, Any]:
        """The results, written after every task."""
        done: list[str] = []
        began = time.monotonic()
        for place, row in enumerate(self.rows, start=1):
            print(f"[{place}/{len(self.rows)}] {row.name}", end="", flush=True)
            found = self._task(row)
            done.append(row.name)
            left = estimate.left(done, time.monotonic() - began) if estimate is not None else None
            if found is not None:
                self.results["tasks"][row.name] = found
                print(f"  [{duration(left)} left]" if left and left > 60 else "", flush=True)
            if row.name in self.computed:
                self._write()
        self._write()
        if self.options.html is not None:
            from eval.run_page import render

            self.options.html.parent.mkdir(parents=True, exist_ok=True)
            self.options.html.write_text(render(self.results, self.shown), encoding="utf-8")
        if self.options.rankings:
            for name, ranking in self.rankings.items():
                write_json(self.options.rankings / f"{file_name(name)}.json", ranking, indent=None)
        self._tell_cached()
        return self.results

    def _task(self, row: TaskRow) -> dict[str, Any] | None:
        """The entry of a task; None where there is nothing to evaluate, which is said."""
        task = self.tasks[row.name]
        able = [system for system in self.systems if left_out(system, row) is None]
        known = {system.name: self.known.pop((system.name, row.name), None) for system in able}
        pages = self.options.html is not None and self.benchmark.shows_rankings and row.kind in RANKINGS
        if self._is_empty(row):
            print("  nothing for it in these data", flush=True)
            return None
        entry: dict[str, Any] | None = None
        if not able or pages or not all(known.values()):
            if not self._opened(task, row):
                return None
            if self.works.get(row.name) is None:
                self.works[row.name] = self._count(task, row)
            entry = self._describe(task, row)
        found: dict[str, Scored] = {}
        for system in able:
            asked = [other for other in able if other.first == system.name]
            before = known[system.name]
            if before is None or any(known[other.name] is None for other in asked):  # what it finds is not kept
                assert entry is not None, "the task was opened for what is not known"
                self.computed.add(row.name)
                scored = self._score(system, task, row, found, entry)
                found[system.name] = scored if asked else replace(scored, found={})
            else:
                kept, found[system.name] = before
                entry = entry or kept
            self._note(system, row, found[system.name], known[system.name] is None)
        assert entry is not None, "it was opened, or known"
        for system in self.systems:
            if (reason := left_out(system, row)) is not None:
                self.results["left_out"].setdefault(system.name, {})[row.name] = reason
        entry = {**entry, "scores": {system.name: found[system.name].numbers if system.name in found else None
                                     for system in self.systems}}  # fmt: skip
        for system in self.systems:
            print(f"  {system.name} {cell(entry, system.name)}", end="", flush=True)
        if pages:
            self._show(task, row)
        if task.data_loaded:
            task.unload_data()
        return entry

    def _score(
        self, system: Loaded, task: Any, row: TaskRow, found: Mapping[str, Scored], entry: Mapping[str, Any]
    ) -> Scored:
        candidates = best_of(found[system.first].found, self.depth) if system.first is not None else None
        scored = score(system, task, row, candidates=candidates, keeps_rankings=self.benchmark.shows_rankings)
        about = self.abouts.get((system.name, row.name))
        if self.scores is not None and about is not None:
            self.scores.put(about, entry, scored)
        return scored

    def _note(self, system: Loaded, row: TaskRow, scored: Scored, anew: bool) -> None:
        """Puts what is not in the results file where it belongs; of what was encoded `anew`, that it is kept now."""
        self.kept.add(row.name, system.name, scored.rows)
        meta = system.runner.mteb_model_meta
        name = meta.name if system.first is None else f"mmembed/{file_name(system.name)}"
        told = {"name": name, "revision": system.provenance.get("fingerprint") or "local"}
        self.kept.add_mteb(meta.model_copy(update=told), scored.result)
        if scored.ranked is not None:
            self.rankings[system.name][row.name] = scored.ranked
        if anew and (store := caching(system)) is not None:
            store.note((self.works.get(row.name) or Work({})).encoded)

    def _is_empty(self, row: TaskRow) -> bool:
        """Whether it was seen before that the data hold nothing for a task, which nobody named."""
        if not self.benchmark.of_local or row.name in (self.options.tasks or ()):
            return False
        work = read_work(self._work_key(row))
        return work is not None and not work.encoded

    def _opened(self, task: Any, row: TaskRow) -> bool:
        """Loads the data of a task; False where there are none, which is said and, of a public set, kept."""
        try:
            self.benchmark.load(task)
        except EmptyTask:
            if row.name in (self.options.tasks or ()):
                raise
            print("  nothing for it in these data", flush=True)
            return False
        except MissingSet as error:
            self.results["missing"][row.name] = str(error)
            print(f"  missing: {error}", flush=True)
            return False
        return True

    def _describe(self, task: Any, row: TaskRow) -> dict[str, Any]:
        """What the results say of a task whose data are loaded; cuts it to `--limit` or the proxy."""
        entry: dict[str, Any] = {"group": row.group, "main_score": row.main_score, "data": row.folder,
                                 "fingerprint": str(task.metadata.revision)}  # fmt: skip
        if isinstance(row, MtebRow) and row.set != row.name:
            entry["set"] = row.set
        if row.overall:
            entry["overall"] = list(row.overall)
        if isinstance(row, Set):
            entry["differs"] = task.differs
            if "frames" in row.modalities:
                entry["frames"] = FRAMES
        cut(task, self.cut)
        return {**entry, **sizes(task, row)}

    def _show(self, task: Any, row: TaskRow) -> None:
        """Some queries of a ranking for the page, with what systems put first."""
        from eval.run_page import examples

        found = {name: own[row.name] for name, own in self.rankings.items() if row.name in own}
        place = only_part(task) if found else None
        if place is not None:
            scores = self.kept.tasks.get(row.name, {"scores": {}})["scores"].get(next(iter(found)), {})
            self.shown += examples(row.name, place[1], found, scores)

    def _write(self) -> None:
        self.results["averages"] = averages(self.results)
        self.results["seconds"] = round(time.monotonic() - self.started, 1)
        if self.options.output:
            write_json(self.options.output, self.results)
        self.kept.write()

    # What is kept -----------------------------------------------------------------------------------------------------

    def _about_task(self, row: TaskRow) -> dict[str, Any]:
        """All that makes a task what it is."""
        return {"benchmark": self.benchmark.name, "task": row.name, "data": row.folder,
                "revision": str(self.tasks[row.name].metadata.revision), "split": self.options.split,
                "languages": self.options.languages, "cut": self.cut.told()}  # fmt: skip

    def _about(self, system: Loaded, row: TaskRow) -> dict[str, Any] | None:
        """All that makes a score; None: there is none, or not all of that is known, so none is kept."""
        task = self._about_task(row)
        from_copies = not self.benchmark.of_local and self.options.source not in (None, HUB)
        if left_out(system, row) is not None or from_copies or task["revision"] in (NEWEST, "None"):
            return None
        return {**task, "model": {key: value for key, value in system.provenance.items() if key != "path"}}

    def _tell_cached(self) -> None:
        if self.scores is None:
            return
        print(f"{self.scores.read:,} scores of tasks read from {self.options.cache}", flush=True)
        for system in self.systems:
            store = caching(system)
            if store is not None:
                print(f"{system.name}: {store.read:,} vectors read, {store.computed:,} computed", flush=True)


def behind(first: Loaded, reranker: Loaded, depth: int) -> Loaded:
    """The system of a model and a reranker that orders what it finds."""

    def lacks(row: TaskRow) -> str | None:
        return first.lacks(row) or reranker.lacks(row)

    stage = {"first_stage": {"name": first.name, "depth": depth, **first.provenance}}
    return replace(reranker, name=f"{first.name} > {reranker.name}", first=first.name, lacks=lacks,
                   provenance={**reranker.provenance, **stage})  # fmt: skip


def left_out(system: Loaded, row: TaskRow) -> str | None:
    """Why a system leaves a task out; None: it does it."""
    reason = system.lacks(row)
    if reason is None and system.reranks and system.first is None and row.kind != "reranking":
        return "nothing found its candidates"
    return reason


def caching(model: Loaded) -> Caching | None:
    """The cache of a model's vectors, if it has one."""
    embedder = getattr(model.runner, "embedder", None)
    return embedder if isinstance(embedder, Caching) else None
