"""What every stage promises, asked of every class that is registered.

A stage that cannot be built from its name alone has its options in OPTIONS; what others leave in items is in ALSO.
"""

import json
from pathlib import Path

import jsonschema
import pytest

from data_tools.synthesis.pipeline import Run
from data_tools.synthesis.settings import SynthesisConfig
from data_tools.synthesis.stages import (
    KINDS,
    STAGES,
    AskingStage,
    Context,
    Dropped,
    Items,
    SetStage,
    Trimmed,
    kind_of,
)
from data_tools.synthesis.templates import as_answer
from mmembed.content import Image
from mmembed.data.records import parse_record
from mmembed.errors import ConfigError
from mmembed.media import MediaStore

ROOT = Path(__file__).parents[2]
PICTURE = str(ROOT / "data" / "noto-emoji" / "images.parquet")
TEXTS = (
    "Honey bees live in colonies of tens of thousands of workers, a few hundred drones and one queen.",
    "The Rhaetian Railway crosses the Bernina Pass without a rack and reaches 2253 metres above the sea.",
    "Sourdough rises without baker's yeast: wild yeasts settle in flour and water that are fed every day.",
    "A lighthouse of granite has stood on the reef since 1882 and was run by three keepers at a time.",
)
OPTIONS = {  # besides `type`; paths are below the folder of a test, which holds what `files` writes
    "retrieve": {"corpus": "corpus.jsonl", "depth": 2},
    "demonstrations": {"examples": "labelled.jsonl", "count": 2},
    "alip_gates": {"embedder": "mmembed"},
    "match_descriptions": {"descriptions": "described.jsonl", "embedder": "mmembed"},
    "balanced": {"least": 1},
    "decontaminate": {"against": ["corpus.jsonl"]},
    "guide_model": {"guide": "embedder"},
    "language": {"languages": ["en"]},
    "length": {"most": 500},
    "noise": {"embedder": "mmembed"},
    "score_gap": {"missing": "keep"},
    "target_directed": {"embedder": "mmembed", "target": "corpus.jsonl", "share": 0.7},
}
EXTREMES = {  # of every stage that asks: options at the ends of what they may be
    "captions": [{"min_words": 1, "max_words": 1}, {"min_words": 300, "max_words": 300, "levels": [9]}],
    "class_descriptions": [{"max_words": 1}, {"max_words": 2, "count": 1}, {"max_words": 500, "count": 40}],
    "composition_negatives": [{"most_changed": 1}, {"positives": 9}],
    "graded_passages": [{"min_words": 1, "max_words": 1}, {"min_words": 900, "max_words": 900, "levels": [1]}],
    "judge": [{"samples": 9, "reason": True}, {"levels": [0, 2]}],
    "multicsr_curate": [{"positive_line": 0.0, "negative_line": 5.0}],
    "multicsr_generate": [{"min_words": 1, "max_words": 1}, {"min_words": 400, "max_words": 400}],
    "queries": [
        {"words": {"keyword": [1, 1]}, "types": ["keyword"], "per_document": 30},
        {"words": {"long": [500, 500]}, "types": ["long"], "per_document": 1, "copied_words": 1},
    ],
    "rewrite": [{"least_words": 1, "most_words": 1}, {"least_words": 90, "each": 9}],
    "s3ft_answers": [{"words": ["relevant", "irrelevant"]}],
    "s3ft_select": [{}],
    "sub_captions": [{"captions": 1, "least_words": 1}, {"captions": 60, "least": 60, "least_words": 90}],
    "tasks": [{"tasks": 1}, {"tasks": 40, "examples": 2}],
}
TEXTS_ALONE = ("retrieve", "demonstrations")  # as their default, BM25, reads them
ALSO = {"candidates": [{"content": "A loaf.", "id": "other", "score": 1.5}, {"content": "A train.", "score": 0.5}]}


@pytest.fixture
def folder(tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("corpus.jsonl", [{"id": f"d{row}", "text": text} for row, text in enumerate(TEXTS)])
    levels = [{"content": f"{text} {level}", "relevance": level} for level, text in enumerate(TEXTS)]
    write(
        "labelled.jsonl", [{"query": text[:40], "documents": levels, "id": f"e{row}"} for row, text in enumerate(TEXTS)]
    )
    write(
        "described.jsonl",
        [{"id": f"c{row}", "content": text, "meta": {"class": "told"}} for row, text in enumerate(TEXTS)],
    )
    return tmp_path


@pytest.fixture
def media():
    return MediaStore(also=[ROOT / "data"])


@pytest.fixture
def context(folder, media):
    def make(name="01-stage"):
        (folder / name).mkdir()
        return Context(3, media, folder / name, folder.joinpath)

    return make


def picture():
    import pyarrow.parquet as pq

    return f"{PICTURE}#{pq.read_table(PICTURE, columns=['image_id'])['image_id'][0].as_py()}"


def items_of(kind, name):
    """Items of texts, and one with a picture where the stage may get it; records with one positive and with two."""
    last = TEXTS[3] if name in TEXTS_ALONE else {"image": picture(), "text": "a face"}
    content = [*TEXTS[:3], "The moor was left.", "A dog sleeps.", last]
    if kind == "documents":
        return [{"id": f"d{row}", "content": one, "source": "made"} for row, one in enumerate(content)]
    queries = [
        {"id": f"q{row}", "query": f"what is told of number {row}?", "instruction": "Find it", "source": "made"}
        for row in range(3)
    ]
    if kind == "queries":
        return queries
    answered = {"meta": {"own": "yes, of another one"}, "rationale": "It tells of that number."}
    positives = [[content[0]], [content[1], content[3]], [content[2]]]
    records = [
        {
            **query,
            "labels": ["told"],
            "documents": [
                *({"content": one, "relevance": 1.0, "id": f"d{one[:9]}", **answered} for one in positives[row]),
                {"content": content[4], "relevance": 0.0, "id": "d4"},
            ],
        }
        for row, query in enumerate(queries)
    ]
    records[2]["query"] = last
    return records


def content_of(item):
    return {"text": item["content"]} if isinstance(item["content"], str) else item["content"]


def needed(stage, items):
    return [{**item, **{key: ALSO[key] for key in stage.needs}} for item in items]


def build(name, folder, **more):
    return STAGES.build({"type": name, **OPTIONS.get(name, {}), **more}, below_root=folder.joinpath)


def driven(stage, item, context):
    """What an asking stage makes of an item when it is given its own samples; all that it asked."""
    asked, work = [], stage.work(item, context)
    try:
        asks = next(work)
        while True:
            asked += asks
            asks = work.send(
                [ask.read(json.loads(as_answer(ask.sample)) if ask.schema else ask.sample) for ask in asks]
            )
    except StopIteration as end:
        return [end.value] if isinstance(end.value, Dropped) else list(end.value), asked


def made_of(stage, items, context):
    if isinstance(stage, SetStage):
        path = context.folder / "given.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        made = stage.apply(Items(path, len(items)), context)
        return [one for one in made if not isinstance(one, Trimmed)]  # what is said of items, not of parts of them
    return [one for item in items for one in driven(stage, item, context)[0]]


@pytest.mark.parametrize("name", STAGES.classes())
def test_it_builds_and_refuses_what_it_does_not_know(name, folder):
    stage = build(name, folder)
    assert isinstance(stage, AskingStage | SetStage) and stage.name == name
    assert set(stage.takes) <= set(KINDS) and stage.takes
    assert json.loads(json.dumps(stage.fingerprint())) == json.loads(json.dumps(build(name, folder).fingerprint()))
    with pytest.raises(ConfigError, match="no_such_option"):
        build(name, folder, no_such_option=1)


@pytest.mark.parametrize("name", STAGES.classes())
def test_it_works_on_each_kind_that_it_takes_and_gives_the_kind_that_it_says(name, folder, context):
    stage = build(name, folder)
    for kind in sorted(stage.takes):
        items = needed(stage, items_of(kind, name))
        made = [one for one in made_of(stage, items, context(f"01-{kind}")) if not isinstance(one, Dropped)]
        assert made, f"nothing was made of {kind}"
        assert {kind_of(one) for one in made} == {stage.gives(kind)}
        ids = [one["id"] for one in made]
        assert len({*ids}) == len(ids)
        begun = [one["id"] for item in items for one in (item, *item.get("documents", []))]
        assert all(any(one.startswith(name) for name in begun) for one in ids)
        for one in made:
            if stage.gives(kind) == "records" and not stage.adds:
                parse_record(one, one["id"])
            elif stage.adds:
                assert one.keys() >= stage.adds


@pytest.mark.parametrize("name", STAGES.classes())
def test_the_same_items_make_the_same_bytes(name, folder, context):
    """In another folder, and items are not changed."""
    for kind in sorted(build(name, folder).takes):
        texts = []
        for time in range(2):
            stage = build(name, folder)
            items = needed(stage, items_of(kind, name))
            before = json.dumps(items)
            (folder / f"{time}-{kind}").mkdir()
            made = made_of(stage, items, context(f"{time}-{kind}/01-same"))
            assert json.dumps(items) == before
            texts.append(json.dumps([one.item if isinstance(one, Dropped) else one for one in made]))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("name", [name for name, cls in STAGES.classes().items() if issubclass(cls, AskingStage)])
def test_its_questions(name, folder, context):
    """Names differ, samples are of the schema, schemas are such, messages are a chat, pictures can be opened."""
    stage = build(name, folder)
    for kind in sorted(stage.takes):
        here, questions = context(f"01-{kind}"), 0
        for item in needed(stage, items_of(kind, name)):
            _, asked = driven(stage, item, here)
            names = [ask.name for ask in asked]
            assert len({*names}) == len(names)
            questions += len(names)
            for ask in asked:
                if ask.schema is not None:
                    jsonschema.Draft202012Validator.check_schema(ask.schema)
                    jsonschema.validate(json.loads(as_answer(ask.sample)), ask.schema)
                roles = [message["role"] for message in ask.messages]
                assert roles[-1] == "user" and {*roles} <= {"system", "user", "assistant"}
                assert roles[0] == "system" or "system" not in roles
                for message in ask.messages:
                    for part in message["content"] if isinstance(message["content"], list) else []:
                        if part["type"] == "image":
                            here.media.check(Image(part["image"]))
        assert questions


@pytest.mark.parametrize("name", [name for name, cls in STAGES.classes().items() if issubclass(cls, AskingStage)])
def test_its_samples_can_be_used_whatever_its_options(name, folder, context):
    """What a run is estimated with: of the schema, and read by the stage itself, which `driven` has it do."""
    for number, more in enumerate(EXTREMES[name]):
        stage = build(name, folder, **more)
        for kind in sorted(stage.takes):
            here = context(f"{number}-{kind}")
            for item in needed(stage, items_of(kind, name)):
                for ask in driven(stage, item, here)[1]:
                    if ask.schema is not None:
                        jsonschema.validate(json.loads(as_answer(ask.sample)), ask.schema)


@pytest.mark.parametrize("name", [name for name, cls in STAGES.classes().items() if issubclass(cls, SetStage)])
def test_a_stage_that_sees_all_items_leaves_their_order(name, folder, context):
    """It says something of each, unless it makes others of them."""
    stage = build(name, folder)
    for kind in sorted(stage.takes):
        items = items_of(kind, name)
        made = made_of(stage, items, context(f"01-{kind}"))
        ids = [one.item["id"] if isinstance(one, Dropped) else one["id"] for one in made]
        given = [item["id"] for item in items]
        assert [one for one in ids if one in given] == (given if {*ids} & {*given} else [])
        assert stage.sampled(items[0], context(f"02-{kind}"))["id"] == items[0]["id"]


@pytest.mark.parametrize(
    ("name", "more"),
    [
        *((name, {}) for name, cls in STAGES.classes().items() if issubclass(cls, SetStage)),
        ("retrieve", {"retriever": "mmembed"}),
        ("demonstrations", {"retriever": "mmembed"}),
        ("balanced", {"metadata": "labelled.jsonl", "least": None}),
        ("guide_model", {"top_k": 1, "corpus": ["corpus.jsonl"]}),
    ],
)
def test_of_no_items_nothing_is_made(name, more, folder, context):
    """A stage in front of it may have left all out."""
    stage = build(name, folder, **more)
    assert list(stage.apply(Items(Path("/dev/null"), 0), context())) == []


@pytest.mark.parametrize("name", [name for name, cls in STAGES.classes().items() if issubclass(cls, AskingStage)])
def test_a_generator_that_writes_rubbish_loses_items_and_stops_nothing(name, folder, scripted, write_lines):
    """Through the whole pipeline: every item is counted, and no question is asked twice with one seed."""
    stage = build(name, folder)
    kind = min(set(stage.takes) - {"records"} or {"records"})
    rows = [{key: value for key, value in item.items() if key != "source"} for item in items_of(kind, name)]
    if kind == "documents":
        rows = [{"id": row["id"], **content_of(row)} for row in rows]
    elif kind == "queries":
        rows = [{"id": row["id"], "text": row["query"]} for row in rows]
    scripted.script = lambda request: "{"
    adding = [
        {"type": other, **OPTIONS.get(other, {})}
        for key in stage.needs
        for other, cls in STAGES.classes().items()
        if key in cls.adds
    ]
    config = SynthesisConfig(
        output=str(folder / "out"),
        root=str(folder),
        media_root=str(ROOT / "data"),
        sources=[{"path": write_lines("given.jsonl", rows), "kind": kind}],
        generator="scripted",
        stages=[*adding, {"type": name, **OPTIONS.get(name, {})}],
        attempts=2,
        max_lost=1.0,
    )
    (folder / "out").mkdir()
    Run(config, folder / "out")()
    summary = json.loads((folder / "out" / "summary.json").read_text())
    report = summary["stages"][-1]
    assert report["in"] == len(rows) and report["unanswered"] == 0
    keys = [request.key for request in scripted.asked]
    assert len({*keys}) == len(keys) > 0 and report["asked"] == len(keys)
    if all(request.schema is not None for request in scripted.asked):  # a text may be of use where there is none
        assert report["unusable"] == {"not JSON": len(keys)}
