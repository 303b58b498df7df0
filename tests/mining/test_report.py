"""The report: every negative that is written is judged, and some are shown."""

import json
import re

import numpy as np
import pytest

from data_tools.mine_negatives import main
from tests.mining.conftest import read_lines, write_lines
from tests.mining.test_mine_negatives import encoded


def mined(tmp_path):
    return json.loads((tmp_path / "out" / "report.json").read_text())["sources"][0]


@pytest.fixture
def judged(mining, tmp_path, texts):
    """A teacher for whom every random document is better than the positive; by the retriever none is.

    Rules let nothing through, so all negatives are random.
    """
    records, corpus = read_lines(texts / "train.jsonl"), read_lines(texts / "corpus.jsonl")
    queries = [record["id"] for record in records]
    documents = [*(record["documents"][0]["id"] for record in records), *(row["id"] for row in corpus)]
    best, worse = [1.0, 0.0], [0.6, 0.8]
    folder = tmp_path / "judge"
    folder.mkdir()
    teacher = {
        "type": "vectors",
        "queries": encoded(folder / "q.enc", queries, [best] * 30),
        "corpus": encoded(folder / "c.enc", documents, [worse] * 30 + [best] * 60),
    }
    rules = [{"type": "rank_window", "first": 10}, "random_fill"]

    def run(**changes):
        block = {"type": "embedder", "retriever": teacher}
        assert main(["--config", str(mining(teacher=block, rules=rules, **changes))]) == 0
        written = read_lines(tmp_path / "out" / "train.jsonl")
        wrong = {row["text"] for row in corpus}
        return sum(document["content"] in wrong for record in written for document in record["documents"])

    return run


@pytest.mark.parametrize("scores", ["none", "retriever", "teacher"])
@pytest.mark.parametrize("rescore", ["candidates", "chosen"])
def test_random_negatives_are_judged_too(judged, tmp_path, rescore, scores):
    wrong = judged(rescore=rescore, scores=scores)
    found = mined(tmp_path)
    assert found["negatives"]["random"] == found["negatives"]["written"] == 90 and wrong > 40
    said = found["false_negatives"]
    assert (said["judge"], said["judged"], said["queries"]) == ("teacher", 90, 30)
    assert said["suspected"] == 90  # other queries' positives score as much as its own
    assert said["judge_chose"] == (rescore == "candidates")
    page = (tmp_path / "out" / "report.html").read_text()
    assert ("what they let through and a fill brought" in page) == (rescore == "candidates")


def test_without_a_teacher_the_page_says_who_judged(mining, tmp_path):
    assert main(["--config", str(mining(rules=[{"type": "percent_of_positive", "percent": 5}]))]) == 0
    assert mined(tmp_path)["false_negatives"]["judge_chose"] is True
    page = re.sub(r"\s+", " ", (tmp_path / "out" / "report.html").read_text())
    assert "The rules chose by the retriever's scores, too: the share says what they let through." in page


def test_some_negatives_are_shown_where_none_is_suspected(mining, tmp_path, texts):
    records = read_lines(texts / "train.jsonl")
    for record in records:
        record["documents"][0]["content"] = record["query"] + " p"
    write_lines(texts / "train.jsonl", records)
    assert main(["--config", str(mining())]) == 0
    found = mined(tmp_path)
    assert found["false_negatives"]["suspected"] == 0 and found["false_negatives"]["examples"] == []
    assert [one["query"]["id"] for one in found["samples"]] == ["q0", "q9", "q19", "q29"]
    written = {one["id"]: one["documents"] for one in read_lines(tmp_path / "out" / "train.jsonl")}
    page = (tmp_path / "out" / "report.html").read_text()
    for one in found["samples"]:
        positive, negative = written[one["query"]["id"]][:2]
        assert one["positive"]["content"] == positive["content"] and one["negative"]["content"] == negative["content"]
        assert negative["content"] in page
    assert np.all([one["positive_score"] > one["negative_score"] for one in found["samples"]])
