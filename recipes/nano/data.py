"""What the nano may learn from: every train-side text and picture of the shared data sets.

A `Text` is one training unit: a string, its language, and the English string whose teacher vector its embedding
should match (itself when it is English, its translation when one is known, empty when neither).
A `Picture` is one image with its captions, each a `Text`.
A `Pair` is a train query and a document that answers it, a `Passage` the sentences of one paragraph (inverse cloze:
each sentence asks for the others).

Hygiene: a dev query is never read here, and a document or picture that is relevant only to dev queries is left out
(`squad` and `xquad` by article, OpenStax by section). Those documents give the text on which perplexity is reported.
"""

import ast
import io
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from PIL import Image

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z“\"(])")
XQUAD_LANGUAGES = ("ar", "de", "el", "es", "hi", "ro", "ru", "th", "tr", "vi", "zh")
# none of the demo's sets: there, fine-tuning has to show its worth
PAIR_SETS = ("medquad", "tldr-commands", "dbpedia-entity", "recipes")
PYTHON_SOURCE = "python-stdlib"
NO_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "idle_test"}
SHORTEST_DOCSTRING, LONGEST_FUNCTION = 20, 1500  # characters
LEAST_SENTENCES = 3  # of a passage
PICTURE_SETS = ("noto-emoji", "story-pages", "openstax-figures", "tech-figures", "vega-charts")


@dataclass(frozen=True)
class Text:
    text: str
    language: str = "en"
    teacher: str = ""
    source: str = ""


@dataclass(frozen=True)
class Picture:
    source: str
    image_id: str
    captions: tuple[Text, ...]


@dataclass(frozen=True)
class Pair:
    query: str
    document: str
    source: str
    document_id: str


@dataclass(frozen=True)
class Passage:
    sentences: tuple[str, ...]
    source: str
    group: str  # article, section or document


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """query id -> {document id: score}"""
    relevance: dict[str, dict[str, int]] = {}
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        query, document, score = line.split("\t")
        relevance.setdefault(query, {})[document] = int(score)
    return relevance


def document_text(document: dict[str, Any]) -> str:
    return f"{document['title']}\n{document['text']}".strip() if document.get("title") else document["text"]


def dev_only_documents(folder: Path) -> set[str]:
    """Ids relevant to a dev query and to no train query."""
    relevant = {
        split: {d for row in read_qrels(folder / "qrels" / f"{split}.tsv").values() for d, s in row.items() if s > 0}
        for split in ("train", "dev")
    }
    return relevant["dev"] - relevant["train"]


def dev_articles(root: Path) -> set[str]:
    hidden = dev_only_documents(root / "squad-en")
    return {d["title"] for d in read_jsonl(root / "squad-en/corpus.jsonl") if d["_id"] in hidden}


def dev_sections(root: Path) -> set[str]:
    """OpenStax sections ("american-government-m90384") that dev terms of the glossary come from."""
    return {re.sub(r"^d-(.*?-m\d+)-.*$", r"\1", d) for d in dev_only_documents(root / "openstax-glossary")}


def train_documents(folder: Path) -> list[dict[str, Any]]:
    hidden = dev_only_documents(folder)
    return [d for d in read_jsonl(folder / "corpus.jsonl") if d["_id"] not in hidden]


def train_queries(folder: Path) -> list[dict[str, Any]]:
    train = read_qrels(folder / "qrels/train.tsv")
    return [q for q in read_jsonl(folder / "queries.jsonl") if q["_id"] in train]


# ---------------------------------------------------------------------------------------------------- texts
def train_texts(root: Path) -> list[Text]:
    """Every unit once, in a fixed order; units of one string keep the first."""
    unique: dict[str, Text] = {}
    for unit in _all_units(root):
        text = unit.text.strip()
        if len(text) > 1:
            unique.setdefault(text, Text(text, unit.language, unit.teacher.strip(), unit.source))
    return list(unique.values())


def heldout_texts(root: Path) -> dict[str, list[str]]:
    """Running text that training never sees, for perplexity."""
    hidden, sections = dev_only_documents(root / "squad-en"), dev_sections(root)
    return {
        "squad-en dev articles": [d["text"] for d in read_jsonl(root / "squad-en/corpus.jsonl") if d["_id"] in hidden],
        "openstax dev sections": [
            p for s in read_jsonl(root / "openstax-text/text.jsonl") if s["_id"] in sections for p in s["paragraphs"]
        ],
    }


def _english(text: str, source: str) -> Text:
    return Text(text, "en", text, source)


def _all_units(root: Path) -> Iterator[Text]:
    yield from _retrieval_units(root)
    yield from _labelled_units(root)
    yield from _prose_units(root)
    yield from _parallel_units(root)
    yield from _foreign_units(root)
    for picture in train_pictures(root):
        yield from picture.captions


def _retrieval_units(root: Path) -> Iterator[Text]:
    for name in ("medquad", "tldr-commands", "mbpp", "odex", "openstax-glossary", "dbpedia-entity", "argkp", "recipes"):
        for document in train_documents(root / name):
            yield from _with_sentences(document_text(document), name)
        for query in train_queries(root / name):
            if query.get("lang", "en") == "en":
                yield _english(query["text"], name)
    articles = dev_articles(root)
    for document in read_jsonl(root / "squad-en/corpus.jsonl"):
        if document["title"] not in articles:
            yield from _with_sentences(document["text"], "squad-en")
    for query in train_queries(root / "squad-en"):
        yield _english(query["text"], "squad-en")


def _labelled_units(root: Path) -> Iterator[Text]:
    for name in ("banking77", "clinc150"):
        for row in read_jsonl(root / name / "train.jsonl"):
            yield _english(row["text"], name)
    for row in read_jsonl(root / "stsb-en/train.jsonl"):
        yield _english(row["sentence1"], "stsb-en")
        yield _english(row["sentence2"], "stsb-en")


def _prose_units(root: Path) -> Iterator[Text]:
    sections = dev_sections(root)
    for section in read_jsonl(root / "openstax-text/text.jsonl"):
        if section["_id"] not in sections:
            for paragraph in section["paragraphs"]:
                yield from _with_sentences(paragraph, "openstax-text")


def _with_sentences(text: str, source: str) -> Iterator[Text]:
    """The whole text, and its sentences when it has several: long and short units of the same words."""
    yield _english(text, source)
    sentences = SENTENCE_END.split(text)
    if len(sentences) > 1:
        yield from (_english(s, source) for s in sentences if len(s) > 30)


def _parallel_units(root: Path) -> Iterator[Text]:
    """Foreign texts with a known English counterpart."""
    for kind in ("corpus.jsonl", "queries.jsonl"):
        hidden = dev_only_documents(root / "xquad/en") | set(read_qrels(root / "xquad/en/qrels/dev.tsv"))
        english = {r["_id"]: r["text"] for r in read_jsonl(root / "xquad/en" / kind) if r["_id"] not in hidden}
        for language in XQUAD_LANGUAGES:
            for row in read_jsonl(root / "xquad" / language / kind):
                counterpart = row["_id"].replace(f"xquad-{language}-", "xquad-en-")
                if counterpart in english:
                    yield Text(row["text"], language, english[counterpart], "xquad")
    rows = read_jsonl(root / "sib200/train.jsonl")
    english = {r["index"]: r["text"] for r in rows if r["lang"] == "en"}
    for row in rows:
        yield Text(row["text"], row["lang"], english.get(row["index"], ""), "sib200")
    english = {r["_id"].split("-", 2)[-1]: r for r in read_jsonl(root / "stsb-en/train.jsonl")}
    for row in read_jsonl(root / "rosts-ro/train.jsonl"):
        if pair := english.get(row["_id"].split("-", 2)[-1]):
            yield Text(row["sentence1"], "ro", pair["sentence1"], "rosts-ro")
            yield Text(row["sentence2"], "ro", pair["sentence2"], "rosts-ro")
    yield from _translated_queries(root / "tldr-commands")


def _translated_queries(folder: Path) -> Iterator[Text]:
    """A translated description means what the English description of the same command means."""
    relevance, queries = read_qrels(folder / "qrels/train.tsv"), train_queries(folder)
    english = {d: q["text"] for q in queries if q["lang"] == "en" for d in relevance[q["_id"]]}
    for query in queries:
        if query["lang"] != "en":
            counterpart = next((english[d] for d in relevance[query["_id"]] if d in english), "")
            yield Text(query["text"], query["lang"], counterpart, "tldr-commands")


def _foreign_units(root: Path) -> Iterator[Text]:
    for name, language in (("jaquad-ja", "ja"), ("cmrc-zh", "zh")):
        for row in train_documents(root / name) + train_queries(root / name):
            yield Text(row["text"], language, "", name)
    for row in read_jsonl(root / "jsts-ja/train.jsonl"):
        yield Text(row["sentence1"], "ja", "", "jsts-ja")
    for query in train_queries(root / "odex"):
        if query["lang"] != "en":
            yield Text(query["text"], query["lang"], "", "odex")


# ------------------------------------------------------------------------------------------ pairs and passages
def python_pairs() -> list[Pair]:
    """Functions of Python's own library: what the docstring's first paragraph says, and the code without it."""
    library = Path(sysconfig.get_path("stdlib"))
    pairs: list[Pair] = []
    for path in sorted(library.rglob("*.py")):
        if not NO_LIBRARY.intersection(path.relative_to(library).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue
            pairs += _documented_functions(tree, str(path.relative_to(library)))
    return pairs


def python_texts(pairs: list[Pair]) -> list[Text]:
    return [_english(text, PYTHON_SOURCE) for pair in pairs for text in (pair.query, pair.document)]


def _documented_functions(tree: ast.Module, path: str) -> Iterator[Pair]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (docstring := ast.get_docstring(node)):
            said = " ".join(docstring.split("\n\n")[0].split())
            del node.body[0]
            code = ast.unparse(node)
            if len(said) >= SHORTEST_DOCSTRING and len(code) <= LONGEST_FUNCTION:
                yield Pair(said, code, PYTHON_SOURCE, f"{path}:{node.lineno}")


def train_pairs(root: Path) -> list[Pair]:
    """English train queries with each document that answers them, unless that belongs to dev queries alone."""
    pairs = []
    for name in PAIR_SETS:
        folder = root / name
        documents = {d["_id"]: d for d in train_documents(folder)}
        relevance = read_qrels(folder / "qrels/train.tsv")
        for query in train_queries(folder):
            if query["text"] and query.get("lang", "en") == "en":
                for document_id, score in relevance[query["_id"]].items():
                    if score > 0 and (document := documents.get(document_id)):
                        pairs.append(Pair(query["text"], document_text(document), name, document_id))
    return pairs


def train_passages(root: Path) -> list[Passage]:
    """Paragraphs of several sentences, by article or section; those that dev queries come from are left out."""
    return [p for p in _all_passages(root) if len(p.sentences) >= LEAST_SENTENCES]


def _all_passages(root: Path) -> Iterator[Passage]:
    articles, sections = dev_articles(root), dev_sections(root)
    for document in read_jsonl(root / "squad-en/corpus.jsonl"):
        if document["title"] not in articles:
            yield Passage(tuple(SENTENCE_END.split(document["text"])), "squad-en", document["title"])
    for section in read_jsonl(root / "openstax-text/text.jsonl"):
        if section["_id"] not in sections:
            for paragraph in section["paragraphs"]:
                yield Passage(tuple(SENTENCE_END.split(paragraph)), "openstax-text", section["_id"])
    for document in train_documents(root / "medquad"):
        yield Passage(tuple(SENTENCE_END.split(document["text"])), "medquad", document["_id"])


# ------------------------------------------------------------------------------------------------- pictures
def train_pictures(root: Path) -> list[Picture]:
    pictures = [p for name in PICTURE_SETS for p in _captioned(root / name)]
    hidden = dev_only_documents(root / "recipes")
    rows = read_jsonl(root / "recipes/corpus.jsonl")
    pictures += [
        Picture("recipes", r["image"], (_english(f"a photo of {r['title']}", "recipes"),))
        for r in rows
        if r.get("image") and r["_id"] not in hidden
    ]
    table = parquet.read_table(root / "clothing/images.parquet", columns=["image_id", "label", "split"]).to_pylist()
    pictures += [
        Picture("clothing", r["image_id"], (_english(f"a photo of {_article(r['label'])}", "clothing"),))
        for r in table
        if r["split"] == "train"
    ]
    return pictures


def _captioned(folder: Path) -> list[Picture]:
    """Pictures with their train captions; a foreign caption points to an English caption of the same picture."""
    image_of = {d["_id"]: d["image"] for d in train_documents(folder)}
    relevance = read_qrels(folder / "qrels/train.tsv")
    captions: dict[str, list[dict[str, Any]]] = {}
    for query in train_queries(folder):
        for document in relevance[query["_id"]]:
            captions.setdefault(document, []).append(query)
    pictures = []
    for document, queries in captions.items():
        if document in image_of:
            english = {q.get("kind", ""): q["text"] for q in reversed(queries) if q.get("lang", "en") == "en"}
            units = tuple(_caption(q, english, folder.name) for q in queries)
            pictures.append(Picture(folder.name, image_of[document], units))
    return pictures


def _caption(query: dict[str, Any], english: dict[str, str], source: str) -> Text:
    language = query.get("lang", "en")
    if language == "en":
        return _english(query["text"], source)
    counterpart = english.get(query.get("kind", ""), next(iter(english.values()), ""))
    return Text(query["text"], language, counterpart, source)


def _article(label: str) -> str:
    return label if label in ("pants", "shoes", "shorts") else f"a {label}"


def open_images(root: Path, source: str) -> Iterator[tuple[str, Image.Image]]:
    """(image id, RGB picture on white) of one set."""
    table = parquet.read_table(root / source / "images.parquet", columns=["image_id", "image"]).to_pydict()
    for image_id, cell in zip(table["image_id"], table["image"], strict=True):
        picture = Image.open(io.BytesIO(cell["bytes"])).convert("RGBA")
        yield image_id, Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
