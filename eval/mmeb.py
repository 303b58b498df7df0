"""Turns a set of MMEB into an mteb task that reads the official data.

Rows come from the set's repository, pictures and frames of videos from the repository of MMEB-V2: its archives, or a
folder where they lie unpacked, as the official download script leaves them (`image-tasks/`, `video-tasks/frames/`).
Media are paths until mteb's loader asks for a batch, so memory is that of the texts.

Each query ranks its own candidates where the set gives some: `top_ranked` of mteb's task. Candidates that look the same
are one, as in the official evaluation: so an answer that several rows share is encoded once, and a copy of the right
answer among the wrong ones is right too.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata

from eval.files import read_json
from eval.mteb_tasks import Ranked
from eval.sets import MissingSet, Source, unpacked
from eval.tasks.local import LANGUAGES
from eval.tasks.mmeb import EVERY, FRAMES, MEDIA, MEDIA_REVISION, MOMENTS, MVBENCH, Choices, Set

LABELS = Path(__file__).parent / "tasks" / "mmeb_labels.json"
ARCHIVES = {
    "image-tasks": ("", ("image-tasks/mmeb_v1.tar.gz",)),
    "video_cls": ("video_cls", ("video-tasks/frames/video_cls.tar.gz",)),
    "video_ret": ("video_ret", ("video-tasks/frames/video_ret.tar.gz",)),
    "video_mret": ("", ("video-tasks/frames/video_mret.tar.gz",)),
    "video_qa": ("", tuple(f"video-tasks/frames/video_qa.tar.gz-{part:02}" for part in range(5))),
}  # what holds a folder -> the folder its files belong in, and its parts in order
PICTURES, VIDEOS = (".jpg", ".jpeg", ".png"), (".mp4", ".avi", ".mkv", ".mov", ".webm")
TOKEN = "<|image_1|>"  # stands for the picture in the data's texts


def build_task(row: Set, source: Source) -> "Mmeb":
    """The mteb task of a set; its data are read at `load_data`."""
    # As a dictionary: mteb's types are closed lists of literals.
    metadata = TaskMetadata.model_validate({
        "name": row.name,
        "description": f"{row.repository} ({row.group})",
        "dataset": {"path": row.repository, "revision": row.revision or "newest"},
        "type": "Any2AnyReranking" if row.kind == "reranking" else "Any2AnyRetrieval",
        "category": row.category,
        "modalities": [name.replace("frames", "video") for name in row.modalities],
        "eval_splits": [row.split],
        "eval_langs": [LANGUAGES[code] for code in row.languages],
        "main_score": row.main_score,
        "prompt": _prompt(row.instruction, row.document_instruction),
    })  # fmt: skip
    # A class of its own: mteb restores `metadata` from the class when it unloads a task's data.
    task: Mmeb = type("Mmeb", (Mmeb,), {"metadata": metadata})()
    task.row, task.source = row, source
    return task


class Mmeb(Ranked):
    """A set of MMEB.

    Attributes:
        listed: how many candidates the data list for each query, copies included.
        differs: where the data are not those of the declared counts, in words.
    """

    k_values: Sequence[int] = (1, 5, 10)
    row: Set
    source: Source
    listed: Sequence[int] = ()
    differs: str

    def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
        if not self.data_loaded:
            read = pages if self.row.layout == "pages" else self._read
            data: Any = self.source.had(self.row.name, lambda: read(self.row, self.source))
            self.dataset = {"default": {self.row.split: data}}
            self.differs = differences(self.row, data, self.listed)
            self.data_loaded = True

    def _read(self, row: Set, source: Source) -> dict[str, Any]:
        """Pairs of pictures and texts, or videos: collected, then tables. Fits the metadata to what the data hold."""
        found = Collected()
        READERS[row.layout](row, source, found)
        self.listed = found.listed
        category = "2".join(
            part + "t" * ("t" not in part and any(item.text.strip() for item in side))
            for part, side in zip(row.category.split("2"), (found.queries, found.documents.values()), strict=True)
        )
        prompt = self.metadata.prompt or found.prompt
        self.metadata = self.metadata.model_copy(update={"category": category, "prompt": prompt})
        query_part, document_part = category.split("2")
        return {
            "queries": _table(found.queries, query_part, row.name),
            "corpus": _table(found.documents.values(), document_part, row.name),
            "relevant_docs": found.judged,
            "top_ranked": found.candidates if row.kind == "reranking" else None,
        }


@dataclass(frozen=True)
class Item:
    """A query or a document. `media`: of a picture its path, of a video those of its frames."""

    id: str
    text: str
    media: tuple[str, ...] = ()


@dataclass
class Collected:
    """What a reader finds, row by row. `prompt`: instructions that the data hold."""

    queries: list[Item] = field(default_factory=list)
    documents: dict[tuple[str, tuple[str, ...]], Item] = field(default_factory=dict)
    judged: dict[str, dict[str, int]] = field(default_factory=dict)
    candidates: dict[str, list[str]] = field(default_factory=dict)
    listed: list[int] = field(default_factory=list)
    prompt: dict[str, str] | None = None

    def document(self, text: str, media: tuple[str, ...] = ()) -> str:
        """The id of a document, which is new where no other looks the same."""
        item = self.documents.setdefault((text, media), Item(_key(len(self.documents)), text, media))
        return item.id

    def query(self, text: str, media: tuple[str, ...], right: Sequence[str], candidates: Sequence[str]) -> None:
        key = f"q{len(self.queries)}"
        self.queries.append(Item(key, text, media))
        self.judged[key] = dict.fromkeys(right, 1)
        self.candidates[key] = sorted({*candidates, *right})
        self.listed.append(len(candidates))


def _key(number: int) -> str:
    """An id that says nothing of the order of the data, where the right answer mostly comes first: ids break ties, and
    a reranker of lists sees candidates by them."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:16]


# Readers of layouts ---------------------------------------------------------------------------------------------------


def _pairs(row: Set, source: Source, found: Collected) -> None:
    """A query and its candidates in each row, the right one first."""
    table = _rows(row, source)
    root = media_root(source, "image-tasks", row.name)
    root = root / "MMEB" if (root / "MMEB").is_dir() else root
    table = table.rename_columns({theirs: ours for ours, theirs in row.columns.items() if theirs in table.column_names})
    told, document_told = (_instructions(table, column) for column in ("instruction", "document_instruction"))
    found.prompt = _prompt(_only(told), _only(document_told))
    for number, one in enumerate(table):
        texts, images = list(one.get("document_text") or ()), list(one.get("document_image") or ())
        texts, images = texts or [""] * len(images), images or [""] * len(texts)
        ids = [found.document(_told(text, document_told, number), _picture(root, image))
               for text, image in zip(texts, images, strict=True)]  # fmt: skip
        found.query(_told(one["text"], told, number), _picture(root, one.get("image")), ids[:1], ids)


def _labels(row: Set, source: Source, found: Collected) -> None:
    """A video and its label in each row; all labels of the set are the corpus."""
    ids = {label: found.document(label) for label in read_json(LABELS)[row.name]}
    for record in _rows(row, source):
        label = record[row.columns["label"]]
        right = ids.setdefault(label, found.document(label))
        found.query("", _frames(row, source, record[row.columns["video"]]), [right], [])


def _choices(row: Set, source: Source, found: Collected) -> None:
    """A question about a video with its answers in each row."""
    assert row.choices is not None
    for config, record in _configs(row, source):
        given, right = _answers(row, row.choices, record)
        ids = [found.document(text) for text in _candidates(row.choices, given)]
        question = record[row.columns["question"]] if "question" in row.columns else ""
        video = _frames(row, source, str(record[row.columns["video"]]), config or "")
        found.query(_shown(row.choices, question, given), video, [ids[right]], ids)


def _captions(row: Set, source: Source, found: Collected) -> None:
    """A text and its video in each row; all videos of the set are the corpus."""
    for record in _rows(row, source):
        caption = record[row.columns["caption"]]
        video = _frames(row, source, _stem(record[row.columns["video"]]))
        text = caption if isinstance(caption, str) else caption[0]
        found.query(text, (), [found.document("", video)], [])


def _clips(row: Set, source: Source, found: Collected) -> None:
    """A text and a video in each row; the folder of the video holds the frames of its clips, and of the query."""
    for record in _rows(row, source):
        folder = _folder(row, source, _stem(record[row.columns["video"]]))
        clips = sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "query")
        ids = [found.document("", _sampled(clip, row.name)) for clip in clips]
        right = [key for key, clip in zip(ids, clips, strict=True) if clip.name.startswith("positive")]
        found.query(record[row.columns["text"]], _sampled(folder / "query", row.name), right, ids)


def _moments(row: Set, source: Source, found: Collected) -> None:
    """A text, mostly with a picture or a video, and its right and wrong clips in each row."""

    def clip(path: str) -> tuple[str, ...]:
        return _frames(row, source, path.split(".mp4")[0].replace("/", "_"))

    for record in _rows(row, source):
        given, text = record[row.columns["input"]], record[row.columns["text"]]
        media: tuple[str, ...] = ()
        if given.endswith(".mp4"):
            media, text = clip(given), f"{MOMENTS['video']} {text}"
        elif given.endswith(".jpg"):
            pictures = _folder(row, source, "").parent
            media, text = _picture(pictures, f"query_{given}"), f"{MOMENTS['picture']} {text}"
        sides = [[found.document("", clip(one["output_path"])) for one in record[row.columns[side]]]
                 for side in ("positives", "negatives")]  # fmt: skip
        found.query(text, media, sides[0], [*sides[0], *sides[1]])


def pages(row: Set, source: Source) -> dict[str, Any]:
    """Pages of documents in three tables: queries, judgements, corpus. Pictures stay encoded in the corpus."""
    names = row.columns
    queries, qrels, corpus = (
        source.rows(row.name, row.repository, config, row.split, row.revision)
        for config in ("queries", "qrels", "corpus")
    )
    judged: dict[str, dict[str, int]] = {}
    for query, document, grade in zip(
        qrels[names["query"]], qrels[names["document"]], qrels[names["grade"]], strict=True
    ):
        if grade > 0:
            own = judged.setdefault(str(query), {})
            own[str(document)] = max(int(grade), own.get(str(document), 0))
    asked = {"id": list(map(str, queries[names["query"]])), "text": queries[names["text"]]}
    documents = corpus.select_columns([names["document"], names["image"]])
    documents = documents.cast_column(names["document"], datasets.Value("string"))
    return {
        "queries": datasets.Dataset.from_dict(asked).filter(lambda query: query["id"] in judged),
        "corpus": documents.rename_columns({names["document"]: "id"}),
        "relevant_docs": judged,
        "top_ranked": None,
    }


READERS: Mapping[str, Callable[[Set, Source, Collected], None]] = {
    "pairs": _pairs, "labels": _labels, "choices": _choices, "captions": _captions, "clips": _clips,
    "moments": _moments,
}  # fmt: skip

# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(row: Set, source: Source) -> Any:
    return source.rows(row.name, row.repository, row.config, row.split, row.revision)


def _configs(row: Set, source: Source) -> Iterator[tuple[str | None, dict[str, Any]]]:
    for config in MVBENCH if row.config == EVERY else (row.config,):
        table = source.rows(row.name, row.repository, config, row.split, row.revision)
        for record in table.select(range(min(row.first or len(table), len(table)))):
            yield config, record


def _answers(row: Set, choices: Choices, record: Mapping[str, Any]) -> tuple[list[str], int]:
    """The choices of a row as they are written, and the place of the right one."""
    columns, answer = choices.columns, record[row.columns["answer"]]
    given = [record[column] for column in columns] if len(columns) > 1 else list(record[columns[0]]) if columns else []
    given = given or ["yes", "no"]
    if choices.answer == "text":
        given = given if answer in given else [answer, *given]
        return given, given.index(answer)
    place = ord(answer) - ord("A") if choices.answer == "letter" else int(answer)
    if not 0 <= place < len(given):
        raise MissingSet(f"{row.name}: the answer '{answer}' is none of {len(given)} choices")
    return given, place


def _candidates(choices: Choices, given: Sequence[str]) -> list[str]:
    if choices.lettered == "taken off":
        return [re.sub(r"^\s*\(?[A-Z][.)]\s*", "", text).strip(". ") for text in given]
    return _lettered(given) if choices.lettered == "put before" else list(given)


def _shown(choices: Choices, question: str, given: Sequence[str]) -> str:
    """A question with its choices, as the official queries write them."""
    return {
        "": question,
        "lines": "\n".join([question, *given]),
        "words": question + " ".join(given),
        "lettered": "\n".join([question, "Options:", *_lettered(given)]),
        "yes or no": f"{question}? (A) yes; (B) no.",
    }[choices.shown]


def _lettered(given: Sequence[str]) -> list[str]:
    return [f"({chr(ord('A') + place)}) {text}" for place, text in enumerate(given)]


def _instructions(table: Any, column: str) -> list[str]:
    """What each row tells."""
    return [_plain(text or "") for text in table[column]] if column in table.column_names else []


def _only(instructions: Sequence[str]) -> str | None:
    """The instruction of all rows; None where they differ, because mteb tells one a task: then the texts carry them."""
    return instructions[0] or None if len(set(instructions)) == 1 else None


def _told(text: str, instructions: Sequence[str], number: int) -> str:
    """A text of a row, behind the instruction of that row where rows differ in it."""
    own = instructions[number] if len(set(instructions)) > 1 else ""
    return " ".join(filter(None, (own, _plain(text))))


def _plain(text: str) -> str:
    return text.replace(TOKEN, "").strip()


def _prompt(query: str | None, document: str | None) -> dict[str, str] | None:
    told = {"query": query, "document": document}
    return {side: text for side, text in told.items() if text} or None


def differences(row: Set, data: Mapping[str, Any], listed: Sequence[int]) -> str:
    """Where the data of a set are not what is declared of it, in words; "" where they are."""
    pools = set(listed) if data["top_ranked"] else {len(data["corpus"])}
    found = {"queries": {len(data["queries"])}, "candidates": pools}
    wanted = {"queries": row.queries, "candidates": row.candidates}
    return ", ".join(
        f"{min(sizes)} to {max(sizes)} {name}, not {wanted[name]}" if len(sizes) > 1 else
        f"{min(sizes)} {name}, not {wanted[name]}"
        for name, sizes in found.items() if wanted[name] is not None and sizes != {wanted[name]}
    )  # fmt: skip


# Pictures and frames --------------------------------------------------------------------------------------------------


def media_root(source: Source, archive: str, name: str) -> Path:
    """The folder below which the files of an archive lie. Raises MissingSet."""
    below = "image-tasks" if archive == "image-tasks" else "video-tasks/frames"
    if source.folder is not None:
        return source.copy(MEDIA, name) / below
    inside, files = ARCHIVES[archive]
    return source.had(name, lambda: unpacked(MEDIA, MEDIA_REVISION, files, below, inside))


def _folder(row: Set, source: Source, video: str, config: str = "") -> Path:
    archive = row.media.split("/")[0]
    return media_root(source, archive, row.name) / row.media.format(video, subset=config)


def _frames(row: Set, source: Source, video: str, config: str = "") -> tuple[str, ...]:
    return _sampled(_folder(row, source, video, config), row.name)


def _sampled(folder: Path, name: str) -> tuple[str, ...]:
    """`FRAMES` pictures of a folder at equal distances, in the order of the numbers in their names; all if fewer.

    Raises:
        MissingSet: there are none.
    """
    frames = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES] if folder.is_dir() else []
    if not frames:
        raise MissingSet(f"{name}: there are no frames in {folder}")
    frames.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)])
    places = np.linspace(0, len(frames) - 1, FRAMES, dtype=int) if len(frames) > FRAMES else range(len(frames))
    return tuple(str(frames[place]) for place in places)


def _picture(root: Path, path: str | None) -> tuple[str, ...]:
    return (str(root / path),) if path else ()


def _stem(path: str) -> str:
    return Path(path).stem if path.lower().endswith(VIDEOS) else path


def _table(items: Any, part: str, name: str) -> datasets.Dataset:
    """Queries or documents with the columns that mteb's category asks for. Raises MissingSet: a file is not there."""
    items = list(items)
    columns: dict[str, list[Any]] = {"id": [item.id for item in items]}
    kinds: dict[str, Any] = {"id": datasets.Value("string")}
    if "t" in part:
        columns["text"], kinds["text"] = [item.text for item in items], datasets.Value("string")
    for item in items:
        for path in item.media:
            if not Path(path).is_file():
                raise MissingSet(f"{name}: there is no {path}; {item.id} needs it")
    if "i" in part:
        columns["image"] = [item.media[0] if item.media else None for item in items]
        kinds["image"] = datasets.Image()
    if "v" in part:
        columns["video"], kinds["video"] = [list(item.media) for item in items], datasets.List(datasets.Image())
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
