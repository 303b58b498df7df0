"""Stages that write: queries, captions, tasks, and passages with demonstrations; a test writes the answers."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.synthesis.pipeline import Run
from data_tools.synthesis.settings import SynthesisConfig
from data_tools.synthesis.stages import STAGES
from data_tools.synthesis.wording import copies_run, shortened
from mmembed.errors import ConfigError

DATA = Path(__file__).parents[2] / "data"
GLOSSARY = {"path": "openstax-glossary/corpus.jsonl", "kind": "documents", "name": "glossary", "max_examples": 12}


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def run(tmp_path, scripted):
    def carry_out(stages, sources, script, output="out", **more):
        scripted.script = script
        (tmp_path / output).mkdir()
        tree = {"output": str(tmp_path / output), "root": str(DATA), "sources": sources, "stages": stages}
        Run(SynthesisConfig(**{**tree, "generator": "scripted", **more}), tmp_path / output)()
        kept = (tmp_path / output / "records.jsonl").exists()
        summary = json.loads((tmp_path / output / "summary.json").read_text())
        return (lines(tmp_path / output / "records.jsonl") if kept else []), summary["stages"][-1], scripted.asked

    return carry_out


def asked_text(request):
    content = request.messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def wanted_types(request):
    """The types that a prompt of queries lists, by its own words."""
    said = {"keywords": "keyword", "a question": "question", "a request": "instruction", "a scenario": "long",
            "a statement": "claim", "a title": "title"}  # fmt: skip
    rows = re.findall(r"^\d+\. (keywords|a \w+)", asked_text(request), flags=re.M)
    return [said[row] for row in rows]


LENGTHS = {"keyword": 3, "question": 8, "instruction": 12, "long": 40, "claim": 9, "title": 5}


def written(request):
    """Queries of the lengths that are asked for, of words that no document has."""
    types = wanted_types(request)
    return json.dumps({"queries": [" ".join(f"{one}{n}" for n in range(LENGTHS[one])) for one in types]})


def test_each_query_is_a_record_of_its_document(run):
    stage = {"type": "queries", "types": [*LENGTHS], "per_document": 4, "instruction": {"claim": "Find evidence"}}
    records, report, asked = run([stage], [GLOSSARY], written)
    assert len(records) == 12 * 4 and len(asked) == 12 and report["lost"] == 0
    corpus = {row["_id"]: row for row in lines(DATA / "openstax-glossary" / "corpus.jsonl")}
    types = Counter(record["meta"]["type"] for record in records)
    assert types.keys() == LENGTHS.keys() and max(types.values()) - min(types.values()) <= 6
    assert {f"queries of type {one}": count for one, count in types.items()} == report["notes"]
    for record in records:
        ((document),) = record["documents"]
        own = corpus[document["id"]]
        assert record["id"].startswith(f"{document['id']}-query-")
        assert own["text"] in document["content"] and document["relevance"] == 1.0
        assert record["query"].startswith(record["meta"]["type"])
        assert record.get("instruction") == ("Find evidence" if record["meta"]["type"] == "claim" else None)
        assert record["source"] == "glossary"


def test_queries_that_break_a_rule_are_left_out_and_others_kept(run, write_lines):
    text = "Sourdough bread rises without baker's yeast because wild yeasts settle in flour and water."
    path = write_lines("one.jsonl", [{"id": "d", "text": text}])
    answer = [
        "does bread rise WITHOUT bakers' yeast: 'because wild yeasts settle in' jars", "short",
        "what makes a dough rise by itself", "What makes a  dough rise by itself",
    ]  # fmt: skip
    stage = {"type": "queries", "types": ["question"], "per_document": 4, "copied_words": 6}
    records, report, _ = run([stage], [{"path": path, "kind": "documents"}], lambda _: json.dumps({"queries": answer}))
    assert [(record["id"], record["query"]) for record in records] == [
        ("d-query-2", "what makes a dough rise by itself")
    ]
    assert report["notes"] == {
        "queries left out: copied from the document": 1, "queries left out: a query twice": 1,
        "queries of type question": 1, "queries left out: too short": 1,
    }  # fmt: skip


def test_a_document_of_whose_queries_none_is_left_is_asked_about_again(run, write_lines, scripted):
    path = write_lines("one.jsonl", [{"id": "d", "text": "A text of some words."}])
    turns = iter([["no"], ["what do the words of it say"]])
    stage = {"type": "queries", "types": ["question"], "per_document": 1}
    records, report, asked = run(
        [stage], [{"path": path, "kind": "documents"}], lambda _: json.dumps({"queries": next(turns)})
    )
    assert len(records) == 1 and report["unusable"] == {"too short": 1}
    assert asked[0].sampling.seed != asked[1].sampling.seed


def test_queries_in_other_languages_than_the_document(run):
    stage = {
        "type": "queries",
        "languages": ["de", "ja"],
        "per_document": 2,
        "types": ["question"],
        "copied_words": None,
    }
    german, japanese = "Was bedeutet dieses seltene Wort eigentlich genau?", "この珍しい言葉は正確には何を意味しますか"

    def script(request):
        text = german if "in German" in asked_text(request) else japanese
        assert ("in Japanese" in asked_text(request)) == (text is japanese)
        return json.dumps({"queries": [text, text[:-6]]})

    records, report, _ = run([stage], [GLOSSARY], script)
    assert len(records) == 24 and report["unusable"] == {}
    for record in records:
        assert record["meta"]["language"] == ("de" if record["query"].isascii() else "ja")
    languages = Counter(record["meta"]["language"] for record in records)
    assert min(languages.values()) >= 4


def test_a_document_of_pictures_is_shown(run):
    source = {"path": "openstax-figures/corpus.jsonl", "kind": "documents", "max_examples": 4}
    records, _, asked = run([{"type": "queries"}], [source], written)
    for request in asked:
        *pictures, text = request.messages[-1]["content"]
        assert [part["type"] for part in pictures] == ["image"] and "#" in pictures[0]["image"]
        assert text["text"].startswith("Write 3 queries")
    assert len(records) == 12 and all("image" in record["documents"][0]["content"] for record in records)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"types": ["keywords"]}, "did you mean 'keyword'"),
        ({"types": []}, "at least one"),
        ({"words": {"question": [5, 3]}}, "give .least, most."),
        ({"words": {"claim": [5, 9]}}, "no type 'claim' in types"),
        ({"instruction": {"claim": "x"}}, "no type 'claim' in types"),
        ({"languages": ["xx"]}, "language 'xx'"),
    ],
)
def test_options_of_queries(options, message):
    with pytest.raises(ConfigError, match=message):
        STAGES.build({"type": "queries", **options}, below_root=Path)


words_of = st.lists(st.sampled_from("abcde"), max_size=12)


@settings(max_examples=300)
@given(words_of, words_of, st.integers(1, 5))
def test_a_copied_run_is_a_common_substring_of_words(text, source, count):
    """By strings: a run of whole words, found as a text between blanks."""
    runs = [f" {' '.join(text[start : start + count])} " for start in range(len(text) - count + 1)]
    expected = any(one in f" {' '.join(source)} " for one in runs)
    assert copies_run(", ".join(text).upper(), " ".join(source), count) == expected


@given(st.text(max_size=60), st.integers(1, 40))
def test_a_shortened_text_is_a_beginning(text, most):
    short = shortened(text, most)
    assert len(short) <= most and text.startswith(short)
    assert len(text) > most or short == text


def captions(request):
    levels = dict.fromkeys(re.findall(r"^level_\d", asked_text(request), flags=re.M))
    return json.dumps({one: f"{one} of this figure shows some eight words here" for one in levels})


FIGURES = {"path": "openstax-figures/corpus.jsonl", "kind": "documents", "name": "figures", "max_examples": 5}


def test_captions_of_a_picture_are_graded_documents(run):
    records, _, asked = run([{"type": "captions", "instruction": "Find it"}], [FIGURES], captions)
    assert len(records) == len(asked) == 5
    for record, request in zip(records, asked, strict=True):
        assert record["query"] == {"image": request.messages[-1]["content"][0]["image"]}
        grades = [(one["relevance"], one["content"][:7], one["id"][-7:]) for one in record["documents"]]
        assert grades == [(float(level), f"level_{level}", f"level-{level}") for level in (3, 2, 1, 0)]
        assert record["instruction"] == "Find it" and record["source"] == "figures"


def test_captions_as_queries_have_the_picture_as_document(run):
    stage = {"type": "captions", "direction": "text_to_image", "positive_from": 2}
    records, _, asked = run([stage], [FIGURES], captions)
    assert len(asked) == 5 and len(records) == 10
    for record in records:
        ((document),) = record["documents"]
        assert record["query"].startswith(f"level_{document['relevance']:.0f}") and document["relevance"] >= 2
        assert record["id"] == f"{document['id']}-level-{document['relevance']:.0f}" and "image" in document["content"]


def test_a_document_without_a_picture_is_left_out(run, write_lines):
    path = write_lines("mixed.jsonl", [{"id": "t", "text": "no picture"}])
    records, report, asked = run([{"type": "captions"}], [{"path": path, "kind": "documents"}], captions)
    assert (records, asked, report["reasons"], report["lost"]) == ([], [], {"no picture": 1}, 0)


TASKS = ["short_long", "long_short", "short_short", "long_long", "sts", "bitext"]


def invented(request):
    """Tasks, or an example in the language and of the length that is asked for."""
    text = asked_text(request)
    if "tasks" in request.schema["properties"]:
        count = int(re.search(r"Write (\d+) tasks", text)[1])
        return json.dumps({"tasks": [f"Given thing {n} of many, find what belongs to it." for n in range(count)]})
    need = [int(found) for found in re.findall(r"(?:at least|about) (\d+) words", text)] or [3]
    own = next((found for name, found in SENTENCES.items() if name in text), SENTENCES["German"])
    longer = " ".join([own] * -(-max(need) // len(own.split())))
    return json.dumps({key: f"{key}: {longer}" for key in ("query", "positive", "negative")})


SENTENCES = {
    "German": "Wer im Frühling zum ersten Mal eine Beute öffnet, braucht vor allem Ruhe und gutes Wetter.",
    "French": "Au printemps, celui qui ouvre une ruche pour la première fois a surtout besoin de calme.",
    "English": "Whoever opens a hive for the first time in spring needs quiet and good weather most of all.",
}


def test_tasks_make_records_without_any_documents(run, write_lines):
    path = write_lines("topics.jsonl", [{"id": "bees", "text": "beekeeping"}, {"id": "rail", "text": "railways"}])
    stage = {"type": "tasks", "kinds": TASKS, "tasks": 2, "examples": 3, "languages": ["de", "fr", "de"]}
    records, report, asked = run([stage], [{"path": path, "kind": "queries"}], invented)
    assert len(records) == 2 * 6 * 2 * 3 and report["lost"] == 0
    assert len(asked) == 2 * (4 + 36) and report["notes"]["tasks"] == 16
    by_kind = Counter(record["meta"]["kind"] for record in records)
    assert by_kind == dict.fromkeys(TASKS, 12)
    for record in records:
        kind = record["meta"]["kind"]
        assert [one["relevance"] for one in record["documents"]] == [1.0, 0.0]
        assert [one["content"].split(":")[0] for one in record["documents"]] == ["positive", "negative"]
        assert (record.get("task") == "classification") == (kind == "long_short")
        if kind == "bitext":
            assert {record["meta"]["language"], record["meta"]["other_language"]} == {"de", "fr"}
        if kind in ("sts", "bitext"):
            assert record["meta"]["high"] >= 4 > record["meta"]["low"] and "Retrieve" in record["instruction"]
        else:
            assert record["instruction"].startswith("Given thing")
        if kind == "short_long":
            assert record["meta"]["words"] in (50, 100, 200, 300, 400, 500)
    assert sum("thing 0 of" in record["instruction"] for record in records) == 2 * 4 * 3
    drawn = Counter(record["meta"]["language"] for record in records)
    assert drawn["de"] > drawn["fr"] > 0
    prompts = [asked_text(request) for request in asked if "query" in request.schema["properties"]]
    assert all(("beekeeping" in prompt) != ("railways" in prompt) for prompt in prompts)
    assert not any("{{" in prompt or "None" in prompt for prompt in prompts)


def test_a_brainstorm_that_is_lost_costs_its_kind_alone(run, write_lines):
    path = write_lines("topics.jsonl", [{"id": "bees", "text": "beekeeping"}])

    def script(request):
        if "tasks" in request.schema["properties"] and "classification tasks" in asked_text(request):
            return "I would rather not."
        return invented(request)

    stage = {"type": "tasks", "kinds": ["short_short", "long_short", "sts"], "tasks": 2}
    records, report, _ = run([stage], [{"path": path, "kind": "queries"}], script, max_lost=0.2)
    assert [record["id"] for record in records] == [
        "bees-short_short-0",
        "bees-short_short-1",
        "bees-sts-0",
        "bees-sts-1",
    ]
    assert report["notes"]["brainstorms that were lost"] == 1 and report["unusable"] == {"not JSON": 3}


def test_demonstrations_are_the_nearest_graded_queries_in_the_words_of_the_template(run, tmp_path):
    """dbpedia-entity: of each query its neighbours by the words that they share, never itself."""
    template = tmp_path / "mine.yaml"
    template.write_text(yaml.safe_dump({"user": "Levels {{ levels | join(' ') }} for {{ query }}"}))
    stages = [
        {"type": "demonstrations", "examples": "dbpedia-entity", "format": "beir", "options": {"split": "dev"}},
        {"type": "graded_passages", "levels": [2, 1, 0], "min_words": 1, "max_words": 10, "template": str(template)},
    ]  # fmt: skip
    source = {"path": "dbpedia-entity", "format": "beir", "options": {"split": "dev"}}

    def script(request):
        return json.dumps({f"level_{level}": f"passage of level {level}" for level in (2, 1, 0)})

    records, report, asked = run(stages, [source], script)
    queries = {row["text"]: row["_id"] for row in lines(DATA / "dbpedia-entity" / "queries.jsonl")}
    corpus = {row["_id"]: row["text"] for row in lines(DATA / "dbpedia-entity" / "corpus.jsonl")}
    grades = {}
    for line in (DATA / "dbpedia-entity" / "qrels" / "dev.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        grades.setdefault(query, {}).setdefault(int(grade), set()).add(corpus[document])
    shown = 0
    for request in asked:
        own = asked_text(request).removeprefix("Levels 2 1 0 for ")
        assert own in queries and [one["role"] for one in request.messages[:-1]] == ["user", "assistant"] * (
            len(request.messages) // 2
        )
        for question, answer in zip(request.messages[:-1:2], request.messages[1:-1:2], strict=True):
            other = question["content"].removeprefix("Levels 2 1 0 for ")
            assert other != own and {*re.findall(r"\w+", other.lower())} & {*re.findall(r"\w+", own.lower())}
            passages = json.loads(answer["content"])
            assert list(passages) == ["level_2", "level_1", "level_0"]
            for level in (2, 1, 0):
                assert passages[f"level_{level}"] in grades[queries[other]][level]
            shown += 1
    assert shown > 30
    items = lines(tmp_path / "out" / "work" / "demonstrations" / "items.jsonl")
    attached = [one["query"] for item in items for one in item["demonstrations"]]
    lacking = sum(not grades[queries[query]].keys() >= {0, 1, 2} for query in attached)
    assert lacking > 0 and report["notes"] == {"demonstrations without a passage at each level": lacking}
    assert shown == len(attached) - lacking and max(len(item["demonstrations"]) for item in items) == 3
    assert len(records) == len(items) and not any("demonstrations" in record for record in records)


def test_demonstrations_of_queries_are_queries_of_near_documents(run, tmp_path, write_lines):
    """Squad: paragraphs, and questions that people asked about their neighbours."""
    stages = [
        {"type": "demonstrations", "examples": "squad-en", "format": "beir", "count": 2},
        {"type": "queries", "types": ["question"], "per_document": 1},
    ]
    source = {"path": "squad-en/corpus.jsonl", "kind": "documents", "max_examples": 6}
    _, _, asked = run(stages, [source], written)
    people = {row["text"] for row in lines(DATA / "squad-en" / "queries.jsonl")}
    corpus = [" ".join(row["text"].split()) for row in lines(DATA / "squad-en" / "corpus.jsonl")]
    template = len(
        yaml.safe_load((Path("data_tools") / "synthesis" / "templates" / "queries.yaml").read_text())["examples"]
    )
    for request in asked:
        own = " ".join(asked_text(request).split("Document:\n")[1].split())
        chat = request.messages[1 + 2 * template : -1]
        assert len(chat) == 4
        for question, answer in zip(chat[::2], chat[1::2], strict=True):
            (query,) = json.loads(answer["content"])["queries"]
            document = " ".join(question["content"].split("Document:\n")[1].split())
            assert query in people and document != own
            assert any(document.endswith(text) or text.startswith(document[:200]) for text in corpus)
