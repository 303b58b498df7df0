"""Cuts the small data slice that ships in `data/` out of a full data root, in the same layout.

    python -m data_tools.slice_shared --from FULL_DATA_ROOT --to data

A clone must run the demo and all tests without the full root (130 MB), in at most 25 MB. Text sets therefore keep their
whole corpus and every dev query, so that a dev number on the slice equals the one on the full root; what is cut away is
training queries, languages, fields that no reader uses and the tails of long answers. Picture sets keep every dev
picture and some of the training pictures, scaled down and stored as WebP, so their dev numbers are a little easier than
on the full root. Every cut is written into the set's README.

The result is a pure function of the full root and of the plans below (choices follow a salted SHA-256 of the ids); the
bytes of the pictures also depend on the libwebp that Pillow carries. Takes a minute and 300 MB.
"""

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

Row = dict[str, Any]
Judgement = tuple[str, str, str]  # query id, document id, score
SALT = "mmembed-slice-1"
LIMIT_BYTES = 25_000_000


@dataclass(frozen=True)
class Pictures:
    """Longest side in pixels, WebP quality, and how many training pictures stay (None: all), whole groups at a time."""

    side: int
    quality: int = 75
    train: int | None = None
    group: str | None = None


@dataclass(frozen=True)
class Retrieval:
    """The cut of a BEIR folder. Dev queries always stay, but for languages that are cut."""

    languages: tuple[str, ...] = ()
    train_queries: int | None = None
    judged_only: bool = False
    max_characters: int | None = None
    drop: tuple[str, ...] = ()
    pictures: Pictures | None = None


@dataclass(frozen=True)
class Rows:
    """The cut of a folder with train.jsonl and dev.jsonl: training rows a class (None: all)."""

    train_per_label: int | None = None


@dataclass(frozen=True)
class LabelledPictures:
    """The cut of a folder whose images.parquet carries label and split: training pictures a class."""

    side: int
    train_per_label: int
    quality: int = 75


PLANS: dict[str, Retrieval | Rows | LabelledPictures] = {
    "squad-en": Retrieval(drop=("answers",)),
    "xquad/de": Retrieval(drop=("answers",)),
    "xquad/zh": Retrieval(drop=("answers",)),
    "medquad": Retrieval(max_characters=500, drop=("source", "focus")),
    "mbpp": Retrieval(),
    "odex": Retrieval(),
    "openstax-glossary": Retrieval(),
    "tldr-commands": Retrieval(languages=("en", "de", "fr", "zh"), train_queries=2500),
    "dbpedia-entity": Retrieval(train_queries=8, judged_only=True),
    "stsb-en": Rows(),
    "banking77": Rows(train_per_label=25),
    "noto-emoji": Retrieval(languages=("en", "de", "zh"), pictures=Pictures(side=128, quality=65)),
    "openstax-figures": Retrieval(pictures=Pictures(side=192, train=470)),
    "story-pages": Retrieval(languages=("en", "fr", "sw"), pictures=Pictures(side=160, train=420, group="story")),
    "tech-figures": Retrieval(pictures=Pictures(side=192, train=270)),
    "vega-charts": Retrieval(pictures=Pictures(side=224)),
    "recipes": Retrieval(pictures=Pictures(side=192)),
    "clothing": LabelledPictures(side=128, train_per_label=25),
}

OVERVIEW = """# Demo and test data

Small real data sets, cut by `data_tools/slice_shared.py` out of a larger data root of the same layout, so that a full
root is a drop-in (`--data-root`, `data.root`). Each folder's README names the source, the licence (they differ) and the
attribution, and what was cut. Only train and dev parts: no row here belongs to a test part.

| set | size | what is here |
|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="source", type=Path, required=True, help="the full data root")
    parser.add_argument("--to", dest="target", type=Path, required=True, help="folder to write; replaced set by set")
    arguments = parser.parse_args()
    lines = []
    for name, plan in PLANS.items():
        target = arguments.target / name
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        cut = slice_set(arguments.source / name, target, plan)
        copy_texts(arguments.source / name, target, cut)
        size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
        lines.append(f"| `{name}` | {size / 1e6:.2f} MB | {cut} |")
        print(f"{name:20s} {size / 1e6:6.2f} MB  {cut}", flush=True)
    write_overview(arguments.target, lines)
    total = sum(path.stat().st_size for path in arguments.target.rglob("*") if path.is_file())
    print(f"{'total':20s} {total / 1e6:6.2f} MB")
    if total > LIMIT_BYTES:
        raise SystemExit(f"the slice takes {total} bytes, the limit is {LIMIT_BYTES}: cut more in PLANS")


def slice_set(source: Path, target: Path, plan: Retrieval | Rows | LabelledPictures) -> str:
    """Writes the cut set and returns a sentence that says what was cut."""
    if isinstance(plan, Retrieval):
        return slice_retrieval(source, target, plan)
    if isinstance(plan, Rows):
        return slice_rows(source, target, plan)
    return slice_labelled_pictures(source, target, plan)


def slice_retrieval(source: Path, target: Path, plan: Retrieval) -> str:
    queries = {row["_id"]: row for row in read_lines(source / "queries.jsonl")}
    corpus = {row["_id"]: row for row in read_lines(source / "corpus.jsonl")}
    qrels = {split: read_qrels(source / "qrels" / f"{split}.tsv") for split in ("train", "dev")}
    full = (len(corpus), *(len({query for query, _, _ in qrels[split]}) for split in ("train", "dev")))
    cuts = []
    if plan.languages:
        queries = {key: row for key, row in queries.items() if row["lang"] in plan.languages}
        cuts.append(f"query languages cut to {', '.join(plan.languages)}")
    if plan.pictures and plan.pictures.train is not None:
        corpus = keep_pictures(corpus, qrels, plan.pictures)
    qrels = {split: [row for row in rows if row[0] in queries and row[1] in corpus] for split, rows in qrels.items()}
    if plan.train_queries is not None:
        kept = set(choose({query for query, _, _ in qrels["train"]}, plan.train_queries))
        qrels["train"] = [row for row in qrels["train"] if row[0] in kept]
    used = {query for rows in qrels.values() for query, _, _ in rows}
    queries = {key: row for key, row in queries.items() if key in used}
    if plan.judged_only:
        judged = {document for rows in qrels.values() for _, document, _ in rows}
        corpus = {key: row for key, row in corpus.items() if key in judged}
    if plan.max_characters is not None:
        corpus = {key: {**row, "text": shorten(row["text"], plan.max_characters)} for key, row in corpus.items()}
        cuts.append(f"document texts cut at a word end before {plan.max_characters} characters")
    if plan.drop:
        queries = {key: {k: v for k, v in row.items() if k not in plan.drop} for key, row in queries.items()}
        cuts.append(f"query fields {', '.join(plan.drop)} left out")
    write_lines(target / "corpus.jsonl", corpus.values())
    write_lines(target / "queries.jsonl", queries.values())
    for split, rows in qrels.items():
        write_qrels(target / "qrels" / f"{split}.tsv", rows)
    if plan.pictures:
        used_pictures = {row["image"] for row in (*corpus.values(), *queries.values()) if row.get("image")}
        slice_pictures(source, target, plan.pictures, lambda row: row["image_id"] in used_pictures)
        cuts.append(described(plan.pictures))
    if (source / "stories.jsonl").exists():
        stories = {row["story"] for row in corpus.values()}
        kept_rows = (row for row in read_lines(source / "stories.jsonl") if row["story"] in stories)
        write_lines(target / "stories.jsonl", (row for row in kept_rows if row["lang"] in plan.languages))
    now = (len(corpus), *(len({query for query, _, _ in qrels[split]}) for split in ("train", "dev")))
    names = ("documents", "train queries", "dev queries")
    pairs = zip(now, full, names, strict=True)
    counts = [f"{kept} of {all_} {name}" if kept != all_ else f"all {all_} {name}" for kept, all_, name in pairs]
    return "; ".join([", ".join(counts), *cuts])


def keep_pictures(corpus: dict[str, Row], qrels: dict[str, list[Judgement]], plan: Pictures) -> dict[str, Row]:
    """All documents judged for a dev query, and whole groups of the others until `plan.train` of them are kept."""
    dev = {document for _, document, _ in qrels["dev"]}
    groups: dict[str, list[str]] = {}
    for key, row in corpus.items():
        if key not in dev:
            groups.setdefault(row[plan.group] if plan.group else key, []).append(key)
    kept: set[str] = set()
    for group in choose(groups, len(groups)):
        if plan.train is not None and len(kept) + len(groups[group]) <= plan.train:
            kept.update(groups[group])
    return {key: row for key, row in corpus.items() if key in dev or key in kept}


def slice_rows(source: Path, target: Path, plan: Rows) -> str:
    train, dev = (list(read_lines(source / f"{split}.jsonl")) for split in ("train", "dev"))
    kept = train
    if plan.train_per_label is not None:
        kept = per_label(train, plan.train_per_label, key="_id")
    write_lines(target / "train.jsonl", kept)
    write_lines(target / "dev.jsonl", dev)
    if (source / "labels.json").exists():
        shutil.copyfile(source / "labels.json", target / "labels.json")
    amount = f"{len(kept)} of {len(train)} train rows" if len(kept) != len(train) else f"all {len(train)} train rows"
    return f"{amount}, all {len(dev)} dev rows"


def slice_labelled_pictures(source: Path, target: Path, plan: LabelledPictures) -> str:
    rows = pq.read_table(source / "images.parquet", columns=["image_id", "label", "split"]).to_pylist()
    train, dev = ([row for row in rows if row["split"] == split] for split in ("train", "dev"))
    kept = {row["image_id"] for row in (*per_label(train, plan.train_per_label, key="image_id"), *dev)}
    pictures = Pictures(plan.side, plan.quality)
    slice_pictures(source, target, pictures, lambda row: row["image_id"] in kept)
    shutil.copyfile(source / "labels.json", target / "labels.json")
    count = f"{len(kept) - len(dev)} of {len(train)} train pictures, all {len(dev)} dev pictures"
    return f"{count}; {described(pictures)}"


def slice_pictures(source: Path, target: Path, plan: Pictures, wanted: Callable[[Row], bool]) -> None:
    """Re-encodes the wanted rows; the other columns and the schema with its metadata stay as they are."""
    table = pq.read_table(source / "images.parquet")
    rows = [row for row in table.to_pylist() if wanted(row)]
    for row in rows:
        row["image"] = {"bytes": webp(row["image"]["bytes"], plan), "path": None}
    small = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(small, target / "images.parquet", row_group_size=128, compression="zstd", use_dictionary=False)


def webp(encoded: bytes, plan: Pictures) -> bytes:
    """The picture on white, at most `plan.side` pixels a side, as lossy WebP."""
    image: Image.Image = Image.open(io.BytesIO(encoded))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.thumbnail((plan.side, plan.side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=plan.quality, method=6)
    return buffer.getvalue()


def described(plan: Pictures) -> str:
    return f"pictures scaled to at most {plan.side} pixels a side, put on white and stored as WebP"


def choose(names: Iterable[str], count: int) -> list[str]:
    """`count` of the names in salted-hash order: the same ones wherever and however often this runs."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{SALT}:{name}".encode()).digest())[:count]


def per_label(rows: list[Row], count: int, key: str) -> list[Row]:
    """`count` rows of each label, in file order."""
    ids: dict[str, list[str]] = {}
    for row in rows:
        ids.setdefault(row["label"], []).append(row[key])
    kept = {name for names in ids.values() for name in choose(names, count)}
    return [row for row in rows if row[key] in kept]


def shorten(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    head = text[:limit]
    return head[: head.rfind(" ")].rstrip() if " " in head else head


def copy_texts(source: Path, target: Path, cut: str) -> None:
    """Copies the README and the licence files; each README gains a line about the cut."""
    for path in sorted(source.iterdir()):
        if path.name.startswith("LICENSE"):
            shutil.copyfile(path, target / path.name)
    readme = source / "README.md" if (source / "README.md").exists() else source.parent / "README.md"
    text = readme.read_text(encoding="utf-8").rstrip()
    note = f"This is a slice of the set that the text above describes. Changed by `data_tools/slice_shared.py`: {cut}."
    (target / "README.md").write_text(f"{text}\n\n## What was cut here\n{note}\n", encoding="utf-8")


def write_overview(target: Path, lines: list[str]) -> None:
    (target / "README.md").write_text(OVERVIEW + "\n".join(lines) + "\n", encoding="utf-8")


def read_lines(path: Path) -> Iterable[Row]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_qrels(path: Path) -> list[Judgement]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(query, document, score) for query, document, score in (line.split("\t") for line in lines)]


def write_qrels(path: Path, rows: list[Judgement]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
