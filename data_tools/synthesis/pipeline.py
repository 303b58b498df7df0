"""The stages of a run one behind another: each makes a file of items of the file before it.

    OUTPUT/records.jsonl       what the last stage made (documents.jsonl, queries.jsonl where those are what it makes)
    OUTPUT/left_out.jsonl      what was left out: stage, reason, what was found, the item, or the document and of which
    OUTPUT/summary.json        counts of each stage, and of what was asked
    OUTPUT/work/               items of each stage, and all answers

A stage whose items, settings and generator are those of before is passed over, whatever made the items; not so one
that lost answers to a generator that could not give them: the same command asks for those again. Files are put in place
whole.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.command import TooMuchLost, training_lines, write_lines
from data_tools.files import digest, write_whole
from data_tools.generators import GENERATORS, Generator
from data_tools.synthesis.answers import Answers
from data_tools.synthesis.asking import Desk, Spent, ask_all, results
from data_tools.synthesis.by_workers import ask_by_workers, desk_of
from data_tools.synthesis.inputs import Inputs, collect, media_of
from data_tools.synthesis.settings import Step, SynthesisConfig, steps
from data_tools.synthesis.stages import AskingStage, Context, Dropped, Item, Items, SetStage, Trimmed, kind_of
from mmembed.data.records import parse_record
from mmembed.errors import MmembedError, RecordError
from mmembed.media import MediaStore
from mmembed.progress import bar

EXAMPLES = 3  # of what a stage left out, in the summary
_ENCODER = json.JSONEncoder(ensure_ascii=False)


class Run:
    """A run in its output folder, which is this process's alone."""

    def __init__(self, config: SynthesisConfig, output: Path) -> None:
        self.config, self.output, self.work = config, output, output / "work"
        self.work.mkdir(exist_ok=True)
        self.media: MediaStore = media_of(config)
        self.steps = steps(config)
        self._running: tuple[Any, Generator] | None = None  # the generator that is started, and its block
        self._starting = 0.0  # seconds that generators took to start, of the stage at work

    def __call__(self) -> str:
        """Carries all stages out; returns what was made, as lines.

        Raises:
            GeneratorDown: a generator answers nothing any more; what it answered is kept.
            TooMuchLost: a stage lost more than `max_lost` of its items.
        """
        inputs = collect(self.config, self.media, self.work)
        items, key, reports = inputs.items, inputs.key, list[dict[str, Any]]()
        with Answers(self.work / "answers.jsonl") as answers:
            budget = self.config.budget
            spent = Spent(len(answers), answers.prompt_tokens + answers.tokens, budget.requests, budget.tokens)
            try:
                for step in self.steps:
                    report = self._carry_out(step, items, key, answers, spent)
                    reports.append(report)
                    items, key = Items(self._folder(step) / "items.jsonl", report["out"]), report["items"]
            finally:
                self._stop()
            asked = {"answers": len(answers), "prompt_tokens": answers.prompt_tokens, "answer_tokens": answers.tokens}
        return self._finish(items, inputs, reports, asked)

    def _carry_out(self, step: Step, items: Items, key: str, answers: Answers, spent: Spent) -> dict[str, Any]:
        """The report of a stage whose items are there, made now or before."""
        folder = self._folder(step)
        identity = "" if step.generator is None else digest(GENERATORS.build(step.generator).fingerprint())
        sampling = self.config.sampling.model_dump(mode="json")
        asking = [identity, sampling, self.config.attempts] if isinstance(step.stage, AskingStage) else []
        key = digest(
            key, step.title, step.block, step.stage.version, step.stage.fingerprint(), self.config.seed, asking
        )
        note = folder / "report.json"
        if note.exists():
            report: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
            if report["key"] == key and not report["unanswered"]:
                return report
            note.unlink()
        folder.mkdir(exist_ok=True)
        began, tokens, count, self._starting = time.monotonic(), answers.tokens, len(answers), 0.0
        if isinstance(step.stage, AskingStage):
            desk = desk_of(self.config, step, self.media, folder, answers, identity)
            context = desk.context
            if self.config.ray is not None:
                ask_by_workers(self.config, self.steps.index(step), step, desk, items, self.work)
            report = self._asked(step, desk, items, spent)
        else:
            assert isinstance(step.stage, SetStage)
            context = Context(self.config.seed, self.media, folder, self.config.below_root, step.title)
            report = self._written(step, items, step.stage.apply(items, context))
        seconds = time.monotonic() - began - self._starting
        report |= {"key": key, "name": step.name, "kind": step.gives, "seconds": round(seconds, 3)}
        report |= {
            "notes": step.stage.told(context.notes),
            "asked": len(answers) - count,
            "tokens": answers.tokens - tokens,
        }
        write_whole(note, json.dumps(report, ensure_ascii=False).encode())
        return report

    def _asked(self, step: Step, desk: Desk, items: Items, spent: Spent) -> dict[str, Any]:
        with bar(step.name, len(items), " items") as shown:
            try:
                ask_all(desk, items, lambda: self._started(step.generator), spent, self.config.max_lost, shown)
            except TooMuchLost as lost:
                raise TooMuchLost(f"read: {len(items):,} items", f"stage {step.name}: {lost}") from None
        desk.context.notes.clear()  # of looks at items before all of their answers were there
        report = self._written(step, items, _flat(results(desk, items)))
        report["unusable"] = dict(desk.unusable)
        report |= {"unanswered": len(desk.failed), "asks": desk.asks, "asks_lost": desk.lost}
        return report

    def _written(self, step: Step, items: Items, made: Iterator[Item | Dropped | Trimmed]) -> dict[str, Any]:
        """Puts the items of a stage in place, and beside them what it left out."""
        report: dict[str, Any] = {"in": len(items), "out": 0, "left_out": 0, "lost": 0, "unusable": {}, "unanswered": 0}
        report |= {"asks": 0, "asks_lost": 0}
        content = hashlib.blake2b(digest_size=16)
        reasons, trimmed = Counter[str](), Counter[str]()
        examples: dict[str, list[Any]] = {}
        folder, seen = self._folder(step), set[str]()

        def lines(left_out: BinaryIO) -> Iterator[bytes]:
            for one in made:
                if isinstance(one, dict) and one["id"] in seen:
                    one = Dropped(one, "duplicate id")
                if isinstance(one, Dropped | Trimmed):
                    what = (
                        {"item": one.item} if isinstance(one, Dropped) else {"of": one.item, "document": one.document}
                    )
                    left_out.write(_line({"stage": step.name, "reason": one.reason, "found": one.found, **what}))
                    if len(examples.setdefault(one.reason, [])) < EXAMPLES:
                        examples[one.reason].append({"found": one.found, **what})
                    (reasons if isinstance(one, Dropped) else trimmed)[one.reason] += 1
                    report["left_out"] += isinstance(one, Dropped)
                    report["lost"] += isinstance(one, Dropped) and one.lost
                    continue
                seen.add(one["id"])
                report["out"] += 1
                line = _line(one)
                content.update(line)
                yield line

        with (folder / "left_out.jsonl").open("wb") as left_out:
            write_lines(folder / "items.jsonl", lines(left_out))
        report["items"] = content.hexdigest()  # what the next stage works on
        return {**report, "reasons": dict(reasons), "trimmed": dict(trimmed), "examples": examples}

    def _started(self, block: Any) -> Generator:
        """A generator that is ready; another one is stopped first."""
        if self._running is not None and self._running[0] is not block:
            self._stop()
        if self._running is None:
            generator = GENERATORS.build(block)
            began = time.monotonic()
            self._running = (block, generator)
            generator.start(self.media)
            self._starting += time.monotonic() - began
        return self._running[1]

    def _stop(self) -> None:
        if self._running is not None:
            self._running[1].close()
            self._running = None

    def _folder(self, step: Step) -> Path:
        return self.work / step.title

    def _finish(self, items: Items, inputs: Inputs, reports: list[dict[str, Any]], asked: dict[str, Any]) -> str:
        """Puts what was made in place; returns it as lines."""
        kind = self.steps[-1].gives
        file = self.output / f"{kind}.jsonl"
        write_lines(file, _checked(items))
        write_lines(self.output / "left_out.jsonl", _all_lines(self._folder(step) for step in self.steps))
        read = {"items": len(inputs.items), "left_out": inputs.left_out, "first": inputs.first}
        stages = [{key: value for key, value in one.items() if key not in ("key", "items")} for one in reports]
        summary = {"read": read, "stages": stages, "asked": asked, "made": {"kind": kind, "items": len(items)}}
        write_whole(self.output / "summary.json", json.dumps(summary, ensure_ascii=False, indent=1).encode())
        lines = [*_told(inputs, reports, asked), f"{file}: {len(items):,} {kind}"]
        if kind == "records" and len(items):
            lines += training_lines(self.output, ["{path: records.jsonl}"], _media_files(items))
        for report in reports:
            if complaint := self._too_much(report):
                raise TooMuchLost("\n".join(lines), complaint)
        return "\n".join(lines)

    def _too_much(self, report: dict[str, Any]) -> str:
        """What to say where a stage lost more than it may; empty where it did not."""
        lost = ""
        if report["lost"] > self.config.max_lost * report["in"]:
            what = max(report["reasons"], key=report["reasons"].get)
            lost = f"{report['lost']:,} of {report['in']:,} items ... (most of all: {what})"
        elif report["asks_lost"] > self.config.max_lost * report["asks"]:
            lost = f"the answers to {report['asks_lost']:,} of {report['asks']:,} questions ..."
        if not lost:
            return ""
        lost = lost.replace(" ...", f", more than max_lost {self.config.max_lost:g}")
        again = "; the same command asks again for what was not answered" if report["unanswered"] else ""
        return f"stage {report['name']} lost {lost}; see {self.output / 'left_out.jsonl'}{again}"


def _checked(items: Items) -> Iterator[bytes]:
    """Lines of items; records are read as training will read them.

    Raises:
        MmembedError: a stage made a record that training cannot read.
    """
    for item in items:
        if kind_of(item) == "records":
            try:
                parse_record(item, f"{items.path.parent.name}: record '{item['id']}'")
            except RecordError as error:
                raise MmembedError(f"{error} (this is a fault of the stage that made it)") from None
        yield _line(item)


def _told(inputs: Inputs, reports: list[dict[str, Any]], asked: dict[str, Any]) -> list[str]:
    lines = [f"read: {len(inputs.items):,} items"]
    lines[0] += "".join(f", {count:,} left out ({reason})" for reason, count in inputs.left_out.most_common())
    for report in reports:
        line = f"{report['name']}: {report['in']:,} items -> {report['out']:,} {report['kind']}"
        line += f" ({1 - report['left_out'] / report['in']:.1%} kept)" if report["left_out"] else ""
        line += "".join(f", {count:,} {reason}" for reason, count in Counter(report["reasons"]).most_common())
        if report["asked"]:
            seconds = max(report["seconds"], 0.01)
            rates = f"{report['asked'] / seconds:,.1f} answers/s, {report['tokens'] / seconds:,.0f} tokens/s"
            line += f"; {report['asked']:,} answers, {rates}"
        if report["unusable"]:
            counts = ", ".join(f"{count:,} {kind}" for kind, count in Counter(report["unusable"]).most_common())
            line += f"; unusable answers: {counts}"
        lines.append(line)
        for reason, count in Counter(report["trimmed"]).most_common():
            lines.append(f"    documents taken out of records, {reason}: {count:,}")
        lines += [f"    {note}: {count:,}" for note, count in sorted(report["notes"].items())]
    if asked["answers"]:
        tokens = f"{asked['prompt_tokens']:,} tokens of prompts, {asked['answer_tokens']:,} of answers"
        lines.append(f"asked in all: {asked['answers']:,} answers, {tokens}")
    return lines


def _flat(outcomes: Iterator[list[Item] | Dropped]) -> Iterator[Item | Dropped]:
    for outcome in outcomes:
        if isinstance(outcome, Dropped):
            yield outcome
        else:
            yield from outcome


def _all_lines(folders: Iterator[Path]) -> Iterator[bytes]:
    for folder in folders:
        with (folder / "left_out.jsonl").open("rb") as lines:
            yield from lines


def _media_files(items: Items) -> list[str]:
    """Files of the pictures that records show."""
    from data_tools.synthesis.templates import pictures_of

    found: set[str] = set()
    for item in items:
        for content in (item["query"], *(document["content"] for document in item["documents"])):
            found.update(source.split("#")[0] for source in pictures_of(content))
    return sorted(found)


def _line(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", errors="replace") + b"\n"
