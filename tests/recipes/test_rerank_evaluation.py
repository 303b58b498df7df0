"""Rerankers in `eval.run` and `eval.rerank`, judged by trec_eval, scikit-learn and `Reranker.score`."""

import json
from itertools import pairwise
from pathlib import Path

import datasets
import mteb
import numpy as np
import pytest
import pytrec_eval
from families import picture
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from eval import mteb_adapter, rerank, run
from eval.baselines import BM25
from eval.mteb_tasks import build_task
from eval.tasks import mrb
from eval.tasks.local import ROWS, select
from mmembed import ListwiseReranker, Reranker
from mmembed.charts import reliability
from mmembed.models.checkpoint import save_checkpoint
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module")
def judge(reranker):
    return Reranker.from_pretrained(reranker, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    """Three sets of the slice, of which few queries are kept: graded pools, texts, pictures."""
    root = tmp_path_factory.mktemp("data")
    for name, queries in (("dbpedia-entity", 6), ("mbpp", 12), ("vega-charts", 5)):
        folder = root / name
        (folder / "qrels").mkdir(parents=True)
        for file in (DATA / name).glob("*"):
            if file.is_file():
                (folder / file.name).symlink_to(file)
        head, *rows = (DATA / name / "qrels/dev.tsv").read_text().splitlines()
        kept = sorted({row.split("\t")[0] for row in rows})[:queries]
        rows = [row for row in rows if row.split("\t")[0] in kept]
        if name == "dbpedia-entity":  # a dozen candidates a query
            rows = [row for query in kept for row in [one for one in rows if one.startswith(query + "\t")][:12]]
        (folder / "qrels/dev.tsv").write_text("\n".join([head, *rows]) + "\n")
    return root


def loaded(name, root):
    task = build_task(select(ROWS, [name])[0], root, "dev")
    task.load_data()
    return task.dataset["default"]["dev"]


def contents(table):
    """id -> content, of a table of documents or queries; mteb strips texts."""
    return {row["id"]: row["image"] if "image" in row else row["text"].strip() for row in table}


def scored(judge, name, root, candidates):
    """query -> document -> logit, by the public interface, pair by pair."""
    data = loaded(name, root)
    queries, documents = contents(data["queries"]), contents(data["corpus"])
    told = select(ROWS, [name])[0].instruction
    pairs = [(query, document) for query, found in candidates.items() for document in found]
    contents_of = [(queries[query], documents[document]) for query, document in pairs]
    logits = judge.score(
        contents_of, instruction=told, scale="logit", token_budget=8192
    )  # eval's batches: no near-ties
    result = {query: {} for query in candidates}
    for (query, document), logit in zip(pairs, logits, strict=True):
        result[query][document] = float(logit)
    return result, data["relevant_docs"]


def trec(found, qrels):
    """Means of trec_eval's numbers."""
    evaluator = pytrec_eval.RelevanceEvaluator(
        {query: dict(judged) for query, judged in qrels.items()}, {"ndcg_cut.10", "recip_rank", "map", "P.1"}
    )
    rows = evaluator.evaluate({query: found.get(query) or {"none": 0.0} for query in qrels})
    keys = {"ndcg_at_10": "ndcg_cut_10", "mrr": "recip_rank", "map": "map", "p_at_1": "P_1"}
    return {name: np.mean([row[key] for row in rows.values()]) for name, key in keys.items()}


def test_eval_run_takes_a_reranker(reranker, judge, data_root, tmp_path, capsys):
    output, name = tmp_path / "results.json", str(reranker)
    tasks = ["dbpedia-entity/judged", "mbpp", "vega-charts"]
    command = ["--model", name, "--dtype", "float32", "--data-root", str(data_root), "--output", str(output)]
    assert run.main([*command, "--no-baselines", "--tasks", *tasks]) == 0
    results = json.loads(output.read_text())
    assert results["models"][name]["kind"] == "reranker" and results["models"][name]["head"] == "yes_no"
    scores = {task: entry["scores"][name] for task, entry in results["tasks"].items()}
    assert scores["mbpp"] is None and scores["vega-charts"] is None, "nothing was found that could be ordered"
    assert "rerankers leave retrieval tasks out: give what finds their documents" in capsys.readouterr().err
    pool = loaded("dbpedia-entity/judged", data_root)["relevant_docs"]
    expected = trec(*scored(judge, "dbpedia-entity/judged", data_root, pool))
    for key, other in (("ndcg_at_10", "ndcg_at_10"), ("map_at_1000", "map")):
        assert scores["dbpedia-entity/judged"][key] == pytest.approx(expected[other], abs=2e-4)


def test_a_reranker_stands_behind_each_model(reranker, backbone, judge, data_root, tmp_path, capsys):
    """The best five documents of each first stage in the reranker's order, as trec_eval scores them."""
    output, html = tmp_path / "results.json", tmp_path / "page.html"
    tasks = ["dbpedia-entity/judged", "mbpp", "vega-charts"]
    command = ["--model", "bm25", str(backbone), "--rerank", str(reranker), "--depth", "5", "--dtype", "float32"]
    files = ["--data-root", str(data_root), "--output", str(output), "--html", str(html)]
    assert run.main([*command, "--no-baselines", "--tasks", *tasks, *files]) == 0
    results = json.loads(output.read_text())
    names = [f"{first} > {reranker}" for first in ("bm25", str(backbone))]
    assert list(results["models"]) == ["bm25", names[0], str(backbone), names[1]]
    stage = results["models"][names[0]]["first_stage"]
    assert (stage["name"], stage["depth"], stage["k1"]) == ("bm25", 5, 1.2)
    scores = {task: entry["scores"] for task, entry in results["tasks"].items()}
    assert scores["vega-charts"]["bm25"] is scores["vega-charts"][names[0]] is None
    assert scores["vega-charts"][names[1]] is not None, "the embedder sees what BM25 does not"
    for first, both in zip(("bm25", str(backbone)), names, strict=True):
        mbpp = scores["mbpp"]
        assert mbpp[first]["recall_at_5"] == mbpp[both]["recall_at_5"] == mbpp[both]["recall_at_100"]
    corpus = loaded("mbpp", data_root)
    bm25 = BM25()
    bm25.index(corpus["corpus"])
    found = bm25.search(corpus["queries"], top_k=5)
    logits, qrels = scored(judge, "mbpp", data_root, found)
    assert scores["mbpp"][names[0]]["ndcg_at_10"] == pytest.approx(trec(logits, qrels)["ndcg_at_10"], abs=1e-4)
    said = capsys.readouterr().out
    assert f"to compute with {names[0]}: " in said and " pairs of 2 tasks" in said
    assert "orders the first 5 documents of bm25" in html.read_text()


@pytest.fixture(scope="module")
def report(reranker, data_root, tmp_path_factory):
    """Folder of a finished evaluation."""
    folder = tmp_path_factory.mktemp("rerank")
    command = ["--model", str(reranker), "--dtype", "float32", "--data-root", str(data_root), "--output", str(folder)]
    assert rerank.main([*command, "--first-stage", "bm25", "--depth", "7"]) == 0
    return folder


def test_numbers_are_those_of_trec_eval_and_scikit_learn(reranker, judge, data_root, report):
    results = json.loads((report / "results.json").read_text())
    candidates = json.loads((report / "candidates.json").read_text())
    assert set(results["tasks"]) == {"dbpedia-entity", "dbpedia-entity/judged", "mbpp"}
    assert results["left_out"] == {"vega-charts": "no candidates of bm25"}
    for name, entry in results["tasks"].items():
        found = candidates["tasks"][name]["found"]
        assert max(map(len, found.values())) == 7 and entry["pairs"] == sum(map(len, found.values()))
        assert entry["graded"] == name.startswith("dbpedia")
        logits, qrels = scored(judge, name, data_root, found)
        score = entry["scores"][str(reranker)]
        for stage, ranking in (("first_stage", found), (None, logits)):
            ours = entry["first_stage"] if stage else score
            for key, value in trec(ranking, qrels).items():
                assert ours[key] == pytest.approx(value, abs=2e-4), (name, stage, key)
        labels = np.array([qrels[query].get(key, 0) > 0 for query, own in logits.items() for key in own])
        values = np.array([logit for own in logits.values() for logit in own.values()])
        assert score["auc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-4)
        probabilities = 1 / (1 + np.exp(-values))
        relevant, mean = calibration_curve(labels, probabilities, n_bins=10)
        kept = [one for one in score["bins"] if one[0]]
        np.testing.assert_allclose([one[1:] for one in kept], np.stack([mean, relevant], 1), atol=1e-4)
        counts = np.array([one[0] for one in kept])
        assert score["ece"] == pytest.approx((np.abs(relevant - mean) * counts).sum() / len(labels), abs=1e-4)
        ideal = {query: {key: qrels[query].get(key, 0) for key in own} for query, own in found.items()}
        assert entry["ceiling"] == pytest.approx(trec(ideal, qrels)["ndcg_at_10"], abs=1e-4)
        assert score["gain"] == pytest.approx(score["ndcg_at_10"] - entry["first_stage"]["ndcg_at_10"], abs=2e-5)
        assert score["gain_low"] <= score["gain"] <= score["gain_high"]


def test_table_and_page_hold_the_numbers(reranker, report):
    results = json.loads((report / "results.json").read_text())
    table, page = (report / "table.md").read_text(), (report / "report.html").read_text()
    for name, entry in results["tasks"].items():
        score = entry["scores"][str(reranker)]
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} | {Path(reranker).name} |")]
        assert [cell.strip() for cell in line.split("|")][3:9] == [
            f"{score[key]:.3f}" for key in ("ndcg_at_10", "mrr", "map", "p_at_1", "auc", "ece")
        ]
        assert f"{score['ece']:.3f}" in page and name in page
    assert (
        "average, text retrieval" in table
        and "<svg" in page
        and "vega-charts is left out: no candidates of bm25" in page
    )
    assert "http" not in page.replace("http://www.w3.org", ""), "nothing is fetched"


def test_candidates_of_an_earlier_run_are_the_same_for_another_reranker(reranker, data_root, report, tmp_path, capsys):
    kept = report / "candidates.json"
    command = ["--model", str(reranker), "--dtype", "float32", "--data-root", str(data_root), "--output", str(tmp_path)]
    assert rerank.main([*command, "--first-stage", str(kept), "--depth", "7", "--tasks", "mbpp"]) == 0
    first, again = (json.loads((folder / "results.json").read_text()) for folder in (report, tmp_path))
    assert again["first_stage"]["name"] == "bm25"
    for stage in ("first_stage", "ceiling", "pairs"):
        assert again["tasks"]["mbpp"][stage] == first["tasks"]["mbpp"][stage]
    capsys.readouterr()
    for flags, message in (
        (["--depth", "8", "--tasks", "mbpp"], "--depth: found 8, and"),
        (["--depth", "5", "--tasks", "vega-charts"], "holds no candidates of vega-charts"),
    ):
        assert rerank.main([*command, "--first-stage", str(kept), *flags]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert rerank.main([*command, "--first-stage", str(tmp_path / "other.json")]) == 2
    assert "no candidates of an earlier run" in capsys.readouterr().err


def test_pictures_are_found_by_an_embedder_and_reranked(backbone, reranker, judge, data_root, tmp_path):
    command = ["--model", str(reranker), "--dtype", "float32", "--data-root", str(data_root), "--output", str(tmp_path)]
    flags = ["--first-stage", str(backbone), "--depth", "6", "--tasks", "vega-charts", "--max-queries", "3"]
    assert rerank.main([*command, *flags]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found = json.loads((tmp_path / "candidates.json").read_text())["tasks"]["vega-charts"]["found"]
    assert len(found) == results["tasks"]["vega-charts"]["queries"] == 3
    logits, qrels = scored(judge, "vega-charts", data_root, found)
    expected = trec(logits, {query: qrels[query] for query in found})
    assert results["tasks"]["vega-charts"]["scores"][str(reranker)]["mrr"] == pytest.approx(expected["mrr"], abs=2e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "{backbone}"], "no reranker; train one with recipes/train_reranker.py"),
        (["--model", "nowhere"], "nowhere: not there"),
        (["--model", "{reranker}", "--first-stage", "{reranker}"], "is a reranker and finds nothing"),
        (["--model", "{reranker}", "--first-stage", "bm52"], "did you mean 'bm25'?"),
        (["--model", "{reranker}", "--depth", "0"], "--depth: found 0"),
        (["--model", "{reranker}", "--tasks", "stsb-en"], "'stsb-en' has nothing to rank"),
        (["--model", "{reranker}", "--tasks", "mbp"], "did you mean 'mbpp'?"),
        (["--model", "{reranker}", "--mrb-sets", "hub"], "--mrb-sets: no effect without --benchmark mrb"),
        (["--model", "{reranker}", "--benchmark", "mrb", "--tasks", "mbpp"], "--tasks: no effect on mrb"),
        (["--model", "{reranker}", "--truncate-dim", "8"], "--truncate-dim: acts on embedders, and none is named"),
    ],
)
def test_refusals_of_the_evaluation(backbone, reranker, capsys, flags, message):
    assert rerank.main([one.format(backbone=backbone, reranker=reranker) for one in flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "bm25", "--rerank", "bm25"], "--rerank: 'bm25' is no reranker"),
        (["--model", "bm25", "--rerank", "judg"], "--rerank judg: neither a folder nor a known name"),
        (["--model", "{reranker}", "--depth", "5"], "--depth: no effect without --rerank"),
        (["--model", "bm25", "--rerank", "{reranker}", "--depth", "0"], "--depth: found 0"),
        (["--model", "{reranker}", "--rerank", "{reranker}"], "--rerank: no model here finds what it orders"),
        (["--model", "{reranker}", "--layers", "1"], "--layers: acts on embedders, and none is named"),
    ],
)
def test_refusals_of_eval_run(reranker, capsys, flags, message):
    assert run.main([*(one.format(reranker=reranker) for one in flags), "--tasks", "mbpp"]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def listwise(tmp_path, backbone):
    """Folder of a reranker that writes orders, hardly trained."""
    pytest.importorskip("trl")
    from recipes.train_generative_reranker import main

    documents = [{"content": "a bus"}, {"content": "a dog", "relevance": 0}]
    rows = [{"query": f"bus {n}", "documents": documents} for n in range(4)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model: {{name_or_path: {backbone}, dtype: float32}}
answer: {{type: listwise, documents: 2}}
adapter: {{type: lora, r: 2, alpha: 4}}
lengths: {{query_max_length: 40, document_max_length: 40}}
data: {{root: {tmp_path}, train: [{{path: lists.jsonl}}]}}
training: {{output_dir: {tmp_path / "listwise"}, max_steps: 1, per_device_train_batch_size: 2, save_strategy: "no",
           gradient_checkpointing: false, disable_tqdm: true}}
"""
    )
    assert main(["--config", str(config)]) == 0
    return tmp_path / "listwise"


def test_rerankers_of_lists_stand_beside_those_of_pairs(reranker, listwise, backbone, data_root, tmp_path):
    head = {"type": "attention", "layer": 2, "offset": 512}
    settings = EmbedderSettings(str(backbone), dtype="float32", head=head, prompt={"type": "in_context"})
    in_context = tmp_path / "in_context"
    save_checkpoint(in_context, *build_from_settings(settings))
    models = [str(reranker), str(in_context), str(listwise)]
    command = ["--model", *models, "--dtype", "float32", "--data-root", str(data_root), "--output", str(tmp_path)]
    assert rerank.main([*command, "--depth", "4", "--max-queries", "4", "--tasks", "dbpedia-entity/judged"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    task = "dbpedia-entity/judged"
    found = json.loads((tmp_path / "candidates.json").read_text())["tasks"][task]["found"]
    scores = results["tasks"][task]["scores"]
    told = select(ROWS, [task])[0].instruction

    data = loaded(task, data_root)
    queries, documents, qrels = contents(data["queries"]), contents(data["corpus"]), data["relevant_docs"]
    shares, orders = Reranker.from_pretrained(in_context, device="cpu"), ListwiseReranker.from_pretrained(listwise)
    runs = {name: {} for name in models[1:]}
    for query, own in found.items():
        texts, keys = [documents[key] for key in own], list(own)
        given = shares.score([(queries[query], text) for text in texts], instruction=told)
        runs[str(in_context)][query] = dict(zip(keys, map(float, given), strict=True))
        places = orders.rank(queries[query], texts, instruction=told)
        runs[str(listwise)][query] = {keys[place]: -float(at) for at, place in enumerate(places)}
    for name, ranking in runs.items():
        for key, value in trec(ranking, {query: qrels[query] for query in found}).items():
            assert scores[name][key] == pytest.approx(value, abs=2e-4), (name, key)
        assert scores[name]["ece"] is None
    assert scores[str(listwise)]["auc"] is None and scores[str(in_context)]["auc"] is not None
    assert (tmp_path / "report.html").read_text().count("over 16 pairs") == 1, "one has probabilities"


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_blocks_of_pairs_keep_a_query_whole(size, monkeypatch):
    monkeypatch.setattr(mteb_adapter, "PAIRS_AT_ONCE", 3)
    pairs = [(f"q{query}", f"d{document}") for query, count in enumerate([2, 5, 1, 1, 3]) for document in range(count)]
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    sides = ([{"text": [pair[side] for pair in batch]} for batch in batches] for side in (0, 1))
    blocks = list(mteb_adapter._pairs(*sides))
    assert [(query[0].text, document[0].text) for block in blocks for query, document in block] == pairs
    for before, after in pairwise(blocks):
        assert before[-1][0] != after[0][0]
    assert size > 4 or max(map(len, blocks)) <= 3 + 4 + size


# MRB ------------------------------------------------------------------------------------------------------------------


def test_the_sets_of_mrb_are_tasks_of_mteb_with_their_modalities():
    assert len(mrb.SETS) == 40 and len({one.name for one in mrb.SETS}) == 40
    counts = {column: sum(one.column == column for one in mrb.SETS) for column in mrb.COLUMNS}
    assert (counts["T→T"], counts["T→VD"], counts["IT→IT"]) == (14, 5, 3)
    for one in mrb.SETS:
        for row in one.rows:
            metadata = mteb.get_task(row.name).metadata
            assert metadata.category == row.category and "eng-Latn" in str(metadata.eval_langs), row.name
            assert len(metadata.eval_splits) == 1
    known = {row.name: row for row in ROWS}
    for column, names in mrb.STAND_INS.items():
        assert all(known[name].category == mrb.COLUMNS[column][1] for name in names)


def write_copy(folder, corpus, queries, qrels):
    """A set in the layout that it has on the hub: parquet files, named by configurations."""
    folder.mkdir(parents=True)
    configs = [("default", "test", qrels), ("corpus", "corpus", corpus), ("queries", "queries", queries)]
    listed = ""
    for config, split, rows in configs:
        images = {"image": datasets.Image()} if any("image" in row for row in rows) else {}
        table = datasets.Dataset.from_list(rows)
        for column, kind in images.items():
            table = table.cast_column(column, kind)
        table.to_parquet(folder / f"{config}.parquet")
        listed += f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {config}.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{listed}---\n")


@pytest.fixture
def copies(tmp_path):
    """Two sets of MRB with a few documents: titles and texts with grades, and texts with pictures on both sides."""
    root = tmp_path / "sets"
    words = ["bus", "train", "river", "bread"]
    write_copy(
        root / "NFCorpus",
        [{"_id": f"d{n}", "title": f"title {n}", "text": f"about the {word}"} for n, word in enumerate(words)],
        [{"_id": f"q{n}", "text": f"the {word}"} for n, word in enumerate(["train", "bread"])],
        [{"query-id": "q0", "corpus-id": "d1", "score": 2}, {"query-id": "q1", "corpus-id": "d3", "score": 1}],
    )
    write_copy(
        root / "InfoSeekIT2ITRetrieval",
        [{"id": f"d{n}", "text": word, "image": picture(n, 56, 56), "modality": "image,text"}
         for n, word in enumerate(words)],
        [{"id": f"q{n}", "text": f"which {n}?", "image": picture(9 + n, 56, 56), "modality": "image,text"}
         for n in range(3)],
        [{"query-id": f"q{n}", "corpus-id": f"d{n}", "score": 1} for n in range(3)],
    )  # fmt: skip
    return root


def test_mrb_takes_the_sets_that_are_there_and_names_what_stands_in(reranker, data_root, copies, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["--model", str(reranker), "--dtype", "float32", "--data-root", str(data_root), "--depth", "3"]
    output = tmp_path / "out"
    flags = ["--benchmark", "mrb", "--mrb-sets", str(copies), "--first-stage", "minilm"]
    assert rerank.main([*command, "--output", str(output), *flags]) == 0
    results = json.loads((output / "results.json").read_text())
    entry = results["tasks"]["NFCorpus"]
    assert entry["column"] == "T→T" and not entry["stands_in"] and (entry["documents"], entry["queries"]) == (4, 2)
    assert list(results["tasks"]) == ["NFCorpus"], "MiniLM sees no pictures"
    assert "there is no" in results["left_out"]["SciFact"]
    table = (output / "table.md").read_text()
    assert "* T→T: 1 of its 14 sets: NFCorpus" in table
    assert "* IT→IT: none of its 3 sets was read, and no local set stands in" in table

    flags = ["--benchmark", "mrb", "--first-stage", "bm25", "--max-queries", "4"]
    assert rerank.main([*command, "--output", str(output), *flags]) == 0
    results = json.loads((output / "results.json").read_text())
    assert set(results["tasks"]) == {"mbpp", "dbpedia-entity"} and all(
        entry["stands_in"] for entry in results["tasks"].values()
    )
    table, page = (output / "table.md").read_text(), (output / "report.html").read_text()
    score = results["averages"]["single-modal, T→T"]["scores"][str(reranker)]["ndcg_at_10"]
    assert f"| {Path(reranker).name} | {score:.3f}* | – |" in table and f"{score:.3f}*" in page
    assert r"* T→T: none of its 14 sets was read; \* local sets stand in: mbpp, dbpedia-entity" in table


def test_texts_with_pictures_are_ranked_against_texts_with_pictures(
    backbone, reranker, judge, copies, tmp_path, monkeypatch
):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    command = ["--model", str(reranker), "--dtype", "float32", "--benchmark", "mrb", "--mrb-sets", str(copies)]
    flags = ["--first-stage", str(backbone), "--depth", "2", "--output", str(tmp_path / "out"), "--max-queries", "2"]
    root = tmp_path / "nothing local"
    (root / "vega-charts").mkdir(parents=True)
    for file in (DATA / "vega-charts").iterdir():
        (root / "vega-charts" / file.name).symlink_to(file)
    assert rerank.main([*command, *flags, "--data-root", str(root)]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: entry["group"] for name, entry in results["tasks"].items()} == {
        "NFCorpus": "single-modal, T→T",
        "vega-charts": "cross-modal, T→VD",
        "InfoSeekIT2ITRetrieval": "fused, IT→IT",
    }
    entry = results["tasks"]["InfoSeekIT2ITRetrieval"]
    assert (entry["documents"], entry["queries"], entry["pairs"]) == (4, 2, 4)
    found = json.loads((tmp_path / "out" / "candidates.json").read_text())["tasks"]["InfoSeekIT2ITRetrieval"]["found"]
    told = mteb.get_task("InfoSeekIT2ITRetrieval").metadata.prompt["query"]
    words = ["bus", "train", "river", "bread"]
    logits = {
        query: dict(zip(own, map(float, judge.score(
            [([picture(9 + int(query[1]), 56, 56), f"which {query[1]}?"],
              [picture(int(key[1]), 56, 56), words[int(key[1])]]) for key in own],
            instruction=told, scale="logit")), strict=True))
        for query, own in found.items()
    }  # fmt: skip
    expected = trec(logits, {query: {f"d{query[1]}": 1} for query in found})
    assert entry["scores"][str(reranker)]["mrr"] == pytest.approx(expected["mrr"], abs=2e-4)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "* IT→IT: 1 of its 3 sets: InfoSeekIT2ITRetrieval" in table


def test_a_set_whose_hub_cannot_be_reached_is_missing():
    from eval.sets import MissingSet, Source, open_task

    with pytest.raises(MissingSet, match="NFCorpus: "):
        open_task(mteb.get_task("NFCorpus"), Source())


def test_points_of_a_reliability_plot():
    chart = reliability([(0, 0.0, 0.0), (30, 0.75, 0.5), (10, 1.0, 1.0)])
    assert reliability([(0, 0.0, 0.0)]) is None
    (x, y, count), last = chart["points"]
    assert count == 30 and last == (chart["right"], chart["top"], 10)
    assert x == pytest.approx(chart["left"] + 0.75 * (chart["right"] - chart["left"]), abs=0.1)
    assert y == pytest.approx((chart["top"] + chart["bottom"]) / 2, abs=0.1)
    assert [round(height / (chart["bottom"] - chart["top"]), 2) for _, _, height in chart["bars"]] == [0, 0.75, 0.25]
