"""Makers of pairs against their rules, written out once more with loops and with scipy."""

import json
import math
import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import PIL.Image
import pytest
from scipy import stats

from mmembed.config import build_config
from mmembed.config.blocks import SourceConfig
from mmembed.content import Example, Image, Text
from mmembed.data.dataset import MixedDataset, RecordDataset
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.data.pair_makers.random_crops import without_some
from mmembed.data.pair_makers.rendered_text import load_font, misspell, render, swap
from mmembed.data.pair_makers.word_repetition import repeat
from mmembed.data.streaming import RecordStream
from mmembed.data.words import Word, join_words, split_sentences, split_words, terms
from mmembed.errors import ConfigError, RecordError

WORDS = ["the", "of", "bus", "red", "train", "river", "bread", "engine", "letter", "forest", "tower", "bridge", "dog"]


def write(path, *rows):
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def dataset(tmp_path, on_bad_record="raise", **source):
    return RecordDataset(SourceConfig(**source), on_bad_record=on_bad_record, cache_dir=tmp_path / "c", root=tmp_path)


def text(content):
    (part,) = content
    return part.text


@pytest.mark.parametrize(("n", "most"), [(1, 1), (3, 2), (6, 2), (10, 3), (50, 16)])
def test_how_many_words_are_repeated_is_uniform(n, most):
    """U{0, ..., max(2, int(.32 n))}, at most n: every number comes equally often, at equally likely places."""
    maker = PAIR_MAKERS.build("word_repetition")
    sentence = " ".join(f"w{index}" for index in range(n))
    counts, places = Counter(), Counter()
    for seed in range(1200):
        words = text(maker.draw(sentence, np.random.default_rng(seed)).positive).split()
        doubled = [left for left, right in pairwise(words) if left == right]
        assert list(dict.fromkeys(words)) == sentence.split() and len(words) == n + len(doubled)
        counts[len(doubled)] += 1
        places.update(doubled)
    most_drawn = max(2, int(0.32 * n))
    expected = np.bincount(np.minimum(range(most_drawn + 1), n)) * 1200 / (most_drawn + 1)
    assert max(counts) == most and stats.chisquare([counts[k] for k in range(most + 1)], expected).pvalue > 1e-3
    if n > 1:
        assert stats.chisquare([places[f"w{index}"] for index in range(n)]).pvalue > 1e-3


def test_crops_are_drawn_as_contriever_draws_them():
    """Lengths against int(n r) of uniform ratios, starts uniform, the words of a crop dropped one by one."""
    maker = PAIR_MAKERS.build({"type": "random_crops", "delete": 0.0})
    document = " ".join(f"w{index}" for index in range(200))
    lengths, places = [], []
    for seed in range(2000):
        pair = maker.draw(document, np.random.default_rng(seed))
        numbers = [int(word[1:]) for word in text(pair.positive if seed % 2 else pair.query).split()]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        lengths.append(len(numbers))
        places.append(numbers[0] / (200 - len(numbers)))
    assert min(lengths) == 10 and max(lengths) >= 98
    assert stats.kstest(np.array(lengths) + 0.5, stats.uniform(10, 90).cdf).pvalue > 1e-3
    assert stats.kstest(places, "uniform").pvalue > 1e-3
    stayed = [len(without_some(list(range(50)), 0.1, np.random.default_rng(seed))) for seed in range(400)]
    assert stats.chisquare([sum(stayed), 20000 - sum(stayed)], [18000, 2000]).pvalue > 1e-3
    assert all(without_some([1, 2], 0.999, np.random.default_rng(seed)) for seed in range(20))  # one stays


def test_a_piece_of_a_long_document_is_taken_anywhere():
    maker = PAIR_MAKERS.build({"type": "random_crops", "chunk_length": 20, "delete": 0.0, "ratio_max": 1.0})
    document = " ".join(f"w{index}" for index in range(100))
    seen = set()
    for seed in range(300):
        pair = maker.draw(document, np.random.default_rng(seed))
        numbers = [int(word[1:]) for side in (pair.query, pair.positive) for word in text(side).split()]
        assert max(numbers) - min(numbers) < 20
        seen.update(numbers)
    assert seen >= set(range(3, 97))


def test_the_context_is_a_neighbour_on_either_side():
    sentences = [f"Sentence number {index} is here." for index in range(8)]
    maker = PAIR_MAKERS.build({"type": "context_prediction", "window": 2})
    distances, centres = Counter(), Counter()
    for seed in range(1600):
        pair = maker.draw(" ".join(sentences), np.random.default_rng(seed))
        centre, context = (sentences.index(text(side)) for side in (pair.query, pair.positive))
        distances[context - centre] += 1
        centres[centre] += 1
    assert set(distances) == {-2, -1, 1, 2}
    assert stats.chisquare([centres[index] for index in range(8)]).pvalue > 1e-3
    longer = PAIR_MAKERS.build({"type": "context_prediction", "window": 1, "sentences": 2})
    for seed in range(50):
        pair = longer.draw(" ".join(sentences[:5]), np.random.default_rng(seed))
        first, second = (text(side).count("Sentence") for side in (pair.query, pair.positive))
        assert first == second == 2
        assert not set(split_sentences(text(pair.query))) & set(split_sentences(text(pair.positive)))


def test_the_two_sides_of_a_dropout_pair_are_one_text():
    pair = PAIR_MAKERS.build("dropout").draw("a red bus", np.random.default_rng(0))
    assert pair.query == pair.positive == (Text("a red bus"),)


# PROP -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prop(tmp_path_factory):
    """(maker, documents as lists of words) of a collection whose words are of very different frequency."""
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, len(WORDS) + 1)
    documents = [
        generator.choice(WORDS, generator.integers(5, 30), p=weights / weights.sum()).tolist() for _ in range(60)
    ]
    maker = PAIR_MAKERS.build({"type": "representative_words", "min_count": 30, "subsampling": 0.05})
    for document in documents:
        maker.count(" ".join(document))
    folder = tmp_path_factory.mktemp("prop")
    maker.keep(folder)
    maker.use(folder)
    return maker, documents


def reference(documents, document, t=0.05, least=30):
    """word -> (P(w|D), k(w)) of the vocabulary, by loops over all documents."""
    counts = Counter(word for other in documents for word in other)
    vocabulary = sorted(word for word in counts if counts[word] >= least)
    having = {word: sum(word in other for other in documents) for word in vocabulary}
    mu = sum(map(len, documents)) / len(documents)
    own = [word for word in document if word in vocabulary]
    found = {}
    for word in vocabulary:
        collection = having[word] / sum(having.values())
        share = counts[word] / sum(counts.values())
        likelihood = (own.count(word) + mu * collection) / (len(own) + mu)
        found[word] = likelihood, min(1.0, math.sqrt(t / share) + t / share)
    return found


def test_likelihoods_are_those_of_the_smoothed_model(prop):
    maker, documents = prop
    vocabulary = maker._arrays["words"].tolist()
    assert 2 < len(vocabulary) < len(WORDS)  # rare ones are left out
    for document in documents[:10]:
        expected = reference(documents, document)
        assert vocabulary == list(expected)
        places = maker._places(document)
        found = maker.log_likelihoods(places, range(len(vocabulary)))
        np.testing.assert_allclose(found, [math.log(value) for value, _ in expected.values()], rtol=1e-12)
        assert math.fsum(map(math.exp, found)) == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(maker._arrays["kept"], [kept for _, kept in expected.values()], rtol=1e-12)


def test_words_are_sampled_from_it_and_their_number_from_poissons(prop):
    maker, documents = prop
    expected = {word: value * kept for word, (value, kept) in reference(documents, documents[0]).items()}
    sampled = maker._sample(maker._places(documents[0]), 20_000, np.random.default_rng(1))
    counts = np.bincount(sampled, minlength=len(expected))
    weights = np.array(list(expected.values()))
    assert stats.chisquare(counts, weights / weights.sum() * 20_000).pvalue > 1e-3
    sizes = Counter()
    for seed in range(3000):
        pair = maker.draw(" ".join(documents[0]), np.random.default_rng(seed))
        assert text(pair.query) == " ".join(documents[0])
        sizes[min(7, len(text(pair.positive).split()))] += 1
    poisson = stats.poisson(3)
    parts = [poisson.pmf(k) for k in range(1, 7)] + [poisson.sf(6)]
    assert stats.chisquare([sizes[k] for k in range(1, 8)], np.array(parts) / sum(parts) * 3000).pvalue > 1e-3


def test_the_likelier_set_is_the_positive(prop):
    maker, documents = prop
    for seed, document in enumerate(documents):
        model = {word: math.log(value) for word, (value, _) in reference(documents, document).items()}
        pair = maker.draw(" ".join(document), np.random.default_rng(seed))
        (negative,) = pair.negatives
        sides = [text(side).split() for side in (pair.positive, negative)]
        assert len(sides[0]) == len(sides[1])
        assert sum(model[word] for word in sides[0]) > sum(model[word] for word in sides[1])


def test_statistics_are_mapped_and_not_copied_to_workers(prop):
    maker, documents = prop
    encoded = pickle.dumps(maker)
    assert len(encoded) < 1500
    again = pickle.loads(encoded)
    assert isinstance(again._arrays["words"], np.memmap)
    draws = [one.draw(" ".join(documents[3]), np.random.default_rng(5)) for one in (maker, again)]
    assert draws[0] == draws[1]


def test_a_collection_of_rare_words_is_refused(tmp_path):
    write(tmp_path / "d.jsonl", {"text": "a red bus"}, {"text": "a blue train"})
    with pytest.raises(ConfigError, match=r"1 of 5 words occur 2 times in all documents; lower min_count"):
        dataset(tmp_path, path="d.jsonl", pairs={"type": "representative_words", "min_count": 2})
    with pytest.raises(ConfigError, match="'representative_words' \\+ streaming: it counts"):
        RecordStream(SourceConfig(path="d.jsonl", pairs="representative_words", streaming=True), root=tmp_path)


# Rendered text --------------------------------------------------------------------------------------------------------


def ink(picture, box):
    return int((np.asarray(picture.convert("L").crop(box)) < 128).sum())


def test_a_picture_holds_its_words_inside_its_margins():
    """Every word leaves ink, nothing is cut at the right or below, also of a word that is wider than the picture."""
    words = split_words("Retrieval of pictures. " + "x" * 60 + " end")
    for size, width in ((11, 100), (16, 200)):
        picture = render(words, load_font(None, size), size, width, indent=5)
        assert picture.width == width and picture.mode == "RGB"
        pitch = int(1.4 * size)
        lines = (picture.height - 8) // pitch
        assert all(ink(picture, (0, 4 + pitch * line, width, 4 + pitch * (line + 1))) for line in range(lines))
        assert not ink(picture, (width - 3, 0, width, picture.height))
        assert not ink(picture, (0, picture.height - 3, width, picture.height))
    few, many = (render(words[:count], load_font(None, 11), 11, 100) for count in (3, 5))
    assert few.height < many.height


def test_words_without_a_gap_stand_together():
    font = load_font(None, 12)
    apart, together = (render([Word("", "ab"), Word(gap, "cd")], font, 12, 100) for gap in (" ", ""))
    assert np.array_equal(np.asarray(together), np.asarray(render([Word("", "abcd")], font, 12, 100)))
    assert not np.array_equal(np.asarray(apart), np.asarray(together))


def test_views_differ_in_size_and_width_and_show_the_same_words():
    maker = PAIR_MAKERS.build({"type": "rendered_text", "query": "image", "max_words": 6})
    document = " ".join(WORDS)
    shapes = set()
    for seed in range(30):
        pair = maker.draw(document, np.random.default_rng(seed))
        for side in (pair.query, pair.positive):
            (part,) = side
            assert isinstance(part, Image) and isinstance(part.source, PIL.Image.Image)
            assert 160 <= part.source.width <= 256
            shapes.add(part.source.size)
    assert len(shapes) > 30
    read = PAIR_MAKERS.build({"type": "rendered_text", "max_words": 6, "font_size": [12, 12], "width": [200, 200]})
    pair = read.draw(document, np.random.default_rng(0))
    assert len(text(pair.query).split()) == 6 and text(pair.query) in document
    drawn = [
        np.asarray(render(split_words(text(pair.query)), load_font(None, 12), 12, 200, indent)) for indent in range(13)
    ]
    assert any(np.array_equal(np.asarray(pair.positive[0].source), one) for one in drawn)


def test_typos_and_swaps_keep_what_a_reader_needs():
    words = split_words("The forest between bridge and tower is dark")
    generator = np.random.default_rng(3)
    wrong = misspell(words, 1.0, generator)
    for right, found in zip(words, wrong, strict=True):
        assert found.gap == right.gap and sorted(found.text) == sorted(right.text)
        assert (found.text[0], found.text[-1]) == (right.text[0], right.text[-1])
        moved = [at for at, (a, b) in enumerate(zip(right.text, found.text, strict=True)) if a != b]
        assert moved == [] or (len(moved) == 2 and moved[1] == moved[0] + 1 and len(right.text) >= 4)
    moved = [word.text for word in swap(words, 0.3, generator)]
    assert sorted(moved) == sorted(word.text for word in words)
    assert all(abs(moved.index(word.text) - at) <= 1 for at, word in enumerate(words))
    assert misspell(words, 0.0, generator) == swap(words, 0.0, generator) == words


def test_a_script_that_the_font_does_not_have_is_refused(tmp_path):
    write(tmp_path / "d.jsonl", {"text": "Tokyo 東京 is the capital of Japan"}, {"text": "東京は日本の首都である"})
    with pytest.raises(RecordError, match=r"d.jsonl:2: no pair by 'rendered_text': the font shows 0 of 11 words"):
        dataset(tmp_path, path="d.jsonl", pairs="rendered_text")
    data = dataset(tmp_path, on_bad_record="skip", path="d.jsonl", pairs="rendered_text")
    assert len(data) == 1 and data.skipped == {"no glyph": 1}
    assert text(MixedDataset([data])[0, 0, 0].query) == "Tokyo is the capital of Japan"
    with pytest.raises(ConfigError, match=r"pair_makers.rendered_text.font: nowhere.ttf"):
        dataset(tmp_path, path="d.jsonl", pairs={"type": "rendered_text", "font": "nowhere.ttf"})


# Words ----------------------------------------------------------------------------------------------------------------


def test_scripts_without_spaces_are_cut_between_letters():
    assert [word.text for word in split_words("東京 is ที่นี่")] == ["東", "京", "is", "ที่", "นี่"]
    assert join_words(repeat(split_words("東京都"), {0, 2})) == "東東京都都"
    assert terms("  'Quoted', (IN brackets)... 3.5! -- ") == ["quoted", "in", "brackets", "3.5"]
    assert split_sentences("彼は本を読んだ。彼女は寝た。") == ["彼は本を読んだ。", "彼女は寝た。"]
    assert split_sentences("One line here\nand another line\n\nYes.") == ["One line here", "and another line Yes."]
    assert split_sentences("   ") == []


# Sources --------------------------------------------------------------------------------------------------------------


def test_documents_come_from_json_lines_columns_titles_and_paragraphs(tmp_path):
    write(tmp_path / "d.jsonl", {"text": "one two", "title": "T"}, {"text": "three four", "title": ""})
    write(tmp_path / "s.jsonl", {"a": "first", "b": "second"}, {"a": "third", "b": 4})
    (tmp_path / "p.txt").write_text("\nA paragraph\n  of two lines.\n\n\nAnother one.\n", encoding="utf-8")

    def texts(**source):
        data = dataset(tmp_path, pairs="dropout", **source)
        return [(text(data[index].query), data[index].where.rpartition("/")[2]) for index in range(len(data))]

    assert texts(path="d.jsonl") == [("one two", "d.jsonl:1"), ("three four", "d.jsonl:2")]
    assert texts(path="d.jsonl", options={"title": "title"})[0] == ("T one two", "d.jsonl:1")
    assert texts(path="p.txt") == [("A paragraph of two lines.", "p.txt:2"), ("Another one.", "p.txt:6")]
    columns = {"path": "s.jsonl", "options": {"text": ["a", "b"]}}
    assert texts(on_bad_record="skip", **columns) == [
        ("first", "s.jsonl:1"),
        ("second", "s.jsonl:1"),
        ("third", "s.jsonl:2"),
    ]
    with pytest.raises(RecordError, match=r"s.jsonl:2: 'b' is 4. Give a string"):
        texts(**columns)
    with pytest.raises(RecordError, match=r"d.jsonl:1: there is no 'txt'. Did you mean 'text'?"):
        texts(path="d.jsonl", options={"text": "txt"})


def test_the_corpus_of_a_beir_folder_has_to_be_named(tmp_path):
    (tmp_path / "set" / "qrels").mkdir(parents=True)
    write(tmp_path / "set" / "corpus.jsonl", {"_id": "1", "text": "a red bus"})
    with pytest.raises(
        ConfigError, match=r"set: holds queries and judgements; .* format: beir, or name .*corpus.jsonl"
    ):
        dataset(tmp_path, path="set", pairs="dropout")
    assert len(dataset(tmp_path, path="set/corpus.jsonl", pairs="dropout")) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"pairs": "random_crop"}, "there is no 'random_crop'; did you mean 'random_crops'?"),
        ({"pairs": {"type": "dropout", "rate": 0.1}}, "unknown option 'rate'; it takes no options"),
        (
            {"pairs": {"type": "random_crops", "delete": 1.0}},
            "random_crops.delete: found 1.0; input should be less than 1",
        ),
        ({"pairs": {"type": "random_crops", "ratio_min": 0.6}}, "ratio_min 0.6 is above ratio_max 0.5"),
        ({"pairs": {"type": "random_crops", "chunk_length": 6}}, "chunk_length 6 holds no two crops of least_words 4"),
        ({"pairs": {"type": "rendered_text", "width": [300, 200]}}, "width: found [300, 200]; give two numbers"),
        ({"pairs": {"type": "rendered_text", "width": [60, 90]}}, "60 pixels is narrow for a font_size of 16"),
        ({"pairs": "dropout", "format": "beir"}, "format 'beir': its records have queries and documents already"),
        ({"format": "documents"}, "format 'documents' gives raw documents, which have no queries; say how pairs"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(tmp_path, source, message):
    write(tmp_path / "d.jsonl", {"text": "a red bus stands at the old bridge"})
    with pytest.raises(ConfigError) as error:
        dataset(tmp_path, path="d.jsonl", **source)
    assert "data source 'd.jsonl': " in str(error.value) and message in str(error.value)


def test_records_with_queries_are_no_raw_documents(tmp_path):
    write(tmp_path / "r.jsonl", {"query": "q", "documents": [{"content": "d"}]})
    with pytest.raises(ConfigError, match=r"r.jsonl:1: a record with a query and documents.*use format: jsonl"):
        dataset(tmp_path, path="r.jsonl", pairs="random_crops")


def test_pairs_are_not_evaluated_on():
    with pytest.raises(ConfigError, match="data.dev 'd.jsonl': pairs that are made would measure how they are made"):
        build_config({"data": {"dev": [{"path": "d.jsonl", "pairs": "dropout"}]}})


def test_what_a_maker_draws_cannot_be_ignored(tmp_path):
    write(tmp_path / "d.jsonl", {"text": "a red bus"})
    with pytest.raises(ConfigError, match=r"'rendered_text' \+ data.ignore_fields 'image': it draws nothing else"):
        RecordDataset(SourceConfig(path="d.jsonl", pairs="rendered_text"), root=tmp_path, ignored=("image",))


@pytest.mark.parametrize("streaming", [False, True])
def test_short_documents_follow_the_policy(tmp_path, streaming):
    long = "a red bus stands at the old bridge over the river"
    write(tmp_path / "d.jsonl", {"text": long}, {"text": "too short"}, {"text": " "}, {"text": f"{long} too"})

    def read(on_bad_record, path="d.jsonl"):
        source = SourceConfig(path=path, pairs="random_crops", streaming=streaming)
        if streaming:
            return RecordStream(source, on_bad_record=on_bad_record, root=tmp_path)
        return RecordDataset(source, on_bad_record=on_bad_record, cache_dir=tmp_path / "c", root=tmp_path)

    with pytest.raises(RecordError, match=r"d.jsonl:2: no pair by 'random_crops': 2 words, it takes 8. To go on"):
        read("raise")
    data = read("skip")
    assert {text(data[row].query) for row in (0, 1)} == {long, f"{long} too"}
    assert data.skipped == {"too short": 1, "empty text": 1}
    write(tmp_path / "short.jsonl", {"text": "one"}, {"text": "two"})
    with pytest.raises(ConfigError, match=r"short.jsonl: no usable record \({'too short': 2}\)"):
        read("skip", "short.jsonl")


def test_a_source_says_what_its_pairs_carry(tmp_path):
    write(tmp_path / "d.jsonl", *({"text": "a red bus at the old red bridge"} for _ in range(5)))
    plain = dataset(tmp_path, path="d.jsonl", pairs="word_repetition", instruction="find")
    assert plain.fields == {"instruction"} and plain.grades.as_list() == [1.0, 1.0, 1]
    words = dataset(tmp_path, path="d.jsonl", pairs={"type": "representative_words", "min_count": 1})
    assert words.fields == {"negatives"} and words.grades.as_list() == [0.0, 1.0, 2]
    assert dataset(tmp_path, path="d.jsonl", pairs="rendered_text").fields == {"image"}
    example = MixedDataset([plain])[0, 2, 4]
    assert (example.instruction, example.visit, example.source) == ("find", 4, "d.jsonl")
    assert isinstance(example, Example) and [document.relevance for document in example.documents] == [1.0]
    assert (plain.keys()[:, 0] == plain.keys()[0, 0]).all()  # equal documents are kept out of one batch


def test_another_maker_or_option_reads_the_source_again(tmp_path):
    """The options decide which documents are usable, so a cache of others' would be wrong."""
    write(tmp_path / "d.jsonl", {"text": "a red bus stands at the bridge"}, {"text": "red bus " * 9})
    maker = {"type": "random_crops", "least_words": 3}
    assert len(dataset(tmp_path, path="d.jsonl", pairs=maker)) == 2
    data = dataset(tmp_path, on_bad_record="skip", path="d.jsonl", pairs={**maker, "least_words": 9})
    assert len(data) == 1 and data.skipped == {"too short": 1}
