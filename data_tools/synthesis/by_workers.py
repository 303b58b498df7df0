"""The questions of a stage asked by workers of a Ray cluster, each with a generator of its own.

    OUTPUT/work/asked/TASK.jsonl      answers of a worker, until this process has taken them over into answers.jsonl

A task is a run of items, about which a worker asks what one process would (`ask_all`). What the stage makes of items
and answers is made afterwards by the run's own process, as ever: records do not depend on who asked. A worker that is
killed loses what was in flight, and so does the run's process, which takes over what it finds when it starts again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from data_tools.generators import GENERATORS, Sampling
from data_tools.synthesis.answers import Answers
from data_tools.synthesis.asking import Desk, Missing, Spent, ask_all
from data_tools.synthesis.inputs import media_of
from data_tools.synthesis.settings import Step, SynthesisConfig, steps
from data_tools.synthesis.stages import AskingStage, Context, Item, Items
from mmembed.media import MediaStore
from mmembed.progress import bar
from mmembed.workers import spread

MOST = 256  # items of a task: what engines answer at a time, so that they do not wait for the last ones too often
TASKS = 4  # of a worker at least, where there are few items


def desk_of(
    config: SynthesisConfig, step: Step, media: MediaStore, folder: Path, answers: Answers, identity: str
) -> Desk:
    """What asks on behalf of a stage of a run, in whichever process."""
    assert isinstance(step.stage, AskingStage), "only these ask"
    context = Context(config.seed, media, folder, config.below_root, step.title)
    sampling = config.sampling.model_dump()
    return Desk(step.stage, context, answers, identity, config.attempts, Sampling(**sampling))


@dataclass(frozen=True)
class Inquiry:
    """What a worker has to know to ask about the items of a stage.

    Attributes:
        number: of the stage.
        items: their file; `starts` of the tasks in it, in bytes, and `size`, items of each.
        work: folder of the run.
        identity: digest of the generator.
    """

    config: SynthesisConfig
    number: int
    items: Path
    starts: tuple[int, ...]
    size: int
    work: Path
    identity: str

    def begin(self) -> Callable[[int], dict[str, str]]:
        """Starts the generator. What asks about a task, and gives the questions that had no answer, with why."""
        step, media = steps(self.config)[self.number], media_of(self.config)
        known = Answers(self.work / "answers.jsonl", read_only=True)
        assert step.generator is not None, "the stage asks"
        generator = GENERATORS.build(step.generator)
        generator.start(media)

        def ask(task: int) -> dict[str, str]:
            with Answers(self.file(task), known) as answers:
                desk = desk_of(self.config, step, media, self.work / step.title, answers, self.identity)
                ask_all(desk, self.of(task), lambda: generator, Spent(0, 0, None, None), 1.0, tqdm(disable=True))
            return desk.failed

        return ask

    def of(self, task: int) -> list[Item]:
        """The items of a task."""
        with self.items.open("rb") as file:
            file.seek(self.starts[task])
            return [json.loads(line) for line in itertools.islice(file, self.size)]

    def file(self, task: int) -> Path:
        return self.work / "asked" / f"{task:06d}.jsonl"


def ask_by_workers(config: SynthesisConfig, number: int, step: Step, desk: Desk, items: Items, work: Path) -> None:
    """Has workers ask what is missing; afterwards every answer is there, or `desk.failed` says why it is not.

    Raises:
        GeneratorDown, as MmembedError: a worker's generator answers nothing any more; what was answered is kept.
    """
    assert config.ray is not None, "called where there is one"
    (work / "asked").mkdir(exist_ok=True)
    for left in sorted((work / "asked").glob("*.jsonl")):  # of a process that was killed
        _take_over(left, desk.answers)
    workers = config.ray.used
    size = max(1, min(MOST, -(-len(items) // (TASKS * workers.count))))
    starts, missing = list[int](), list[int]()
    with items.path.open("rb") as file:
        at = 0
        for row, line in enumerate(file):
            if row % size == 0:
                starts.append(at)
            at += len(line)
            task = row // size
            if (not missing or missing[-1] != task) and _unanswered(desk, json.loads(line)):
                missing.append(task)
    inquiry = Inquiry(config, number, items.path.absolute(), tuple(starts), size, work.absolute(), desk.identity)
    with bar(f"{step.name} (workers)", len(missing) * size, " items") as shown:
        for task, failed in spread(missing, inquiry.begin, workers):
            _take_over(inquiry.file(task), desk.answers)
            desk.failed |= failed
            shown.update(size)


def _unanswered(desk: Desk, item: Item) -> bool:
    try:
        desk.outcome(item)
    except Missing:
        return True
    return False


def _take_over(file: Path, answers: Answers) -> None:
    """Adds a worker's answers to those of the run."""
    with Answers(file) as theirs:
        for key in theirs:
            answer = theirs.get(key)
            if answer is not None and key not in answers:
                answers.add(key, answer)
    file.unlink()
