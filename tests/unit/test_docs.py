"""The documents do not drift from the code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import yaml

from mmembed.config import _Loader, build_config, load_config  # the loader that runs are read with
from mmembed.data.dataset import RecordDataset, locate, media_store
from mmembed.data.format_base import FORMATS
from mmembed.data.pair_base import PAIR_MAKERS
from mmembed.data.records import parse_record
from mmembed.heads import HEADS
from mmembed.mining import MINERS
from mmembed.objectives import build_objective
from mmembed.pooling import POOLINGS
from mmembed.prompts import PROMPTS
from mmembed.training.batch_report import check_sources
from tests.contract.options import label_vectors

ROOT = Path(__file__).resolve().parents[2]
COMBINATIONS = ROOT / "docs" / "methods" / "combinations.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_methods_tables_are_current():
    done = subprocess.run(
        [sys.executable, "-m", "tools.methods_tables", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", sorted(set((ROOT / "docs" / "methods").glob("*.md")) - {COMBINATIONS}), ids=lambda page: page.stem
)
def test_the_line_of_yaml_of_every_method_is_its_defaults(page):
    text = page.read_text(encoding="utf-8")
    entries = re.findall(r"^## (\w+)\n.*?```yaml\n(.*?)```", text, flags=re.S | re.M)
    assert len(entries) == len(re.findall(r"^## ", text, flags=re.M)) > 1
    for name, text in entries:
        tree = yaml.load(text, _Loader)
        normalize = tree.pop("normalize", True)
        ((key, written),) = tree.pop("data", tree).items()
        *beside, block = written if isinstance(written, list) else [written]
        assert block["type"] == name
        if key == "objective":
            folder = {"vectors": label_vectors()} if "vectors" in block else {}
            built = build_objective([*beside, block | folder] if beside else block | folder, embedding_size=256)
            assert normalize is not built.wants_lengths  # which the preflight holds against each other
        else:
            registries = {"pooling": POOLINGS, "prompt": PROMPTS, "pairs": PAIR_MAKERS, "head": HEADS}
            registry = registries.get(key, MINERS)
            assert key in registries or key in ("rules", "batch_order")
            given = {"hidden_size": 64} if key in ("pooling", "head") else {}
            registry.build(block, **given)


def test_methods_with_a_momentum_encoder_are_shown_as_their_papers_have_them():
    text = (ROOT / "docs" / "methods" / "objectives.md").read_text(encoding="utf-8")
    shown = [yaml.load(one, _Loader)["objective"] for one in re.findall(r"```yaml\n(objective: {.*?\n)```", text)]
    settings = {block["type"]: block for block in shown}
    assert_part_of({"momentum": 0.995, "alpha": 0.4, "size": 65536}, settings["tcl"])
    assert_part_of({"momentum": 0.995, "in_batch": True}, settings["negative_queue"])


def test_the_yaml_of_combinations_builds_and_its_claims_are_declared():
    text = COMBINATIONS.read_text(encoding="utf-8")
    blocks = [yaml.load(block, _Loader) for block in re.findall(r"```yaml\n(.*?)```", text, flags=re.S)]
    assert len(blocks) == 6
    for block in blocks:
        config = build_config(block)
        build_objective(config.objective, embedding_size=1024, depth=4)
        POOLINGS.build(config.pooling, hidden_size=64)
        for source in config.data.train:
            assert (ROOT / "data" / source.path).exists()
            FORMATS.build({"type": source.format, **source.options})
    verdicts = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    claims = [(name, line) for line in re.findall(r"here\*\*: (.*)", text) for name in re.findall(r"`(\w+)`", line)]
    assert len(claims) == 4
    for name, line in claims:
        assert (ROOT / "eval" / "claims" / "declared" / f"{name}.yaml").exists()
        verdict = re.search(rf"^## {name}\n.*?^Verdict: \*\*(.*?)\*\*", verdicts, flags=re.S | re.M)
        assert (verdict[1] if verdict else "not measured") in line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"\b((?:recipes|tools|data_tools|eval|benchmarks)/[\w/]+\.(?:py|yaml|sh))\b", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names what does not exist: {missing}"


def blocks(language):
    """The code blocks of the README in a language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)


def trainings():
    """The training commands of the README that name a shipped file: (file, overrides)."""
    commands = [shlex.split(line) for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    named = [words[words.index("--config") + 1 :] for words in commands if "--config" in words]
    return [(ROOT / words[0], words[1:]) for words in named if words[0].startswith("recipes/")]


def assert_part_of(part, whole, key=""):
    """Each key and value of a YAML tree is in another one; of a list some entries may be missing."""
    if isinstance(part, dict):
        for name, value in part.items():
            assert name in whole, f"{key}.{name}"
            assert_part_of(value, whole[name], f"{key}.{name}")
    elif isinstance(part, list) and isinstance(part[0], dict):
        assert all(entry in whole for entry in part), key
    else:
        assert part == whole, key


def test_the_yaml_of_the_readme_is_a_part_of_the_file_that_its_command_runs():
    """And what it names is there: sources are found, of the kind that it says, with a record of each."""
    (block,) = blocks("yaml")
    tree = yaml.load(block, _Loader)
    file = trainings()[0][0]
    assert_part_of(tree, yaml.load(file.read_text(encoding="utf-8"), _Loader))
    data = build_config(tree).data
    assert data.train and data.dev
    for source in (*data.train, *data.dev):
        reader = FORMATS.build({"type": source.format, **source.options})
        record = next(iter(reader.read(locate(source, ROOT / data.root))))
        assert parse_record(record, record["where"]).documents


def test_the_training_commands_of_the_readme_find_their_data(tmp_path):
    """One runs on the shipped sets, one on records like the README's own."""
    (record,) = [json.loads(block) for block in blocks("json")]
    (tmp_path / "img").mkdir()
    PIL.Image.new("RGB", (64, 64)).save(tmp_path / record["documents"][0]["content"]["image"])
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    shipped, own = (load_config(file, overrides) for file, overrides in trainings())
    for source in (*shipped.data.train, *shipped.data.dev):
        assert locate(source, ROOT / shipped.data.root)
    assert own.data.root == "/my/data"
    own = own.model_copy(update={"data": own.data.model_copy(update={"root": str(tmp_path)})})
    media = media_store(own.data)
    train, dev = (
        [RecordDataset(one, media, cache_dir=tmp_path / "cache", root=tmp_path) for one in sources]
        for sources in (own.data.train, own.data.dev)
    )
    check_sources(train, own, build_objective(own.objective), reads={"image", "video", "audio"})
    assert len(train[0]) == len(dev[0]) == 1
