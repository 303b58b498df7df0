"""What a file format can hold of a record, what it would lose, and the record without that.

A conversion may lose nothing that its user did not name. So each format that is written declares a `Holds`, and one
function finds what a record has beyond it: the refusal, `--drop`, the table of docs/convert.md and the tests of every
format's round trip follow from that declaration. Costs 10 to 20 us a record.

`meta.spelling` says how a file wrote what a record says in one way only (a null for a missing key, a list of one for a
string): it is kept for the way back into the same format, and is no information for another one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmembed.content import Audio, Image, Task, Text, Video, to_content
from mmembed.data.records import content_to_json, parse_content, parse_record, with_title, without_media
from mmembed.errors import RecordError

SPELLING = "spelling"
RECORD_FIELDS = ("instruction", "task", "source", "id", "labels", "meta")
DOCUMENT_FIELDS = {  # of a document -> its name among what may be dropped
    "title": "title",
    "score": "score",
    "id": "documents.id",
    "rationale": "rationale",
    "meta": "documents.meta",
}
MEDIA = ("image", "video", "audio")
LOSABLE = (
    *RECORD_FIELDS,
    *DOCUMENT_FIELDS.values(),
    "relevance",
    *MEDIA,
    "sampling_rate",
    "pictures",
    "order",
    "positives",
    "negatives",
    "documents",
    "content",
    "unjudged",
)
_TASKS = frozenset(task.value for task in Task)
_DEFAULTS = {"task": "retrieval", "source": ""}  # what a missing key says


@dataclass(frozen=True)
class Holds:
    """What a format can hold.

    Args:
        record: fields of a record, of `RECORD_FIELDS`; `meta` is then an object of anything.
        document: fields of a document, of `DOCUMENT_FIELDS`.
        meta, document_meta: keys of a `meta` that is no object of anything.
        relevance: `graded`; `binary`, relevant or not; `unknown`, of documents that nobody judged; `any` of them.
        sts: a query and one document with a similarity (task `sts`), whatever `relevance` says.
        media: kinds of media.
        pictures: most in one content; None: any number.
        interleaved: `any` order of texts and media; `around`, where two texts do not meet; `no`: media, then one text.
        sampling_rate: of sounds.
        positives, negatives: least and most a record; None: any number.
        ordered: documents keep their order; else positives come first, and each side keeps its own.
        scores: which documents of a record have one: `each` as it likes; a `side`, positives or negatives, wholly or
            not at all; `all` or none.
        needs: fields that a record cannot lack. Ids are made where they are missing.
        documents: a query may have some.
        contents: false of files that name ids only.
        unjudged: `queries` without documents, `documents` without a query.
    """

    record: frozenset[str] = frozenset()
    document: frozenset[str] = frozenset()
    meta: frozenset[str] = frozenset()
    document_meta: frozenset[str] = frozenset()
    relevance: Literal["binary", "graded", "unknown", "any"] = "binary"
    sts: bool = False
    media: frozenset[str] = frozenset()
    pictures: int | None = 1
    interleaved: Literal["no", "around", "any"] = "no"
    sampling_rate: bool = False
    positives: tuple[int, int | None] = (1, None)
    negatives: tuple[int, int | None] = (0, None)
    ordered: bool = False
    scores: Literal["each", "side", "all"] = "each"
    needs: frozenset[str] = frozenset()
    documents: bool = True
    contents: bool = True
    unjudged: frozenset[str] = frozenset()

    def losable(self) -> list[str]:
        """The names of what a record may have and this format cannot hold, as `--drop` takes them."""
        can = {*self.record, *(DOCUMENT_FIELDS[field] for field in self.document), *self.media}
        can |= {"relevance"} if self.relevance == "any" else set()
        can |= {"pictures"} if self.pictures is None or "image" not in self.media else set()
        can |= {
            name for name, (_, most) in (("positives", self.positives), ("negatives", self.negatives)) if most is None
        }
        held = {
            "order": self.interleaved == "any",
            "sampling_rate": self.sampling_rate or "audio" not in self.media,
            "documents": self.documents,
            "content": self.contents,
            "unjudged": len(self.unjudged) == 2,
        }
        can |= {name for name, is_held in held.items() if is_held}
        can |= set() if self.contents else {"title", *MEDIA, "sampling_rate", "pictures", "order"}
        can -= {"score"} if self.sts or self.scores != "each" else set()
        return [name for name in LOSABLE if name not in can]


def fitted(
    record: dict[str, Any], holds: Holds, allowed: frozenset[str], target: str
) -> tuple[dict[str, Any] | None, frozenset[str]]:
    """The record as a format can hold it, and what was dropped of it; None where that is all of it.

    Args:
        allowed: names of what may be dropped.
        target: the format's name.

    Raises:
        RecordError: it has more than the format holds and than may be dropped, or lacks what the format needs.
    """
    dropped: frozenset[str] = frozenset()
    while lost := losses(record, holds):
        refused = [name for name in lost if name not in allowed]
        if refused or dropped >= lost.keys():
            names = refused or list(lost)
            found = f"{', '.join(lost[name] for name in names)}: {target} cannot hold that"
            remedy = f"To leave it out say --drop {','.join(names)}"
            raise RecordError(record["where"], found, remedy, f"not held: {', '.join(names)}")
        dropped |= lost.keys()
        if "unjudged" in lost:
            return None, dropped
        record = _without(record, lost.keys(), holds)
    _complete(record, holds, target)
    return record, dropped


def losses(record: Mapping[str, Any], holds: Holds) -> dict[str, str]:
    """What a format cannot hold of a record: its name as `--drop` takes it -> where it stands."""
    documents = record.get("documents") or []
    alone = _alone(record)
    if alone is not None and alone not in holds.unjudged:
        return {"unjudged": "a document without a query" if alone == "documents" else "a query without documents"}
    if documents and not holds.documents:
        return {"documents": "documents"}
    lost = {key: key for key in RECORD_FIELDS if _beyond(record, key, holds.record, holds.meta)}
    pair = holds.sts and record.get("task") == Task.STS.value and len(documents) == 1
    if pair:
        lost.pop("task", None)
        if documents[0].get("score") is not None:  # one number has a place
            lost["score"] = "documents[0].score beside a similarity"
    if not holds.contents and ("query" in record or any("content" in document for document in documents)):
        lost["content"] = "the texts and media"
    if "query" in record and holds.contents:
        _of_content(record["query"], "query", holds, lost)
    held = holds.document if holds.contents else holds.document | {"title"}  # it is a part of the content
    for place, document in enumerate(documents):
        key = f"documents[{place}]"
        for field, name in DOCUMENT_FIELDS.items():
            if _beyond(document, field, held, holds.document_meta):
                lost.setdefault(name, f"{key}.{field}")
        if not pair and not _held_relevance(document, holds):
            lost.setdefault("relevance", f"{key}.relevance {document.get('relevance', 1)}")
        if "content" in document and holds.contents:
            _of_content(document["content"], key, holds, lost)
    if documents and not pair:
        _of_sides(documents, holds, lost)
    return lost


def sides(documents: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    """The positives and the others, each in their order."""
    positives = [document for document in documents if is_positive(document)]
    return positives, [document for document in documents if not is_positive(document)]


def positives_first(documents: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [document for side in sides(documents) for document in side]


def is_positive(document: Mapping[str, Any]) -> bool:
    """Also of a document that nobody judged."""
    relevance = document.get("relevance", 1)
    return relevance is None or relevance > 0


def normal(record: Mapping[str, Any], ordered: bool = True) -> dict[str, Any]:
    """What a record says, whatever it is spelled like: equal for equal records.

    Args:
        ordered: documents have an order; else positives are put first.
    """
    plain = {key: value for key, value in record.items() if key in RECORD_FIELDS and value is not None}
    plain = {key: value for key, value in plain.items() if value != _DEFAULTS.get(key)}
    query = record.get("query")
    if isinstance(query, Mapping) and query.get("instruction") is not None:
        plain["instruction"] = query["instruction"]
        query = {key: value for key, value in query.items() if key != "instruction"}
    if query is not None:
        plain["query"] = content_to_json(to_content(query))
    documents = list(record.get("documents") or [])
    plain["documents"] = [_normal_document(one) for one in (documents if ordered else positives_first(documents))]
    return _without_spelling(plain)


def check(record: Mapping[str, Any]) -> None:
    """Raises RecordError for what is right in no format: texts that are empty, a positive that is a negative, ...

    Unlike a record to train on it may lack a positive, judgements, documents, a query, and contents where all are ids.
    """
    where, documents = record["where"], record.get("documents") or []
    if not isinstance(documents, list) or not all(isinstance(one, Mapping) for one in documents):
        parse_record({"query": "", **record}, where)
    if not documents or "query" not in record:
        for key, content in _contents(record):
            parse_content(content, key, where)
        return
    judged = [{**one, "relevance": 1.0} if one.get("relevance", 1) is None else one for one in documents]
    task = record.get("task")
    if task is None or (isinstance(task, str) and task in _TASKS):  # an STS record needs no positive
        task = Task.STS.value
    parse_record({**record, "documents": judged, "task": task}, where)


def spell(name: str, item: dict[str, Any], original: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """A record or a document that knows how its row of a file differs from the one that would be written for it."""
    if original == written:
        return item
    write = {key: value for key, value in original.items() if key not in written or written[key] != value}
    without = [key for key in written if key not in original]
    return with_spelling(name, item, write=write, **({"without": without} if without else {}))


def with_spelling(name: str, item: dict[str, Any], **spelled: Any) -> dict[str, Any]:
    meta = item.get("meta", {})
    spellings = _mapping(meta.get(SPELLING))
    return {**item, "meta": {**meta, SPELLING: {**spellings, name: {**spelling_of(name, item), **spelled}}}}


def spelling_of(name: str, item: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a file of a format wrote this; empty where it came from elsewhere."""
    return _mapping(_mapping(_mapping(item.get("meta")).get(SPELLING)).get(name))


def respelled(
    name: str, item: Mapping[str, Any], written: dict[str, Any], still_says: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The row to write: as the file had it that the item comes from, where that still says the same.

    Args:
        still_says: whether a row, which it checks, says what the item says; may raise RecordError.
    """
    spelled = spelling_of(name, item)
    if not spelled:
        return written
    without = spelled.get("without")
    left = {key: value for key, value in written.items() if not (isinstance(without, list) and key in without)}
    row = {**left, **_mapping(spelled.get("write"))}
    try:
        return row if still_says(row) else written
    except RecordError:  # somebody wrote that spelling by hand
        return written


def meta_of(item: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that only another format has."""
    return {key: value for key, value in (item.get("meta") or {}).items() if key != SPELLING}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _alone(record: Mapping[str, Any]) -> Literal["queries", "documents"] | None:
    """What stands without the other side; of files of ids a record has neither text."""
    if "query" not in record and "id" not in record:
        return "documents"
    return None if record.get("documents") else "queries"


def _beyond(item: Mapping[str, Any], key: str, held: frozenset[str], keys: frozenset[str]) -> bool:
    value = item.get(key)
    if value is None or value == _DEFAULTS.get(key) or key in held:
        return False
    if key == "meta":
        return not meta_of(item).keys() <= keys
    return not (key == "title" and not value.strip())


def _held_relevance(document: Mapping[str, Any], holds: Holds) -> bool:
    relevance = document.get("relevance", 1)
    if holds.relevance == "any":
        return True
    if relevance is None or holds.relevance == "unknown":
        return relevance is None and holds.relevance == "unknown"
    return holds.relevance == "graded" or relevance in (0, 1)


def _of_content(content: Any, key: str, holds: Holds, lost: dict[str, str]) -> None:
    if isinstance(content, str):
        return
    parts = to_content(content)
    kinds = {type(part).__name__.lower() for part in parts} - {"text"}
    for kind in sorted(kinds - holds.media):
        lost.setdefault(kind, f"{key} with {'an' if kind != 'video' else 'a'} {kind}")
    count = sum(isinstance(part, Image) for part in parts)
    if "image" in holds.media and holds.pictures is not None and count > holds.pictures:
        lost.setdefault("pictures", f"{key} with {count} pictures")
    if not holds.sampling_rate and any(isinstance(part, Audio) and part.sampling_rate is not None for part in parts):
        lost.setdefault("sampling_rate", f"{key} with a sampling_rate")
    if kinds <= holds.media and _own_order(parts, holds):
        lost.setdefault("order", f"{key} with parts in an order of its own")


def _own_order(parts: Sequence[Any], holds: Holds) -> bool:
    if holds.interleaved == "around":
        return any(isinstance(one, Text) and isinstance(two, Text) for one, two in itertools.pairwise(parts))
    return holds.interleaved == "no" and isinstance(content_to_json(tuple(parts)), list)


def _of_sides(documents: Sequence[Mapping[str, Any]], holds: Holds, lost: dict[str, str]) -> None:
    both = sides(documents)
    for name, side, (_, most) in zip(("positives", "negatives"), both, (holds.positives, holds.negatives), strict=True):
        if most is not None and len(side) > most:
            lost[name] = f"{len(side)} {name}"
    if "score" in holds.document and holds.scores != "each":
        for group in both if holds.scores == "side" else (documents,):
            if len({document.get("score") is None for document in group}) > 1:
                lost["score"] = "scores of some documents only"


def _without(record: dict[str, Any], names: Any, holds: Holds) -> dict[str, Any]:
    """The record without what is lost."""
    kept = {key: value for key, value in record.items() if key not in names or key not in RECORD_FIELDS}
    if "content" in names and "query" in kept:
        kept = {"id": None} | kept  # a query still, which says so by its id
        del kept["query"]
    elif "query" in kept:
        kept["query"] = _lesser(kept["query"], "query", names, holds, record["where"])
    positives, negatives = sides(record.get("documents") or [])
    if "positives" in names:
        positives = positives[: holds.positives[1]]
    if "negatives" in names:
        negatives = negatives[: holds.negatives[1]]
    left = {id(document) for document in (*positives, *negatives)}
    documents = [document for document in record.get("documents") or [] if id(document) in left]
    kept["documents"] = [] if "documents" in names else documents
    kept["documents"] = [
        _lesser_document(document, f"documents[{place}]", names, holds, record["where"])
        for place, document in enumerate(kept["documents"])
    ]
    return kept


def _lesser_document(document: dict[str, Any], key: str, names: Any, holds: Holds, where: str) -> dict[str, Any]:
    kept = dict(document)
    if "content" in names:
        kept.pop("content", None)
        kept.pop("title", None)
    elif "title" in names and "content" in kept:  # it is read as a part of the text: only the border goes
        kept["content"] = with_title(kept, key, where)
    for field, name in DOCUMENT_FIELDS.items():
        if name in names:
            kept.pop(field, None)
    if "relevance" in names:
        kept["relevance"] = None if holds.relevance == "unknown" else float(is_positive(document))
    if "content" in kept:
        kept["content"] = _lesser(kept["content"], key, names, holds, where)
    return kept


def _lesser(content: Any, key: str, names: Any, holds: Holds, where: str) -> Any:
    kept = without_media(content, [kind for kind in MEDIA if kind in names])
    if kept is None:
        raise RecordError(
            where, f"{key} is nothing but what is to be dropped", "Remove the record, or choose another format", "empty"
        )
    if "pictures" in names and not isinstance(kept, str):
        pictures = 0
        parts = []
        for part in to_content(kept):
            pictures += isinstance(part, Image)
            if not isinstance(part, Image) or holds.pictures is None or pictures <= holds.pictures:
                parts.append(part)
        kept = content_to_json(tuple(parts))
    if "sampling_rate" in names and not isinstance(kept, str):
        parts = [Audio(part.source) if isinstance(part, Audio) else part for part in to_content(kept)]
        kept = content_to_json(tuple(parts))
    return _media_first(kept) if "order" in names else kept


def _media_first(content: Any) -> Any:
    """Pictures, then a video, then a sound, then all texts, a line each."""
    parts = to_content(content)
    ordered = [part for kind in (Image, Video, Audio) for part in parts if isinstance(part, kind)]
    text = "\n".join(part.text for part in parts if isinstance(part, Text))
    return content_to_json((*ordered, Text(text)) if text else tuple(ordered))


def _complete(record: Mapping[str, Any], holds: Holds, target: str) -> None:
    """Raises RecordError where a record lacks what a format needs."""
    documents = record.get("documents") or []
    if holds.contents and "query" not in record and "id" in record:
        remedy = "Name the files of the texts: --options queries=... --options corpus=..."
        raise RecordError(record["where"], f"ids without texts, which {target} needs", remedy, "no texts")
    if not holds.contents and (record.get("id") is None or any(one.get("id") is None for one in documents)):
        remedy = "Convert to beir first, where ids are made"
        raise RecordError(record["where"], f"there is no 'id', which {target} needs", remedy, "no id")
    if not documents or "query" not in record:
        return
    pair = holds.sts and record.get("task") == Task.STS.value
    for name, side, (least, _) in zip(
        ("positive", "negative"), sides(documents), (holds.positives, holds.negatives), strict=True
    ):
        if len(side) < least and not pair:
            found = f"{len(side) or 'no'} {name}, and {target} needs {least}"
            raise RecordError(record["where"], found, "Remove the record, or choose another format", f"no {name}")
    if "score" in holds.needs and any(document.get("score") is None for document in documents):
        remedy = "Score the documents first (python -m data_tools.score)"
        raise RecordError(record["where"], f"a document without 'score', which {target} needs", remedy, "no score")


def _contents(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if "query" in record:
        yield "query", record["query"]
    for place, document in enumerate(record.get("documents") or []):
        if "content" in document:
            key = f"documents[{place}]"
            yield key, with_title(document, key, record["where"])


def _normal_document(document: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in document.items() if value is not None and key not in ("content", "relevance")}
    if "title" in plain and not plain["title"].strip():
        del plain["title"]
    relevance = document.get("relevance", 1)
    plain["relevance"] = None if relevance is None else float(relevance)
    if "content" in document:
        content = document["content"]
        plain["content"] = content if isinstance(content, str) else content_to_json(to_content(content))
    return _without_spelling(plain)


def _without_spelling(item: dict[str, Any]) -> dict[str, Any]:
    meta = meta_of(item)
    return {key: value for key, value in item.items() if key != "meta"} | ({"meta": meta} if meta else {})
