"""Public benchmarks of a few rows in the layout of the official data, and an encoder whose ranking of them is known.

Everything carries a number: a text as `#7`, a picture or a frame as its colour. `Numbered` puts a query beside the
document of its number, and orders the others by their numbers, the largest first.
"""

import json
import re

import datasets
import numpy as np
import PIL.Image

from eval.mmeb import LABELS
from eval.tasks import mmeb
from mmembed.content import Image, Text, Video

SIZE = 1024


class Numbered:
    """A picture's or a video's number counts before that of a text; a text without one is a label of `numbers`."""

    def __init__(self, numbers=None):
        self.numbers, self.told = numbers or {}, []

    def encode(self, contents, *, role, instruction):
        self.told.append((role, instruction))
        vectors = np.zeros((len(contents), SIZE + 1), dtype=np.float32)
        for row, content in enumerate(contents):
            number = self._number(content)
            vectors[row, number] = 1
            vectors[row, SIZE] = 0.1 if role == "query" else number / SIZE / 10
        return vectors

    def similarity(self, a, b):
        return a @ b.T

    def _number(self, content):
        for part in content:
            if isinstance(part, Image | Video):
                picture = part.frames[0].source if isinstance(part, Video) else part.source
                red, green, _ = picture.convert("RGB").getpixel((0, 0))
                return red + 256 * green
        (text,) = (part.text for part in content if isinstance(part, Text))
        found = re.search(r"#(\d+)", text)
        return int(found[1]) if found else self.numbers[text]


def picture(path, number):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(path)
    return path


def frames(folder, number, count=2):
    for place in range(count):
        picture(folder / f"frame_{place + 1:04}.png", number)


def table(root, repository, rows, split, config=None):
    """Adds a table to a repository's copy, with the card that names its files."""
    folder = root / repository
    folder.mkdir(parents=True, exist_ok=True)
    file = f"{config or 'default'}-{split}.parquet"
    data = datasets.Dataset.from_list(rows)
    if "image" in rows[0]:
        data = data.cast_column("image", datasets.Image())
    data.to_parquet(folder / file)
    files: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.parquet")):
        of, _, part = path.stem.rpartition("-")
        files.setdefault(of, []).append(f"  - split: {part}\n    path: {path.name}\n")
    listed = "".join(f"- config_name: {of}\n  data_files:\n{''.join(own)}" for of, own in files.items())
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


# MMEB: three queries a set, of which two find their own document and the third finds another --------------------------

ANSWERS = ((1, 1), (2, 2), (3, 1))  # number of a query, number of its right document


def write_mmeb(root, sets):
    """Miniatures of sets below a folder of copies."""
    for one in sets:
        WRITERS[one.layout](root, one)


def label_numbers():
    """Numbers of the official labels: their places."""
    return {label: place for labels in json.loads(LABELS.read_text()).values() for place, label in enumerate(labels)}


def _pairs(root, one):
    asked, given = one.category.split("2")
    images = root / mmeb.MEDIA / "image-tasks"
    for number in range(5):
        picture(images / one.name / f"{number}.png", number)
    rows = []
    for number, right in ANSWERS:
        candidates = [right, *(other for other in range(1, 5) if other != right)]
        rows.append({
            "qry_inst": "<|image_1|>\nFind what belongs to it:" if "i" in asked else "Find what belongs to it:",
            "qry_text": f"what is #{number}?" if "t" in asked else "",
            "qry_img_path": f"{one.name}/{number}.png" if "i" in asked else "",
            "tgt_inst": "<|image_1|>\nRepresent the given image." if "i" in given else "",
            "tgt_text": [f"it is #{other}" if "t" in given else "" for other in candidates],
            "tgt_img_path": [f"{one.name}/{other}.png" if "i" in given else "" for other in candidates],
        })  # fmt: skip
    table(root, one.repository, rows, one.split, one.config)


def _pages(root, one):
    write_pages(root, one.repository, one.split)


def write_pages(root, repository, split):
    corpus = [{"corpus-id": number, "image": _encoded(root, number)} for number in range(1, 5)]
    queries = [{"query-id": number, "query": f"which page is #{number}?"} for number, _ in ANSWERS]
    qrels = [{"query-id": number, "corpus-id": right, "score": 1} for number, right in ANSWERS]
    qrels += [{"query-id": 2, "corpus-id": 4, "score": 0}]
    for config, rows in (("corpus", corpus), ("queries", queries), ("qrels", qrels)):
        table(root, repository, rows, split, config)


def _encoded(root, number):
    return {"bytes": picture(root / "pictures" / f"{number}.png", number).read_bytes(), "path": None}


def _frames_of(root, one, video, number, subset="", count=2):
    frames(root / mmeb.MEDIA / "video-tasks/frames" / one.media.format(video, subset=subset), number, count)


def _labels(root, one):
    labels = json.loads(LABELS.read_text())[one.name]
    rows = []
    for number, right in ANSWERS:
        _frames_of(root, one, f"clip {number}", number)
        rows.append({"video_id": f"clip {number}", "pos_text": labels[right]})
    table(root, one.repository, rows, one.split, one.config)


def _choices(root, one):
    columns, choices = one.columns, one.choices
    for config in mmeb.MVBENCH if one.config == mmeb.EVERY else (one.config,):
        rows = []
        for number, right in ANSWERS:
            video = f"clip {number}"
            _frames_of(root, one, video, number, config or "", count=11)
            given = [f"#{other} it is" for other in range(1, max(4, len(choices.columns)) + 1)]
            if not choices.columns:
                given = ["yes", "no"]
            written = given
            if choices.lettered == "taken off":
                written = [f"{chr(65 + place)}. {text}." for place, text in enumerate(given)]
            row = {columns["video"]: video, columns["answer"]: {
                "text": written[(right - 1) % len(given)], "letter": chr(64 + right), "index": str(right - 1),
            }[choices.answer]}  # fmt: skip
            if "question" in columns:
                row[columns["question"]] = "what is it"
            if len(choices.columns) > 1:
                row |= dict(zip(choices.columns, written, strict=True))
            elif choices.columns:
                row[choices.columns[0]] = written
            rows.append(row)
        table(root, one.repository, rows, one.split, config)


def _captions(root, one):
    rows = []
    for number, right in ANSWERS:
        video = f"clip-{number}"
        _frames_of(root, one, video, number, count=1 if number == 2 else 2)
        caption = f"see #{right}"
        rows.append(
            {
                one.columns["video"]: video + (".mp4" if one.name == "DiDeMo" else ""),
                one.columns["caption"]: [caption, "another"] if one.name in ("MSVD", "VATEX") else caption,
            }
        )
    table(root, one.repository, rows, one.split, one.config)


def _clips(root, one):
    rows = []
    for number, right in ANSWERS:
        video = f"long {number}"
        folder = root / mmeb.MEDIA / "video-tasks/frames" / one.media.format(video)
        frames(folder / "query", number)
        frames(folder / "positive_0", right)
        for other in range(1, 5):
            if other != right:
                frames(folder / f"negative_{other}", other)
        rows.append({"query": "when?", "video_path": f"videos/{video}.mp4"})
    table(root, one.repository, rows, one.split, one.config)


def _moments(root, one):
    folder = root / mmeb.MEDIA / "video-tasks/frames/video_mret/MomentSeeker"
    for number in range(1, 5):
        frames(folder / "video_frames" / f"part_{number}", number)
    picture(folder / "query_2.jpg.png", 2).rename(folder / "query_2.jpg")
    rows = [
        {"query": f"moment #{number}", "input_frames": given,
         "positive_frames": [{"output_path": f"part/{right}.mp4"}],
         "negative_frames": [{"output_path": f"part/{other}.mp4"} for other in range(1, 5) if other != right]}
        for (number, right), given in zip(ANSWERS, ("", "2.jpg", "part/3.mp4"), strict=True)
    ]  # fmt: skip
    table(root, one.repository, rows, one.split, one.config)


WRITERS = {"pairs": _pairs, "pages": _pages, "labels": _labels, "choices": _choices, "captions": _captions,
           "clips": _clips, "moments": _moments}  # fmt: skip


# mteb: the same three queries in the tables of its retrieval tasks ----------------------------------------------------


PADDED = ("NIGHTSI2IRetrieval", "MSCOCOT2IRetrieval", "VisualNewsI2TRetrieval", "Fashion200kI2TRetrieval")


def write_retrieval(root, task, split="test"):
    """A miniature of a retrieval task of mteb below a folder of copies; some have columns that hold nothing."""
    name, padded = task.metadata.name, task.metadata.name in PADDED
    asked, given = task.metadata.category.split("2")
    if name.startswith("Vidore"):
        write_pages(root, name, split)
        return

    def item(kind, number, part):
        text = {"text": f"about #{number}" if "t" in part else ""} if padded or "t" in part else {}
        image = {"image": _encoded(root, number) if "i" in part else None} if padded or "i" in part else {}
        return {"id": f"{kind}{number}", **text, **image}

    table(root, name, [item("d", number, given) for number in range(1, 5)], split, "corpus")
    table(root, name, [item("q", number, asked) for number, _ in ANSWERS], split, "queries")
    qrels = [{"query-id": f"q{number}", "corpus-id": f"d{right}", "score": 1} for number, right in ANSWERS]
    table(root, name, qrels, split, "default")
