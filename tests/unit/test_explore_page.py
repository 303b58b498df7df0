"""The page of `mmembed explore` in a real browser, a headless Chromium, served by the real command.

Screenshots of what the tests see are written to pytest's folder of the module.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from families import build, picture

from mmembed.models.checkpoint import save_checkpoint

for package in ("gradio", "playwright"):
    pytest.importorskip(package, reason=f"{package} is not here; make env installs it")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; install the system's package chromium"),
]
TEXTS = ["a red bus in the town", "a blue train on the river", "bread and butter", "a letter from the sea", "a dog"]

PARTS = "h1, h3, p, textarea, input[type=number], .rankings, .hit, .plotly, button"
NARROW = f"""document.documentElement.scrollWidth <= innerWidth &&
[...document.querySelectorAll('{PARTS}')].every(one => one.getBoundingClientRect().right <= innerWidth)"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    rows = [{"id": f"d{place}", "text": text} for place, text in enumerate(TEXTS)]
    for number in range(4):
        picture(number, 120, 80).save(folder / f"{number}.png")
        rows.append({"id": f"p{number}", "image": f"{number}.png"})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.png").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def other(family_folder):
    """An untrained model."""
    return family_folder("qwen3_vl")


@pytest.fixture(scope="module")
def judge(other, folder):
    words = ["a", "b"]
    parts = build(other, head={"type": "yes_no", "words": words}, prompt={"type": "judge", "words": words})
    save_checkpoint(folder / "judge", *parts)
    return folder / "judge"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = [] if os.geteuid() else ["--no-sandbox"]  # which Chromium refuses to root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


NOTES = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        where = arguments[1] if event == "socket.connect" else arguments[0]
        with open({file!r}, "a") as file:
            print(where[0] if isinstance(where, tuple) else where, file=file)
sys.addaudithook(note)
"""


class Served:
    """The command, running, with a proxy that is not there; which machines it asks for is noted."""

    def __init__(self, temporary, notes, *arguments):
        notes.mkdir()
        self.asked = notes / "asked"
        (notes / "sitecustomize.py").write_text(NOTES.format(file=str(self.asked)))
        command = [sys.executable, "-m", "mmembed", "explore", *map(str, arguments), "--port", "0"]
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.2:9")
        environment = {**os.environ, **proxies, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        environment["PYTHONPATH"] = str(notes)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
        self.told = self.process.stdout.readline()
        if not self.told:
            pytest.fail(self.process.stderr.read())
        self.address = self.told.split()[0]

    def end(self, ending):
        """What was on stderr when a signal ended it; the exit code."""
        self.process.send_signal(ending)
        _, errors = self.process.communicate(timeout=30)
        return errors, self.process.returncode

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def served(folder, other, judge):
    """Two models and a reranker over a corpus that is encoded first."""
    models = ["mmembed-nano", other]
    served = Served(
        folder,
        folder / "notes",
        folder / "corpus.jsonl",
        "--model",
        *models,
        "--rerank",
        judge,
        "--dtype",
        "float32",
        "--top-k",
        "4",
    )
    yield served
    served.close()


def opened(browser, served, width=1280, height=800):
    """The page; requests to other machines and errors of scripts fail the test when it ends."""
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(30_000)
    page.asked, page.broken = set(), []
    page.on("request", lambda request: page.asked.add(urlsplit(request.url).hostname))
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(served.address)
    page.get_by_label("Query").wait_for()
    return page


def closed(page, folder, name):
    page.screenshot(path=folder / f"{name}.png", full_page=True)
    assert page.evaluate(NARROW), "the page is wider than the window"
    assert page.asked - {None, ""} == {"127.0.0.1"} and page.broken == []
    page.close()


def ask(page, text):
    page.get_by_label("Query").fill(text)
    page.get_by_label("Query").press("Enter")


def titles(page):
    return page.locator(".rankings h3").all_inner_texts()


def first(page, column):
    return page.locator(".rankings section").nth(column).locator(".hit").first


def test_a_typed_query_shows_models_and_reranker_side_by_side(browser, served, folder):
    page = opened(browser, served)
    ask(page, TEXTS[1])
    page.locator(".hit").first.wait_for()
    assert titles(page) == ["mmembed-nano", "mmembed-nano, then judge", "qwen3_vl", "qwen3_vl, then judge"]
    for column in (0, 2):
        assert TEXTS[1] in first(page, column).inner_text()
    boxes = [page.locator(".rankings section").nth(column).bounding_box() for column in range(4)]
    assert len({box["y"] for box in boxes}) == 1 and [box["x"] for box in boxes] == sorted(box["x"] for box in boxes)
    marks = page.locator(".mark").all_inner_texts()
    assert len(marks) == 16 and all(re.fullmatch(r"=|[▲▼] \d|only here(, \d there)?|was \d", mark) for mark in marks)
    closed(page, folder, "models")


def test_the_reranker_can_be_left_out(browser, served, folder):
    page = opened(browser, served)
    page.get_by_label("Rerank").uncheck()
    ask(page, TEXTS[1])
    page.locator(".hit").first.wait_for()
    assert titles(page) == ["mmembed-nano", "qwen3_vl"]
    closed(page, folder, "without")


def test_a_dropped_image_finds_itself(browser, served, folder):
    page = opened(browser, served)
    page.locator("input[type=file]").set_input_files(folder / "2.png")
    page.locator(".hit").first.wait_for()
    assert (
        "p2" in first(page, 0).inner_text() and first(page, 0).locator("img").evaluate("one => one.naturalWidth") == 120
    )
    closed(page, folder, "image")


def test_a_broken_image_and_an_empty_query_are_told(browser, served, folder):
    page = opened(browser, served)
    page.locator("input[type=file]").set_input_files(folder / "broken.png")
    page.get_by_text("the query's image: damaged, or no image").wait_for()
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.get_by_role("button", name="Search").click()
    page.get_by_text("the query is empty").wait_for()
    closed(page, folder, "refused")


def test_the_map_shows_documents_results_and_texts(browser, served, folder):
    page = opened(browser, served)
    ask(page, TEXTS[1])
    page.locator(".hit").first.wait_for()
    page.get_by_role("tab", name="Map").click()
    plots = page.get_by_test_id("plotly")
    plots.nth(1).locator(".point").first.wait_for()
    points = [plots.first.locator(".trace").nth(trace).locator(".point") for trace in range(3)]
    assert [one.count() for one in points] == [9, 1, 4]
    box = points[2].last.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.locator(".hoverlayer .hovertext").first.wait_for()
    assert re.search(r"[dp]\d", page.locator(".hoverlayer").first.text_content())
    assert page.get_by_text(re.compile("9 documents; two directions")).count() == 2
    closed(page, folder, "map")


def test_on_a_phone_nothing_scrolls_sideways(browser, served, folder):
    page = opened(browser, served, 360, 740)
    ask(page, TEXTS[1])
    page.locator(".hit").first.wait_for()
    page.wait_for_function("document.querySelector('.rankings').getBoundingClientRect().top < innerHeight")
    assert page.evaluate(NARROW)
    page.get_by_role("tab", name="Map").click()
    page.get_by_test_id("plotly").first.locator(".point").first.wait_for()
    closed(page, folder, "phone")


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_encoded_folder_is_served_until_the_end_and_uploads_go(browser, folder, tmp_path, ending):
    from mmembed.cli import main

    target = folder / f"{ending.name}.enc"
    assert main(["encode", str(folder / "corpus.jsonl"), "--output", str(target)]) == 0
    served = Served(tmp_path, folder / ending.name, target)
    try:
        page = opened(browser, served)
        ask(page, TEXTS[4])
        page.locator(".hit").first.wait_for()
        assert titles(page) == ["mmembed-nano"] and TEXTS[4] in first(page, 0).inner_text()
        assert page.locator(".mark").count() == 0
        page.locator("input[type=file]").set_input_files(folder / "2.png")
        first(page, 0).locator("img").wait_for()
        closed(page, folder, "folder")
        assert list(tmp_path.rglob("2.png"))
        assert served.end(ending) == ("", 0)
        assert not list(tmp_path.iterdir())
        assert set(served.asked.read_text().split()) <= {"127.0.0.1", "localhost"}
    finally:
        served.close()
    assert served.told.startswith("http://127.0.0.1:") and "Ctrl-C ends it" in served.told
