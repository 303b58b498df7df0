"""Retrieval and judgement on data that people have graded: their grades, given as a model's answers, come back."""

import json
import re
import shlex
from collections import Counter, defaultdict
from pathlib import Path

import krippendorff
import numpy as np
import pytest
import yaml
from sklearn.metrics import cohen_kappa_score

from data_tools.synthesis.estimate import estimate
from data_tools.synthesis.pipeline import Run
from data_tools.synthesis.settings import SynthesisConfig, load_synthesis
from data_tools.synthesis.stages import STAGES, Context, Items
from data_tools.synthesize import main
from mmembed.errors import ConfigError
from mmembed.media import MediaStore

DATA = Path(__file__).parents[2] / "data"
DBPEDIA = DATA / "dbpedia-entity"
PLAIN = "Q: {{ query }}\nD: {{ document }}"


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def texts(name):
    return {row["_id"]: row["text"] for row in lines(DBPEDIA / f"{name}.jsonl")}


def qrels(split):
    grades = defaultdict(dict)
    for line in (DBPEDIA / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        grades[query][document] = int(grade)
    return grades


@pytest.fixture
def people(scripted):
    """A judge that grades as people did, by the texts that it is shown; what nobody judged is 0."""
    queries, corpus = texts("queries"), texts("corpus")
    assert len({*corpus.values()}) == len(corpus) and len({*queries.values()}) == len(queries)
    known = {
        (queries[query], corpus[document]): grade
        for split in ("train", "dev")
        for query, of_query in qrels(split).items()
        for document, grade in of_query.items()
    }

    def grade(request):
        found = re.fullmatch(r"Q: (.*)\nD: (.*)", request.messages[-1]["content"])
        return known.get(found.groups(), 0)

    scripted.script = lambda request: json.dumps({"relevance": grade(request)})
    scripted.grade = staticmethod(grade)
    return scripted


@pytest.fixture
def run(tmp_path):
    template = tmp_path / "plain.yaml"
    template.write_text(yaml.safe_dump({"user": PLAIN}))

    def carry_out(stages, sources, **more):
        output = tmp_path / more.pop("output", "out")
        output.mkdir(exist_ok=True)
        plain = [{**one, "template": str(template)} if one["type"] == "judge" else one for one in stages]
        tree = {"output": str(output), "root": str(DATA), "sources": sources, "stages": plain, "generator": "scripted"}
        told = Run(SynthesisConfig(**{**tree, **more}), output)()
        return told, output

    return carry_out


def notes_of(output, place):
    return json.loads((output / "summary.json").read_text())["stages"][place]["notes"]


def test_grades_of_people_come_back_as_labels(run, people):
    """BM25's candidates of the judged queries, and their labels, from files that are read here by themselves."""
    queries = {"path": "dbpedia-entity/queries.jsonl", "kind": "queries", "name": "dbpedia"}
    stages = [
        {"type": "retrieve", "corpus": "dbpedia-entity/corpus.jsonl", "depth": 15},
        {"type": "judge", "levels": [2, 1, 0], "positive_from": 1},
    ]
    told, output = run(stages, [queries], max_lost=0)
    records, corpus = lines(output / "records.jsonl"), texts("corpus")
    grades = {**qrels("train"), **qrels("dev")}
    assert len(records) > 40
    seen = Counter()
    for record in records:
        assert len(record["documents"]) <= 15 and any(one["relevance"] > 0 for one in record["documents"])
        scores = [one["score"] for one in record["documents"]]
        assert scores == sorted(scores, reverse=True)
        words = {*re.findall(r"\w+", record["query"].lower())}
        for document in record["documents"]:
            assert corpus[document["id"]] == document["content"]
            assert words & {*re.findall(r"\w+", document["content"].lower())}
            assert document["relevance"] == grades[record["id"]].get(document["id"], 0)
            assert document["meta"]["judge"] == [int(document["relevance"])]
            seen[int(document["relevance"])] += 1
    assert min(seen[0], seen[1], seen[2]) > 30
    left = [row["item"]["id"] for row in lines(output / "left_out.jsonl")]
    assert {*left} | {record["id"] for record in records} == {*texts("queries")}
    assert all(row["reason"] == "no document is relevant" for row in lines(output / "left_out.jsonl"))
    assert notes_of(output, 0)["candidates"] == len(people.asked)
    assert "train on them with" in told and shlex.split(told.splitlines()[-1])


def test_known_documents_are_no_candidates(run, people):
    """Of records, by id and by content; the record's own labels stay as they are."""
    source = {"path": "dbpedia-entity", "format": "beir", "options": {"split": "train"}}
    stages = [
        {"type": "retrieve", "corpus": "dbpedia-entity/corpus.jsonl", "depth": 5},
        {"type": "judge", "levels": [2, 1, 0], "positive_from": 1, "own_positives": "keep"},
    ]
    _, output = run(stages, [source])
    before = {
        record["query"]: {document["id"]: document["relevance"] for document in record["documents"]}
        for record in lines(output / "work" / "inputs.jsonl")
    }
    records = lines(output / "records.jsonl")
    assert len(records) == len(before) == 8
    for record in records:
        own = before[record["query"]]
        assert [one["id"] for one in record["documents"][: len(own)]] == list(own)
        assert [one["relevance"] for one in record["documents"][: len(own)]] == list(own.values())
        found = [one["id"] for one in record["documents"][len(own) :]]
        assert len(found) == len({*found}) == 5 and not {*found} & {*own}
        assert all(one["relevance"] == 0 for one in record["documents"][len(own) :])  # all that people judged is known


def test_a_judge_that_agrees_says_so_and_a_filter_drops_nothing(run, people):
    source = {"path": "dbpedia-entity", "format": "beir", "options": {"split": "train"}}
    stages = [{"type": "judge", "what": "documents", "use": "filter", "levels": [2, 1, 0], "positive_from": 1}]
    _, output = run(stages, [source])
    notes = notes_of(output, 0)
    assert notes["Cohen's kappa with labels, relevant or not"] == notes["quadratic weighted kappa with grades"] == 1.0
    given = lines(output / "work" / "inputs.jsonl")
    assert notes["pairs with a label"] == sum(len(record["documents"]) for record in given) == len(people.asked)
    kept = lines(output / "records.jsonl")
    assert [[one["id"] for one in record["documents"]] for record in kept] == [
        [one["id"] for one in record["documents"]] for record in given
    ]


def test_a_judge_that_errs_is_measured_and_its_filter_drops_what_it_contradicts(run, people):
    """Three samples, of which each errs by itself; all numbers from the answers themselves, by other libraries."""
    drawn = np.random.default_rng(0)
    errors = {}

    def noisy(request):
        error = errors.setdefault(request.key, int(drawn.choice([-1, 0, 0, 0, 1])))
        return json.dumps({"relevance": min(2, max(0, people.grade(request) + error))})

    people.script = noisy
    source = {"path": "dbpedia-entity", "format": "beir", "options": {"split": "train"}, "max_examples": 4}
    stages = [
        {
            "type": "judge", "what": "documents", "use": "filter", "levels": [2, 1, 0], "positive_from": 1,
            "samples": 3, "decide": "median",
        }
    ]  # fmt: skip
    _, output = run(stages, [source])
    of_pair = defaultdict(list)
    for request in people.asked:
        of_pair[request.messages[-1]["content"]].append(json.loads(noisy(request))["relevance"])
    truth = {request.messages[-1]["content"]: people.grade(request) for request in people.asked}
    units, labels = np.array(list(of_pair.values())), np.array(list(truth.values()))
    decided = np.median(units, axis=1).astype(int)
    notes = notes_of(output, 0)
    agree = float((units.min(axis=1) == units.max(axis=1)).mean())
    assert notes["share of pairs whose samples agree"] == pytest.approx(agree, abs=5e-5)
    expected = krippendorff.alpha(reliability_data=units.T, level_of_measurement="ordinal")
    assert notes["Krippendorff's alpha of samples (ordinal)"] == pytest.approx(expected, abs=5e-5)
    expected = cohen_kappa_score(labels, decided, weights="quadratic")
    assert notes["quadratic weighted kappa with grades"] == pytest.approx(expected, abs=5e-5)
    expected = cohen_kappa_score(labels > 0, decided > 0)
    assert notes["Cohen's kappa with labels, relevant or not"] == pytest.approx(expected, abs=5e-5)
    assert notes["positives left out"] == int(((labels > 0) & (decided == 0)).sum()) > 0
    assert notes["negatives left out"] == int(((labels == 0) & (decided > 0)).sum()) > 0
    kept = [one for record in lines(output / "records.jsonl") for one in record["documents"]]
    for document in kept:
        assert (document["relevance"] > 0) == (sorted(document["meta"]["judge"])[1] > 0)
    temperatures = {request.sampling.temperature for request in people.asked}
    seeds = Counter(request.sampling.seed for request in people.asked)
    assert temperatures == {0.7} and len(seeds) == len(people.asked)


def test_majority_reasons_and_samples_without_use(run, scripted, write_lines):
    """One pair each: the majority, a tie (the lower grade), one sample of rubbish, rubbish alone."""
    answers = {
        "A": [3, 3, 1, 0], "B": [3, 1, 3, 1], "C": [None, 2, 2, None], "D": [None] * 4, "E": [1, 1, 0, 1],
    }  # fmt: skip

    def script(request):
        name = request.messages[-1]["content"][-1]
        grade = answers[name].pop()
        return "no idea" if grade is None else json.dumps({"reason": f"because {grade}", "relevance": grade})

    scripted.script = script
    record = {"query": "q", "documents": [{"content": name, "relevance": 1} for name in answers]}
    path = write_lines("five.jsonl", [record])
    judge = {"type": "judge", "what": "documents", "samples": 4, "reason": True}
    _, output = run([judge], [{"path": path}], attempts=1, max_lost=0.4)
    (made,) = lines(output / "records.jsonl")
    found = {
        one["content"]: (one["relevance"], one["rationale"], sorted(one["meta"]["judge"])) for one in made["documents"]
    }
    assert found == {
        "A": (3.0, "because 3", [0, 1, 3, 3]),
        "B": (0.0, "because 1", [1, 1, 3, 3]),
        "C": (2.0, "because 2", [2, 2]),
        "E": (0.0, "because 1", [0, 1, 1, 1]),
    }
    assert notes_of(output, 0)["pairs without a usable judgement"] == 1


def test_copies_that_are_judged_differently_make_no_bad_record(run, scripted, write_lines):
    """Two documents of one content, and two of one id, of which a judge takes one for relevant."""
    first = {}

    def script(request):
        text = request.messages[-1]["content"][-1]
        relevant = text != "z" and first.setdefault(text, request.key) == request.key
        return json.dumps({"relevance": 3 if relevant else 0})

    scripted.script = script
    documents = [{"content": text, "id": name} for text, name in (("x", "a"), ("x", "b"), ("y", "c"), ("z", "c"))]
    path = write_lines("copies.jsonl", [{"query": "q", "documents": documents}])
    _, output = run([{"type": "judge", "what": "documents"}], [{"path": path}])
    (made,) = lines(output / "records.jsonl")
    assert {one["relevance"] for one in made["documents"]} == {3.0} and len(made["documents"]) == 2
    assert notes_of(output, 0)["negatives that are copies of a positive"] == 2


def test_positives_of_two_grades_join_the_scale_of_the_judge(run, scripted, write_lines):
    scripted.script = lambda request: '{"relevance": 2}'
    records = write_lines("own.jsonl", [{"query": "red bus", "documents": [{"content": "a bus"}]}])
    corpus = write_lines("corpus.jsonl", [{"text": "A  BUS"}, {"text": "red bus"}, {"text": "a red train"}])
    _, output = run([{"type": "retrieve", "corpus": corpus}, {"type": "judge"}], [{"path": records}])
    (made,) = lines(output / "records.jsonl")
    assert [(one["content"], one["relevance"]) for one in made["documents"]] == [("a bus", 3.0), ("a red train", 2.0)]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"type": "judge"}], "needs candidates, and no stage before it adds them; add retrieve"),
        ([{"type": "retrieve", "corpus": "mbpp/corpus.jsonl"}], "adds candidates, and no stage behind .*add judge"),
        ([{"type": "demonstrations", "examples": "dbpedia-entity", "format": "beir"}, "graded_passages", "judge"],
         "needs candidates"),
        ([{"type": "judge", "what": "documents"}], "works on records, and what comes to it are queries"),
        ([{"type": "judge", "use": "filter"}], "candidates have no labels"),
        ([{"type": "judge", "samples": 2, "temperature": 0.0}], "at temperature 0 are all the same"),
        ([{"type": "judge", "what": "documents", "own_positives": "keep"}], "own_positives has no effect"),
        ([{"type": "judge", "decide": "median"}], "no effect with one sample"),
        ([{"type": "judge", "levels": [1, 0]}], "one from positive_from"),
        ([{"type": "retrieve", "corpus": "no/such.jsonl"}], "there is no .*no/such.jsonl"),
        ([{"type": "retrieve", "corpus": "mbpp/corpus.jsonl", "retriever": {"type": "bm25", "k": 1}}],
         "unknown option 'k'"),
        ([{"type": "retrieve", "corpus": "mbpp/corpus.jsonl", "similarity": "dot"}], "no effect with retriever 'bm25'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_is_asked(tmp_path, scripted, capsys, stages, message):
    tree = {
        "output": str(tmp_path / "out"), "root": str(DATA), "generator": "scripted", "stages": stages,
        "sources": [{"path": "dbpedia-entity/queries.jsonl", "kind": "queries"}],
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert main(["--config", str(file)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_an_encoder_finds_what_brute_force_finds_and_encodes_nothing_twice(tmp_path, monkeypatch):
    """The packaged nano over texts and pictures; a run that died within the corpus goes on behind its last shard."""
    from data_tools.mining.retrievers import Item as Content
    from data_tools.mining.retrievers.mmembed_model import MmembedModel
    from data_tools.synthesis import encoding, finding

    monkeypatch.setattr(finding, "BLOCK", 8)
    monkeypatch.setattr(encoding, "SHARD", 8)
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": f"d{row}", "text": text} for row, text in enumerate(list(texts("corpus").values())[:36])]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = list(texts("queries").values())[:12]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps({"id": f"q{row}", "query": text}) + "\n" for row, text in enumerate(asked)))
    block = {"type": "retrieve", "corpus": str(corpus), "depth": 4}
    block["retriever"] = {"type": "mmembed", "dtype": "float32"}  # in bfloat16 a vector hangs on its batch
    (tmp_path / "01-retrieve").mkdir()
    context = Context(0, MediaStore(), tmp_path / "01-retrieve", Path)
    seen, encode, most = [], MmembedModel.encode, [3]

    def dying(self, items, role):
        if len(items) > 1:  # one alone is the probe
            most[0] -= 1
            if most[0] < 0:
                raise KeyboardInterrupt
            seen.extend(item.text for item in items)
        return encode(self, items, role)

    monkeypatch.setattr(MmembedModel, "encode", dying)
    with pytest.raises(KeyboardInterrupt):
        list(STAGES.build(block, below_root=Path).apply(Items(given, 12), context))
    most[0] = 100
    made = list(STAGES.build(block, below_root=Path).apply(Items(given, 12), context))
    assert Counter(seen) == Counter([*(row["text"] for row in rows), *asked])
    model = MmembedModel(dtype="float32")
    model.load(MediaStore())
    vectors = encode(model, [Content(row["text"], None, None, "") for row in rows], "document").astype(np.float64)
    queries = encode(model, [Content(text, None, None, "") for text in asked], "query").astype(np.float64)
    scores = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ (
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    ).T
    for item, of_item in zip(made, scores, strict=True):
        found = [one["id"] for one in item["candidates"]]
        np.testing.assert_allclose([one["score"] for one in item["candidates"]], np.sort(of_item)[::-1][:4], atol=1e-5)
        assert {*found} == {f"d{row}" for row in np.argsort(-of_item)[:4]}


def test_pictures_are_found_and_judged_as_pictures(tmp_path, scripted):
    """Figures of OpenStax by their captions; a picture that a query shows is not found for it."""
    scripted.script = lambda request: '{"relevance": 3}'
    corpus, pictures = tmp_path / "figures.jsonl", DATA / "openstax-figures" / "images.parquet"
    rows = [row for row in lines(DATA / "openstax-figures" / "corpus.jsonl") if row.get("image")][:12]
    sources = [f"{pictures}#{row['image']}" for row in rows]
    corpus.write_text(
        "".join(json.dumps({"id": row["_id"], "image": one}) + "\n" for row, one in zip(rows, sources, strict=True))
    )
    queries = tmp_path / "queries.jsonl"
    queries.write_text(
        json.dumps({"id": "t", "text": "a diagram of a cell"}) + "\n"
        + json.dumps({"id": "p", "text": "like this", "image": sources[2]}) + "\n"
    )  # fmt: skip
    retrieve = {"type": "retrieve", "corpus": str(corpus), "depth": 11, "retriever": "mmembed"}
    config = SynthesisConfig(
        output=str(tmp_path / "out"), root=str(DATA), sources=[{"path": str(queries), "kind": "queries"}],
        generator="scripted", stages=[retrieve, {"type": "judge"}],
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    Run(config, tmp_path / "out")()
    records = {record["id"]: record for record in lines(tmp_path / "out" / "records.jsonl")}
    assert rows[2]["_id"] not in {one["id"] for one in records["p"]["documents"]}
    assert len(records["p"]["documents"]) == len(records["t"]["documents"]) == 11
    shown = Counter(
        (request.messages[-1]["content"][-1]["text"].count("like this"), len(request.messages[-1]["content"]) - 1)
        for request in scripted.asked
    )
    assert shown == {(0, 1): 11, (1, 2): 11}


def test_the_estimate_counts_what_is_asked(tmp_path, scripted):
    """As many requests as the run then makes; the templates, and so the tokens of prompts, are those of the run."""
    scripted.script = lambda request: '{"relevance": 3}'
    stages = [
        {"type": "retrieve", "corpus": "squad-en/corpus.jsonl", "depth": 3},
        {"type": "judge", "samples": 2},
    ]
    sources = [{"path": "squad-en/queries.jsonl", "kind": "queries", "max_examples": 32}]
    tree = {"root": str(DATA), "sources": sources, "stages": stages, "generator": "scripted"}
    dry, out = tmp_path / "dry", tmp_path / "out"
    dry.mkdir()
    out.mkdir()
    told = estimate(SynthesisConfig(output=str(dry), **tree), dry)
    Run(SynthesisConfig(output=str(out), **tree), out)()
    (requests,) = re.findall(r"in all: about ([\d,]+) requests", told)
    assert int(requests.replace(",", "")) == len(scripted.asked) == 32 * 3 * 2
    (prompts,) = re.findall(r"in all: .* ([\d,]+) tokens of prompts", told)
    asked = sum(len(message["content"]) for request in scripted.asked for message in request.messages) / 4
    assert int(prompts.replace(",", "")) == pytest.approx(asked, rel=0.1)


OWN = ("queries", "graded_captions", "tasks", "judged", "demonstrated")


@pytest.mark.parametrize("name", OWN)
def test_shipped_configs_of_these_stages_say_what_they_would_ask(name, scripted, tmp_path):
    file = DATA.parent / "recipes" / "configs" / "synthesis" / f"{name}.yaml"
    tree = yaml.safe_load(file.read_text())
    heading = file.read_text().splitlines()[:2]
    assert heading[0] == f"# python -m data_tools.synthesize --config recipes/configs/synthesis/{file.name}"
    assert heading[1].startswith("# ")
    root = f"root={DATA.parent / tree['root']}"
    config = load_synthesis(file, ["generator={type: scripted}", root, f"output={tmp_path}"])
    told = estimate(config, tmp_path)
    assert int(re.findall(r"in all: about ([\d,]+) requests", told)[0].replace(",", "")) >= 8


def test_sts_records_are_not_judged(run, scripted, write_lines):
    scripted.script = lambda request: '{"relevance": 3}'
    path = write_lines("sts.jsonl", [{"query": "a", "documents": [{"content": "b", "relevance": 0.5}], "task": "sts"}])
    with pytest.raises(ValueError, match="an STS record grades a pair by likeness"):
        run([{"type": "judge", "what": "documents"}], [{"path": path}])


def test_levels_need_a_zero():
    with pytest.raises(ConfigError, match="0 and one from positive_from"):
        STAGES.build({"type": "judge", "levels": [3, 2]}, below_root=Path)
