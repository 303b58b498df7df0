"""Filters through the real command: what it says, what it keeps beside the result, and the shipped configs."""

import json
from pathlib import Path

import pytest
import yaml

from data_tools.synthesize import main
from tests.synthesis.filtering import pair, records, write_jsonl

CONFIGS = Path("recipes/configs/synthesis")


def test_documents_that_are_taken_out_are_counted_and_shown(tmp_path, capsys):
    rows = [
        pair(
            "kept", "Which bus goes to the harbour?", ("The bus number nine.", 1), ("which bus goes to the harbour?", 0)
        ),
        pair("dropped", "Which tram stops here?", ("which tram stops here?", 1)),
    ]
    config = {
        "output": str(tmp_path / "out"), "sources": [{"path": write_jsonl(tmp_path / "in.jsonl", rows)}],
        "stages": ["schema"],
    }  # fmt: skip
    path = tmp_path / "filter.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path)]) == 0
    said = capsys.readouterr().out
    assert "2 items -> 1 records (50.0% kept), 1 document: is the query" in said
    assert "documents taken out of records, is the query: 1" in said
    left_out = [json.loads(line) for line in (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()]
    assert [(one.get("of"), one["reason"]) for one in left_out] == [
        ("kept", "is the query"),
        (None, "document: is the query"),
    ]
    (report,) = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert report["trimmed"] == {"is the query": 1} and report["left_out"] == 1 and report["lost"] == 0
    assert report["examples"]["is the query"][0]["document"]["content"] == rows[0]["documents"][1]["content"]
    (made,) = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text().splitlines()]
    assert [one["content"] for one in made["documents"]] == ["The bus number nine."]


@pytest.mark.parametrize("name, most", [("filter", 40), ("select", 40)])
def test_shipped_filters_run_on_the_data_of_this_repository(tmp_path, capsys, name, most):
    sources = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["sources"]
    given = json.dumps([{**source, "max_examples": most} for source in sources])
    overrides = [f"output={tmp_path}", f"sources={given}"]
    assert main(["--config", str(CONFIGS / f"{name}.yaml"), *overrides]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["read"]["items"] == most * len(sources) and len(summary["stages"]) in (2, 8)
    made = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    known = {one["id"]: one["query"] for source in sources for one in records(source["path"])}
    assert made and all(one["query"] == known[one["id"].split("/")[-1]] for one in made)
    left_out = sum(1 for line in (tmp_path / "left_out.jsonl").read_text().splitlines() if "item" in json.loads(line))
    assert len(made) + left_out == summary["read"]["items"] and "records.jsonl" in out
    before = (tmp_path / "records.jsonl").read_bytes()
    assert main(["--config", str(CONFIGS / f"{name}.yaml"), *overrides]) == 0  # all stages are passed over
    assert (tmp_path / "records.jsonl").read_bytes() == before
