"""Stages that refine, through the real pipeline with answers that the test writes; rules against published values."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from families import picture
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.generators import Answer
from data_tools.synthesis.estimate import estimate
from data_tools.synthesis.pipeline import Run
from data_tools.synthesis.settings import load_synthesis
from data_tools.synthesis.stages import STAGES, Context, Unusable
from data_tools.synthesis.stages.composition_negatives import changed_words
from data_tools.synthesis.stages.multicsr_curate import curate, read_score
from data_tools.synthesis.stages.sub_captions import sentences_of
from mmembed.data.records import parse_record
from mmembed.data.word_swaps import swaps_of, tagged
from mmembed.errors import ConfigError, MmembedError
from mmembed.media import MediaStore

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses.json").read_text(encoding="utf-8"))
SWAPS = ("noun_phrases", "nouns", "adjectives", "adverbs", "verbs")


@pytest.fixture
def run(tmp_path, scripted):
    """run(stages, source rows, kind, script) -> what was made, and the run's own summary."""

    def carry_out(stages, rows, kind="records", script=None, name="run", **config):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        asks = any(STAGES.get(stage["type"]).__mro__[1].__name__ == "AskingStage" for stage in stages)
        file, output = tmp_path / f"{name}.yaml", tmp_path / name
        tree = {"output": str(output), "sources": [{"path": str(tmp_path / f"{name}.jsonl"), "kind": kind}]}
        tree |= {"generator": "scripted"} if asks else {}
        file.write_text(yaml.safe_dump({**tree, "stages": stages, "max_lost": 1.0, **config}))
        scripted.script = staticmethod(script) if script else None
        loaded = load_synthesis(file)
        output.mkdir(exist_ok=True)
        if asks:
            assert "requests" in estimate(loaded, output)  # samples are read and go through all stages
        Run(loaded, output)()
        summary = json.loads((output / "summary.json").read_text())
        made = (output / f"{summary['made']['kind']}.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in made.splitlines()], summary

    return carry_out


def question(request):
    content = request.messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def notes(summary):
    return {key: count for stage in summary["stages"] for key, count in stage["notes"].items()}


# MultiCSR ------------------------------------------------------------------------------------------------------------


def test_curation_keeps_what_the_authors_filter_keeps():
    (entry,) = (one for one in GOLDEN["multicsr"] if one["name"] == "stage-2 self-curation")
    pairs = entry["inputs"]["scores_pos_neg"]
    assert [place for place, pair in enumerate(pairs) if curate(*pair) == "keep"] == entry["expected"]["kept"] == [0, 2]
    assert [place for place, (a, b) in enumerate(pairs) if curate(b, a) == "swap"] == [0, 2]


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 5), st.floats(0, 5))
def test_curation_knows_no_roles(first, second, least, most):
    mirrored = {"keep": "swap", "swap": "keep", None: None}
    assert curate(second, first, least, most) == mirrored[curate(first, second, least, most)]


@pytest.mark.parametrize("answer", ["5", "5.0", "0", "3.4"])
def test_scores_are_a_digit_or_one_with_a_tenth(answer):
    assert read_score(answer) == float(answer)


@pytest.mark.parametrize("answer", ["5.1", "6", "3.45", "4.5/5", "about 3", "-1", "3.", "٣", ".5"])
def test_other_scores_are_unusable(answer):
    with pytest.raises(Unusable, match="no score"):
        read_score(answer)


def test_sentences_become_records_and_are_curated(run):
    """Written, scored, swapped, left out: from raw sentences to what training reads."""
    sentences = {"a": "A man plays the piano.", "b": "The shop closes at noon.", "c": "Snow fell all night."}
    written = {
        "a": ("Somebody makes some music.", '"No one touches the piano."'),
        "b": ("The shop stays open all day.", "At noon the shop shuts."),  # the wrong way round
        "c": ("It was cold last night.", "It did not snow last night."),
    }
    scores = {"a": ("4.5", "1.0"), "b": ("0.5", "4.8"), "c": ("2.9", "0.0")}

    def script(request):
        text, system = question(request), request.messages[0]["content"]
        name = next(one for one, sentence in sentences.items() if sentence in text)
        if "score" in system:
            return scores[name][text.split("Second: ")[1].split("\n")[0] == written[name][1].strip('"')]
        return written[name]["cannot be true" in system]

    rows = [{"id": name, "text": text} for name, text in sentences.items()]
    stages = [{"type": "multicsr_generate", "instruction": "Find what follows"}, {"type": "multicsr_curate"}]
    made, summary = run(stages, rows, "documents", script)
    assert [(one["id"], one["query"]) for one in made] == [("a", sentences["a"]), ("b", sentences["b"])]
    found = [
        [(doc["content"], doc["relevance"], doc["meta"]["similarity"]) for doc in one["documents"]] for one in made
    ]
    assert found == [
        [("Somebody makes some music.", 1.0, 4.5), ("No one touches the piano.", 0.0, 1.0)],
        [("At noon the shop shuts.", 1.0, 4.8), ("The shop stays open all day.", 0.0, 0.5)],
    ]  # fmt: skip
    assert made[0]["documents"][0]["id"] == "a-entailment" and made[0]["instruction"] == "Find what follows"
    assert all(doc["meta"]["by"] == "multicsr_generate" for one in made for doc in one["documents"])
    assert summary["stages"][1]["reasons"] == {"scores": 1} and summary["stages"][1]["lost"] == 0
    assert summary["stages"][1]["examples"]["scores"][0]["found"] == "positive 2.9, negative 0.0"


def test_two_examples_are_shown_and_copies_are_asked_again(run, scripted):
    tries = Counter()

    def script(request):
        tries[request.messages[0]["content"]] += 1
        first = tries[request.messages[0]["content"]] == 1
        return "the GATE  is open." if first else f"Attempt {len(request.messages)} says something else."

    made, summary = run(
        [{"type": "multicsr_generate"}], [{"id": "x", "text": "The gate is open."}], "documents", script
    )
    assert made == [] and summary["stages"][0]["reasons"] == {"one text for both relations": 1}
    assert summary["stages"][0]["unusable"] == {"copies": 2}
    assert {len(request.messages) for request in scripted.asked} == {1 + 2 * 2 + 1}  # 2-shot


# Rewrites ------------------------------------------------------------------------------------------------------------


def test_rewrites_stand_beside_the_caption_under_its_id(run):
    """LaCLIP: one draw among original and rewrites; one word is no rewrite."""
    rows = [
        {"query": "1", "documents": [{"content": "a red bus waits", "id": "d"}, {"content": "bread", "relevance": 0}]},
        {"query": "q2", "documents": [{"content": "a dog asleep"}], "id": "two"},
    ]  # fmt: skip

    def script(request):
        return "Bus" if "red bus" in question(request) else f"A sleeping dog, {request.sampling.seed % 1000}."

    made, summary = run([{"type": "rewrite", "each": 3}], rows, script=script)
    assert made[0]["documents"] == rows[0]["documents"]
    original, *others = made[1]["documents"]
    assert original == {"content": "a dog asleep", "id": "two-0"} and len(others) == 3
    assert {one["id"] for one in others} == {"two-0"} and len({one["content"] for one in others}) == 3
    assert others[0]["meta"] == {"by": "rewrite", "style": "caption"} and "relevance" not in others[0]
    assert notes(summary) == {"lost rewrites": 3}
    assert summary["stages"][0]["unusable"] == {"too short": 9}


def test_training_draws_original_and_rewrites_alike(run, scripted):
    """LaCLIP's step in our collator: over visits each of the four texts comes about as often."""
    from dataclasses import replace

    from mmembed.config.blocks import SourceConfig
    from mmembed.data.collate import Collator

    made, _ = run(
        [{"type": "rewrite", "each": 3}], [{"query": "q", "documents": [{"content": "a dog asleep"}]}],
        script=lambda request: f"A sleeping dog, {request.sampling.seed}.",
    )  # fmt: skip
    example = parse_record(made[0], "r:1")

    class Prompt:
        reads_lists = False

    preprocessor = type("Preprocessor", (), {"prompt": Prompt})
    collator = Collator(preprocessor, {"": SourceConfig(path="r")}, 100, train_group_size=1)
    drawn = Counter(collator._group(replace(example, visit=visit))[0].content[0].text for visit in range(2000))
    assert len(drawn) == 4 and all(430 < count < 570 for count in drawn.values())  # 3.6 standard deviations


def test_passages_in_styles_are_documents_of_their_own(run, tmp_path):
    """WRAP; a picture beside the text stays, lines of questions and answers stay lines."""
    rows = [{"id": "p", "image": "x.png", "text": "Tides come from the moon's pull."}]
    picture(0, 40, 40).save(tmp_path / "x.png")
    seen = {}

    def script(request):
        text = question(request)
        style = "qa" if "questions and answers" in text else "easy" if "small child" in text else "hard"
        seen[style] = text
        return "Question: why tides?\nAnswer: the moon." if style == "qa" else f"{style} words about tides"

    made, _ = run([{"type": "rewrite", "styles": ["easy", "hard", "qa"]}], rows, "documents", script)
    assert all(one["content"]["image"] == str(tmp_path / "x.png") for one in made)
    assert [(one["id"], one["content"]["text"]) for one in made] == [
        ("p", "Tides come from the moon's pull."),
        ("p-easy-0", "easy words about tides"),
        ("p-hard-1", "hard words about tides"),
        ("p-qa-2", "Question: why tides?\nAnswer: the moon."),
    ]
    assert made[3]["meta"] == {"by": "rewrite", "style": "qa", "of": "p"} and len(seen) == 3


def test_queries_are_rewritten_into_records(run):
    rows = [{"query": "bus times", "documents": [{"content": "the timetable"}], "id": "r"}]
    stages = [{"type": "rewrite", "of": "query", "keep_original": False}]
    made, _ = run(stages, rows, script=lambda _: "When does the bus go?")
    assert [(one["id"], one["query"], one["documents"]) for one in made] == [
        ("r-caption-0", "When does the bus go?", rows[0]["documents"])
    ]


# Sub-captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One here. Two there! Three? Yes.", ["One here.", "Two there!", "Three?", "Yes."]),
        ("1. A cat.\n2. A dog runs.\n- A bird", ["A cat.", "A dog runs.", "A bird"]),
        ("It costs 2.50 at St. Mary's. J. Smith pays.", ["It costs 2.50 at St. Mary's.", "J. Smith pays."]),
        ("一只猫坐着。旁边有狗！", ["一只猫坐着。", "旁边有狗！"]),
        ('He says "Stop." Then he goes.', ['He says "Stop.', "Then he goes."]),
        ("Same. Same.", ["Same."]),
    ],
)
def test_sentences(text, found):
    assert sentences_of(text) == found


def test_pictures_get_the_sentences_of_a_description(run, tmp_path):
    """The picture is the query, its own text the first positive; what is too short is no caption."""
    picture(0, 60, 60).save(tmp_path / "bus.png")
    rows = [{"id": "p", "image": "bus.png", "text": "old bus"}, {"id": "t", "text": "text alone"}]
    description = "A red bus waits at a stop. Nice. Two people stand beside the bus. Rain falls on the road."

    def script(request):
        parts = request.messages[-1]["content"]
        assert [part["type"] for part in parts] == ["image", "text"] and parts[0]["image"].endswith("bus.png")
        return description

    made, summary = run([{"type": "sub_captions", "captions": 2}], rows, "documents", script)
    (record,) = made
    assert record["query"] == {"image": str(tmp_path / "bus.png")} and record["id"] == "p"
    assert [one["content"] for one in record["documents"]] == [
        "old bus", "A red bus waits at a stop.", "Two people stand beside the bus.",
    ]  # fmt: skip
    assert len({one["id"] for one in record["documents"]}) == 3
    assert summary["stages"][0]["reasons"] == {"no picture": 1} and summary["stages"][0]["lost"] == 0
    again = [{"type": "sub_captions", "captions": 3, "keep_text": False}, {"type": "sub_captions"}]
    made, _ = run(again, rows[:1], "documents", script, name="again")
    assert len(made[0]["documents"]) == 3, "sentences that are there are not added again"


# ALIP and GIST -------------------------------------------------------------------------------------------------------


class Given:
    """An embedder that has its vectors: by content."""

    name, reads = "given", frozenset({"text", "image"})

    def __init__(self, vectors):
        self.vectors = vectors

    def fingerprint(self):
        return "given"

    def load(self, media):
        pass

    def encode(self, items, role):
        return np.array([self.vectors[json.dumps(item.content)] for item in items], dtype=np.float32)


@pytest.fixture
def applied(tmp_path):
    def apply(stage, items, name="01-x"):
        context = Context(0, MediaStore(), tmp_path / name, Path)
        return list(stage.apply(items, context)), context

    return apply


def test_gates_are_those_of_the_reference_implementation(applied):
    """The golden values of ALIP's first step, sample weights and both pair weights."""
    (entry,) = GOLDEN["alip"]
    inputs, expected = entry["inputs"], entry["expected"]
    vectors, items = {}, []
    for row in range(3):
        texts = [f"text {row}", f"caption {row}"]
        items.append({"id": str(row), "query": f"picture {row}", "documents": [{"content": text} for text in texts]})
        for content, name in zip([f"picture {row}", *texts], ("image", "raw_text", "synthetic_caption"), strict=True):
            vectors[json.dumps(content)] = inputs[name][row]
    stage = STAGES.get("alip_gates")(embedder="mmembed", scores=True)
    stage.encoder = Given(vectors)
    made, _ = applied(stage, items)
    for key, name in (("sample", "w_sample"), ("text", "w_raw"), ("caption", "w_caption")):
        assert [one["meta"]["alip"][key] for one in made] == pytest.approx(expected[name], abs=1e-5)
    norm = [math.hypot(*inputs[name][0]) for name in ("image", "raw_text")]
    cosine = sum(a * b for a, b in zip(inputs["image"][0], inputs["raw_text"][0], strict=True)) / math.prod(norm)
    assert made[0]["documents"][0]["score"] == pytest.approx(cosine, abs=1e-5)

    stage = STAGES.get("alip_gates")(embedder="mmembed", least=0.5, better_alone=True)
    stage.encoder = Given(vectors)
    (first, second, third), context = applied(stage, items)
    assert second.reason == "text and caption disagree" and not second.lost
    assert [one["content"] for one in first["documents"]] == ["text 0"]
    assert [one["content"] for one in third["documents"]] == ["text 2"]
    assert context.notes == {"captions taken off": 2}


def test_means_go_on_over_batches(applied):
    """H after n batches by a loop of its own; batches of one."""
    cosines = [0.9, 0.1, 0.5]
    vectors, items = {json.dumps("p"): [1.0, 0.0], json.dumps("c"): [1.0, 0.0]}, []
    for row, cosine in enumerate(cosines):
        vectors[json.dumps(f"t{row}")] = [cosine, math.sqrt(1 - cosine**2)]
        documents = [{"content": f"t{row}"}, {"content": "c"}]
        items.append({"id": str(row), "query": "p", "documents": documents})
    stage = STAGES.get("alip_gates")(embedder="mmembed", batch=1, decay=0.5, gamma=1.0)
    stage.encoder = Given(vectors)
    made, _ = applied(stage, [*items, {"id": "x", "query": "p", "documents": [{"content": "c"}]}])
    mean, expected = 1.0, []
    for cosine in cosines:
        mean = 0.5 * mean + 0.5 * cosine
        expected.append(min(1.0, math.exp(cosine - mean)))
    assert [one["meta"]["alip"]["sample"] for one in made[:3]] == pytest.approx(expected, abs=1e-5)
    assert made[3].reason == "no text and caption"


def test_gates_with_the_nano_on_pictures(run, tmp_path):
    """The real embedder and the real pipeline: weights of three records, twice the same."""
    for number in range(3):
        picture(number, 50, 50).save(tmp_path / f"{number}.png")
    rows = [
        {"query": {"image": f"{number}.png"}, "documents": [{"content": f"number {number}"}, {"content": "a picture"}]}
        for number in range(3)
    ]
    stages = [{"type": "alip_gates", "embedder": {"type": "mmembed", "model": "mmembed-nano", "dtype": "float32"}}]
    made, _ = run(stages, rows)
    again, _ = run(stages, rows, name="other")
    gates = [one["meta"]["alip"] for one in made]
    assert gates == [one["meta"]["alip"] for one in again] and all(0 < one["sample"] <= 1 for one in gates)
    from mmembed import Embedder
    from mmembed.objectives.alip import agreement
    from mmembed.objectives.alip import gates as of

    embedder = Embedder.from_pretrained("mmembed-nano", dtype="float32")
    views = [embedder.encode([one["query"] for one in made], role="query")]
    views += [embedder.encode([one["documents"][place]["content"] for one in made]) for place in (0, 1)]
    found = agreement(torch.nn.functional.normalize(torch.tensor(np.stack(views)), dim=-1))
    sample, text, caption = of(found, 0.99 + 0.01 * found.mean(1))
    assert [one["sample"] for one in gates] == pytest.approx(sample.tolist(), abs=1e-4)
    assert [one["caption"] for one in gates] == pytest.approx(caption.tolist(), abs=1e-4)
    assert [one["text"] for one in gates] == pytest.approx(text.tolist(), abs=1e-4)


def test_classes_are_described_matched_and_summarised(run, tmp_path):
    """GIST in two runs, with the nano as what compares."""
    for number in range(4):
        picture(number, 50, 50).save(tmp_path / f"{number}.png")
    classes = [{"id": "swallow", "text": "barn swallow"}, {"id": "owl", "text": "snowy owl"}]

    def describe(request):
        name = "swallow" if "swallow" in question(request) else "owl"
        sex = "male" if "male birds" in question(request) else "young"
        return json.dumps({"descriptions": [f"a {sex} {name} on branch number {one}" for one in range(3)]})

    stages = [{"type": "class_descriptions", "domain": "birds", "aspects": ["male birds", "young birds"], "count": 3}]
    described, _ = run(stages, classes, "documents", describe, name="described")
    assert len(described) == 12 and described[0]["id"] == "swallow-0" and described[0]["meta"]["class"] == "swallow"

    pictures = [
        {"query": {"image": f"{number}.png"}, "documents": [{"content": "x"}], "labels": [label], "id": f"p{number}"}
        for number, label in enumerate(["swallow", "owl", "owl", "heron"])
    ]
    embedder = {"type": "mmembed", "model": "mmembed-nano", "dtype": "float32"}
    file = str(tmp_path / "described" / "documents.jsonl")
    match = {"type": "match_descriptions", "descriptions": file, "embedder": embedder, "top": 2}
    summarise = {"type": "rewrite", "styles": ["summary"], "keep_original": False}
    made, summary = run([match, summarise], pictures, script=lambda request: question(request)[-20:] + " in short")
    assert [one["id"] for one in made] == ["p0", "p1", "p2"]
    assert summary["stages"][0]["reasons"] == {"no description of its class": 1}
    from mmembed import Embedder

    model = Embedder.from_pretrained("mmembed-nano", dtype="float32")
    owls = [one["content"] for one in described if one["meta"]["class"] == "owl"]
    shown = model.encode([{"image": str(tmp_path / "1.png")}], role="query")
    best = model.similarity(shown, model.encode(owls))[0].argsort()[::-1][:2]
    assert [one["content"] for one in made[1]["documents"]] == [f"{owls[place][-20:]} in short" for place in best]
    assert {one["id"] for one in made[1]["documents"]} == {"owl"} and made[1]["documents"][0]["relevance"] == 1.0


def test_a_line_that_is_no_description_is_named(tmp_path):
    whole = {"id": "owl-0", "content": "an owl", "meta": {"class": "owl"}}
    stage = {"type": "match_descriptions", "descriptions": "told.jsonl", "embedder": "mmembed"}
    file = tmp_path / "told.jsonl"
    for bad in ('{"id": ', '["owl"]', '{"id": "x", "content": "x"}', '{"id": "x", "content": "x", "meta": 3}'):
        file.write_text(f"{json.dumps(whole)}\n{bad}\n")
        with pytest.raises(ConfigError, match=r"told\.jsonl:2: "):
            list(STAGES.build(stage, below_root=tmp_path.joinpath).apply([], None))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no description"):
        list(STAGES.build(stage, below_root=tmp_path.joinpath).apply([], None))


def test_a_vector_that_is_not_finite_names_its_item(tmp_path, applied):
    items = [{"id": f"r{row}", "query": "p", "documents": [{"content": "t"}, {"content": f"c{row}"}]} for row in (1, 2)]
    vectors = {json.dumps(one): [1.0, 0.0] for one in ("p", "t", "c1")} | {json.dumps("c2"): [float("nan"), 0.0]}
    stage = STAGES.get("alip_gates")(embedder="mmembed")
    stage.encoder = Given(vectors)
    with pytest.raises(MmembedError, match=r"record 'r2': .* NaN"):
        applied(stage, items)


def test_a_second_life_encodes_nothing_again(applied):
    items = [{"id": "r", "query": "p", "documents": [{"content": "t"}, {"content": "c"}]}]
    stage = STAGES.get("alip_gates")(embedder="mmembed")
    stage.encoder = Given({json.dumps(one): [1.0, 0.5] for one in "ptc"})
    first, _ = applied(stage, items)
    stage.encoder = Given({})  # has no vector of anything
    assert applied(stage, items)[0] == first


# Composition ---------------------------------------------------------------------------------------------------------

CAPTIONS = [  # and swaps that a person makes of them
    ("A boy in a red coat feeds two white geese.", ["A boy in a white coat feeds two red geese."]),
    ("The old bridge leads to a small village.", ["The small bridge leads to a old village."]),
    ("A cup of tea stands beside an open book.", ["A book of tea stands beside an open cup."]),
    ("Green hills rise behind a wooden house.", ["Wooden hills rise behind a green house."]),
    ("A woman waters the flowers while her brother paints the fence.",
     ["A brother waters the flowers while her woman paints the fence."]),
    ("The long train crosses a deep valley.", ["The deep train crosses a long valley."]),
    ("A cat sleeps on the roof of a car.",
     ["A roof sleeps on the cat of a car.", "A car sleeps on the roof of a cat."]),
    ("Three yellow boats lie on a quiet lake.", ["Three quiet boats lie on a yellow lake."]),
]  # fmt: skip


def plain(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def test_swaps_are_those_that_a_person_makes():
    for caption, wanted in CAPTIONS:
        words = tagged(caption, "en")
        ours = {tuple(plain(one)) for kind in SWAPS for one in swaps_of(caption, words, kind, "en")}
        assert {tuple(plain(one)) for one in wanted} <= ours, caption


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_swap_keeps_the_words_and_changes_the_text(data):
    captions = st.sampled_from([caption for caption, _ in CAPTIONS])
    caption = " ".join(data.draw(st.lists(captions, min_size=1, max_size=2)))
    kind = data.draw(st.sampled_from(SWAPS))
    words = tagged(caption, "en")
    for one in swaps_of(caption, words, kind, "en"):
        assert Counter(plain(one)) == Counter(plain(caption)) and plain(one) != plain(caption)
        assert one[:1].isupper() == caption[:1].isupper() and len(one) == len(caption)
        assert [mark for mark in one if not mark.isalnum() and mark != " "] == [
            mark for mark in caption if not mark.isalnum() and mark != " "
        ]
    assert swaps_of(caption, words, kind, "en") == swaps_of(caption, tagged(caption, "en"), kind, "en")


@pytest.mark.parametrize(
    ("language", "kind", "text", "swap"),
    [
        ("en", "verbs", "A man is slowly riding it; a girl feeds it", "A man feeds it; a girl is slowly riding it"),
        ("en", "adverbs", "She slowly rises and quietly sits", "She quietly rises and slowly sits"),
        ("en", "nouns", "Dogs don't chase the big cats.", "Cats don't chase the big dogs."),
        ("de", "adjectives", "Ein großer Hund und eine kleine Katze", "Ein kleine Hund und eine großer Katze"),
        ("nl", "nouns", "De hond loopt naast de vrouw", "De vrouw loopt naast de hond"),
    ],
)  # fmt: skip
def test_swaps_by_hand(language, kind, text, swap):
    assert swap in swaps_of(text, tagged(text, language), kind, language)


def test_what_cannot_be_swapped_stays_without_negatives(run):
    """Equal words change nothing; what a record has already is no negative; two runs agree."""
    rows = [
        {"query": "q", "documents": [{"content": "a dog and a dog"}], "id": "same"},
        {"query": "a bone chases a dog", "documents": [{"content": "A dog chases a bone."}], "id": "there"},
        {"query": "q", "id": "three", "documents": [{"content": text, "id": text[:9]} for text, _ in CAPTIONS[:3]]},
    ]  # fmt: skip
    made, summary = run([{"type": "word_swaps", "most": 2}], rows)
    assert [len(one["documents"]) for one in made] == [1, 1, 3 + 5]
    assert notes(summary) == {"records without a swap": 2, "negatives": 5}
    negatives = made[2]["documents"][3:]
    assert all(one["relevance"] == 0 and one["meta"]["by"] == "word_swaps" for one in negatives)
    assert len({one["id"] for one in negatives}) == 5 and len({one["content"] for one in negatives}) == 5
    again, _ = run([{"type": "word_swaps", "most": 2}], rows, name="again")
    assert [one["documents"] for one in again] == [one["documents"] for one in made]


@pytest.mark.parametrize(
    ("first", "second", "count"),
    [("a b c", "a b c", 0), ("A dog.", "a dog", 0), ("a b c", "a x c", 1), ("a b c", "b c", 1), ("a b", "b a", 2),
     ("", "a b", 2), ("两只狗", "三只狗", 1), ("two dogs", "three cats here", 3)],
)  # fmt: skip
def test_changed_words(first, second, count):
    assert changed_words(first, second) == count


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_changed_words_is_a_distance(first, second):
    """Against the definition by recursion."""

    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return distance(a[1:], b[1:])
        return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))

    assert changed_words(" ".join(first), " ".join(second)) == distance(first, second)


def test_written_negatives_are_checked(run):
    caption = "Two brown dogs sleep under a table."
    answers = {
        "one person": "Two brown cats sleep under a table.",
        "one property": "Two brown dogs sleep under a table!",  # a copy
        "one relation": "Three white birds fly over the roof of a house.",  # another picture
        "one number": "None.",
    }

    def script(request):
        return next(answer for key, answer in answers.items() if key in question(request))

    rows = [
        {"query": "x", "documents": [{"content": caption, "id": "d"}, {"content": "no text of it", "relevance": 0}]}
    ]
    made, summary = run([{"type": "composition_negatives"}], rows, script=script)
    assert made[0]["documents"][2:] == [
        {
            "content": "Two brown cats sleep under a table.", "relevance": 0.0, "id": "d-other-object",
            "meta": {"by": "composition_negatives", "changed": "object"},
        }
    ]  # fmt: skip
    assert summary["stages"][0]["unusable"] == {"copies": 3, "too many words changed": 3}
    assert notes(summary) == {"lost: attribute": 1, "lost: relation": 1, "no negative: count": 1}


# S3FT ----------------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    ("own", "It is 330 metres tall.", 1.0, "It gives the height."),
    ("wrong", "It stands in Paris.", 0.0, "It gives the place, no height."),
    ("unlike", "It has three floors.", 0.0, "Floors are no height."),
    ("bare", "It is of iron.", 0.0, None),
]


def s3ft_script(request):
    """The model to be tuned, and a judge that believes in what is called right."""
    system, text = request.messages[0]["content"], question(request)
    name = next(name for name, content, *_ in DOCUMENTS if content in text)
    if "two reasons" in system:
        return "Yes." if "right" in text.split("Second reason: ")[1] else "no"
    if "your own words" in system:
        return {"wrong": "a right paraphrase", "unlike": "another meaning", "own": "a right paraphrase, too"}[name]
    said = {
        "own": "my right reason\nyes",
        "wrong": "my reason\nYES",
        "unlike": "strange\nno",
        "bare": "iron, right\nno",
    }
    return Answer(said[name], "stop", 5, 5)


def s3ft_rows():
    documents = [
        {"content": content, "relevance": relevance, **({"rationale": gold} if gold else {})}
        for _, content, relevance, gold in DOCUMENTS
    ]
    return [{"query": f"how tall is tower {number}", "documents": documents, "id": f"r{number}"} for number in range(6)]


S3FT = [{"type": "s3ft_answers", "generator": "tuned"}, {"type": "s3ft_select", "generator": "judge"}]
MODELS = {"generator": None, "generators": {name: {"type": "scripted", "model": name} for name in ("tuned", "judge")}}


def test_own_right_answers_are_chosen(run):
    """Own where it is judged equivalent, else the paraphrase, else the gold; each model answers its stage."""
    made, summary = run(S3FT, s3ft_rows(), script=s3ft_script, **MODELS)
    assert len(made) == 6
    found = [(one["rationale"], one["meta"]["answer"]) for one in made[0]["documents"]]
    assert found == [
        ("my right reason", "own"), ("a right paraphrase", "paraphrase"), ("Floors are no height.", "gold"),
        ("iron, right", "own"),
    ]  # fmt: skip
    assert all(set(one["meta"]) == {"by", "answer"} for one in made[0]["documents"])
    counted = notes(summary)
    assert counted["trained on: own"] == 12 and counted["trained on: gold"] == counted["trained on: paraphrase"] == 6
    assert counted["wrong verdict"] == 6 and counted["right verdict"] == 18


def test_the_question_is_the_prompt_of_training(family_folder, run, scripted):
    """Letter by letter what recipes/train_generative_reranker.py trains on."""
    from mmembed.config.blocks import LengthsConfig
    from mmembed.content import to_content
    from mmembed.generation.prompts import Writer
    from mmembed.models.generator import GeneratorSettings, load_generator

    run(S3FT[:1], s3ft_rows()[:1], script=s3ft_script, generator=None, generators={"tuned": "scripted"})
    asked = [request for request in scripted.asked if "You judge" in request.messages[0]["content"]]
    loaded = load_generator(
        GeneratorSettings(
            str(family_folder("qwen3")),
            None,
            "float32",
            "sdpa",
            {"type": "rationale", "words": ["yes", "no"]},
            vars(LengthsConfig()),
        )
    )
    writer = Writer(loaded.family, LengthsConfig())
    for request, (_, content, *_) in zip(sorted(asked, key=order), DOCUMENTS, strict=True):
        expected = writer.rationale(to_content("how tall is tower 0"), to_content(content)).messages
        assert list(request.messages) == expected


def order(request):
    return next(place for place, (_, content, *_) in enumerate(DOCUMENTS) if content in question(request))


# All -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "kind", "message"),
    [
        ({"type": "rewrite", "of": "query"}, "documents", "has no effect on documents"),
        ({"type": "rewrite", "styles": ["poem"]}, "documents", "styles"),
        ({"type": "rewrite", "each": 2, "temperature": 0.0}, "documents", "raise the temperature"),
        ({"type": "sub_captions", "least": 9}, "documents", "least 9 is above captions 8"),
        ({"type": "word_swaps", "language": "fr"}, "records", "language"),
        ({"type": "word_swaps", "swaps": []}, "records", "at least one"),
        ({"type": "composition_negatives", "most_changed": 0}, "records", "most_changed"),
        ({"type": "alip_gates"}, "records", "embedder"),
        ({"type": "alip_gates", "embedder": "bm25"}, "records", "gives no vectors"),
        ({"type": "multicsr_curate", "positive_line": 6.0}, "records", "positive_line"),
        ({"type": "multicsr_generate"}, "records", "works on documents"),
        ({"type": "s3ft_answers", "words": ["yes", "yes"]}, "records", "words"),
    ],
)
def test_what_cannot_work_is_refused(run, stage, kind, message):
    row = {"query": "q", "documents": [{"content": "d"}]} if kind == "records" else {"text": "d"}
    with pytest.raises(ConfigError, match=message):
        run([stage], [row], kind, lambda _: "")


def test_what_was_selected_is_trained_on(run, tmp_path):
    """From gold reasons to a tuned reranker that answers: the shipped config and trl, a few steps of the nano."""
    from safetensors.torch import load_file

    from mmembed import RationaleReranker
    from recipes.train_generative_reranker import main

    run(S3FT, s3ft_rows(), script=s3ft_script, **MODELS)
    shipped = Path("recipes/configs/generative_reranker/s3ft.yaml")
    out = tmp_path / "tuned"
    overrides = [
        "model={name_or_path: mmembed-nano, dtype: float32}", f"data.root={tmp_path / 'run'}",
        f"training.output_dir={out}", "training.max_steps=4", "training.gradient_accumulation_steps=1",
        "training.bf16=false", "training.learning_rate=0.01", "training.logging_steps=1", "training.disable_tqdm=true",
        "training.gradient_checkpointing=false", "lengths={query_max_length: 16, document_max_length: 32}",
    ]  # fmt: skip
    assert main(["--config", str(shipped), *overrides]) == 0
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["lora_dropout"]) == (8, 16, 0.1)
    moved = [tensor for name, tensor in load_file(out / "adapter_model.safetensors").items() if "lora_B" in name]
    assert moved and all(tensor.abs().max() > 0 for tensor in moved)
    judged = RationaleReranker.from_pretrained(out).judge(
        [("how tall is the tower", "It is 330 metres tall.")], max_new_tokens=16
    )
    assert isinstance(judged[0].rationale, str)


@pytest.mark.parametrize("path", sorted(Path("recipes/configs/synthesis").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(path, scripted, tmp_path):
    """Their stages and options; generators are those of other tests."""
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "generator" in tree:
        tree["generator"] = "scripted"
    if "generators" in tree:
        tree["generators"] = {name: {"type": "scripted", "model": name} for name in tree["generators"]}
    (tmp_path / path.name).write_text(yaml.safe_dump(tree))
    assert load_synthesis(tmp_path / path.name).stages
    assert path.read_text().startswith(f"# python -m data_tools.synthesize --config {path}")


def test_documents_ask_and_queries_answer(run):
    """Two queries of one document; one that is only a negative; twice around is where it began."""
    rows = [
        {"id": "q1", "query": "red", "documents": [{"content": "bus", "id": "b"}, {"content": "dog", "relevance": 0}]},
        {"id": "q2", "query": "large", "documents": [{"content": "bus", "id": "b", "relevance": 2.0}]},
    ]
    made, summary = run([{"type": "turn_around", "instruction": "What is it like?"}], rows)
    assert [(one["id"], one["query"], one["instruction"]) for one in made] == [("b", "bus", "What is it like?")]
    assert made[0]["documents"] == [
        {"content": "red", "relevance": 1.0, "id": "q1"}, {"content": "large", "relevance": 2.0, "id": "q2"},
    ]  # fmt: skip
    assert summary["stages"][0]["reasons"] == {"a document without a positive": 1}
    back, _ = run([{"type": "turn_around"}, {"type": "turn_around"}], rows, name="back")
    found = [(one["id"], one["query"], [(d["content"], d["relevance"]) for d in one["documents"]]) for one in back]
    assert found == [("q1", "red", [("bus", 1.0)]), ("q2", "large", [("bus", 2.0)])]
