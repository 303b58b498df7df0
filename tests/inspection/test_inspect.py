"""The command on small files: numbers counted by hand, bad input, hostile texts, memory, and what training says."""

import json
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import yaml

from data_tools.inspect import main
from data_tools.inspection.contents import Keys
from data_tools.inspection.reading import Reading
from data_tools.inspection.statistics import Statistics
from data_tools.mining.collection import _Reader
from mmembed.config.blocks import DataConfig, SourceConfig
from mmembed.content import to_content
from mmembed.media import MediaStore

ROOT = Path(__file__).resolve().parents[2]
PASSAGE = "The river rose after the long rain, and the people of the village carried their goods to the hill above it."
GERMAN = "Der Fluss stieg nach dem langen Regen, und die Leute trugen ihre Sachen auf den Hügel über dem Dorf."


def _write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def inspected(tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """inspected("x.jsonl", ...) -> the sources of report.json."""

    def run(*arguments: Any) -> list[dict[str, Any]]:
        assert main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 0
        found = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        return found["sources"]

    return run


def _page(tmp_path: Path) -> str:
    return (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def _records() -> list[dict[str, Any]]:
    near = PASSAGE.replace("above it", "above them")
    return [
        {"query": "Why did the river rise so much last spring?", "documents": [
            {"content": PASSAGE, "relevance": 3, "score": 0.9}, {"content": near, "relevance": 2, "score": 0.7},
            {"content": GERMAN, "relevance": 0, "score": 0.8}], "labels": [["water", "river"]]},
        {"query": "why did the  RIVER rise so much last spring?", "documents": [
            {"content": PASSAGE.upper(), "relevance": 1, "score": 0.5},
            {"content": "A train.", "relevance": 0, "score": 0.6}], "labels": [["water", "river"]]},
        {"query": "Warum ist der Fluss im letzten Frühjahr gestiegen?", "documents": [
            {"content": GERMAN, "relevance": 1}], "labels": [["water", "lake"]], "instruction": "Find it"},
        {"query": "Why did the river rise so much last spring?", "documents": [
            {"content": GERMAN, "relevance": 1}], "labels": [["air", "wind"]], "task": "clustering"},
    ]  # fmt: skip


def test_the_numbers_of_a_file_are_those_of_a_count_by_hand(inspected: Any, tmp_path: Path) -> None:
    rows = _records()
    (found,) = inspected(_write(tmp_path / "x.jsonl", rows))
    documents = [document for row in rows for document in row["documents"]]
    assert found["records"] == 4 and found["bad"]["count"] == 0
    assert found["tasks"] == {"retrieval": 3, "clustering": 1}
    queries, texts = found["queries"], found["documents"]
    assert (queries["contents"], queries["distinct"], queries["copies"]) == (4, 2, 2)  # case and space make no other
    assert (texts["contents"], texts["distinct"], texts["copies"]) == (7, 4, 3)
    assert [(one["count"], one["where"].rpartition(":")[2]) for one in texts["most_repeated"]] == [(3, "1"), (2, "1")]
    levels = Counter(f"{document['relevance']:g}" for document in documents)
    assert found["relevance"]["levels"] == dict(sorted(levels.items()))
    assert found["positives"]["mean"] == pytest.approx(5 / 4) and found["negatives"]["mean"] == pytest.approx(2 / 4)
    assert found["contradictions"] == 1  # the German passage answers the first question, says the last record
    lengths = [len(document["content"]) for document in documents]
    assert texts["characters"]["mean"] == pytest.approx(np.mean(lengths), abs=1e-5)
    assert texts["characters"]["percentiles"]["50"] == np.median(lengths)
    assert sum(texts["characters"]["histogram"]["all"]) == 7
    assert found["scores"]["positives"]["mean"] == pytest.approx((0.9 + 0.7 + 0.5) / 3)
    assert found["scores"]["negatives"]["percentiles"]["100"] == pytest.approx(0.8)
    assert (found["scores"]["compared"], found["scores"]["positive_first"]) == (2, 0.5)
    assert sum(map(sum, found["scores"]["histogram"].values())) == 5
    assert [level["counts"] for level in found["labels"]] == [
        {"water": 3, "air": 1}, {"river": 2, "lake": 1, "wind": 1}]  # fmt: skip
    assert found["fields"] == {"instruction": 1, "labels": 4, "negatives": 2, "relevance": 1, "score": 2}
    assert found["instructions"]["counts"] == {"Find it": 1}
    assert queries["languages"] == {"sampled": 4, "counts": {"en": 3, "de": 1}}
    assert texts["languages"]["counts"]["de"] == 3
    near = texts["near_duplicate_texts"]
    assert (near["texts"], near["of"], near["groups"], near["members"]) == (4, 7, 1, 2)
    assert {PASSAGE, PASSAGE.replace("above it", "above them")} == {one["text"] for one in near["shown"][0]}


def test_numbers_of_a_shipped_set_are_those_of_its_files(inspected: Any, tmp_path: Path) -> None:
    (found,) = inspected(ROOT / "data/dbpedia-entity", "--format", "beir", "--sample", 50)
    judged: dict[str, dict[str, int]] = {}
    for line in (ROOT / "data/dbpedia-entity/qrels/train.tsv").read_text().splitlines()[1:]:
        query, document, score = line.split("\t")
        judged.setdefault(query, {})[document] = int(score)
    judged = {query: rows for query, rows in judged.items() if any(score > 0 for score in rows.values())}
    scores = Counter(score for rows in judged.values() for score in rows.values())
    assert found["records"] == len(judged)
    assert found["relevance"]["levels"] == {str(score): count for score, count in sorted(scores.items())}
    assert found["documents"]["contents"] == sum(scores.values())
    assert found["documents"]["languages"]["sampled"] == 50
    assert found["documents"]["near_duplicate_texts"]["of"] == sum(scores.values())


def test_contents_are_equal_where_mining_takes_them_for_equal(tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "red"), ("c.png", "blue")):
        PIL.Image.new("RGB", (20, 10), colour).save(tmp_path / name)
    (tmp_path / "s.wav").write_bytes(b"RIFF0000")
    media = MediaStore(tmp_path)
    keys, mining = Keys(media), _Reader(media, "raise", None)
    sound = {"audio": str(tmp_path / "s.wav")}
    contents = ["Ａ red\n bus", "a RED bus", "a red bus.", {"image": "a.png"}, {"image": "b.png"}, {"image": "c.png"},
                {"image": "a.png", "text": "a red bus"}, {"video": ["a.png", "c.png"]},
                {"images": ["a.png", "c.png"]}, sound]  # fmt: skip
    for content in map(to_content, contents):
        assert keys.key(content, "x:1") == mining._key(content, "x:1")[0]
    assert len({keys.key(to_content(content), "x:1") for content in contents}) == 8


def test_pictures_are_shown_compared_and_measured(inspected: Any, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, 255, (3, 12, 16, 3), np.uint8)
    first, second, third = (PIL.Image.fromarray(one).resize((160, 120), PIL.Image.Resampling.BICUBIC) for one in rows)
    first.save(tmp_path / "a.png")
    first.save(tmp_path / "a-again.png")
    first.save(tmp_path / "a-poor.jpg", quality=60)
    second.save(tmp_path / "b.png")
    third.resize((80, 60)).save(tmp_path / "c.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000] + b"IEND")
    names = ["a.png", "a-again.png", "a-poor.jpg", "b.png", "c.png", "torn.png"]
    records = [{"query": f"picture {name}", "documents": [{"content": {"image": name}}]} for name in names]
    (found,) = inspected(_write(tmp_path / "x.jsonl", records))
    side = found["documents"]
    assert side["kinds"] == {"image": 6} and found["fields"] == {"image": 6}
    assert side["distinct"] == 5  # a.png and a-again.png are the same bytes
    assert side["most_repeated"][0]["count"] == 2
    pixels = side["pictures"]["pixels"]
    assert (pixels["count"], pixels["percentiles"]["0"], pixels["percentiles"]["100"]) == (6, 80 * 60, 160 * 120)
    looks = side["near_duplicate_pictures"]
    assert [sorted(Path(one["picture"]).name for one in group) for group in looks["shown"]] == [
        ["a-again.png", "a-poor.jpg", "a.png"]]  # fmt: skip
    assert looks["damaged"] == 1 and "torn.png" in looks["damaged_shown"][0]
    assert _page(tmp_path).count("data:image/jpeg;base64,") >= 5 + 3 + 1
    assert "picture cannot be opened" in _page(tmp_path)


def test_raw_documents_have_one_side(inspected: Any, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(f"{PASSAGE}\n\n{GERMAN}\n\n{PASSAGE}\n", encoding="utf-8")
    (found,) = inspected(tmp_path / "x.txt", "--format", "documents")
    assert found["records"] == 3 and found["queries"] is None and found["relevance"]["count"] == 0
    assert (found["documents"]["contents"], found["documents"]["distinct"]) == (3, 2)
    assert found["documents"]["languages"]["counts"] == {"en": 2, "de": 1}


def test_options_and_root_reach_the_format(inspected: Any) -> None:
    (found,) = inspected("story-pages", "--format", "beir", "--root", ROOT / "data", "--options", "lang=sw")
    languages = found["queries"]["languages"]["counts"]
    assert max(languages, key=languages.__getitem__) == "sw"


def test_broken_lines_and_missing_pictures_are_counted_by_kind_with_their_places(
    inspected: Any, tmp_path: Path
) -> None:
    good = {"query": "a", "documents": [{"content": "b"}]}
    picture = {"query": "a", "documents": [{"content": {"image": "gone.png"}}]}
    rows = ["{broken", good, '{"query": "x"}', picture, picture, {**good, "relevancy": 1}, "[1]", good]
    (found,) = inspected(_write(tmp_path / "x.jsonl", rows))
    assert found["records"] == 2
    assert found["bad"]["kinds"] == {"not JSON": 2, "image missing": 2, "missing key": 1, "unknown key": 1}
    places = {kind: [one.split(": ")[0].rpartition(":")[2] for one in shown]
              for kind, shown in found["bad"]["shown"].items()}  # fmt: skip
    assert places == {"not JSON": ["1", "7"], "image missing": ["4", "5"], "missing key": ["3"], "unknown key": ["6"]}
    assert "gone.png: there is no such file" in _page(tmp_path)


def test_a_file_of_broken_lines_alone_is_reported(inspected: Any, tmp_path: Path) -> None:
    (found,) = inspected(_write(tmp_path / "x.jsonl", ["{", "}"]))
    assert found["records"] == 0 and found["bad"]["kinds"] == {"not JSON": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["empty.jsonl"], "empty.jsonl: holds no record"),
        (["gone.jsonl"], "there is no"),
        ([], "give either a PATH, or a training run's --config"),
        (["x.jsonl", "--config", "y.yaml"], "give either a PATH"),
        (["x.jsonl", "--format", "jsonlines"], "did you mean 'jsonl'?"),
        (["x.jsonl", "--options", "split"], "--options: found 'split'; write key=value"),
        (["x.jsonl", "--options", "split=test"], "unknown option 'split'"),
        (["x.jsonl", "--sample", "0"], "--sample: found 0"),
        (["x.jsonl", "--generate", "9"], "no effect without --models"),
        (["--config", "y.yaml", "--format", "beir"], "--format: no effect with --config"),
        (["--config", "gone.yaml"], "gone.yaml"),
        (["x.jsonl", "--models", "gone", "mmembed-nano"], "cannot load 'gone'"),
    ],
)
def test_what_cannot_be_inspected_is_refused_with_the_reason(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "x.jsonl", [{"query": "a", "documents": [{"content": "b"}]}])
    (tmp_path / "empty.jsonl").write_text("")
    assert main([*arguments, "--output", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


def test_a_misspelt_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["x.jsonl", "--formt", "beir"])
    assert stopped.value.code == 2
    assert "did you mean '--format'?" in capsys.readouterr().err


class _Elements(HTMLParser):
    """Tags, attributes and text of a page, as a browser takes it apart."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = Counter[str](), set[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_hostile_texts_are_texts(inspected: Any, tmp_path: Path) -> None:
    hostile = """"><script>alert('x')</script><img src=x onerror="alert(1)">{{ 7 * 7 }}"""
    record = {"query": hostile, "documents": [{"content": hostile}, {"content": f"{hostile} 2", "relevance": 0}],
              "instruction": hostile, "labels": [hostile], "task": "retrieval"}  # fmt: skip
    broken = {"query": "a", "documents": [{"content": {"image": f"{hostile}.png"}}]}
    folder = tmp_path / "<u>&amp;"
    folder.mkdir()
    inspected(_write(folder / "x.jsonl", [record, record, broken, {"query": hostile, hostile: 1, "documents": []}]))
    page = _Elements()
    page.feed(_page(tmp_path))
    assert page.tags["script"] == 0 and page.tags["u"] == 0 and page.tags["img"] == 0
    assert not {name for name in page.attributes if name.startswith("on")}
    assert sum(text.count(hostile) for text in page.text) >= 5
    assert "49" not in "".join(text for text in page.text if "alert" in text)
    assert any("<u>&amp;" in text for text in page.text)


def _many(path: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            words = " ".join(f"w{word}" for word in generator.integers(0, 50_000, 12))
            record = {"query": f"{words} {number}", "documents": [{"content": words, "score": number / 7}]}
            file.write(json.dumps({**record, "labels": [f"label {number}"]}) + "\n")
    return path


def _peak(path: Path, folder: Path) -> int:
    data = DataConfig(train=(SourceConfig(path=str(path)),))
    statistics = Statistics(Reading(data.train[0], data), folder, sample=20)
    tracemalloc.start()
    statistics.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statistics.records > 1000
    return peak


def test_memory_does_not_grow_with_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_tools.inspection import sketches

    for name in ("NAMES", "VALUES"):  # bounds that the small file reaches, too
        monkeypatch.setattr(sketches, name, 500)
    small, large = (_peak(_many(tmp_path / f"{count}.jsonl", count), tmp_path) for count in (1_200, 5_000))
    # What grows is the buffer of three digests a record, of 8 bytes each, up to 2**16 of them.
    assert large - small < 3_800 * 3 * 8 * 1.3 + 50_000 < 0.3 * 3_800 * 160


def _config(tmp_path: Path, sources: list[dict[str, Any]], **changes: Any) -> Path:
    data = {"root": str(tmp_path), "train_group_size": 4, "train": sources, **changes.pop("data", {})}
    tree = {
        "model": {"name_or_path": "mmembed-nano", "dtype": "float32", "freeze": []},
        "data": data,
        "objective": {"type": "contrastive", "temperature": 0.05},
        "training": {"output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 8, "max_steps": 2},
        **changes,
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def _with_negatives(count: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"query": f"question {row}", "documents": [
            {"content": f"answer {row} a"}, {"content": f"answer {row} b"},
            *({"content": f"wrong {row} {one}", "relevance": 0, **more} for one in range(5))]}
        for row in range(count)
    ]  # fmt: skip


def test_a_query_meets_what_the_settings_of_a_run_give_it(
    inspected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    _write(tmp_path / "n.jsonl", _with_negatives(40))
    _write(tmp_path / "p.jsonl", [{"query": f"q {row}", "documents": [{"content": f"d {row}"}]} for row in range(40)])
    sources = [
        {"path": "n.jsonl"},
        {"path": "p.jsonl"},
        {"path": "n.jsonl", "name": "alone", "in_batch_negatives": False},
    ]
    found = inspected("--config", _config(tmp_path, sources))
    meets = {one["source"]: [one["use"][key] for key in ("positives", "own_negatives", "in_batch_negatives")]
             for one in found}  # fmt: skip
    # Batches of 8 queries; of n.jsonl each brings one of its two positives and three of its five negatives.
    assert meets == {"n.jsonl": [1, 3, 7 * 4], "p.jsonl": [1, 0, 7], "alone": [1, 3, 0]}
    assert all(one["use"]["refused"] == [] and one["use"]["unused"] == {} for one in found)
    assert [one["use"]["used"] for one in found] == [["negatives"], [], ["negatives"]]


def test_what_training_refuses_is_said_of_the_source_and_the_others_are_counted(
    inspected: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recipes.train_embedder import main as train

    monkeypatch.setenv("MMEMBED_CACHE", str(tmp_path / "cache"))
    _write(tmp_path / "scored.jsonl", _with_negatives(20, score=0.5))
    _write(tmp_path / "few.jsonl", _with_negatives(3))
    _write(tmp_path / "fine.jsonl", _with_negatives(20))
    sources = [{"path": "scored.jsonl"}, {"path": "fine.jsonl"}, {"path": "gone.jsonl"}]
    config = _config(tmp_path, sources[:2])
    found = {one["source"]: one["use"] for one in inspected("--config", config)}
    assert list(found["scored.jsonl"]["unused"]) == ["score"] and found["scored.jsonl"]["positives"] is None
    assert found["fine.jsonl"]["refused"] == [] and found["fine.jsonl"]["own_negatives"] == 3
    capsys.readouterr()
    assert train(["--config", str(config)]) == 2
    assert found["scored.jsonl"]["refused"][0] in capsys.readouterr().err

    config = _config(tmp_path, sources[:2], data={"ignore_fields": ["score", "negatives"]})
    found = {one["source"]: one["use"] for one in inspected("--config", config)}
    assert found["scored.jsonl"]["refused"] == [] and found["scored.jsonl"]["ignored"] == ["negatives", "score"]
    assert list(found["scored.jsonl"]["unused"]) == ["score"] and found["scored.jsonl"]["own_negatives"] == 3
    assert "as data.ignore_fields allows" in _page(tmp_path)

    config = _config(tmp_path, [{"path": "few.jsonl"}])
    (few,) = inspected("--config", config)
    assert "few.jsonl' has 3 rows" in few["use"]["refused"][0]


def test_sigterm_ends_it_with_130(tmp_path: Path) -> None:
    path = _many(tmp_path / "x.jsonl", 60_000)
    command = [sys.executable, "-m", "data_tools.inspect", str(path), "--output", str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / ".owner").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 130
    assert not (tmp_path / "out" / "report.json").exists()
