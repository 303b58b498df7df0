"""Every stage that a fenced YAML block of the docs shows is built as it stands there."""

import json
import re
from pathlib import Path

import pytest
import yaml
from families import picture

from data_tools.synthesis.stages import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "synthesis.md", *sorted((ROOT / "docs" / "stages").glob("*.md"))]
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
STAGE = re.compile(r"\s*- (\{type: .*|[a-z_]+\s*(#.*)?)")
OF_THE_RUN = ("generator", "name")  # keys of an entry that are no options of its stage


def shown():
    for page in PAGES:
        for block in BLOCK.findall(page.read_text(encoding="utf-8")):
            for line in filter(STAGE.fullmatch, block.splitlines()):
                (entry,) = yaml.safe_load(line)
                yield pytest.param(entry, id=f"{page.stem}: {line.strip()}"[:70])


SHOWN = list(shown())


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with the files that the docs name."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs", "my", "photographs", "path"):
        (tmp_path / folder).mkdir()
    (tmp_path / "runs" / "embedder").symlink_to(ROOT / "mmembed" / "nano")
    (tmp_path / "path" / "modules.json").write_text("[]")  # what a folder of sentence-transformers is known by
    for name, data in (("squad-en", "squad-en"), ("my-set", "squad-en"), ("dbpedia-entity", "dbpedia-entity")):
        (tmp_path / name).symlink_to(ROOT / "data" / data)
    for file in ("corpus.jsonl", "my/dev.jsonl"):
        (tmp_path / file).write_text(json.dumps({"id": "one", "text": "A heron waits."}) + "\n")
    picture(1, 50, 50).save(tmp_path / "photographs" / "one.png")
    return tmp_path


def test_there_are_some():
    assert len(SHOWN) > 15
    assert {"filters", "refining", "writing", "synthesis"} == {one.id.split(":")[0] for one in SHOWN}


@pytest.mark.parametrize("entry", SHOWN)
def test_a_stage_of_the_docs_is_built(entry, root):
    entry = {"type": entry} if isinstance(entry, str) else {k: v for k, v in entry.items() if k not in OF_THE_RUN}
    assert STAGES.build(entry, below_root=root.joinpath).name == entry["type"]
