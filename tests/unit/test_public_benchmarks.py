"""Every set of the public benchmarks, from a miniature in the official layout, through the command itself."""

import io
import json
import math
import shutil
import tarfile
from dataclasses import replace

import datasets
import mteb
import numpy as np
import pytest
from miniatures import ANSWERS, Numbered, label_numbers, table, write_mmeb, write_retrieval

from eval import benchmarks, evaluation, run, sets
from eval.mmeb import build_task, differences
from eval.models import Loaded, ranks_alone
from eval.mteb_adapter import MtebEncoder, MtebReranker
from eval.rows import DIGITS
from eval.sets import MissingSet, Source
from eval.tasks import mmeb, mrb

HIT = round(2 / 3, DIGITS)
NDCG = round((1 + 1 + 1 / math.log2(5)) / 3, 5)  # the third query's document comes behind 3, 4 and 2


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """The encoder behind whatever `--model` names, with its own store of tables."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    numbered = Numbered({"yes": 1, "no": 2, **label_numbers()})
    runner = MtebEncoder(numbered, "toy", modalities=["text", "image", "video"])
    monkeypatch.setattr(evaluation, "load", lambda name, *_: Loaded(name, runner, {}, lambda _: None))
    return numbered


@pytest.fixture
def copies(tmp_path):
    return tmp_path / "copies"


def evaluate(folder, *flags):
    (folder / "model").mkdir(exist_ok=True)
    output = folder / "results.json"
    code = run.main(["--model", str(folder / "model"), "--no-baselines", "--output", str(output), *flags])
    return code, json.loads(output.read_text()) if output.is_file() else None


def main_scores(results):
    return {name: next(iter(entry["scores"].values()))["main"] for name, entry in results["tasks"].items()}


def chosen(*names):
    return [one for one in mmeb.V2 if one.name in names]


@pytest.mark.slow
def test_every_set_of_mmeb_gives_its_known_score(toy, copies, tmp_path):
    write_mmeb(copies, mmeb.V2)
    code, results = evaluate(tmp_path, "--benchmark", "mmeb-v2", "--source", str(copies))
    assert code == 0 and not results["missing"] and len(results["tasks"]) == 78
    wanted = {one.name: NDCG if one.modality == "document" else HIT for one in mmeb.V2}
    assert main_scores(results) == pytest.approx(wanted, abs=2e-5)
    own = results["averages"]
    assert own["images"] == own["images in-domain"] == {str(tmp_path / "model"): HIT}
    assert own["all"][str(tmp_path / "model")] == pytest.approx((54 * HIT + 24 * NDCG) / 78, abs=2e-5)


@pytest.mark.slow
def test_every_set_of_mrb_gives_its_known_score(toy, copies, tmp_path):
    for task in (mteb.get_task(row.name) for one in mrb.SETS for row in one.rows):
        write_retrieval(copies, task, task.metadata.eval_splits[0])
    code, results = evaluate(tmp_path, "--benchmark", "mrb", "--source", str(copies))
    assert code == 0 and not results["missing"] and len(results["tasks"]) == 51
    wanted = {name: NDCG if entry["main_score"].startswith("ndcg") else 1 for name, entry in results["tasks"].items()}
    assert main_scores(results) == pytest.approx(wanted, abs=2e-5)
    assert {entry.get("set", name) for name, entry in results["tasks"].items()} == {one.name for one in mrb.SETS}


def test_instructions_and_parts_of_queries_and_documents(toy, copies, tmp_path):
    sets = ("CIRR", "VisDial", "MSVD", "NExTQA", "MomentSeeker", "ViDoRe_docvqa")
    write_mmeb(copies, chosen(*sets))
    assert evaluate(tmp_path, "--benchmark", "mmeb-v2", "--source", str(copies), "--tasks", *sets)[0] == 0
    told = dict.fromkeys(toy.told)
    asked = [text for role, text in told if role == "query"]
    assert asked[0] == "Find what belongs to it:" and ("document", "Represent the given image.") in told
    assert {one.instruction for one in chosen(*sets)} - {None} <= set(asked)
    assert ("document", "Understand the content of the provided video.") in told
    assert ("document", None) in told  # answers are told nothing


def test_questions_about_videos_are_written_as_the_official_queries(copies):
    names = {"Video-MME": "what is it\nA. #1 it is.\nB. #2 it is.", "EgoSchema": "what is itA. #1 it is. B. #2 it is.",
             "MVBench": "what is it\nOptions:\n(A) #1 it is\n(B) #2 it is", "SmthSmthV2": "",
             "ActivityNetQA": "what is it? (A) yes; (B) no."}  # fmt: skip
    write_mmeb(copies, chosen(*names))
    for name, beginning in names.items():
        data = loaded(name, copies)
        if beginning:
            assert data["queries"]["text"][0].startswith(beginning), name
        texts = data["corpus"]["text"]
        assert {"MVBench": "(A) #1 it is", "ActivityNetQA": "yes"}.get(name, "#1 it is") in texts
        assert all(len(own) == len(texts) for own in data["top_ranked"].values())
    assert len(loaded("Video-MME", copies)["queries"][0]["video"]) == mmeb.FRAMES  # of 11 that are there


def loaded(name, copies):
    (one,) = chosen(name)
    task = build_task(one, Source(copies))
    task.load_data()
    return task.dataset["default"][one.split]


def test_rows_that_differ_in_their_instruction_carry_it_in_the_text(copies):
    (one,) = chosen("MSCOCO_t2i")
    write_mmeb(copies, [one])
    file = next((copies / one.repository).glob("*.parquet"))
    rows = datasets.Dataset.from_parquet(str(file)).to_list()
    rows[1]["qry_inst"] = "Another:"
    datasets.Dataset.from_list(rows).to_parquet(file)
    assert loaded(one.name, copies)["queries"]["text"][:2] == ["Find what belongs to it: what is #1?",
                                                              "Another: what is #2?"]  # fmt: skip


def test_the_place_of_the_right_answer_says_nothing(copies):
    """It stands first in the data; a reranker of lists, and ties, see candidates by their ids."""
    write_mmeb(copies, chosen("OK-VQA"))
    data = loaded("OK-VQA", copies)
    places = [data["top_ranked"][query].index(*data["relevant_docs"][query]) for query in data["queries"]["id"]]
    assert set(places) != {0}


def test_copies_among_candidates_count_where_data_are_compared_with_the_declared_counts(copies):
    (one,) = chosen("ScienceQA")
    write_mmeb(copies, [one])
    (file,) = (copies / one.repository).glob("*.parquet")
    rows = datasets.Dataset.from_parquet(str(file)).to_list()
    for row in rows:
        row["tgt_text"], row["tgt_img_path"] = row["tgt_text"][:1] + row["tgt_text"][1:2] * 4, [""] * 5
    datasets.Dataset.from_list(rows).to_parquet(file)
    task = build_task(replace(one, queries=3, candidates=5), Source(copies))
    task.load_data()
    assert task.differs == "" and {len(own) for own in task.dataset["default"]["test"]["top_ranked"].values()} == {2}
    assert differences(one, task.dataset["default"]["test"], task.listed) == (
        "3 queries, not 1000, 5 candidates, not 736"
    )


def test_a_copy_that_was_changed_is_read_anew(copies):
    (one,), task = chosen("VisRAG_ChartQA"), mteb.get_task("SciFact")
    write_mmeb(copies, [one])
    write_retrieval(copies, task)
    for wanted in (3, 2):
        assert len(loaded(one.name, copies)["queries"]) == wanted
        again = mteb.get_task("SciFact")
        sets.open_task(again, Source(copies))
        assert len(again.dataset["default"]["test"]["queries"]) == wanted
        for file in (copies / one.repository / "queries-train.parquet", copies / "SciFact/queries-test.parquet"):
            datasets.Dataset.from_parquet(str(file)).select(range(2)).to_parquet(file)


def test_data_of_another_form_are_a_missing_set(copies):
    (one,) = chosen("NIGHTS")
    table(copies, one.repository, [{"question": "x"}], one.split, one.config)
    (copies / mmeb.MEDIA).mkdir(parents=True)
    with pytest.raises(MissingSet, match="NIGHTS: it has no 'text'"):
        loaded("NIGHTS", copies)


def test_what_is_missing_is_named_and_the_rest_is_evaluated(toy, copies, tmp_path, capsys):
    write_mmeb(copies, chosen("NIGHTS", "CIRR", "MSVD", "HMDB51"))
    shutil.rmtree(copies / "VLM2Vec/HMDB51")
    (copies / mmeb.MEDIA / "image-tasks/CIRR/3.png").unlink()
    shutil.rmtree(copies / mmeb.MEDIA / "video-tasks/frames/video_ret/MSVD/clip-2")
    flags = ("--benchmark", "mmeb-v2", "--source", str(copies), "--tasks", "CIRR", "NIGHTS", "HMDB51", "MSVD")
    code, results = evaluate(tmp_path, *flags)
    assert code == 0 and list(results["tasks"]) == ["NIGHTS"] and set(results["missing"]) == {"CIRR", "HMDB51", "MSVD"}
    assert "there is no" in results["missing"]["CIRR"] and "CIRR/3.png" in results["missing"]["CIRR"]
    assert "clip-2" in results["missing"]["MSVD"] and "HMDB51" in results["missing"]["HMDB51"]
    printed = capsys.readouterr().out
    assert "missing, 3 of 4 tasks; averages are without them" in printed and "HMDB51: there is no" in printed
    assert "NIGHTS has 3 queries, not 1000, 4 candidates, not 1000: compare it with no published number" in printed
    code, results = evaluate(tmp_path, *flags[:5], "CIRR")
    assert code == 2 and not results["tasks"]


def test_a_limit_draws_the_same_queries_and_says_so(toy, copies, tmp_path, capsys):
    write_mmeb(copies, chosen("NIGHTS"))
    flags = ("--benchmark", "mmeb-v1", "--source", str(copies), "--tasks", "NIGHTS", "--limit", "2")
    found = []
    for _ in range(2):
        code, results = evaluate(tmp_path, *flags, "--rankings", str(tmp_path / "rankings"))
        assert code == 0 and results["limit"] == 2 and results["tasks"]["NIGHTS"]["queries"] == 2
        (file,) = (tmp_path / "rankings").iterdir()
        found.append(set(json.loads(file.read_text())["NIGHTS"]))
    assert found[0] == found[1] and len(found[0]) == 2
    assert "at most 2 queries of a task: these numbers compare with no others" in capsys.readouterr().out
    assert run.main([*flags[:-1], "0", "--model", str(tmp_path / "model")]) == 2
    assert "--limit: found 0" in capsys.readouterr().err


def write_tasks(copies):
    """Tasks of mteb of several kinds."""
    table(copies, "STSBenchmark", [{"sentence1": f"#{a}", "sentence2": f"#{b}", "score": float(5 * (a == b))}
          for a, b in ((1, 1), (1, 2), (3, 3), (3, 4))], "test")  # fmt: skip
    for split in ("train", "test"):
        rows = [{"text": f"{word} #{label}", "label": label} for label in (1, 2, 3) for word in "abcdefgh"]
        table(copies, "Banking77Classification", rows, split)
    write_retrieval(copies, mteb.get_task("ArguAna"))
    ranked = [{"query-id": f"q{number}", "corpus-ids": [f"d{right}", "d4", f"d{number}"]} for number, right in ANSWERS]
    write_retrieval(copies, mteb.get_task("AskUbuntuDupQuestions"))
    table(copies, "AskUbuntuDupQuestions", ranked, "test", "top_ranked")


def test_tasks_of_mteb_go_the_same_way(toy, copies, tmp_path):
    write_tasks(copies)
    names = ("ArguAna", "AskUbuntuDupQuestions", "STSBenchmark", "Banking77Classification")
    flags = ("--benchmark", "mteb-eng-v2", "--source", str(copies), "--tasks", *names, "TwitterURLCorpus")
    code, results = evaluate(tmp_path, *flags)
    assert code == 0 and results["benchmark"] == "MTEB(eng, v2)" and list(results["missing"]) == ["TwitterURLCorpus"]
    scores = main_scores(results)
    assert scores["ArguAna"] == pytest.approx(NDCG, abs=2e-5)
    assert scores["AskUbuntuDupQuestions"] == pytest.approx((1 + 1 + 1 / 3) / 3, abs=2e-5)  # MAP
    assert scores["Banking77Classification"] == 1 and scores["STSBenchmark"] > 0.8
    assert results["tasks"]["STSBenchmark"]["rows"] == 4 and results["tasks"]["ArguAna"]["documents"] == 4
    assert set(results["averages"]) == {"Retrieval", "Reranking", "STS", "Classification", "all"}
    code, results = evaluate(tmp_path, *flags[:-1], "--limit", "2")
    assert {name: entry.get("queries", entry.get("rows")) for name, entry in results["tasks"].items()} == dict.fromkeys(
        names, 2
    )


def test_an_aggregate_of_mteb_is_the_mean_of_its_tasks(toy, copies, tmp_path):
    for part in mteb.get_task("CQADupstackRetrieval").metadata.tasks:
        write_retrieval(copies, part)
    flags = ("--benchmark", "beir", "--source", str(copies), "--tasks", "CQADupstackRetrieval")
    code, results = evaluate(tmp_path, *flags)
    entry = results["tasks"]["CQADupstackRetrieval"]
    assert code == 0 and (entry["data"], entry["documents"]) == ("12 sets", 48)
    assert main_scores(results)["CQADupstackRetrieval"] == pytest.approx(NDCG, abs=2e-5)


def test_languages_choose_tasks_and_subsets(capsys):
    options = run.parse(["--list", "--benchmark", "mmeb-v2", "--languages", "fra"])
    assert {one.name for one in benchmarks.find(options).rows} == {
        "ViDoRe_tabfquad", "ViDoRe_shiftproject", "ViDoRe_biomedical_lectures_v2_multilingual",
        "ViDoRe_economics_reports_v2_multilingual", "ViDoRe_esg_reports_v2_multilingual",
    }  # fmt: skip
    options = run.parse(["--list", "--languages", "deu"])
    assert all("de" in row.languages for row in benchmarks.find(options).rows)
    flags = [
        "--benchmark",
        "mteb-multilingual-v2",
        "--tasks",
        "MIRACLRetrievalHardNegatives",
        "--languages",
        "zh",
        "de",
    ]
    found = benchmarks.find(run.parse(["--list", *flags]))
    assert found.build(found.rows[0]).hf_subsets == ["de", "zh"]
    for code, hint in (("de", "no task here is in 'de'"), ("klingon", "no code of two or three letters")):
        assert run.main(["--list", "--benchmark", "beir-nl", "--languages", code]) == 2
        assert hint in capsys.readouterr().err


def test_a_list_opens_nothing(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("opened"))
    for name, line in (
        ("local", "mbpp  "), ("mrb", "ArguAna  "), ("vidore-v3", "Vidore3FinanceEnRetrieval"),
        ("MTEB(eng, v2)", "Banking77Classification"), ("mmeb-v2", "MomentSeeker"),
    ):  # fmt: skip
        assert run.main(["--list", "--benchmark", name]) == 0
        assert line in capsys.readouterr().out
    assert run.main(["--list", "--benchmark", "mmeb-v1", "--tasks", "Ref*"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].split() == ["RefCOCO", "image", "grounding", "hit_rate_at_1", "ziyjiang/MMEB_Test_Instruct"]
    assert printed[-1] == "2 tasks"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark", "mmeb-v3"], "did you mean 'mmeb-v"),
        (["--benchmark", "mteb-engl-v2"], "did you mean 'mteb-eng-v2'?"),
        (["--benchmark", "miebs"], "did you mean 'mieb"),
        (["--benchmark", "mmeb-v1", "--tasks", "NIGHT"], "did you mean 'NIGHTS'?"),
        (["--benchmark", "beir", "--tasks", "trec-covid"], "did you mean 'TRECCOVID'?"),
        (["--benchmark", "beir", "--split", "train"], "--split: acts on local"),
        (["--benchmark", "beir", "--data-root", "data"], "--data-root: acts on local"),
        (["--benchmark", "beir", "--rankings", "x"], "--rankings: acts on local and mmeb"),
        (["--benchmark", "beir", "--source", "nowhere"], "neither 'hub' nor a folder"),
        (["--source", "hub"], "--source: acts on public benchmarks"),
    ],
)
def test_names_and_options_that_cannot_be(flags, message, capsys):
    assert run.main(["--list", *flags]) == 2
    assert message in capsys.readouterr().err


def test_short_names_are_each_of_one_benchmark():
    names = [benchmarks.short(benchmark.name) for benchmark in mteb.get_benchmarks()]
    assert len(set(names)) == len(names) and not set(names) & set(benchmarks.OURS)
    for name, full in {"mteb-eng-v2": "MTEB(eng, v2)", "beir": "BEIR", "nanobeir": "NanoBEIR", "bright": "BRIGHT",
                       "vidore-v1": "ViDoRe(v1)", "vidore-v3": "ViDoRe(v3)", "jinavdr": "JinaVDR", "rteb-beta":
                       "RTEB(beta)", "mieb-eng": "MIEB(eng)", "mveb": "MVEB(v1)", "mmteb": "MTEB(Multilingual, v2)",
                       "MTEB(fra, v1)": "MTEB(fra, v1)"}.items():  # fmt: skip
        assert benchmarks.of_mteb(name).name == full


def test_a_baseline_says_why_it_leaves_a_task_out(copies, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_mmeb(copies, chosen("NIGHTS", "MSVD"))
    flags = ["--benchmark", "mmeb-v2", "--source", str(copies), "--tasks", "NIGHTS", "MSVD"]
    assert run.main(["--model", "bm25", *flags]) == 0
    printed = capsys.readouterr().out
    assert "bm25 leaves out NIGHTS: it reads no pictures" in printed
    assert "bm25 leaves out MSVD: it reads no videos" in printed


def test_the_packaged_model_reads_pictures_and_videos(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ("NIGHTS", "WebQA", "MSVD", "MomentSeeker", "HMDB51", "VisRAG_PlotQA")
    write_mmeb(copies, chosen(*names))
    output = tmp_path / "results.json"
    flags = ["--benchmark", "mmeb-v2", "--source", str(copies), "--tasks", *names, "--output", str(output)]
    assert run.main(["--model", "mmembed-nano", "--no-baselines", "--dtype", "float32", *flags]) == 0
    scores = main_scores(json.loads(output.read_text()))
    assert set(scores) == set(names) and all(0 <= score <= 1 for score in scores.values())
    assert scores["NIGHTS"] == HIT  # a picture is nearest to itself


def test_a_reranker_orders_own_candidates_and_leaves_whole_corpora_out(toy, copies, tmp_path, monkeypatch):
    def score(pairs, *, instruction):
        sides = [toy.encode(side, role="query", instruction=None) for side in zip(*pairs, strict=True)]
        return (sides[0] * sides[1]).sum(1)

    runner = MtebReranker(score, "judge", modalities=["text", "image", "video"])
    monkeypatch.setattr(evaluation, "load", lambda name, *_: Loaded(name, runner, {}, ranks_alone, reranks=True))
    write_mmeb(copies, chosen("NIGHTS", "MSVD"))
    code, results = evaluate(tmp_path, "--benchmark", "mmeb-v2", "--source", str(copies), "--tasks", "NIGHTS", "MSVD")
    judge = str(tmp_path / "model")
    assert code == 0 and results["tasks"]["NIGHTS"]["scores"][judge]["main"] == HIT
    assert results["left_out"] == {judge: {"MSVD": "nothing found its candidates"}}


# What can be wrong with a model, or with data -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("nan", "NIGHTS, documents, row 2: the model gave NaN or infinity"),
        ("size", "NIGHTS, documents, row 0: the model gave 7 numbers, for others 1025"),
    ],
)
def test_a_model_that_gives_no_usable_vectors_stops_with_task_and_row(
    toy, copies, tmp_path, monkeypatch, capsys, broken, message
):
    usual = toy.encode

    def encode(contents, *, role, instruction):
        vectors = usual(contents, role=role, instruction=instruction)
        if role == "document":
            if broken == "size":
                return vectors[:, :7]
            vectors[2, 5] = np.nan
        return vectors

    monkeypatch.setattr(toy, "encode", encode)
    write_mmeb(copies, chosen("NIGHTS"))
    flags = ("--benchmark", "mmeb-v1", "--source", str(copies), "--tasks", "NIGHTS")
    assert run.main(["--model", str(copies), "--no-baselines", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_reranker_that_gives_no_number_stops_with_task_and_pair():
    from mteb.types import PromptType

    judge = MtebReranker(lambda pairs, *, instruction: np.array([1.0, np.nan], dtype=np.float32), "x", modalities=[])
    batch = [{"text": ["a", "b"]}]
    with pytest.raises(ValueError, match="ArguAna, pair 1: the reranker gave NaN"):
        judge.predict(batch, batch, task_metadata=mteb.get_task("ArguAna").metadata, prompt_type=PromptType.query)


def test_ids_of_two_documents_and_judgements_of_nothing(toy, copies, tmp_path):
    for name in ("ArguAna", "NFCorpus", "SciFact"):
        write_retrieval(copies, mteb.get_task(name))
    twice = [{"id": key, "text": "#1"} for key in ("d1", "d2", "d1")]
    datasets.Dataset.from_list(twice).to_parquet(copies / "ArguAna/corpus-test.parquet")
    nothing = [{"query-id": "q1", "corpus-id": "d1", "score": 0}]
    datasets.Dataset.from_list(nothing).to_parquet(copies / "NFCorpus/default-test.parquet")
    flags = ("--benchmark", "beir", "--source", str(copies), "--tasks", "ArguAna", "NFCorpus", "SciFact")
    code, results = evaluate(tmp_path, *flags)
    assert code == 0 and list(results["tasks"]) == ["SciFact"]
    assert "rows 0 and 2 of its corpus are both called 'd1'" in results["missing"]["ArguAna"]
    assert "no query has a relevant document" in results["missing"]["NFCorpus"]


def test_two_local_documents_with_one_id_are_an_error_with_the_line(tmp_path, capsys):
    folder = tmp_path / "mbpp"
    (folder / "qrels").mkdir(parents=True)
    line = json.dumps({"_id": "d", "text": "x"})
    (folder / "corpus.jsonl").write_text(f"{line}\n{line}\n")
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "x"}) + "\n")
    (folder / "qrels/dev.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    assert run.main(["--model", "bm25", "--data-root", str(tmp_path)]) == 2
    assert f"{folder / 'corpus.jsonl'}:2: another record with the id 'd'" in capsys.readouterr().err


def test_a_broken_connection_says_how_to_go_on(monkeypatch):
    def broken(*_, **__):
        raise ConnectionError("the connection was reset")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    (one,) = chosen("MSVD")
    with pytest.raises(MissingSet, match="MSVD: the connection was reset; what has arrived is kept: the same command"):
        Source().rows(one.name, one.repository, None, "test", None)


def test_archives_are_unpacked_once(tmp_path, monkeypatch):
    """An archive in parts, as the frames of questions about videos come."""
    import huggingface_hub

    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        data = bytes(range(256)) * 40
        member = tarfile.TarInfo("video_qa/x.jpg")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    files = tuple(f"video-tasks/frames/video_qa.tar.gz-{part:02}" for part in range(3))
    third = len(packed.getvalue()) // 3
    for place, file in enumerate(files):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        end = None if place == 2 else (place + 1) * third
        (tmp_path / file).write_bytes(packed.getvalue()[place * third : end])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    root = sets.unpacked("a/b", "main", files, "video-tasks/frames", "")
    assert (root / "video_qa/x.jpg").read_bytes() == data
    (root / "video_qa/x.jpg").unlink()
    sets.unpacked.cache_clear()
    sets.unpacked("a/b", "main", files, "video-tasks/frames", "")
    assert not (root / "video_qa/x.jpg").exists()


def test_the_hub_gives_what_copies_give(toy, copies, tmp_path, monkeypatch):
    """Rows by their repository and configuration, pictures and frames out of the archives of MMEB-V2."""
    import huggingface_hub

    names = ("NIGHTS", "MSVD", "HMDB51", "QVHighlight", "VisRAG_PlotQA")
    write_mmeb(copies, chosen(*names))
    real, archives, media = datasets.load_dataset, tmp_path / "archives", copies / mmeb.MEDIA
    frames = media / "video-tasks/frames"
    for file, folder, inside in (
        ("image-tasks/mmeb_v1.tar.gz", media / "image-tasks", "MMEB"),
        ("video-tasks/frames/video_cls.tar.gz", frames / "video_cls", "."),
        ("video-tasks/frames/video_ret.tar.gz", frames / "video_ret", "."),
        ("video-tasks/frames/video_mret.tar.gz", frames / "video_mret", "video_mret"),
    ):
        (archives / file).parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives / file, "w:gz") as archive:
            archive.add(folder, arcname=inside)
    shutil.rmtree(media)

    def load(path, config, *, split, revision):
        return real(str(copies / path), config, split=split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(archives))
    sets.unpacked.cache_clear()
    code, results = evaluate(tmp_path, "--benchmark", "mmeb-v2", "--tasks", *names)
    assert code == 0 and not results["missing"]
    wanted = {name: NDCG if name.startswith("Vis") else HIT for name in names}
    assert main_scores(results) == pytest.approx(wanted, abs=2e-5)
