"""What a maker of pairs has to provide, and where makers are found.

Unsupervised training has documents and no queries: a maker draws a query and a positive (and perhaps a negative) from
one document. It draws anew each time that a run comes to the document, by a generator of the run's seed, the number of
the visit and the document's own words. So the pairs do not depend on the number of processes and data workers, on the
neighbours in a batch, on where the files lie, or on a stop in between.

Costs: a generator, 10 us, and what the maker draws, for each pair; documents are kept once, as any record is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mmembed.content import Content, Document, Example, Text
from mmembed.data.format_base import FORMATS
from mmembed.errors import ConfigError, RecordError
from mmembed.registry import Registry

if TYPE_CHECKING:
    from mmembed.config.blocks import SourceConfig


@dataclass(frozen=True, slots=True)
class Pair:
    """What is drawn of one document."""

    query: Content
    positive: Content
    negatives: tuple[Content, ...] = ()


class PairMaker:
    """Base of all makers. The constructor's arguments are the maker's options.

    Attributes:
        gives: what its pairs carry beside texts, as `RecordDataset.fields` names it: `negatives`, `image`.
        apart: the two sides are nearly the same text and differ by dropout too: each is encoded whole, with masks of
            its own, where other inputs have a common beginning computed once.
        by_dropout: the two sides differ by dropout alone, so that a model without any would learn nothing of them.
        learns: it needs statistics of all documents before the first pair: see `count`, `keep`, `use`.
    """

    name: ClassVar[str]
    gives: ClassVar[frozenset[str]] = frozenset()
    apart: ClassVar[bool] = False
    by_dropout: ClassVar[bool] = False
    learns: ClassVar[bool] = False

    @property
    def grades(self) -> tuple[float, ...]:
        """The relevances that its pairs have."""
        return (1.0, 0.0) if "negatives" in self.gives else (1.0,)

    def lacks(self, text: str) -> tuple[str, str] | None:
        """Why no pair can be drawn of a document, and the kind of that for the count; None where one can."""
        return None

    def draw(self, text: str, generator: np.random.Generator) -> Pair:
        """A pair of a document that `lacks` nothing."""
        raise NotImplementedError

    def count(self, text: str) -> None:
        """Called once with each document that is used, while the source is read."""

    def keep(self, folder: Path) -> None:
        """Writes what was counted beside the cached records. Raises ConfigError where it is no use."""

    def use(self, folder: Path) -> None:
        """Opens what `keep` wrote."""

    def check(self, document: Example) -> None:
        """Raises RecordError where no pair can be drawn of a document."""
        lacking = self.lacks(text_of(document))
        if lacking is not None:
            found, kind = lacking
            raise RecordError(
                document.where,
                f"no pair by '{self.name}': {found}",
                "To go on without such documents set data.on_bad_record: skip",
                kind,
            )

    def make(self, document: Example, seed: int) -> Example:
        """The pair of one visit to a document, as an example.

        The positive's id stands for the document: where it comes twice in a batch, its crops are no negatives of each
        other.
        """
        text = text_of(document)
        own = hashlib.blake2b(text.encode(), digest_size=8).digest()
        generator = np.random.default_rng((seed, document.visit, int.from_bytes(own, "little")))
        pair = self.draw(text, generator)
        negatives = [Document(negative, 0.0) for negative in pair.negatives]
        documents = (Document(pair.positive, id=f"document {own.hex()}"), *negatives)
        return dataclasses.replace(document, query=pair.query, documents=documents)


PAIR_MAKERS: Registry[PairMaker] = Registry("mmembed.data.pair_makers", PairMaker)


def maker_of(source: SourceConfig, ignored: Collection[str] = ()) -> PairMaker | None:
    """The maker of a source's pairs; None of a source whose records have queries.

    Args:
        ignored: `data.ignore_fields`.

    Raises:
        ConfigError: an unknown maker or option, pairs of a format that has queries, raw documents without pairs, a
            maker that needs all documents first on a stream, one that draws what is to be ignored.
    """
    try:
        return _maker_of(source, ignored)
    except ConfigError as error:
        raise ConfigError(f"data source '{source.name}': {error}") from None


def _maker_of(source: SourceConfig, ignored: Collection[str]) -> PairMaker | None:
    raw = FORMATS.get(source.format).raw
    if source.pairs is None:
        if raw:
            raise ConfigError(
                f"format '{source.format}' gives raw documents, which have no queries; say how pairs are made of them, "
                f"for example pairs: random_crops (there are {', '.join(PAIR_MAKERS.classes())})"
            )
        return None
    maker = PAIR_MAKERS.build(source.pairs)
    if not raw:
        raise ConfigError(
            f"pairs '{maker.name}' + format '{source.format}': its records have queries and documents already; remove "
            "pairs to train on them, or give raw documents (format: documents, for example the corpus.jsonl of a "
            "BEIR folder)"
        )
    if maker.learns and source.streaming:
        raise ConfigError(
            f"pairs '{maker.name}' + streaming: it counts the words of all documents before the first pair; remove "
            "streaming"
        )
    for field in sorted(maker.gives & set(ignored) - {"negatives"}):  # these may stay unused
        raise ConfigError(
            f"pairs '{maker.name}' + data.ignore_fields '{field}': it draws nothing else; remove one of them"
        )
    return maker


def text_of(document: Example) -> str:
    """The text of a raw document."""
    (part,) = document.query
    assert isinstance(part, Text), "formats of raw documents give one text"
    return part.text


def code_of(maker: PairMaker | None) -> str:
    """The files that decide which documents a maker takes and what it counts; for the key of a cache."""
    if maker is None:
        return ""
    modules = {inspect.getmodule(kind) for kind in type(maker).__mro__ if issubclass(kind, PairMaker)}
    files = sorted({str(module.__file__) for module in modules if module is not None})
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
