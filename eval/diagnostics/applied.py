"""The diagnostics on a model and a task: each is one function, which says why where it does not apply.

A function takes a `Material` and gives a `Found`, or raises `LeftOut`. `OF_KIND` says which are asked of a task.
Vectors of a task are made once for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, get_args

import numpy as np
import torch

from eval.diagnostics import composition, discriminant, geometry, poisoning, robustness, scores, smaller
from eval.files import read_json
from eval.mteb_adapter import contents_of
from eval.significance import Paired, interval, paired
from eval.tasks.local import Row
from eval.vectors import BLOCK, Compared, as_queries, compared, ndcg_by_query
from mmembed import diagnostics, metrics
from mmembed.content import Example, Image, Text
from mmembed.data.word_swaps import Language
from mmembed.errors import ConfigError, MmembedError
from mmembed.quantize import Precision, unit_rows

POOL = 500  # others a query, of the ROC curve (arXiv 2510.00137)
CALIBRATED = 20  # documents a query, of the probabilities
BINS = 30  # of cosines
RATES = (0.1, 0.25, 0.5, 1.0)  # of words with a typo
PARAPHRASE = 4.5  # of 5, from which two sentences say the same
SHOTS = (2, 4, 8, 16, 32)  # examples of a class: one has no covariance
ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # of the discriminant beside zero-shot logits
TRIGGERED = 200  # queries
OF_LAYERS = 200  # contents


class LeftOut(MmembedError):
    """Why a diagnostic does not apply to a model or a task."""


@dataclass(frozen=True)
class Found:
    """What a diagnostic says.

    Attributes:
        numbers: by name.
        drawn: plots, each with `kind` (`lines`, `even`, `reliability`, `histogram`, `differences`) and its data.
        lines: a table, the head first.
    """

    numbers: Mapping[str, float | None]
    drawn: Sequence[Mapping[str, Any]] = ()
    lines: Sequence[Sequence[str]] = ()


@dataclass
class Material:
    """A model and a task with its data.

    Attributes:
        runner: an `MtebEncoder`.
        sees: whether the model reads pictures.
        single: whether it gives one vector a content.
        triggers: words of the audit beside `poisoning.RARE`.
        kept: labelled vectors by part.
    """

    runner: Any
    task: Any
    row: Row
    split: str
    sees: bool
    single: bool = True
    triggers: Sequence[str] = ()
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def data(self) -> Any:
        return self.task.dataset["default"][self.split]

    @cached_property
    def vectors(self) -> Compared:
        """Of unit length. Raises LeftOut for a model of many vectors, and where nothing is relevant."""
        self._check_single()
        found = compared(self.runner, self.task, self.row, self.split)
        if not (found.relevance > 0).any():
            raise LeftOut("no query has a relevant document in the corpus")
        queries, documents = unit_rows(found.queries), unit_rows(found.documents)
        return Compared(queries, documents, queries @ documents.T, found.relevance)

    @cached_property
    def by_query(self) -> np.ndarray:
        """(Q,) nDCG@10."""
        return ndcg_by_query(self.vectors.similarity, self.vectors.relevance)

    @property
    def texts(self) -> list[str]:
        """Of the queries. Raises LeftOut where they are pictures."""
        if self.row.category.split("2")[0] != "t":
            raise LeftOut("queries are pictures, and this changes the words of texts")
        return list(self.data["queries"]["text"])

    def asked(self, contents: Sequence[Any]) -> np.ndarray:
        """(N, E) unit vectors of contents in the place of queries. Raises LeftOut for a model of many vectors."""
        self._check_single()
        return unit_rows(as_queries(self.runner, self.task, contents))

    def _check_single(self) -> None:
        if not self.single:
            raise LeftOut("the model gives a vector for each token, and this looks at one a content")

    @property
    def first_relevant(self) -> tuple[np.ndarray, np.ndarray]:
        """Places of the queries that have a relevant document, and of the best of each: (N,), (N,)."""
        queries = np.flatnonzero((self.vectors.relevance > 0).any(1))
        return queries, self.vectors.relevance[queries].argmax(1)


# Retrieval ------------------------------------------------------------------------------------------------------------


def pooled_auc(on: Material) -> Found:
    """One ROC curve of all queries."""
    found, wrong = metrics.pool(on.vectors.similarity, on.vectors.relevance, POOL)
    false, true = scores.roc(found, wrong)
    low, high = float(min(wrong.min(), found.min())), float(max(wrong.max(), found.max()))
    counts = {name: np.histogram(side, BINS, (low, high))[0].tolist() for name, side in
              (("relevant", found), ("others", wrong))}  # fmt: skip
    return Found(
        {
            "AUC": metrics.pooled_auc(on.vectors.similarity, on.vectors.relevance, POOL),
            "pairs": len(found) + len(wrong),
        },
        [
            {"kind": "lines", "axis": "false positive rate",
             "series": {"true positive rate": scores.thinned(list(zip(false.tolist(), true.tolist(), strict=True))),
                        "chance": [(0.0, 0.0), (1.0, 1.0)]}},
            {"kind": "histogram", "axis": "cosine", "counts": counts, "low": low, "high": high},
        ],
    )  # fmt: skip


def calibration(on: Material) -> Found:
    """Cosines as probabilities, as they are and after Platt's scaling."""
    shown, right = scores.first(on.vectors.similarity, on.vectors.relevance, CALIBRATED)
    raw = metrics.calibration(scores.as_probabilities(shown), right)
    given, relevant = scores.scaled(on.vectors.similarity, on.vectors.relevance, CALIBRATED)
    fitted = metrics.calibration(given, relevant)
    return Found(
        {"ECE of (1 + cosine) / 2": raw.error, "ECE, scaled": fitted.error, "relevant share": float(relevant.mean())},
        [{"kind": "reliability", "title": title, "bins": _bins(one)}
         for title, one in (("(1 + cosine) / 2", raw), ("scaled on the other half", fitted))],
    )  # fmt: skip


def alignment(on: Material) -> Found:
    """How close what belongs together is, and how spread out the rest."""
    queries, documents = (torch.from_numpy(side) for side in (on.vectors.queries, on.vectors.documents))
    asked, best = on.first_relevant
    pairs = queries[asked], documents[best]
    return Found({
        "alignment": float(diagnostics.alignment(*pairs)),
        "uniformity, queries": float(diagnostics.uniformity(queries[:2000])),
        "uniformity, documents": float(diagnostics.uniformity(documents[:2000])),
        "cosine of pairs": float((pairs[0] * pairs[1]).sum(1).mean()),
        "cosine of a query with all": float(on.vectors.similarity.mean()),
    })  # fmt: skip


def isotropy(on: Material) -> Found:
    """Whether all dimensions are used."""
    documents = on.vectors.documents
    if len(documents) < 2:
        raise LeftOut("there is one document")
    shares = geometry.spectrum(documents).cumsum()
    enough = len(documents) > documents.shape[1]  # fewer cannot vary along all dimensions
    return Found(
        {
            "effective rank": float(diagnostics.effective_rank(torch.from_numpy(documents))),
            "dimensions": documents.shape[1], "IsoScore": geometry.isoscore(documents) if enough else None,
            "partition isotropy": geometry.partition_isotropy(documents),
            "mean cosine": geometry.mean_cosine(documents),
        },
        [{"kind": "lines", "axis": "directions",
          "series": {"share of the variance": [(place + 1, share) for place, share in enumerate(shares.tolist())]}}],
    )  # fmt: skip


def modality_gap(on: Material) -> Found:
    """How far two modalities are apart."""
    left, right = on.row.category.split("2")
    if left == right:
        raise LeftOut(f"queries and documents are both of modality '{left}'; a task such as vega-charts has two")
    queries, documents = on.vectors.queries, on.vectors.documents
    sides = {"queries": queries @ queries.T, "documents": documents @ documents.T, "across": on.vectors.similarity}
    cosines = {name: one[~np.eye(len(one), dtype=bool)] if name != "across" else one.ravel()
               for name, one in sides.items()}  # fmt: skip
    low, high = (float(edge(one)) for edge, one in ((min, [c.min() for c in cosines.values()]),
                                                    (max, [c.max() for c in cosines.values()])))  # fmt: skip
    return Found(
        {
            "gap": float(diagnostics.modality_gap(torch.from_numpy(queries), torch.from_numpy(documents))),
            "separability": geometry.separability(queries, documents),
            **{f"mean cosine, {name}": float(one.mean()) for name, one in cosines.items()},
        },
        [{"kind": "histogram", "axis": "cosine", "low": low, "high": high,
          "counts": {name: np.histogram(one, BINS, (low, high))[0].tolist() for name, one in cosines.items()}}],
    )  # fmt: skip


def matryoshka(on: Material) -> Found:
    """What the first dimensions alone are worth."""
    vectors = on.vectors
    curve = {dim: smaller.cut(vectors.queries, vectors.documents, vectors.relevance, dim)
             for dim in smaller.prefixes(vectors.queries.shape[1])}  # fmt: skip
    whole = float(on.by_query.mean())
    half = vectors.queries.shape[1] // 2
    enough = next((dim for dim, one in curve.items() if one.mean() >= 0.95 * whole > 0), None)
    numbers = {"nDCG@10": whole, "dimensions for 95 % of it": enough}
    if half in curve:
        numbers["nDCG@10, half the dimensions"] = float(curve[half].mean())
    return Found(
        numbers,
        [{"kind": "even", "axis": "dimensions",
          "series": {"nDCG@10": [(dim, float(one.mean())) for dim, one in curve.items()]}}],
        [["dimensions", "nDCG@10", "95 % interval"], *([str(dim), *_with_interval(one)] for dim, one in curve.items())],
    )  # fmt: skip


def quantization(on: Material) -> Found:
    """What eight bits and one bit a dimension lose, and what rescoring wins back."""
    vectors = on.vectors
    numbers, rows = {"nDCG@10, float32": float(on.by_query.mean())}, {}
    precisions: tuple[Precision, ...] = ("int8", "binary")
    for precision in precisions:
        for rescored in (False, True):
            name = f"{precision}{', rescored' if rescored else ''}"
            own = smaller.coded(vectors.queries, vectors.documents, vectors.relevance, precision, rescored)
            numbers[f"nDCG@10, {name}"] = float(own.mean())
            rows[name] = paired(own, on.by_query)
    return Found(numbers, [_differences(rows)], _tested(rows, "precision"))


def typos(on: Material) -> Found:
    """Queries with letters exchanged."""
    texts, curve, rows = on.texts, {0.0: float(on.by_query.mean())}, {}
    for rate in RATES:
        similarity = on.asked(robustness.with_typos(texts, rate)) @ on.vectors.documents.T
        own = ndcg_by_query(similarity, on.vectors.relevance)
        curve[rate], rows[f"{100 * rate:g} % of the words"] = float(own.mean()), paired(own, on.by_query)
    return Found(
        {"nDCG@10": curve[0.0], **{f"nDCG@10, {name}": curve[rate] for rate, name in zip(RATES, rows, strict=True)}},
        [{"kind": "lines", "axis": "share of words with a typo", "series": {"nDCG@10": list(curve.items())}}],
        _tested(rows, "typos in"),
    )


def rendered(on: Material) -> Found:
    """Queries as pictures of their words."""
    if not on.sees:
        raise LeftOut("the model reads no pictures")
    texts = on.texts
    places = robustness.readable(texts)
    if len(places) < max(2, len(texts) // 2):
        raise LeftOut(f"the font at hand draws {len(places)} of {len(texts)} queries; it has Latin letters")
    pictures = on.asked([(Image(robustness.as_picture(texts[place])),) for place in places])
    own = ndcg_by_query(pictures @ on.vectors.documents.T, on.vectors.relevance[places])
    rows = {"as a picture": paired(own, on.by_query[places])}
    pairs = robustness.paraphrases(on.vectors.queries[places], pictures)
    return Found(
        {
            "nDCG@10, text": float(on.by_query[places].mean()), "nDCG@10, picture": float(own.mean()),
            "a text finds its picture": pairs["found"], "cosine of both": pairs["cosine"],
            "cosine with another's": pairs["others"], "queries": len(places),
        },
        lines=_tested(rows, "queries"),
    )  # fmt: skip


def word_order(on: Material) -> Found:
    """Whether a query is nearer to its document than the same words in other places."""
    texts, (asked, best) = on.texts, on.first_relevant
    documents, right = on.vectors.documents[best], on.vectors.similarity[asked, best]
    language = next((one for one in get_args(Language) if on.row.languages == (one,)), None)
    makers: dict[str, Callable[..., str | None]] = {
        order: partial(composition.reordered, order=order) for order in composition.ORDERS
    }
    if language is not None:
        makers |= {kind: partial(composition.swapped, kind=kind, language=language) for kind in composition.SWAPS}
    numbers, rows, lines = {}, {}, [["words", "texts", "right", "95 % interval"]]
    for name, make in makers.items():
        generator = np.random.default_rng(0)
        made = [make(texts[query], generator=generator) for query in asked.tolist()]
        there = [place for place, text in enumerate(made) if text is not None]
        if len(there) < 2:
            lines.append([name, str(len(there)), "–", "–"])
            continue
        wrong = on.asked([(Text(made[place] or ""),) for place in there])
        own = composition.preferred(right[there], (wrong * documents[there]).sum(1))
        numbers[f"right, {name.replace('_', ' ')}"] = float(own.mean())
        lines.append([name, str(len(there)), *_with_interval(own)])
        low, high = interval(own) or (own.mean(), own.mean())
        rows[name.replace("_", " ")] = (float(own.mean()) - 0.5, float(low) - 0.5, float(high) - 0.5)
    if not numbers:
        raise LeftOut("no two queries have words that can change places")
    return Found(numbers, [{"kind": "differences", "axis": "above chance (.5)", "rows": _coloured(rows)}], lines)


def poisoning_audit(on: Material) -> Found:
    """Triggers that pull queries to one document, and words of pairs that are unlike."""
    asked, best = on.first_relevant
    cosines = on.vectors.similarity[asked, best]
    left, _ = on.row.category.split("2")
    drawn = asked[:TRIGGERED]
    tried: dict[str, list[Any]] = {}
    odd: list[tuple[str, float, int]] = []
    if "t" in left and "i" not in left:
        texts = on.texts
        odd = poisoning.odd_words([texts[place] for place in asked.tolist()], cosines)
        for word in dict.fromkeys((*poisoning.RARE, *on.triggers, *(word for word, z, _ in odd[:3] if z > 3))):
            tried[f"the word '{word}'"] = [(Text(poisoning.with_word(texts[place], word)),) for place in drawn.tolist()]
    if "i" in left:
        pictures = on.data["queries"].select(drawn.tolist())
        tried["a patch"] = [
            content
            for batch in pictures.iter(batch_size=BLOCK)
            for content in contents_of(batch | {"image": [poisoning.with_patch(one) for one in batch["image"]]})
        ]
    lines, most = [["trigger", "hijacked", "drawn together", "moved"]], 0.0
    for name, contents in tried.items():
        found = poisoning.pull(on.vectors.queries[drawn], on.asked(contents), on.vectors.documents)
        most = max(most, found.hijacked)
        lines.append([name, f"{found.hijacked:.3f}", f"{found.drawn:+.3f}", f"{found.moved:.3f}"])
    lines += [[f"odd: {word}, {count} pairs", "", "", f"z {z:.1f}"] for word, z, count in odd[:5]]
    return Found({"hijacked, the most": most, "z of the oddest word": odd[0][1] if odd else None}, lines=lines)


# Pairs and labels -----------------------------------------------------------------------------------------------------


def paraphrases(on: Material) -> Found:
    """Sentences that people found to say the same."""
    rows = on.task.dataset[on.split]
    same = [place for place, grade in enumerate(rows["score"]) if grade >= PARAPHRASE]
    if len(same) < 2:
        raise LeftOut(f"{len(same)} pairs have {PARAPHRASE} of 5 or more")
    sides = [on.asked([rows[column][place] for place in same]) for column in ("sentence1", "sentence2")]
    found = robustness.paraphrases(*sides)
    return Found({"nearest of all": found["found"], "cosine of both": found["cosine"],
                  "cosine with another's": found["others"], "pairs": len(same)})  # fmt: skip


def tolerance(on: Material) -> Found:
    """How close contents of one class are."""
    vectors, labels = _labelled(on, on.split)
    within, across = geometry.tolerance(vectors, labels)
    return Found({"tolerance": within, "cosine across classes": across, "classes": len(set(labels.tolist())),
                  "uniformity": float(diagnostics.uniformity(torch.from_numpy(vectors[:2000])))})  # fmt: skip


def gaussian_discriminant(on: Material) -> Found:
    """A classifier of closed form, by the number of examples of a class."""
    train, known = _labelled(on, "train")
    asked, labels = _labelled(on, on.split)
    names = [name.replace("_", " ") for name in read_json(on.task.folder / "labels.json")]
    described = on.asked(names)
    curves: dict[str, list[tuple[float, float]]] = {"discriminant": [], "with the names of classes": []}
    lines = [["examples a class", "discriminant", "with names", "95 % interval"]]
    for shots in [one for one in SHOTS if one <= np.bincount(known).max()]:
        places = discriminant.few(known, shots)
        classifier = discriminant.fit(train[places], known[places])
        alpha = _best_alpha(train, known, places, described)
        own = described[classifier.classes.astype(int)]
        both = classifier.classes[discriminant.with_descriptions(classifier, asked, own, alpha).argmax(1)] == labels
        right = classifier.predict(asked) == labels
        curves["discriminant"].append((shots, float(right.mean())))
        curves["with the names of classes"].append((shots, float(both.mean())))
        lines.append([str(shots), f"{right.mean():.3f}", *_with_interval(both.astype(float))])
    zero_shot = (asked @ described.T).argmax(1) == labels
    numbers = {"accuracy of names alone": float(zero_shot.mean())}
    if curves["discriminant"]:
        numbers |= {f"accuracy, {name}": points[-1][1] for name, points in curves.items()}
    return Found(numbers, [{"kind": "even", "axis": "examples a class", "series": curves}], lines)


def _best_alpha(train: np.ndarray, known: np.ndarray, places: np.ndarray, described: np.ndarray) -> float:
    """Of `ALPHAS`, by leaving half of the drawn examples out for validation, as the authors choose it there."""
    half = places[::2], places[1::2]
    if len(set(known[half[0]].tolist())) < 2 or np.bincount(known[half[0]]).max() < 2:
        return 1e-2
    classifier = discriminant.fit(train[half[0]], known[half[0]])
    own = described[classifier.classes.astype(int)]

    def right(alpha: float) -> float:
        logits = discriminant.with_descriptions(classifier, train[half[1]], own, alpha)
        return float((classifier.classes[logits.argmax(1)] == known[half[1]]).mean())

    return max(ALPHAS, key=right)


def _labelled(on: Material, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, E) unit vectors and (N,) labels of a part, at most `SHOTS[-1]` of a class; made once."""
    if split not in on.kept:
        rows = on.task.dataset[split]
        places = np.sort(discriminant.few(np.asarray(rows["label"]), SHOTS[-1]))
        some = rows.select(places.tolist())
        contents = [
            content for batch in some.iter(batch_size=BLOCK)
            for content in contents_of({key: batch[key] for key in ("text", "image") if key in batch})
        ]  # fmt: skip
        on.kept[split] = on.asked(contents), np.asarray(some["label"])
    return on.kept[split]


# A model --------------------------------------------------------------------------------------------------------------


def by_layer(embedder: Any, contents: Sequence[Any], settings: Mapping[str, Any]) -> Found:
    """How the vectors of each layer fill their space.

    Args:
        embedder: is cut on the way, from the last layer down. settings: of `Embedder.encode`.

    Raises:
        LeftOut: the layers of the decoder are not known.
    """
    if embedder.model.pooling.multi_vector:
        raise LeftOut("the model gives a vector for each token, and this looks at one a content")
    cosine, rank, score = [], [], []
    for depth in range(embedder.model.depth, 0, -1):
        try:
            if depth < embedder.model.depth:
                embedder.model.cut(depth)
        except ConfigError as error:
            raise LeftOut(str(error)) from error
        vectors = unit_rows(np.asarray(embedder.encode(list(contents), role="document", **settings), dtype=np.float32))
        cosine.append((depth, geometry.mean_cosine(vectors)))
        rank.append((depth, float(diagnostics.effective_rank(torch.from_numpy(vectors)))))
        score.append((depth, geometry.isoscore(vectors)))
    series = {"mean cosine": cosine[::-1], "IsoScore": score[::-1]}
    return Found(
        {"mean cosine, first layer": cosine[-1][1], "mean cosine, last layer": cosine[0][1],
         "effective rank, first layer": rank[-1][1], "effective rank, last layer": rank[0][1]},
        [{"kind": "even", "axis": "layer", "series": series},
         {"kind": "even", "axis": "layer", "series": {"effective rank": rank[::-1]}}],
    )  # fmt: skip


# Training data --------------------------------------------------------------------------------------------------------


def poisoned_pairs(runner: Any, examples: Sequence[Example]) -> Found:
    """Words of queries whose pairs the model finds unlike: of data that it has not learned from.

    Raises:
        LeftOut: fewer than `poisoning.LEAST_PAIRS` queries have a text and a positive.
    """
    pairs = [(example, next(one for one in example.documents if one.relevance > 0)) for example in examples
             if any(isinstance(part, Text) for part in example.query)
             and any(one.relevance > 0 for one in example.documents)]  # fmt: skip
    if len(pairs) < poisoning.LEAST_PAIRS:
        raise LeftOut(f"{len(pairs)} records have a text as query and a positive; give {poisoning.LEAST_PAIRS} or more")
    encode = runner.embedder.encode
    queries, documents = (
        unit_rows(np.asarray(encode(side, role=role, instruction=None), dtype=np.float32))
        for side, role in (([one.query for one, _ in pairs], "query"), ([one.content for _, one in pairs], "document"))
    )
    cosines = (queries * documents).sum(1)
    texts = [" ".join(part.text for part in one.query if isinstance(part, Text)) for one, _ in pairs]
    odd = poisoning.odd_words(texts, cosines)
    low, high = float(cosines.min()), float(cosines.max())
    return Found(
        {"pairs": len(pairs), "mean cosine": float(cosines.mean()), "z of the oddest word": odd[0][1] if odd else None},
        [{"kind": "histogram", "axis": "cosine of a pair", "low": low, "high": high,
          "counts": {"pairs": np.histogram(cosines, BINS, (low, high))[0].tolist()}}],
        [["word", "pairs", "z"], *([word, str(count), f"{z:.1f}"] for word, z, count in odd)],
    )  # fmt: skip


# Which is asked of what -----------------------------------------------------------------------------------------------

Diagnostic = Callable[[Material], Found]
RETRIEVAL: tuple[Diagnostic, ...] = (
    pooled_auc, calibration, alignment, isotropy, modality_gap, matryoshka, quantization, typos, rendered, word_order,
    poisoning_audit,
)  # fmt: skip
OF_KIND: Mapping[str, tuple[Diagnostic, ...]] = {
    "retrieval": RETRIEVAL, "sts": (paraphrases,), "classification": (tolerance, gaussian_discriminant)
}  # fmt: skip


def _bins(found: metrics.Calibration) -> list[list[float]]:
    columns = found.count.tolist(), found.probability.tolist(), found.relevant.tolist()
    return [[count, mean, share] if count else [0, 0.0, 0.0] for count, mean, share in zip(*columns, strict=True)]


def _with_interval(values: np.ndarray) -> list[str]:
    bounds = interval(values)
    return [f"{values.mean():.3f}", "–" if bounds is None else f"{bounds[0]:.3f} to {bounds[1]:.3f}"]


def _tested(rows: Mapping[str, Paired], head: str) -> list[list[str]]:
    """Differences from nDCG@10 as it was."""
    lines = [[head, "difference", "95 % interval", "p"]]
    return lines + [
        [name, f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}", f"{one.p:.4f}"]
        for name, one in rows.items()
    ]


def _differences(rows: Mapping[str, Paired]) -> dict[str, Any]:
    return {"kind": "differences", "axis": "nDCG@10 less that of float32",
            "rows": _coloured({name: (one.difference, one.low, one.high) for name, one in rows.items()})}  # fmt: skip


def _coloured(rows: Mapping[str, tuple[float, float, float]]) -> list[list[Any]]:
    """With a word for those whose interval does not hold 0."""
    return [[name, value, low, high, "above" if low > 0 else "below" if high < 0 else "around"]
            for name, (value, low, high) in rows.items()]  # fmt: skip
