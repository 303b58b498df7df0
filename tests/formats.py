"""What files and records of every format are drawn from, by what the format says of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from mmembed.data.format_base import FORMATS, WritableFormat
from mmembed.data.holding import Holds, normal
from mmembed.data.rows import RowFormat

WRITABLE = {name: cls for name, cls in FORMATS.classes().items() if issubclass(cls, WritableFormat)}
PICTURES = ("a.png", "below/b.png", "ü c.png")  # files that are there, in the folder of the records
TEXTS = st.one_of(
    st.text(min_size=1, max_size=12),
    st.sampled_from(['it\'s "said"', "a\nb", "\n", "[1]", "<image>", "<|image_1|>", "\u2028", "null", "-"]),
).filter(lambda text: bool(text.strip()))
IDS = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)
NUMBERS = st.one_of(st.integers(-9, 9), st.floats(-1e6, 1e6, allow_nan=False))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
EXTRAS = st.dictionaries(st.text(max_size=5).map(lambda name: f"x_{name}"), JSON, max_size=2)
META = {  # a key of a `meta` that is no object of anything -> its values
    "instruction": TEXTS,
    "system": TEXTS,
    "iteration": IDS.filter(lambda name: name != "0"),
    "grade": st.integers(-3, -1),
    "rank": st.integers(1, 999),
    "tag": IDS,
    "mark": IDS.filter(lambda name: name != "Q0"),
}


# Records --------------------------------------------------------------------------------------------------------------


@st.composite
def records(draw: Any, name: str) -> list[dict[str, Any]]:
    """Records that a format can hold, with everything that it says it holds."""
    holds = WRITABLE[name].holds
    most = 1 if name.startswith("sentence_transformers") else 3  # rows of one file have the same columns there
    shared: list[dict[str, Any]] = []
    prefix = draw(IDS)
    ids = [f"{prefix}{number}" for number in range(60)]
    found = [_record(draw, name, holds, shared, ids) for _ in range(draw(st.integers(1, most)))]
    if "queries" in holds.unjudged and holds.documents and draw(st.booleans()):
        found.append(found[0] | {"documents": [], "id": ids.pop()})
    if "documents" in holds.unjudged and draw(st.booleans()):
        alone = {"documents": [_document(draw, name, holds, ids, "score" in holds.needs)]}
        alone["documents"][0].pop("relevance", None)
        found.append(alone | ({"meta": {"corpus_id": "one"}} if name == "nemo_corpus" else {}))
    return [record | {"where": f"f:{place}"} for place, record in enumerate(found, start=1)]


def _record(draw: Any, name: str, holds: Holds, shared: list[dict[str, Any]], ids: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"documents": []}
    if holds.contents:
        record["query"] = draw(contents(holds))
    for key, values in (("instruction", TEXTS), ("source", TEXTS), ("labels", st.lists(TEXTS, min_size=1, max_size=2))):
        if key in holds.record and draw(st.booleans()):
            record[key] = draw(values)
    if "id" in holds.needs or ("id" in holds.record and draw(st.booleans())):
        record["id"] = ids.pop()
    if "meta" in holds.record and (meta := draw(EXTRAS)):
        record["meta"] = meta
    if name == "nemo_corpus":
        record["meta"] = record.get("meta", {}) | {"corpus_id": draw(st.sampled_from(["one", "two"]))}
    if "task" in holds.record:
        record["task"] = draw(st.sampled_from(["retrieval", "reranking", "sts"]))
    if holds.documents:
        _judge(draw, name, record, holds, shared, ids)
    return record


def _judge(draw: Any, name: str, record: Any, holds: Holds, shared: list[dict[str, Any]], ids: list[str]) -> None:
    if holds.sts and draw(st.booleans()):
        document = _document(draw, name, holds, ids, False)
        record.update(task="sts", documents=[document | {"relevance": draw(st.floats(0, 5))}])
        return
    counts = [
        draw(st.integers(least, 3 if most is None else most)) for least, most in (holds.positives, holds.negatives)
    ]
    counts[0] += sum(counts) == 0
    scored = "score" in holds.document and draw(st.booleans())
    for side, count in enumerate(counts):
        scored = draw(st.booleans()) if holds.scores == "side" and "score" in holds.document else scored
        for _ in range(count):
            one = scored if holds.scores != "each" else "score" in holds.document and draw(st.booleans())
            document = _document(draw, name, holds, ids, one or "score" in holds.needs)
            document = document | draw(relevances(holds, side))
            if "grade" in document.get("meta", {}):
                document["relevance"] = 0
            record["documents"].append(document)
    if name == "sentence_transformers" and len(record["documents"]) > 1 and not scored and draw(st.booleans()):
        record["meta"] = {"margin": draw(NUMBERS)}
    _tell_apart(record)
    corpus = record.get("meta", {}).get("corpus_id")
    if (
        holds.contents
        and "documents.id" in holds.needs
        and shared
        and draw(st.booleans())
        and shared[0]["corpus"] == corpus
    ):
        own = {key: record["documents"][0][key] for key in ("relevance", "score") if key in record["documents"][0]}
        record["documents"][0] = own | shared[0]["document"]
    elif not shared:
        kept = {key: record["documents"][0].get(key) for key in ("content", "title", "id", "meta")}
        shared.append({"corpus": corpus, "document": {key: value for key, value in kept.items() if value is not None}})
    if holds.ordered or draw(st.booleans()):
        record["documents"] = draw(st.permutations(record["documents"]))


def _tell_apart(record: dict[str, Any]) -> None:
    """No two documents are the same: a content would be a positive and a negative."""
    seen: list[Any] = []
    for number, document in enumerate(record["documents"]):
        if "content" in document:
            said = [document.get("title"), normal({"query": document["content"]})]
            if said in seen:
                document["content"] = f"document {number}"
            seen.append(said)


def _document(draw: Any, name: str, holds: Holds, ids: list[str], scored: bool) -> dict[str, Any]:
    document: dict[str, Any] = {"content": draw(contents(holds))} if holds.contents else {}
    if "id" in holds.document and ("documents.id" in holds.needs or draw(st.booleans())):
        document["id"] = ids.pop()
    if scored:
        document["score"] = draw(NUMBERS)
    for key in ("title", "rationale"):
        if key in holds.document and not isinstance(document["content"], list) and draw(st.booleans()):
            document[key] = draw(TEXTS)
    meta = {key: draw(META[key]) for key in sorted(holds.document_meta - {"role"}) if draw(st.booleans())}
    if "role" in holds.document_meta and draw(st.booleans()):
        meta["role"] = "assistant" if name == "ms_swift" else "user"  # the unusual one
    if name == "trec_run":  # what it has not is made
        meta = {"rank": draw(META["rank"]), "tag": draw(META["tag"])} | meta
    if "meta" in holds.document:
        meta = draw(EXTRAS)
    return document | ({"meta": meta} if meta else {})


def relevances(holds: Holds, side: int) -> st.SearchStrategy[dict[str, Any]]:
    if holds.relevance == "unknown":
        return st.just({"relevance": None})
    if side:
        return st.sampled_from([{"relevance": 0}, {"relevance": 0.0}])
    graded = st.floats(0.1, 9).map(lambda grade: {"relevance": grade})
    return st.just({}) | st.just({"relevance": 1}) if holds.relevance == "binary" else st.just({}) | graded


@st.composite
def contents(draw: Any, holds: Holds) -> Any:
    """A text in both of its spellings, media with and without a text, and orders where the format has them."""
    text, parts = draw(TEXTS), []
    if "image" in holds.media and draw(st.booleans()):
        most = 1 if holds.pictures == 1 else 2
        parts += [{"image": one} for one in draw(st.lists(st.sampled_from(PICTURES), min_size=1, max_size=most))]
    if "video" in holds.media and draw(st.booleans()):
        parts.append({"video": draw(st.lists(st.sampled_from(PICTURES), min_size=1, max_size=2))})
    if "audio" in holds.media and draw(st.booleans()):
        rate = {"sampling_rate": draw(st.integers(1, 48000))} if holds.sampling_rate and draw(st.booleans()) else {}
        parts.append({"audio": "said.wav", **rate})
    if not parts:
        return text if draw(st.booleans()) else {"text": text}
    if draw(st.booleans()):
        parts.append({"text": text})
    if holds.interleaved != "no" and draw(st.booleans()):
        parts = draw(st.permutations(parts))
        if holds.interleaved == "any" or "text" not in parts[-1]:
            parts.append({"text": draw(TEXTS)})
        return parts
    pictures = [one["image"] for one in parts if "image" in one]
    merged = {key: value for one in parts for key, value in one.items() if key != "image"}
    return ({"image": pictures[0]} if len(pictures) == 1 else {"images": pictures} if pictures else {}) | merged


# Files ----------------------------------------------------------------------------------------------------------------

Files = dict[
    str, Any
]  # name -> rows of JSON (.jsonl), an object (.json), lines (.tsv, .txt), rows of a table (.parquet)


def files(name: str) -> st.SearchStrategy[Files]:
    """Files of a format as others write them. A format of JSON rows needs nothing here but what its schema lacks."""
    if name in FILES:
        return FILES[name]
    cls = WRITABLE[name]
    assert issubclass(cls, RowFormat), f"say in FILES what files of the format '{name}' look like"
    rows = with_extras(st.from_type(cls.schema.row)).map(FIXES.get(name, lambda row: row))
    return st.lists(rows, min_size=1, max_size=3).map(lambda found: {"rows.jsonl": found})


def with_extras(rows: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.builds(lambda row, extras: {**row, **extras}, rows, EXTRAS)


def _scored(row: Any, *pairs: tuple[str, str]) -> Any:
    """As many scores as documents."""
    for side, scores in pairs:
        if row.get(scores) is not None:
            given = row[scores] or [0.5]
            row[scores] = [given[place % len(given)] for place in range(len(row.get(side) or []))]
    return row


def _nemo(row: Any) -> Any:
    if row.get("query") and row.get("question"):
        del row["query"]
    return row if row.get("query") or row.get("question") else row | {"question": "asked"}


def _blockrank(row: Any) -> Any:
    row["documents"] = list({one["doc_id"]: one for one in row["documents"]}.values())
    return row | {"answer_ids": [one["doc_id"] for one in reversed(row["documents"][::2])]}


def _passages(row: Any, *sides: str) -> Any:
    """Passages that say something, each once."""
    seen: set[Any] = set()
    for side in sides:
        for number, one in enumerate(row.get(side) or []):
            one["text"] = one["text"] if one["text"].strip() else f"passage {number}"
            if one.get("docid") in seen:
                one["docid"] = f"{side} {number}"
            seen.add(one.get("docid", side))
    return row


def _shown(row: Any) -> Any:
    for one in (row["query"], *row["documents"]):
        if not (one.get("text") or "").strip():
            one["text"] = "shown"
    return row


FIXES: dict[str, Callable[[Any], Any]] = {
    "flag_embedding": lambda row: _scored(row, ("pos", "pos_scores"), ("neg", "neg_scores")),
    "tevatron_legacy": lambda row: _passages(row, "positive_passages", "negative_passages"),
    "tevatron_distil": lambda row: _scored(_passages(row, "passages"), ("passages", "scores")),
    "qwen3_vl": lambda row: row if (row.get("text") or "").strip() else row | {"text": "shown"},
    "qwen3_vl_rerank": _shown,
    "nemo": _nemo,
    "blockrank": _blockrank,
}

TOKENS = st.builds(
    lambda token, text, lead: (lead + token + text) if token else text or "x",
    st.sampled_from(["<|image_1|>\n", "<|image_1|>", "<|image_1|> ", ""]),
    st.sampled_from(["", "What is this?", "\nit's [x]"]),
    st.sampled_from(["", "Look: "]),
)


@st.composite
def _vlm2vec(draw: Any, several: bool) -> dict[str, Any]:
    def pair() -> tuple[str, str]:
        text = draw(TOKENS)
        image = "a/ü.png" if "<|image_1|>" in text or draw(st.booleans()) else ""
        return text, image

    row: dict[str, Any] = {}
    row["qry"], row["qry_image_path"] = pair()
    row["pos_text"], row["pos_image_path"] = pair()
    negatives = [pair() for _ in range(draw(st.integers(0, 2)))]
    if several:
        spelled = draw(st.sampled_from([str, json.dumps]))
        row["neg_text"], row["neg_image_path"] = (spelled([one[place] for one in negatives]) for place in (0, 1))
    elif negatives:
        row["neg_text"], row["neg_image_path"] = negatives[0]
    else:
        row |= draw(st.sampled_from([{}, {"neg_text": "", "neg_image_path": ""}, {"neg_text": None}]))
    if not row["qry_image_path"] and draw(st.booleans()):
        row["qry_image_path"] = None
    return row | draw(EXTRAS)


@st.composite
def _swift(draw: Any, role: str) -> dict[str, Any]:
    def chat(role: str) -> tuple[list[Any], dict[str, Any]]:
        media = {
            "images": draw(st.lists(st.just("a.png"), max_size=2)),
            "videos": draw(st.lists(st.lists(st.just("f.png"), min_size=1, max_size=2), max_size=1)),
            "audios": draw(st.lists(st.just("s.wav"), max_size=1)),
        }
        tags = [f"<{kind[:-1]}>" for kind, given in media.items() for _ in given]
        tags = tags[draw(st.integers(0, len(tags))) :]  # media without a tag come first
        text = "".join(draw(st.permutations([*tags, draw(st.sampled_from(["a text", "\n", "b"]))])))
        system = [{"role": "system", "content": "Find it"}] if draw(st.booleans()) else []
        return [*system, {"role": role, "content": text or "x"}], media

    messages, media = chat("user")
    row = {"messages": messages, **{kind: given for kind, given in media.items() if given or draw(st.booleans())}}
    label = draw(st.none() | st.floats(0, 1))
    counts = (
        {"positive": draw(st.integers(1, 2)), "negative": draw(st.integers(0, 2))} if label is None else {"positive": 1}
    )
    for side, count in counts.items():
        chats = [chat(draw(st.sampled_from([role, role, "user", "assistant"]))) for _ in range(count)]
        row[f"{side}_messages"] = [one for one, _ in chats]
        for kind in ("images", "videos", "audios"):
            if any(media[kind] for _, media in chats) or draw(st.booleans()):
                row[f"{side}_{kind}"] = [media[kind] for _, media in chats]
    return row | draw(EXTRAS) | ({} if label is None else {"label": label})


VALUES = st.one_of(
    TEXTS,
    st.sampled_from([{"image": "a.png", "text": "x"}, {"image": "a.png"}, {"text": "said"}, {"audio": "s.wav"}]),
    st.sampled_from(
        [[{"role": "user", "content": "hi"}], [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]]
    ),
)


@st.composite
def _columns(draw: Any) -> list[dict[str, Any]]:
    count = draw(st.integers(2, 4))
    names = draw(
        st.sampled_from(
            [["anchor", "positive", "negative_1", "negative_2"], ["question", "answer", "wrong", "wronger"]]
        )
    )[:count]
    label = draw(st.sampled_from([None, "label", "labels", "score"]))
    names = [*names, label] if label and draw(st.booleans()) else [label, *names] if label else names
    kind = draw(st.sampled_from(["number", "list"]))
    numbers = st.floats(0, 5) if kind == "number" else st.lists(NUMBERS, min_size=count - 1, max_size=count - 1)
    return [
        {name: draw(numbers if name == label else VALUES) for name in names} for _ in range(draw(st.integers(1, 3)))
    ]


@st.composite
def _lists(draw: Any) -> list[dict[str, Any]]:
    names = draw(st.sampled_from([["query", "docs", "labels"], ["label", "asked", "found"], ["q", "scores", "d"]]))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        documents = draw(st.lists(VALUES, min_size=1, max_size=4))
        grades = draw(st.lists(st.integers(0, 3), min_size=len(documents), max_size=len(documents)))
        values = iter([draw(VALUES), documents])
        rows.append({name: grades if name in ("labels", "label", "scores") else next(values) for name in names})
    return rows


def _rows(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Files]:
    return st.lists(strategy, min_size=1, max_size=3).map(lambda rows: {"rows.jsonl": rows})


@st.composite
def _tevatron(draw: Any) -> Files:
    cls = WRITABLE["tevatron"]
    ids = draw(st.lists(IDS, unique=True, min_size=1, max_size=5))
    corpus = [draw(with_extras(st.from_type(cls.corpus_schema.row))) | {"docid": name} for name in ids]
    corpus = [row if any(row.get(kind) for kind in ("text", "image")) else row | {"text": "x"} for row in corpus]
    queries = []
    for name in draw(st.lists(IDS, unique=True, min_size=1, max_size=3)):
        positives = draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
        rest = [one for one in ids if one not in positives]
        row = draw(with_extras(st.from_type(cls.schema.row))) | {"query_id": name, "positive_document_ids": positives}
        if row.get("negative_document_ids") is not None:
            row["negative_document_ids"] = rest
        queries.append(row if row.get("query_text") else row | {"query_text": "asked"})
    return {"train.jsonl": queries, "corpus.jsonl": corpus}


@st.composite
def _judged(draw: Any, image: bool) -> Files:
    """A corpus, queries, some without judgements, and who judged what."""
    ids = draw(st.lists(IDS, unique=True, min_size=1, max_size=4))
    names = draw(st.lists(IDS, unique=True, min_size=1, max_size=3))
    title = st.sampled_from([{}, {"title": ""}, {"title": "T"}, {"title": None}])
    show = st.sampled_from([{}, {"image": "p-1"}, {"image": "p-2"}, {"image": None}]) if image else st.just({})
    corpus = [{"_id": one, "text": draw(TEXTS), **draw(title), **draw(show), **draw(EXTRAS)} for one in ids]
    queries = [{"_id": one, "text": draw(TEXTS), **draw(show), **draw(EXTRAS)} for one in names]
    judged = [
        (query, document, draw(st.sampled_from([0, 1, 2, 0.5])))
        for query in names
        if draw(st.booleans())
        for document in draw(st.lists(st.sampled_from(ids), unique=True, min_size=1))
    ]
    found: Files = {"corpus.jsonl": corpus, "queries.jsonl": queries}
    if image:
        found["qrels/train.tsv"] = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, line)) for line in judged)]
        if any(row.get("image") for row in corpus + queries):
            found["images.parquet"] = [
                {"image_id": name, "image": {"bytes": name.encode(), "path": None}, "note": "kept"}
                for name in ("p-1", "p-2", "p-3")
            ]
        return found
    found["qrels.jsonl"] = []
    for query in dict.fromkeys(query for query, _, _ in judged):
        own = [(document, score) for name, document, score in judged if name == query]
        documents, scores = zip(*own, strict=True)
        found["qrels.jsonl"].append({"qid": query, "docid": list(documents), "score": list(scores)})
    return found


@st.composite
def _nemo_corpus(draw: Any) -> Files:
    found: Files = {}
    data, paths = [], []
    for corpus in draw(st.sampled_from([["one"], ["one", "two"]])):
        ids = draw(st.lists(IDS, unique=True, min_size=1, max_size=4))
        paths.append({"path": f"./{corpus}_files"})
        extra = draw(st.sampled_from([{}, {"query_instruction": "Find it"}]))
        found[f"{corpus}_files/merlin_metadata.json"] = {"class": "TextQADataset", "corpus_id": corpus} | extra
        found[f"{corpus}_files/train.parquet"] = [{"id": one, "text": draw(TEXTS)} for one in ids]
        for number in range(draw(st.integers(1, 2))):
            chosen = draw(st.lists(st.sampled_from(ids), min_size=1, unique=True))
            row = {"question_id": f"{corpus}-{number}", "question": draw(TEXTS), "corpus_id": corpus, **draw(EXTRAS)}
            row["pos_doc"] = [{"id": one} for one in chosen]
            rest = [{"id": one} for one in ids if one not in chosen]
            data.append(row | draw(st.sampled_from([{}, {"neg_doc": rest}, {"neg_doc": None}])))
    listed = paths[0] if len(paths) == 1 and draw(st.booleans()) else paths
    return found | {"train.json": {"corpus": listed, "data": data}}


@st.composite
def _trec(draw: Any, run: bool) -> Files:
    lines = []
    for query in draw(st.lists(IDS, unique=True, min_size=1, max_size=3)):
        for rank, document in enumerate(draw(st.lists(IDS, unique=True, min_size=1, max_size=3)), start=1):
            if run:
                lines.append(f"{query} Q0 {document} {rank} {draw(NUMBERS)} {draw(IDS)}")
            else:
                lines.append(f"{query} {draw(st.sampled_from(['0', 'Q0']))} {document} {draw(st.integers(-2, 3))}")
    return {"lines.txt": lines}


FILES: dict[str, st.SearchStrategy[Files]] = {
    "jsonl": records("jsonl").map(
        lambda found: {"rows.jsonl": [{key: one[key] for key in one if key != "where"} for one in found]}
    ),
    "vlm2vec": _rows(_vlm2vec(False)),
    "mme5": _rows(_vlm2vec(True)),
    "ms_swift": _rows(_swift("user")),
    "ms_swift_reranker": _rows(_swift("assistant")),
    "sentence_transformers": _columns().map(lambda rows: {"rows.jsonl": rows}),
    "sentence_transformers_list": _lists().map(lambda rows: {"rows.jsonl": rows}),
    "tevatron": _tevatron(),
    "trove": _judged(False),
    "beir": _judged(True),
    "nemo_corpus": _nemo_corpus(),
    "trec_qrels": _trec(False),
    "trec_run": _trec(True),
}


def place(found: Files, folder: Path) -> Path:
    """Writes files, with nothing of the code under test; what a format's reader is given."""
    for name, content in found.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("\n".join(map(json.dumps, content)) + "\n", encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(content), encoding="utf-8")
        elif path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(content), path)
        else:
            path.write_bytes("".join(f"{line}\n" for line in content).encode())
    return folder / next(iter(found)) if len(found) == 1 else folder


def said_by(path: Path) -> Any:
    """What a file says, by other parsers than ours; lines of corpora and judgements have no order."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        return sorted(map(_plain, rows)) if path.stem in ("corpus", "qrels") else rows
    if path.suffix == ".json":
        return json.loads(path.read_bytes())
    if path.suffix == ".parquet":
        return sorted(map(_plain, pq.read_table(path).to_pylist()))
    return sorted([_number(cell) for cell in line.split()] for line in path.read_bytes().decode().split("\n"))


def _plain(row: Any) -> str:
    return json.dumps(_numbers(row), sort_keys=True, default=repr)


def _numbers(value: Any) -> Any:
    """1 and 1.0 are one number."""
    if isinstance(value, dict):
        return {key: _numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(cell: str) -> str:
    try:
        return repr(float(cell))
    except ValueError:
        return cell
