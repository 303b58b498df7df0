"""The documents do not drift from the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_methods_tables_are_current():
    done = subprocess.run(
        [sys.executable, "tools/methods_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    missing = [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"\b((?:recipes|tools|data_tools|eval|benchmarks)/[\w/]+\.(?:py|yaml|sh))\b", text)
    missing += [path for path in named if not (ROOT / path).exists()]
    assert not missing, f"{page.name} names what does not exist: {missing}"


def test_every_yaml_block_of_the_readme_is_a_valid_run():
    import yaml

    from mmembed.config import _Loader, build_config  # the loader that runs are read with

    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    for block in blocks:
        build_config(yaml.load(block, _Loader))
