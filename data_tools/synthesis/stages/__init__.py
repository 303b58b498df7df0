"""The stages of a pipeline: a file each. `type` of an entry of `stages` is the name.

    item -> what is asked, in turns -> items            `AskingStage.work`, a generator function
    all items -> items, or why they (or documents of them) are left out        `SetStage.apply`

An item is a JSON object with an `id`, of one of three kinds, which its keys tell apart:

    documents   {"id", "content", ...}                       what there is to be found
    queries     {"id", "query", ...}                         what is looked for
    records     {"id", "query", "documents": [...], ...}     what is trained on (docs/data.md)

Besides, an item carries what one stage leaves for another, which takes it out again: `candidates`, documents that are
not judged yet, and `demonstrations`, labelled records that a prompt shows. A config in which none takes it is refused.

The constructor's arguments are the options of the block; one that names `below_root` is given the function that finds
files which options name. Nothing here depends on the order in which answers come, and
randomness comes from `Context.random`: the same items, settings and answers make the same items.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.files import digest
from data_tools.generators import Message
from mmembed.media import MediaStore
from mmembed.registry import Registry

Kind = Literal["documents", "queries", "records"]
KINDS: tuple[Kind, ...] = ("documents", "queries", "records")
Item = dict[str, Any]


class Unusable(Exception):
    """An answer that cannot be used. `kind` groups what is counted; asking again may give a better one."""

    def __init__(self, kind: str, found: str = "") -> None:
        super().__init__(f"{kind}: {found}" if found else kind)
        self.kind, self.found = kind, found


class Lost(Exception):
    """An ask that has no usable answer after all attempts; an item that does without catches it."""

    def __init__(self, kind: str, found: str = "") -> None:
        super().__init__(kind)
        self.kind, self.found = kind, found


@dataclass(frozen=True)
class Ask:
    """One question about an item.

    Attributes:
        name: of the question, unique among those of its item.
        messages: a chat.
        sample: an answer that is usable, of the usual length: the text, or the JSON where there is a schema. A run is
            estimated with it.
        read: makes a value of the answer: of its text, or of its JSON where there is a schema, which has been checked.
            Raises Unusable.
        schema: of the answer.
        max_tokens, temperature: of the answer; None takes the run's.
        language: ISO 639-1 code that texts of the answer have to be in; None takes any.
        optional: None stands for an answer that was lost; otherwise `Lost` is raised where the stage waits for it.
    """

    name: str
    messages: tuple[Message, ...]
    sample: Any
    read: Callable[[Any], Any] = lambda value: value
    schema: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    language: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Dropped:
    """An item that goes no further. `item` is shown as an example; `lost` says that it was to be kept."""

    item: Item
    reason: str
    found: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Trimmed:
    """A document that is taken out of a record, which goes on without it: `Dropped` of a part.

    item: id of the record.
    """

    item: str
    document: Mapping[str, Any]
    reason: str
    found: str = ""


# yields asks, is sent their values, returns items, or why the item goes no further
Work = Generator[Sequence[Ask], list[Any], Sequence[Item] | Dropped]


@dataclass
class Context:
    """What a stage knows of its run.

    Attributes:
        seed: of the run.
        media: opens pictures.
        folder: the stage's own, for what it computes. It is kept, so what lies there goes under digests of what it
            depends on (`mmembed.shards`).
        below_root: an absolute path of one in the config.
        name: of the stage among those of its run, whatever stands in front of it.
        notes: what the stage counts besides items, for the summary; of a function of the items alone.
    """

    seed: int
    media: MediaStore
    folder: Path
    below_root: Callable[[str], Path]
    name: str = ""
    notes: Counter[str] = field(default_factory=Counter)

    def random(self, *names: str) -> random.Random:
        """A generator of its own for a name: an item's id."""
        return random.Random(digest(self.seed, self.name, *names))


class Items:
    """Items of a file, one a line, read anew by each loop."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self._count = path, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Item]:
        with self.path.open("rb") as lines:
            for line in lines:
                yield json.loads(line)


class Stage:
    """Base of all.

    takes: kinds of items that it works on.
    version: raised when the stage makes something else of the same items, settings and answers.
    adds: what it leaves in items for a stage behind it.
    uses: what it takes out of items, where they have it; `needs` is what it cannot do without. Of an object, they may
        follow from its options.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[Kind]] = frozenset(KINDS)
    version: ClassVar[int] = 1
    adds: ClassVar[frozenset[str]] = frozenset()
    uses: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()

    def gives(self, kind: Kind) -> Kind:
        """The kind of items that it makes of one that it takes."""
        return kind

    def fingerprint(self) -> Any:
        """What its work depends on besides its options: contents of files that they name, as JSON."""
        return None

    def told(self, notes: Counter[str]) -> dict[str, Any]:
        """The numbers of the summary, from what `Context.notes` holds at the end."""
        return dict(+notes)


class AskingStage(Stage):
    """Base of stages that ask a language model about each item by itself."""

    def work(self, item: Item, context: Context) -> Work:
        """Yields asks, which are sent to the model together, and gets their values back in order; returns what is made
        of the item, or Dropped where that is nothing. Raises Lost, or lets it pass, for want of an answer."""
        raise NotImplementedError


class SetStage(Stage):
    """Base of stages that see all items: filters, selections, retrieval."""

    def apply(self, items: Items, context: Context) -> Iterator[Item | Dropped | Trimmed]:
        """Each item as it goes on, or why it does not, in the order of the items; documents that a record goes on
        without come before it."""
        raise NotImplementedError

    def sampled(self, item: Item, context: Context) -> Item:
        """What a run is estimated with in the place of an item, before anything is computed."""
        return item


STAGES: Registry[Stage] = Registry("data_tools.synthesis.stages", Stage, given={"below_root"})


def kind_of(item: Mapping[str, Any]) -> Kind:
    if "content" in item:
        return "documents"
    return "records" if "documents" in item else "queries"
