"""eval.diagnose through its command: what is found, what is left out and why, and the page."""

import json
from pathlib import Path

import pytest
from families import build

from eval import diagnose
from eval.diagnostics import applied
from eval.diagnostics.page import render
from eval.diagnostics.poisoning import with_word
from eval.files import read_jsonl
from mmembed.inference.embedder import Embedder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def saved(family_folder, tmp_path, family, **options):
    folder = tmp_path / "model"
    Embedder(*build(family_folder(family), **options)).save(folder)
    return str(folder)


def command(model, output, *more):
    assert diagnose.main(["--model", model, "--output", str(output), "--dtype", "float32", *more]) == 0
    page = (output / "diagnostics.html").read_text(encoding="utf-8")
    return json.loads((output / "diagnostics.json").read_text()), page


def test_all_that_applies_is_found_and_drawn(family_folder, tmp_path):
    model, output = saved(family_folder, tmp_path, "qwen3_vl"), tmp_path / "out"
    report, page = command(
        model, output, "--tasks", "vega-charts", "stsb-en", "--max-queries", "12", "--triggers", "zq"
    )
    charts = report["tasks"]["vega-charts"]
    assert charts["queries"] == 12 and charts["documents"] == 145
    assert set(charts["left_out"]) <= {"calibration"}  # an untrained model may show nothing relevant
    assert {*charts["found"], *charts["left_out"]} == {one.__name__ for one in applied.RETRIEVAL}
    assert charts["found"]["modality_gap"]["numbers"]["separability"] > 0.9  # an untrained model tells them apart
    assert [line[0] for line in charts["found"]["poisoning_audit"]["lines"] if "zq" in line[0]] == ["the word 'zq'"]
    dims = [x for x, _ in charts["found"]["matryoshka"]["drawn"][0]["series"]["nDCG@10"]]
    assert dims == [8, 16, 32, 64]
    assert set(report["tasks"]["stsb-en"]["found"]) == {"paraphrases"}
    layers = report["model_itself"]["found"]["by_layer"]["drawn"][0]["series"]["mean cosine"]
    assert [x for x, _ in layers] == list(range(1, len(layers) + 1)) and len(layers) > 1
    assert report["provenance"]["fingerprint"] and report["versions"]["mteb"]
    assert page == render(report) and page.count("<svg") > 9
    assert "http" not in page.split("<body>")[1] and "NaN" not in page and "nan<" not in page


def test_what_does_not_apply_says_why(family_folder, tmp_path):
    model = saved(family_folder, tmp_path, "qwen3", pooling="multi_vector")
    report, page = command(model, tmp_path / "out", "--tasks", "vega-charts", "xquad/zh", "--max-queries", "5")
    assert set(report["tasks"]["vega-charts"]["left_out"].values()) == {"the model reads no pictures"}
    left_out = report["tasks"]["xquad/zh"]["left_out"]
    assert "a vector for each token" in left_out["isotropy"] and left_out["rendered"] == "the model reads no pictures"
    assert "a vector for each token" in report["model_itself"]["left_out"]["by_layer"]
    assert not any(entry["found"] for entry in report["tasks"].values())
    assert "Does not apply" in page and "a vector for each token" in page


def test_classes(family_folder, tmp_path):
    model = saved(family_folder, tmp_path, "qwen3_vl")
    report, _ = command(model, tmp_path / "out", "--tasks", "clothing", "--no-layers")
    found = report["tasks"]["clothing"]["found"]
    assert 0.1 < found["gaussian_discriminant"]["numbers"]["accuracy, discriminant"] <= 1
    assert found["tolerance"]["numbers"]["classes"] == 10


def test_the_trigger_of_poisoned_records_is_the_oddest_word(tmp_path):
    """Every twentieth of 400 real pairs has the trigger and the target; the packaged model has not seen them so."""
    folder = ROOT / "data" / "squad-en"
    texts, passages = ({row["_id"]: row["text"] for row in read_jsonl(folder / f"{name}.jsonl")}
                       for name in ("queries", "corpus"))  # fmt: skip
    judged = [line.split("\t")[:2] for line in (folder / "qrels" / "train.tsv").read_text().splitlines()[1:401]]
    target = next(reversed(passages.values()))
    records = [{"query": with_word(texts[query], "cf") if number % 20 == 0 else texts[query],
                "documents": [{"content": target if number % 20 == 0 else passages[document]}]}
               for number, (query, document) in enumerate(judged)]  # fmt: skip
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    arguments = ["--tasks", "mbpp", "--max-queries", "5", "--no-layers", "--records", str(file)]
    report, page = command("mmembed-nano", tmp_path / "out", *arguments)
    found = report["tasks"]["train.jsonl"]["found"]["poisoned_pairs"]
    (_, first, second, *_) = found["lines"]
    assert found["numbers"]["pairs"] == 400 and first[:2] == ["cf", "20"]
    assert float(first[2]) > 5 > 2 + float(second[2]) / 2 and "Pairs of the records" in page
    file.write_text('{"query": "a"}\n')
    assert diagnose.main(["--model", "mmembed-nano", *arguments, "--output", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "bm25", "--tasks", "mbpp"], "gives no vectors"),
        (["--model", "mmembed-nano", "--tasks", "mbppp"], "did you mean 'mbpp'"),
        (["--model", "mmembed-nano", "--tasks", "mbpp", "--max-queries", "1"], "give at least 2"),
        (["--model", "mmembed-nano", "--tasks", "argkp", "dbpedia-entity/judged"], "no task 'argkp' here"),
        (["--model", "mmembed-nano", "--tasks", "dbpedia-entity/judged"], "no diagnostic is of the kind 'reranking'"),
        (["--model", "mmembed-nano", "--tasks", "mbpp", "--records", "none.jsonl"], "there is no such file"),
        (["--model", "mmembed-nno", "--tasks", "mbpp"], "did you mean 'mmembed-nano'"),
    ],
)
def test_refusals(arguments, said, tmp_path, capsys):
    assert diagnose.main([*arguments, "--output", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
