"""Pipelines through the real command: what is asked, kept, lost and asked again."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data_tools.generators import Answer, GeneratorDown, RequestFailed
from data_tools.synthesize import main
from mmembed.data.records import parse_record

QUERIES = [{"_id": f"q{number}", "text": f"query number {number}"} for number in range(30)]


def graded(request, words=40):
    """A usable answer of graded_passages, another one for each seed."""
    return json.dumps(
        {key: f"{key} {request.sampling.seed} " + "word " * words for key in request.schema["properties"]}
    )


@pytest.fixture
def command(tmp_path, write_lines):
    """Runs a pipeline; returns its status and the folder of its output."""

    def run(stages=("graded_passages",), lines=QUERIES, kind="queries", *overrides, flags=(), output="out", **more):
        source = write_lines("source.jsonl", lines)
        config = {
            "output": str(tmp_path / output), "sources": [{"path": source, "kind": kind, "name": "mine"}],
            "generator": "scripted", "stages": list(stages), **more,
        }  # fmt: skip
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump(config))
        return main(["--config", str(path), *flags, *overrides]), tmp_path / output

    return run


def records(folder: Path):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def left_out(folder: Path):
    return [json.loads(line) for line in (folder / "left_out.jsonl").read_text().splitlines()]


def test_each_query_gets_a_passage_of_each_level_that_training_reads(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    status, folder = command()
    assert status == 0
    made = records(folder)
    assert [one["id"] for one in made] == [one["_id"] for one in QUERIES]
    for record in made:
        example = parse_record(record, "here")
        assert [document.relevance for document in example.documents] == [3, 2, 1, 0]
        assert example.source == "mine"
    assert "30 items -> 30 records; 30 answers" in capsys.readouterr().out


def test_a_second_run_asks_for_nothing_and_starts_nothing(scripted, command):
    scripted.script = staticmethod(graded)
    command()
    asked, before = len(scripted.asked), scripted.started
    status, folder = command()
    assert (status, len(scripted.asked), scripted.started) == (0, asked, before)
    assert len(records(folder)) == 30


def test_seeds_make_a_run_repeatable_whatever_the_order_of_answers(scripted, command):
    scripted.script = staticmethod(graded)
    outputs = [command(output=name)[1] for name in ("one", "two")]
    assert (outputs[0] / "records.jsonl").read_bytes() == (outputs[1] / "records.jsonl").read_bytes()
    other = command(output="three", seed=1)[1]
    assert (outputs[0] / "records.jsonl").read_bytes() != (other / "records.jsonl").read_bytes()
    assert len({request.sampling.seed for request in scripted.asked}) == 60  # two runs alike, one of another seed


def test_garbage_is_counted_and_asked_for_again(scripted, command):
    tries: Counter[str] = Counter()

    def script(request):
        name = request.messages[-1]["content"].split("Query: ")[1]
        tries[name] += 1
        number = int(name.split()[-1])
        if tries[name] > 1 or number % 2:
            return graded(request)
        garbage = [
            "{broken",
            "",
            '{"level_3": "x"}',
            "[]",
            json.dumps({f"level_{n}": "the same text " * 20 for n in range(4)}),
        ]
        return garbage[number // 2 % len(garbage)]

    scripted.script = staticmethod(script)
    status, folder = command()
    assert status == 0 and len(records(folder)) == 30
    summary = json.loads((folder / "summary.json").read_text())["stages"][0]
    assert summary["unusable"] == {"not JSON": 3, "empty": 3, "not of the schema": 6, "copies": 3}
    assert len(scripted.asked) == 45


def test_what_stays_unusable_is_left_out_with_its_reason(scripted, command, capsys):
    scripted.script = staticmethod(
        lambda request: (
            graded(request) if "number 1" in request.messages[-1]["content"] else Answer("{", "length", 1, 9)
        )
    )
    status, folder = command(max_lost=0.1)
    assert status == 1
    output = capsys.readouterr()
    assert "lost 19 of 30 items, more than max_lost 0.1 (most of all: cut off)" in output.err
    assert "11 records" in output.out
    assert len(records(folder)) == 11
    assert {(one["stage"], one["reason"]) for one in left_out(folder)} == {("01-graded_passages", "cut off")}
    assert len(scripted.asked) == 11 + 19 * 3  # three attempts each, each with a seed of its own
    assert len({request.sampling.seed for request in scripted.asked}) == len(scripted.asked)
    asked = len(scripted.asked)
    assert command(max_lost=0.7)[0] == 0 and len(scripted.asked) == asked


def test_refused_answers_are_not_asked_for_again(scripted, command):
    scripted.script = staticmethod(
        lambda request: (
            Answer("", "refused", 1, 0) if "number 7" in request.messages[-1]["content"] else graded(request)
        )
    )
    status, folder = command()
    assert status == 0 and len(records(folder)) == 29 and len(scripted.asked) == 30
    assert left_out(folder)[0]["reason"] == "refused"


def test_what_the_generator_could_not_answer_is_asked_for_by_the_next_run(scripted, command, capsys):
    def failing(request):
        if "number 1" in request.messages[-1]["content"]:
            raise RequestFailed("no answer after 5 tries", "no answer")
        return graded(request)

    scripted.script = staticmethod(failing)
    status, folder = command()
    assert status == 1 and "asks again for what was not answered" in capsys.readouterr().err
    assert {one["reason"] for one in left_out(folder)} == {"no answer"}
    scripted.script, before = staticmethod(graded), len(scripted.asked)
    status, folder = command()
    assert status == 0 and len(scripted.asked) == before + 11
    assert not left_out(folder)
    whole = command(output="whole")[1]
    assert (folder / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_a_generator_that_is_down_ends_the_run_and_nothing_is_lost(scripted, command, capsys):
    count = 0

    def dying(request):
        nonlocal count
        count += 1
        if count > 12:
            raise GeneratorDown("http://nowhere: does not answer; start the server")
        return graded(request)

    scripted.script = staticmethod(dying)
    status, folder = command()
    assert status == 2 and "start the server" in capsys.readouterr().err
    stored = (folder / "work" / "answers.jsonl").read_text().count("\n")
    assert stored >= 5
    scripted.script, before = staticmethod(graded), len(scripted.asked)
    assert command()[0] == 0
    assert len(scripted.asked) - before == 30 - stored


def test_a_budget_holds_for_all_lives_of_a_run(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    status, folder = command(budget={"requests": 12})
    assert status == 1 and len(scripted.asked) == 12
    assert "the budget is spent" in capsys.readouterr().err
    assert len(records(folder)) == 12
    assert command(budget={"requests": 12})[0] == 1 and len(scripted.asked) == 12
    assert command(budget={"requests": 30})[0] == 0 and len(scripted.asked) == 30
    tokens = json.loads((folder / "summary.json").read_text())["asked"]
    spent = tokens["prompt_tokens"] + tokens["answer_tokens"]
    status, other = command(budget={"tokens": spent // 2}, output="other")
    assert status == 1
    asked = json.loads((other / "summary.json").read_text())["asked"]
    assert spent // 2 <= asked["prompt_tokens"] + asked["answer_tokens"] <= spent // 2 + 8 * spent / 30  # in flight


def test_the_estimate_says_how_many_requests_there_are(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    status, folder = command(flags=["--dry-run"], prices={"prompt": 1.0, "answer": 2.0, "tokens_per_second": 100})
    output = capsys.readouterr().out
    assert status == 0 and not scripted.asked and not (folder / "records.jsonl").exists()
    assert "30 items, 30 requests" in output and "cost: about" in output and "hours, at most" in output
    command()
    assert len(scripted.asked) == 30


def test_other_settings_ask_anew_and_the_same_ones_again_find_their_answers(scripted, command):
    scripted.script = staticmethod(graded)
    first = command()[1] / "records.jsonl"
    before = first.read_bytes()
    command(stages=[{"type": "graded_passages", "max_words": 100}])
    assert len(scripted.asked) == 60
    command()
    assert len(scripted.asked) == 60 and first.read_bytes() == before


def test_an_edited_template_asks_anew_and_is_used(scripted, command, tmp_path):
    scripted.script = staticmethod(graded)
    template = tmp_path / "mine.yaml"
    template.write_text("user: 'Levels {{ levels | join(\", \") }} of: {{ query }}'\n")
    stage = {"type": "graded_passages", "template": str(template)}
    assert command(stages=[stage])[0] == 0
    assert scripted.asked[0].messages == ({"role": "user", "content": "Levels 3, 2, 1, 0 of: query number 0"},)
    template.write_text("user: 'Other words of: {{ query }}'\n")
    assert command(stages=[stage])[0] == 0 and len(scripted.asked) == 60


def test_repeated_ids_are_left_out_and_counted(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    status, folder = command(lines=[*QUERIES, QUERIES[3], {**QUERIES[4], "text": "another"}])
    assert status == 0 and len(records(folder)) == 30
    assert "2 left out (duplicate id)" in capsys.readouterr().out


def test_bad_lines_are_refused_or_skipped(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    lines = [*QUERIES, {"_id": "x", "text": ""}, {"_id": "y", "text": "a", "image": "missing.png"}]
    status, _ = command(lines=lines)
    assert status == 2 and "source.jsonl:31: no text" in capsys.readouterr().err
    status, folder = command(lines=lines, on_bad_record="skip")
    assert status == 0 and len(records(folder)) == 30
    left = json.loads((folder / "summary.json").read_text())["read"]["left_out"]
    assert sum(left.values()) == 2


def test_records_keep_their_documents_in_the_mixed_setting(scripted, command):
    scripted.script = staticmethod(graded)
    lines = [{"query": "a", "documents": [{"content": "good", "id": "d"}, {"content": "bad", "relevance": 0}]}]
    folder = command([{"type": "graded_passages", "keep_documents": True}], lines, "records")[1]
    (record,) = records(folder)
    assert [document["relevance"] for document in record["documents"]] == [3.0, 0, 3.0, 2.0, 1.0, 0.0]
    assert record["documents"][0]["id"] == "d"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ["graded_passagse"]}, "did you mean 'graded_passages'"),
        ({"stages": [{"type": "graded_passages", "levels": [0]}]}, "one of them above 0"),
        ({"stages": [{"type": "graded_passages", "levels": [3, 3]}]}, "different levels"),
        ({"stages": [{"type": "graded_passages", "language": "english"}]}, "language 'english'"),
        ({"stages": [{"type": "graded_passages", "min_words": 200}]}, "is above max_words"),
        ({"stages": [{"type": "graded_passages", "generator": "judge"}]}, "there is no generator 'judge'"),
        ({"stages": [{"type": "graded_passages", "template": "nowhere.yaml"}]}, "nowhere.yaml: No such file"),
        ({"stages": [{"type": "graded_passages", "name": "a/b"}]}, "use letters, digits"),
        ({"stages": "graded_passages"}, "write a list"),
        ({"generator": None}, "there is no 'generator'"),
        ({"generator": "scriptde"}, "did you mean 'scripted'"),
        ({"generators": {"judge": "scripted"}}, "no stage asks generator 'judge'"),
        ({"sources": [{"path": "a.jsonl", "kind": "documents"}]}, "what comes to it are documents"),
        ({"sources": [{"path": "a.jsonl", "kind": "queries", "format": "beir"}]}, "format and options are of records"),
        ({"sources": [{"path": "a", "kind": "queries"}, {"path": "b"}]}, "queries and records in one run"),
        ({"budget": {"request": 3}}, "did you mean 'requests'"),
        ({"max_lost": 2}, "max_lost"),
        ({"sampling": {"temperature": -1}}, "temperature"),
    ],
)
def test_configs_that_cannot_work_are_refused_before_anything_starts(
    scripted, tmp_path, capsys, change, message
):  # fmt: skip
    config = {
        "output": str(tmp_path / "out"), "generator": "scripted", "stages": ["graded_passages"],
        "sources": [{"path": "a.jsonl", "kind": "queries"}], **change,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    assert main(["--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and str(path) in error
    assert not scripted.started


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("user: '{{ qeury }}'", "user: there is no variable 'qeury'; did you mean 'query'"),
        ("user: '{{ query'", "mine.yaml: "),
        ("system: hello", "has no 'user'"),
        ("user: a\nexamles: []", "did you mean 'examples'"),
        ("user: '{{ query }}'\nexamples: [{query: a}]", "examples[0] has no 'answer'"),
        ("user: '{{ query }}'\nexamples: [{qery: a, answer: b}]", "did you mean 'query'"),
        ("user: '{% for level in levels %}{{ qurey }}{% endfor %}'", "there is no variable 'qurey'"),
        ("user: '{% if instruction %}{{ instrction }}{% endif %}'", "did you mean 'instruction'"),
        ("user: '{{ query }} {{ levels }}'\nexamples: [{query: a, answer: b}]", "'levels' is undefined"),
        ("user: [a", "not YAML"),
        ("user: '{{ query.__class__.__mro__ }}'", "mine.yaml: access to attribute '__class__'"),
    ],
)
def test_templates_that_cannot_work_are_refused_before_anything_starts(
    scripted, command, tmp_path, capsys, template, message
):
    (tmp_path / "mine.yaml").write_text(template)
    status, _ = command([{"type": "graded_passages", "template": str(tmp_path / "mine.yaml")}])
    assert status == 2 and message in capsys.readouterr().err and not scripted.asked


TWICE = [
    {"type": "graded_passages", "levels": [3, 0]},
    {"type": "graded_passages", "levels": [2, 1], "keep_documents": True},
]


@pytest.mark.parametrize("reason", ["failed", "budget"])
def test_answers_of_a_later_run_reach_the_stages_behind(scripted, command, reason):
    """Two stages: what the first one could not be answered at first goes through the second one, too."""

    def failing(request):
        if "number 1" in request.messages[-1]["content"] and "level_3" in request.schema["properties"]:
            raise RequestFailed("no answer", "no answer")
        return graded(request)

    scripted.script = staticmethod(failing if reason == "failed" else graded)
    status, folder = command(stages=TWICE, budget={"requests": 25} if reason == "budget" else {})
    assert status == 1 and len(records(folder)) < 30
    scripted.script = staticmethod(graded)
    status, folder = command(stages=TWICE, budget={"requests": 60} if reason == "budget" else {})
    assert status == 0
    assert [len(one["documents"]) for one in records(folder)] == [4] * 30
    assert len(scripted.asked) == 60 + 11 * (reason == "failed")


def test_a_stage_folder_that_a_kill_left_without_anything_is_used(scripted, command):
    scripted.script = staticmethod(graded)
    folder = command()[1]
    before = (folder / "records.jsonl").read_bytes()
    for file in (folder / "work/graded_passages").iterdir():
        file.unlink()
    assert command()[0] == 0 and (folder / "records.jsonl").read_bytes() == before
    assert len(scripted.asked) == 30


def test_a_stage_more_in_front_asks_for_nothing_anew(scripted, command):
    scripted.script = staticmethod(graded)
    record = [{"query": f"q {number}", "documents": [{"content": "a document"}]} for number in range(6)]
    command(["graded_passages"], record, "records")
    command([{"type": "length", "min_document": 1}, "graded_passages"], record, "records")
    assert len(scripted.asked) == 6


def test_a_run_that_loses_everything_is_stopped_before_it_has_asked_for_all(scripted, command, capsys):
    def rejecting(request):
        raise RequestFailed("no", "rejected by the server")

    scripted.script = staticmethod(rejecting)
    many = [{"_id": f"q{number}", "text": f"query number {number}"} for number in range(600)]
    status, _ = command(lines=many)
    assert status == 1 and len(scripted.asked) < 120
    assert "items of 600 are lost, more than max_lost 0.05 allows" in capsys.readouterr().err
    status, folder = command(lines=many, max_lost=1.0)
    assert status == 0 and len(left_out(folder)) == 600


def test_lost_answers_that_a_stage_does_without_are_too_much_as_well(scripted, command, capsys):
    scripted.script = staticmethod(lambda request: "")
    lines = [{"query": "a dog", "documents": [{"content": f"a dog chases {number} cats"}]} for number in range(6)]
    status, folder = command(["composition_negatives"], lines, "records", max_lost=0.2)
    assert status == 1 and len(records(folder)) == 6
    assert "questions, more than max_lost 0.2" in capsys.readouterr().err


def test_a_failed_question_costs_itself_alone_where_the_stage_does_without(scripted, command):
    def failing(request):
        if "horse" in json.dumps(request.messages):
            raise RequestFailed("too long", "rejected by the server")
        return json.dumps({"relevance": 3})

    scripted.script = staticmethod(failing)
    lines = [{"query": "animals", "documents": [{"content": text} for text in ("a dog", "a cat", "a horse", "a cow")]}]
    stage = {"type": "judge", "what": "documents", "use": "labels"}
    status, folder = command([stage], lines, "records", max_lost=0.5)
    assert status == 0 and [one["relevance"] for one in records(folder)[0]["documents"]].count(3.0) == 3
    scripted.script, before = staticmethod(lambda request: json.dumps({"relevance": 2})), len(scripted.asked)
    assert command([stage], lines, "records", max_lost=0.5)[0] == 0
    assert len(scripted.asked) == before + 1


def test_a_picture_more_in_a_folder_is_noticed(scripted, tmp_path):
    import PIL.Image

    scripted.script = staticmethod(graded)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    config = {
        "output": str(tmp_path / "out"), "sources": [{"path": str(pictures), "kind": "documents"}],
        "stages": [{"type": "near_duplicates"}],
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    for count in (1, 2):
        PIL.Image.effect_noise((40, 40), 90 * count).save(pictures / f"{count}.png")
        main(["--config", str(tmp_path / "config.yaml")])
        summary = json.loads((tmp_path / "out/summary.json").read_text())
        assert summary["read"]["items"] == count


def test_a_sound_is_a_bad_record_that_is_named_and_skipped(scripted, command, capsys):
    scripted.script = staticmethod(graded)
    lines = [*QUERIES, {"_id": "s", "audio": "said.wav"}]
    assert command(lines=lines)[0] == 2 and "source.jsonl:31: no generator reads audio" in capsys.readouterr().err
    status, folder = command(lines=lines, on_bad_record="skip")
    assert status == 0 and len(records(folder)) == 30


@pytest.mark.parametrize(
    "template",
    ["user: '{{ query }} {{ max_words + 5 }} {{ levels[0] }}'", "user: '{% for one in levels %}{{ one }}{% endfor %}'"],
)
def test_templates_that_compute_with_their_variables_are_taken(scripted, command, tmp_path, template):
    scripted.script = staticmethod(graded)
    (tmp_path / "mine.yaml").write_text(template)
    assert command([{"type": "graded_passages", "template": str(tmp_path / "mine.yaml")}])[0] == 0
