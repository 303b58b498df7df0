"""The local benchmark: mteb's numbers against our own metrics, BM25 against loops and known numbers, the command."""

import io
import json
import math
from collections import Counter
from pathlib import Path

import mteb
import numpy as np
import PIL.Image
import pyarrow.parquet
import pytest

from eval import run
from eval.baselines import BM25, MiniLM
from eval.files import read_jsonl
from eval.models import Loaded
from eval.mteb_adapter import Instructions, MtebEncoder, contents_of
from eval.mteb_tasks import build_task
from eval.scoring import score
from eval.tasks.local import LANGUAGES, ROWS, available, select
from mmembed import metrics
from mmembed.content import Image, Text
from mmembed.data.words import search_words
from mmembed.errors import ConfigError

DATA = Path(__file__).resolve().parents[2] / "data"


class Trigrams:
    """A real, if modest, encoder: hashed character trigrams of texts, thumbnails of pictures. Notes what it is told."""

    def __init__(self):
        self.calls = []

    def encode(self, contents, *, role, instruction):
        self.calls.append((role, instruction, contents))
        vectors = np.full((len(contents), 548), 1e-3, dtype=np.float32)
        for row, content in enumerate(contents):
            for part in content:
                if isinstance(part, Text):
                    text = f"  {part.text}"
                    for start in range(len(text) - 2):
                        code = sum(ord(letter) * 31**power for power, letter in enumerate(text[start : start + 3]))
                        vectors[row, code % 500] += 1
                elif isinstance(part, Image):
                    small = np.asarray(part.source.convert("RGB").resize((4, 4)), dtype=np.float32)
                    vectors[row, 500:548] = small.ravel() / 128 - 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def similarity(self, a, b):
        return a @ b.T


class Rounded(MtebEncoder):
    """Scores of three decimals: candidates tie, and the order of ties must be trec_eval's on both sides.

    Only in pools: a search of mteb keeps an arbitrary one of the documents that tie at its cut.
    """

    def similarity(self, a, b):
        return super().similarity(a, b).round(decimals=3)


def row(name):
    return select(ROWS, [name])[0]


def evaluate(model, name):
    """(mteb's scores, the task with its data) of one local task on the slice."""
    task = build_task(row(name), DATA, "dev")
    task.load_data()
    outcome = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False,
                            encode_kwargs={"batch_size": 64, "show_progress_bar": False})  # fmt: skip
    return outcome.task_results[0].scores["dev"][0], task


def encoder():
    trigrams = Trigrams()
    return trigrams, MtebEncoder(trigrams, "trigrams", modalities=["text", "image"])


@pytest.mark.parametrize("name", ["xquad/de", "vega-charts", "recipes", "recipes/photo", "dbpedia-entity/judged"])
def test_mteb_gives_the_numbers_of_our_metrics(name):
    trigrams, judged_pool = Trigrams(), name.endswith("judged")
    model = (Rounded if judged_pool else MtebEncoder)(trigrams, "trigrams", modalities=["text", "image"])
    scores, task = evaluate(model, name)
    data = task.dataset["default"]["dev"]
    (query_role, _, queries), *blocks = trigrams.calls
    assert query_role == "query" and {role for role, _, _ in blocks} == {"document"}
    documents = [content for _, _, contents in blocks for content in contents]
    vectors = [trigrams.encode(side, role="query", instruction=None) for side in (queries, documents)]
    similarity = np.round(vectors[0] @ vectors[1].T, 3 if judged_pool else 9)  # (Q, N)
    ids = list(data["corpus"]["id"])
    order = np.argsort(ids)[::-1]  # trec_eval's order of ties
    relevance = np.array([[data["relevant_docs"][query].get(key, 0) for key in ids] for query in data["queries"]["id"]])
    valid = None
    if data["top_ranked"]:
        valid = np.array([[key in data["top_ranked"][query] for key in ids] for query in data["queries"]["id"]])[
            :, order
        ]
    ranked, judged = metrics.rank_by_score(similarity[:, order], relevance[:, order], valid)
    ours = metrics.retrieval_metrics(ranked, judged, ks=(1, 10, 100))
    for key in ("ndcg_at_10", "recall_at_10", "map_at_10", "mrr_at_10", "hit_rate_at_1", "recall_at_100"):
        assert scores[key] == pytest.approx(ours[key], abs=2e-4), key
    exponential = metrics.ndcg_at_k(ranked, judged, 10, gain="exponential").mean()
    assert scores["ndcg_exp_at_10"] == pytest.approx(exponential, abs=2e-4)


def test_sides_modalities_and_instructions_reach_the_model():
    trigrams, model = encoder()
    evaluate(model, "recipes")
    (role, instruction, queries), (_, nothing, first), (_, _, rest) = trigrams.calls
    documents = [*first, *rest]  # pictures come in blocks of 256
    assert (role, instruction, nothing) == ("query", row("recipes").instruction, None)
    assert all(len(content) == 1 and isinstance(content[0], Text) for content in queries)
    kinds = Counter(tuple(type(part).__name__ for part in content) for content in documents)
    assert kinds == {("Image", "Text"): 90, ("Text",): 184}  # the README of the set counts 90 pictures on 274 recipes

    trigrams, model = encoder()
    evaluate(model, "openstax-figures/image-to-text")
    (_, _, pictures), (_, _, texts) = trigrams.calls
    assert len(pictures) == 110 and all(isinstance(content[0], Image) for content in pictures)
    captions = [query for query in read_jsonl(DATA / "openstax-figures/queries.jsonl") if query["kind"] == "caption"]
    assert len(texts) == len(captions) and all(isinstance(content[0], Text) for content in texts)

    trigrams, model = encoder()
    evaluate(model, "stsb-en")
    assert [role for role, _, _ in trigrams.calls] == ["query", "query"]


def test_a_query_brings_the_picture_of_its_document_which_comes_without():
    trigrams, model = encoder()
    evaluate(model, "recipes/photo-and-intro")
    (_, instruction, queries), (_, _, documents) = trigrams.calls
    assert instruction == row("recipes/photo-and-intro").instruction
    assert len(queries) == 16 and len(documents) == 274
    assert all([type(part) for part in content] == [Image, Text] for content in queries)
    assert all([type(part) for part in content] == [Text] for content in documents)

    task = build_task(row("openstax-figures/picture-and-caption"), DATA, "dev")
    task.load_data()
    data = task.dataset["default"]["dev"]
    corpus = {line["_id"]: line for line in read_jsonl(DATA / "openstax-figures/corpus.jsonl")}
    shown = {line["image_id"]: line for line in _images("openstax-figures")}
    assert len(data["queries"]) == 110 and data["corpus"].column_names == ["id", "text"]
    for one in data["queries"].select(range(3)):
        (own,) = data["relevant_docs"][one["id"]]
        expected = PIL.Image.open(io.BytesIO(shown[corpus[own]["image"]]["image"]["bytes"]))
        assert one["image"].tobytes() == expected.tobytes()
        (alt,) = [line["text"] for line in data["corpus"] if line["id"] == own]
        assert alt == shown[corpus[own]["image"]]["alt"]


def _images(folder):
    return pyarrow.parquet.read_table(DATA / folder / "images.parquet").to_pylist()


def test_a_blank_text_of_a_task_is_a_content_that_can_be_encoded():
    """mteb wants as many vectors as documents; Embedder.encode refuses blank texts."""
    image = PIL.Image.new("RGB", (8, 8))
    assert contents_of({"text": [" ", "a "]}) == [(Text("."),), (Text("a "),)]
    assert contents_of({"text": ["\n"], "image": [image]}) == [(Image(image),)]


def test_sentence_pairs_equal_our_spearman():
    trigrams, model = encoder()
    scores, task = evaluate(model, "stsb-en")
    left, right = (trigrams.encode(contents, role="query", instruction=None) for _, _, contents in trigrams.calls[:2])
    assert scores["cosine_spearman"] == pytest.approx(
        metrics.spearman((left * right).sum(1), task.dataset["dev"]["score"]), abs=1e-4
    )


def test_classification_takes_the_whole_training_part():
    from sklearn.linear_model import LogisticRegression

    trigrams, model = encoder()
    scores, task = evaluate(model, "clothing")
    train, dev = (
        trigrams.encode([(Image(picture),) for picture in task.dataset[split]["image"]], role="query", instruction=None)
        for split in ("train", "dev")
    )
    probe = LogisticRegression(max_iter=100, random_state=42).fit(train, task.dataset["train"]["label"])
    assert scores["accuracy"] == pytest.approx(probe.score(dev, task.dataset["dev"]["label"]), abs=0.01)
    assert scores["accuracy"] > 0.15  # ten classes


def test_clustering_and_bitext_run(tmp_path):
    """sib200 is not in the slice: a few sentences in its layout."""
    folder = tmp_path / "sib200"
    folder.mkdir()
    lines = [{"_id": f"{lang}-{i}", "lang": lang, "index": i, "label": ("a", "b")[i % 2], "text": f"{word} {i}"}
             for lang in ("de", "en") for i, word in enumerate(["hund katze maus", "zug bus bahn"] * 10)]  # fmt: skip
    for split in ("train", "dev"):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (folder / "labels.json").write_text('["a", "b"]')
    options = run.parse(["--model", "bm25", "--data-root", str(tmp_path)])
    for name, expected in (("sib200-clustering/de", 0.9), ("sib200-bitext/de-en", 0.9), ("sib200/de", 0.9)):
        task = build_task(row(name), options.data_root, options.split)
        task.load_data()
        loaded = Loaded("trigrams", encoder()[1], {}, lambda _: None)
        assert score(loaded, task, row(name), split="dev").numbers["main"] >= expected, name


def test_bm25_equals_its_equation_written_as_loops():
    """Lucene's BM25 (k1 1.2, b .75) on the German passages; and the numbers that the data came with."""
    corpus = list(read_jsonl(DATA / "xquad/de/corpus.jsonl"))
    queries = list(read_jsonl(DATA / "xquad/de/queries.jsonl"))[:20]
    texts = [search_words(document["text"]) for document in corpus]
    counts = [Counter(text) for text in texts]
    mean = sum(map(len, texts)) / len(texts)
    frequency = Counter(token for count in counts for token in count)
    bm25 = BM25()
    bm25.index({"id": [document["_id"] for document in corpus], "text": [document["text"] for document in corpus]})
    found = bm25.search(
        {"id": [query["_id"] for query in queries], "text": [query["text"] for query in queries]}, top_k=180
    )
    for query in queries:
        for document, count, text in zip(corpus, counts, texts, strict=True):
            expected = 0.0
            for token in search_words(query["text"]):
                if token in count:
                    idf = math.log(1 + (len(corpus) - frequency[token] + 0.5) / (frequency[token] + 0.5))
                    length = 1.2 * (1 - 0.75 + 0.75 * len(text) / mean)
                    expected += idf * count[token] / (count[token] + length)
            assert found[query["_id"]].get(document["_id"], 0.0) == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("squad-en", 0.841), ("xquad/de", 0.890), ("xquad/zh", 0.965), ("mbpp", 0.082), ("odex", 0.688),
     ("noto-emoji/keywords-to-name", 0.713), ("recipes/intro-to-text", 0.479)],
)  # fmt: skip
def test_bm25_gives_the_numbers_that_came_with_the_data(name, expected):
    assert evaluate(BM25(), name)[0]["ndcg_at_10"] == pytest.approx(expected, abs=0.01)


def test_minilm_gives_the_numbers_that_came_with_the_data():
    scores, _ = evaluate(MtebEncoder(MiniLM(), "minilm", modalities=["text"]), "noto-emoji/keywords-to-name")
    assert scores["ndcg_at_10"] == pytest.approx(0.762, abs=0.01)


def test_words_of_spaced_and_unspaced_scripts():
    assert search_words("Der rote Bus, 2 Türen!") == ["der", "rote", "bus", "2", "türen"]
    assert search_words("東京タワー tower 五") == ["東京", "京タ", "タワ", "ワー", "tower", "五"]


def test_command_writes_results_with_provenance(tmp_path, capsys):
    output, rankings = tmp_path / "results.json", tmp_path / "rankings"
    assert (
        run.main(["--model", "bm25", "--tasks", "mbpp", "vega*", "--output", str(output), "--rankings", str(rankings)])
        == 0
    )
    results = json.loads(output.read_text())
    mbpp = results["tasks"]["mbpp"]
    assert mbpp["documents"] == 470 and mbpp["queries"] == 90 and len(mbpp["fingerprint"]) == 16
    assert mbpp["scores"]["bm25"]["main"] == mbpp["scores"]["bm25"]["ndcg_at_10"]
    assert results["tasks"]["vega-charts"]["scores"]["bm25"] is None  # it sees no pictures; that is no zero
    assert results["averages"]["image retrieval"]["bm25"] is None
    assert results["models"]["bm25"]["k1"] == 1.2 and results["versions"]["mteb"].startswith("2.")
    kept = json.loads((rankings / "bm25.json").read_text())["mbpp"]
    for query in kept.values():
        found, scores = zip(*query["top"], strict=True)
        assert len(scores) <= 10 and list(scores) == sorted(scores, reverse=True) and query["text"]
        first = next((place for place, key in enumerate(found, start=1) if key in query["relevant"]), None)
        assert first == query["rank"] or (first is None and (query["rank"] or 11) > 10)
    printed = capsys.readouterr().out
    assert "mbpp" in printed and f"{mbpp['scores']['bm25']['main']:.3f}" in printed


@pytest.mark.parametrize(
    ("flags", "tasks", "expected"),
    [
        (["x"], ["mbpp", "vega-charts"], ["bm25", "minilm"]),
        (["x"], ["stsb-en"], ["minilm"]),
        (["x"], ["vega-charts"], []),
        (["x", "minilm"], ["mbpp"], ["bm25"]),
        (["x", "--no-baselines"], ["mbpp"], []),
        (["minilm"], ["mbpp"], []),
    ],
)
def test_baselines_stand_beside_a_model(flags, tasks, expected):
    options = run.parse(["--model", *flags])
    assert run.usual_baselines(options, select(ROWS, tasks)) == expected


def test_baselines_cannot_be_left_out_and_named(capsys):
    assert run.main(["--model", "bm25", "--no-baselines", "--tasks", "mbpp"]) == 2
    assert "--no-baselines: no effect where only bm25" in capsys.readouterr().err


def test_a_second_evaluation_reads_the_features_of_the_first(tmp_path):
    """Same scores, and nothing is added to the store."""
    numbers, sizes = [], []
    for turn in range(2):
        output, cache = tmp_path / f"{turn}.json", tmp_path / "cache"
        command = ["--model", "mmembed-nano", "--tasks", "vega-charts", "--output", str(output), "--dtype", "float32"]
        assert run.main([*command, "--vision-cache", str(cache), "--no-baselines"]) == 0
        numbers.append(json.loads(output.read_text())["tasks"]["vega-charts"]["scores"]["mmembed-nano"]["main"])
        sizes.append(sum(file.stat().st_size for file in cache.glob("*/*.features")))
    assert numbers[0] == numbers[1] and sizes[0] == sizes[1] > 0


def test_unknown_names_suggest_the_nearest(capsys, tmp_path):
    for arguments, hint in (
        (["--model", "bm52", "--tasks", "mbpp"], "did you mean 'bm25'?"),
        (["--model", "bm25", "--tasks", "squad-enn"], "did you mean 'squad-en'?"),
        (["--model", "bm25", "--tasks", "jaquad-ja"], "not under the data root"),
        (["--model", "bm25", "--tasks", "mbpp", "--split", "test"], "dev, train"),
        (["--model", "bm25", "--data-root", str(tmp_path)], "no folder of the local benchmark"),
    ):
        assert run.main(arguments) == 2
        assert hint in capsys.readouterr().err


def test_instructions_come_from_the_task_or_the_users_file(tmp_path):
    file = tmp_path / "instructions.yaml"
    file.write_text("'xquad/*': Find the passage\nmbpp: {query: Find code, document: Code}\nstsb-en: null\n")
    names = [row.name for row in ROWS]
    instructions = Instructions.read(file, names)
    query, document = mteb.types.PromptType.query, mteb.types.PromptType.document

    def find(name, side):
        return instructions.find(build_task(row(name), DATA, "dev").metadata, side)

    assert find("xquad/de", query) == "Find the passage" and find("xquad/de", document) is None
    assert find("mbpp", query) == "Find code" and find("mbpp", document) == "Code"
    assert find("stsb-en", None) is None
    assert find("odex", query) == row("odex").instruction and find("odex", document) is None
    instructions = Instructions.read(file, names, use_tasks=False)
    assert find("odex", query) is None and find("mbpp", query) == "Find code"
    file.write_text("sqaud-en: x\n")
    with pytest.raises(ConfigError, match="squad-en"):
        Instructions.read(file, names)


def test_every_row_of_the_slice_builds():
    rows = available(DATA)
    assert len(rows) > 15 and len({row.name for row in ROWS}) == len(ROWS)
    assert all(set(row.languages) <= set(LANGUAGES) for row in ROWS)
    for one in rows:
        if not one.where.get("lang") or (DATA / one.folder).name == "xquad":
            assert build_task(one, DATA, "dev").metadata.main_score == one.main_score


def test_multi_vector_models_rank_by_late_interaction_and_are_spared_the_rest(family_folder, tmp_path):
    from families import build

    from mmembed.inference.embedder import Embedder

    folder = tmp_path / "multi"
    Embedder(*build(family_folder("qwen3_vl"), pooling="multi_vector")).save(folder)
    output = tmp_path / "results.json"
    assert run.main(["--model", str(folder), "--tasks", "vega-charts", "stsb-en", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    scores = {name: entry["scores"][str(folder)] for name, entry in results["tasks"].items()}
    assert scores["stsb-en"] is None and results["models"][str(folder)]["multi_vector"]
    assert list(results["models"]) == [str(folder), "minilm"]  # BM25 can do neither of these
    assert results["tasks"]["stsb-en"]["scores"]["minilm"]["main"] > 0.8
    task = build_task(row("vega-charts"), DATA, "dev")
    task.load_data()
    data, embedder = task.dataset["default"]["dev"], Embedder.from_pretrained(folder)
    queries = embedder.encode(data["queries"]["text"], role="query")
    documents = embedder.encode(list(data["corpus"]["image"]))
    relevance = [
        [data["relevant_docs"][query].get(key, 0) for key in data["corpus"]["id"]] for query in data["queries"]["id"]
    ]
    ranked, judged = metrics.rank_by_score(embedder.similarity(queries, documents), relevance)
    assert scores["vega-charts"]["ndcg_at_10"] == pytest.approx(metrics.ndcg_at_k(ranked, judged, 10).mean(), abs=1e-3)
