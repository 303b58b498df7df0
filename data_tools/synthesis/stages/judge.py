"""Graded judgements of query and document, one ask a pair: labels for training, or a filter of labels that are there.

The grades are those of TREC's deep-learning tracks, and the criteria follow UMBRELA (arXiv 2406.06519, figure 1): what
is the query after, how well does the document serve that, can it be trusted. The prompt is ours (templates/judge.yaml);
UMBRELA asks for the grade alone, `reason: true` for a sentence before it, which goes into the document's rationale.
With several samples a pair is asked about that often with other seeds, and the majority counts (self-consistency), of
grades that are as frequent the lowest one, or the median.

The summary tells how far to trust it: of samples the share of pairs in which all agree, and Krippendorff's alpha
(ordinal); of pairs that have a label Cohen's kappa of relevant or not, and with grades above 1 the quadratic weighted
one.

Cost: candidates x samples requests an item, which share the prompt up to the document.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_tools.synthesis.agreement import alpha, kappa
from data_tools.synthesis.stages import Ask, AskingStage, Context, Dropped, Item, Kind, Lost, Work
from data_tools.synthesis.templates import Template, pictures_of, text_of
from data_tools.synthesis.wording import filler, shortened
from mmembed.content import to_content
from mmembed.errors import ConfigError, MmembedError
from mmembed.registry import Count, Positive

_VARIABLES = ("query", "document", "instruction", "levels", "reason", "query_pictures", "document_pictures")
_SAMPLES, _LABELS = "samples ", "label and grade "  # of notes that `told` makes numbers of
_REASON = 400  # characters
Judged = tuple[int, str | None, list[int]]  # the grade, its reason, the grades of all samples


class Judge(AskingStage):
    """Judges documents of a query.

    Args:
        what: the candidates that `retrieve` found, which become documents behind those of the record; or the record's
            own documents.
        use: labels: a grade becomes the document's relevance. filter: labels stay, and documents whose label the grade
            contradicts are left out. Of either a record goes on if it has a positive.
        positive_from: grades below it are no positives: as labels they are 0, and a filter leaves positives with such a
            grade out, and negatives with others. `meta.judge` of a document holds the grades as they were given. A
            document without a usable judgement is left out of labels, and stays in a filter.
        own_positives: of records whose candidates are judged: best (as None) gives their positives the best grade, so
            that a candidate does not stand above them because their labels are 0 and 1; keep leaves them as they are.
        levels: grades, from the best one to 0.
        samples: asks of a pair.
        decide: by majority or median.
        reason: a sentence before the grade.
        most_characters: of a query and of a document that are shown.
        temperature: None is 0 for one sample, and the run's for several.
        template: a YAML file in the place of the packaged one.
    """

    name: ClassVar[str] = "judge"
    takes: ClassVar[frozenset[Kind]] = frozenset({"queries", "records"})
    uses = frozenset({"candidates"})

    def __init__(
        self,
        below_root: Callable[[str], Path],
        what: Literal["candidates", "documents"] = "candidates",
        use: Literal["labels", "filter"] = "labels",
        positive_from: Positive = 2,
        own_positives: Literal["best", "keep"] | None = None,
        levels: Sequence[Count] = (3, 2, 1, 0),
        samples: Positive = 1,
        decide: Literal["majority", "median"] = "majority",
        reason: bool = False,
        most_characters: Positive = 6000,
        max_tokens: Positive = 256,
        temperature: float | None = None,
        template: str | None = None,
    ) -> None:
        if len(set(levels)) < len(levels) or 0 not in levels or max(levels) < positive_from:
            raise ConfigError(
                f"judge.levels: found {list(levels)}; give different grades, 0 and one from positive_from "
                f"({positive_from}) on"
            )
        if use == "filter" and what == "candidates":
            raise ConfigError("judge.use 'filter': candidates have no labels; set what: documents, or use: labels")
        if own_positives is not None and what == "documents":
            raise ConfigError(
                "judge.own_positives has no effect with what 'documents', which are all judged; remove it"
            )
        if samples > 1 and temperature == 0:
            raise ConfigError("judge: samples above 1 at temperature 0 are all the same; raise it, or set samples: 1")
        if decide == "median" and samples == 1:
            raise ConfigError("judge.decide has no effect with one sample; raise samples, or remove it")
        self.what, self.use, self.positive_from, self.levels = what, use, positive_from, tuple(levels)
        self.samples, self.decide, self.reason, self.own_positives = samples, decide, reason, own_positives
        self.most_characters, self.max_tokens = most_characters, max_tokens
        self.temperature = 0.0 if temperature is None and samples == 1 else temperature
        self.uses = self.needs = frozenset({"candidates"} if what == "candidates" else ())
        if what == "documents":
            self.takes = frozenset({"records"})  # type: ignore[misc]  # queries have none
        self.template = Template(self.name, template, below_root, _VARIABLES)
        grade = {"type": "integer", "enum": list(levels)}
        said = {"reason": {"type": "string", "minLength": 1, "maxLength": _REASON}} if reason else {}
        self.schema = {
            "type": "object", "properties": {**said, "relevance": grade}, "required": [*said, "relevance"],
            "additionalProperties": False,
        }  # fmt: skip
        self.sample = {**({"reason": filler("because", 20)} if reason else {}), "relevance": max(levels)}

    def gives(self, kind: Kind) -> Kind:
        return "records"

    def fingerprint(self) -> Any:
        return self.template.source

    def work(self, item: Item, context: Context) -> Work:
        if item.get("task") == "sts":
            raise MmembedError(f"item '{item['id']}': an STS record grades a pair by likeness; leave its source out")
        documents = item.get(self.what, [])
        asks = [
            self._ask(item, document, f"{place}-{sample}")
            for place, document in enumerate(documents)
            for sample in range(self.samples)
        ]
        if not asks:
            return Dropped(item, "no candidate")
        answers = yield asks
        judged = [self._decided(answers[start : start + self.samples]) for start in range(0, len(asks), self.samples)]
        context.notes["pairs without a usable judgement"] += judged.count(None)
        if not any(judged):
            raise Lost("no usable judgement")
        self._note(documents, judged, context.notes)
        kept = self._kept(documents, judged, context.notes)
        own = [self._raised(document) for document in item.get("documents", [])] if self.what == "candidates" else []
        record = {key: value for key, value in item.items() if key != "candidates"}
        record["documents"] = _settled([*own, *kept], context.notes)
        if not any(document.get("relevance", 1.0) > 0 for document in record["documents"]):
            return Dropped(item, "no document is relevant")
        return [record]

    def told(self, notes: Counter[str]) -> dict[str, Any]:
        patterns = {tuple(grades): count for grades, count in _taken(notes, _SAMPLES)}
        labels = {(label, grade): count for (label, grade), count in _taken(notes, _LABELS)}
        numbers: dict[str, Any] = {
            key: count for key, count in (+notes).items() if not key.startswith((_SAMPLES, _LABELS))
        }
        several = {grades: count for grades, count in patterns.items() if len(grades) > 1}
        if several:
            unanimous = sum(count for grades, count in several.items() if len(set(grades)) == 1)
            numbers["share of pairs whose samples agree"] = round(unanimous / sum(several.values()), 4)
            numbers["Krippendorff's alpha of samples (ordinal)"] = _rounded(alpha(several))
        if labels:
            sides: Counter[tuple[int, int]] = Counter()
            for (label, grade), count in labels.items():
                sides[label > 0, grade >= self.positive_from] += count
            numbers["pairs with a label"] = sides.total()
            numbers["Cohen's kappa with labels, relevant or not"] = _rounded(kappa(sides, quadratic=False))
            if max(label for label, _ in labels) > 1:
                numbers["quadratic weighted kappa with grades"] = _rounded(kappa(labels, quadratic=True))
        return {key: value for key, value in numbers.items() if value is not None}

    def _ask(self, item: Item, document: Mapping[str, Any], name: str) -> Ask:
        shown = [pictures_of(item["query"]), pictures_of(document["content"])]
        values = {
            "query": shortened(text_of(item["query"]), self.most_characters),
            "document": shortened(text_of(document["content"]), self.most_characters),
            "instruction": item.get("instruction", ""), "levels": self.levels, "reason": self.reason,
            "query_pictures": len(shown[0]), "document_pictures": len(shown[1]),
        }  # fmt: skip
        messages = self.template.messages(values, [*shown[0], *shown[1]])
        return Ask(name, messages, self.sample, _read, self.schema, self.max_tokens, self.temperature, optional=True)

    def _decided(self, answers: Sequence[tuple[int, str | None] | None]) -> Judged | None:
        """Of the samples that can be used; None where none can. The reason is that of the first with this grade."""
        given = [answer for answer in answers if answer is not None]
        if not given:
            return None
        grades = [grade for grade, _ in given]
        decided = statistics.median_low(grades) if self.decide == "median" else min(statistics.multimode(grades))
        return decided, next(reason for grade, reason in given if grade == decided), grades

    def _kept(
        self, documents: Sequence[dict[str, Any]], judged: Sequence[Judged | None], notes: Counter[str]
    ) -> list[dict[str, Any]]:
        kept = []
        for document, one in zip(documents, judged, strict=True):
            if one is None:
                kept += [document] if self.use == "filter" else []
                continue
            grade, reason, grades = one
            relevant = document.get("relevance", 1.0) > 0
            if self.use == "filter" and relevant != (grade >= self.positive_from):
                notes["positives left out" if relevant else "negatives left out"] += 1
                continue
            label = {"relevance": float(grade if grade >= self.positive_from else 0)} if self.use == "labels" else {}
            why = {} if reason is None else {"rationale": reason}
            meta = {**document.get("meta", {}), self.name: grades}
            kept.append({**document, **label, **why, "meta": meta})
        return kept

    def _raised(self, document: dict[str, Any]) -> dict[str, Any]:
        relevant = document.get("relevance", 1.0) > 0 and self.own_positives != "keep"
        return {**document, "relevance": float(max(self.levels))} if relevant else document

    def _note(
        self, documents: Sequence[Mapping[str, Any]], judged: Sequence[Judged | None], notes: Counter[str]
    ) -> None:
        for document, one in zip(documents, judged, strict=True):
            if one is None:
                continue
            grade, _, grades = one
            notes[f"grade {grade}"] += 1
            notes[_SAMPLES + json.dumps(sorted(grades))] += 1
            label = document.get("relevance", 1.0)
            if self.what == "documents" and label == int(label):
                notes[_LABELS + json.dumps([int(label), grade])] += 1


def _settled(documents: list[dict[str, Any]], notes: Counter[str]) -> list[dict[str, Any]]:
    """Without negatives whose content or id is that of a positive: of copies that were judged differently."""
    positives = [document for document in documents if document.get("relevance", 1.0) > 0]
    contents = {to_content(document["content"]) for document in positives}
    ids = {document["id"] for document in positives if "id" in document}
    kept = [
        document
        for document in documents
        if document.get("relevance", 1.0) > 0
        or (to_content(document["content"]) not in contents and document.get("id") not in ids)
    ]
    notes["negatives that are copies of a positive"] += len(documents) - len(kept)
    return kept


def _read(value: Any) -> tuple[int, str | None]:
    reason = value.get("reason")
    return value["relevance"], reason.strip() or None if reason is not None else None


def _taken(notes: Mapping[str, int], prefix: str) -> list[tuple[list[int], int]]:
    return [(json.loads(key.removeprefix(prefix)), count) for key, count in notes.items() if key.startswith(prefix)]


def _rounded(number: float | None) -> float | None:
    return None if number is None else round(number, 4)
