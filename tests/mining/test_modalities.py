"""Texts, pictures and both, on either side, on small slices of the shipped data with the packaged model."""

import json
import re
import shlex

import numpy as np
import pytest
import yaml

from data_tools.mine_negatives import main
from tests.mining.conftest import DATA, read_lines, write_lines

COUNT = 8  # records a source


def rows_of(name):
    """(query, document) of some judged pairs as contents, with paths below the data's folder."""
    folder = DATA / name
    sides = {}
    for side in ("queries", "corpus"):
        sides[side] = {row["_id"]: row for row in read_lines(folder / f"{side}.jsonl")}
    pairs = [line.split("\t") for line in (folder / "qrels" / "train.tsv").read_text().splitlines()[1:]]
    found, seen = [], set()
    for query, document, grade in pairs:
        if int(grade) > 0 and query in sides["queries"] and not {query, document} & seen:
            seen |= {query, document}
            found.append((content(sides["queries"][query], name), content(sides["corpus"][document], name)))
    return found


def content(row, name):
    text = " ".join(part for part in (row.get("title"), row.get("text")) if part)
    picture = {"image": f"{name}/images.parquet#{row['image']}"} if row.get("image") else {}
    return {**picture, "text": text} if picture and text else picture or text


@pytest.fixture(scope="module")
def mined(tmp_path_factory):
    """The output folder, the sources' records before, and what the command said."""
    folder = tmp_path_factory.mktemp("modalities")
    words, emoji, figures = rows_of("mbpp"), rows_of("noto-emoji"), rows_of("openstax-figures")
    sources = {
        "text-text": words[:COUNT],
        "text-image": emoji[:COUNT],
        "image-text": [(document, query) for query, document in emoji[COUNT : 2 * COUNT]],
        "image-image": [(emoji[20 + row][1], emoji[40 + row][1]) for row in range(COUNT)],
        "mixed": [*words[20:24], *emoji[60:64], *figures[:COUNT]],
    }
    for name, pairs in sources.items():
        records = [{"query": query, "documents": [{"content": document}]} for query, document in pairs]
        write_lines(folder / f"{name}.jsonl", records)
    tree = {
        "output": str(folder / "out"),
        "root": str(folder),
        "media_root": str(DATA),
        "sources": [{"path": f"{name}.jsonl"} for name in sources],
        "teacher": {"type": "embedder", "retriever": {"type": "mmembed", "truncate_dim": 64}},
        "rescore": "chosen",
        "search": {"depth": 6},
        "rules": ["top_k"],
        "negatives": 3,
        "shard": 5,
    }
    file = folder / "mining.yaml"
    file.write_text(yaml.safe_dump(tree))
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(["--config", str(file)]) == 0
    return folder, sources, said.getvalue()


def kind(content):
    return "+".join(key for key in ("image", "text") if isinstance(content, dict) and key in content) or "text"


@pytest.mark.parametrize("name", ["text-text", "text-image", "image-text", "image-image", "mixed"])
def test_every_record_has_negatives_of_the_corpus(mined, name):
    folder, sources, _ = mined
    written = read_lines(folder / "out" / f"{name}.jsonl")
    assert len(written) == len(sources[name])
    kinds = (
        {kind(record["query"]) for record in written},
        {kind(document["content"]) for record in written for document in record["documents"]},
    )
    before = {kind(query) for query, _ in sources[name]}, {kind(document) for _, document in sources[name]}
    assert kinds == before
    for record in written:
        negatives = [document for document in record["documents"] if document.get("relevance") == 0]
        contents = [json.dumps(document["content"]) for document in record["documents"]]
        assert len(negatives) == 3 and len(set(contents)) == 4


@pytest.mark.parametrize("name", ["text-image", "mixed"])
def test_the_candidates_are_the_nearest_of_the_model(mined, name):
    """Encoded again by the public embedder, the negatives are the three most similar documents but the positive."""
    from mmembed import Embedder
    from mmembed.media import MediaStore

    folder, sources, _ = mined
    embedder = Embedder.from_pretrained("mmembed-nano", media=MediaStore(DATA))
    queries, documents = (list(side) for side in zip(*sources[name], strict=True))
    scores = embedder.similarity(embedder.encode(queries, role="query"), embedder.encode(documents))
    for row, record in enumerate(read_lines(folder / "out" / f"{name}.jsonl")):
        wanted = [one for one in np.argsort(-scores[row], kind="stable") if one != row][:3]
        own = [documents.index(relative(document["content"])) for document in record["documents"][1:]]
        assert scores[row][own] == pytest.approx(scores[row][wanted], abs=2e-3)


def relative(content):
    if not isinstance(content, dict):
        return content
    return {key: value.replace(f"{DATA}/", "") if key == "image" else value for key, value in content.items()}


def test_the_report_has_every_source_its_histograms_and_pictures(mined):
    folder, sources, _ = mined
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [one["source"] for one in report["sources"]] == [f"{name}.jsonl" for name in sources]
    for one in report["sources"]:
        assert sum(one["scores"]["counts"]["negatives"]) == one["negatives"]["chosen"] == 3 * one["queries"]
        assert sum(one["teacher_scores"]["counts"]["positives"]) == one["records"]
        wrong = one["false_negatives"]
        assert wrong["judge"] == "teacher" and wrong["judged"] == one["negatives"]["chosen"]
        assert wrong["rate"] == pytest.approx(wrong["suspected"] / wrong["judged"], abs=1e-6)
        for example in wrong["examples"]:
            assert example["negative_score"] >= example["positive_score"]
    page = (folder / "out" / "report.html").read_text()
    shown = [one for source in report["sources"][1:4] for one in source["false_negatives"]["examples"]]
    assert shown and page.count('<img src="data:image/jpeg') >= len(shown)
    assert len(re.findall(r"<svg ", page)) == 2 * len(sources) and "http" not in page.replace("http://www.w3.org", "")


def test_the_training_command_trains_on_them_as_they_are(mined, family_folder):
    from recipes.train_embedder import main as train

    folder, _, said = mined
    overrides = shlex.split(said.splitlines()[-1].removeprefix("train on them with: "))
    assert [one.split("=")[0] for one in overrides] == ["data.root", "data.train", "data.media_root"]
    config = folder / "train.yaml"
    config.write_text(
        f"""
model: {{name_or_path: {family_folder("qwen3_vl")}, dtype: float32}}
adapter: {{type: lora, r: 4}}
data: {{train_group_size: 4}}
objective: {{type: contrastive, temperature: 0.05}}
training: {{output_dir: {folder / "trained"}, per_device_train_batch_size: 4, max_steps: 3, learning_rate: 1e-3,
           save_strategy: "no", disable_tqdm: true, token_budget: 1024}}
"""
    )
    assert train(["--config", str(config), *overrides]) == 0
    assert (folder / "trained" / "mmembed.json").exists()
