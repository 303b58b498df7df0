"""The page: Gradio's parts around an `Explorer`.

It asks no other machine for anything: Gradio's telemetry is off, fonts are those of the machine that looks, pictures
are part of what is sent.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from html import escape
from pathlib import Path
from threading import Event
from typing import Any

import gradio
from gradio.components.plot import PlotData

from mmembed.charts import PAGES
from mmembed.errors import MmembedError
from mmembed.explore.cards import cards, refusal
from mmembed.explore.comparison import Explorer, Question
from mmembed.explore.projection import figure, project
from mmembed.media import MediaStore

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MOST = 50  # hits of a ranking that the page offers
SCROLL = "() => { if (innerWidth < 640) document.querySelector('.found').scrollIntoView({behavior: 'smooth'}) }"


def serve(
    explorer: Explorer, media: MediaStore, name: str, *, host: str, port: int, top_k: int, ready: Callable[[str], Any]
) -> None:
    """Shows the page until Ctrl-C or SIGTERM. Gradio keeps uploads in the folder that GRADIO_TEMP_DIR names.

    Args:
        media: opens the documents' pictures.
        name: of what is explored, for the title.
        ready: is told the page's address when it can be opened.
    """
    page = build_page(explorer, media, name, top_k)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=media.limits.max_bytes,
        theme=gradio.themes.Default(font=FONTS, font_mono=["monospace"]),
        css_paths=PAGES / "explore.css",
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ready(address)
        Event().wait()
    except KeyboardInterrupt:
        return
    finally:
        page.close(verbose=False)


def build_page(explorer: Explorer, media: MediaStore, name: str, top_k: int) -> gradio.Blocks:
    """The page's parts, and what happens when something is asked."""
    sides = explorer.documents.sides
    planes = [project(side) for side in sides]
    items = explorer.documents.items({int(row) for plane in planes for row in plane.rows})

    def plot(place: int, *found: Any) -> PlotData:
        return PlotData(type="plotly", plot=json.dumps(figure(planes[place], sides[place], items, *found)))

    def ask(
        text: str | None, image: dict[str, Any] | None, instruction: str | None, shown: float, rerank: bool
    ) -> list[Any]:
        picture = None if image is None else Path(image["path"]).read_bytes()
        try:
            answer = explorer.ask(
                Question(text or "", picture, (instruction or "").strip() or None, int(shown), rerank)
            )
        except MmembedError as error:
            return [refusal(str(error)), *(plot(place) for place in range(len(sides)))]
        found = [(answer.last(place).hits, answer.vectors[place]) for place in range(len(sides))]
        return [cards(answer, media), *(plot(place, *one) for place, one in enumerate(found))]

    with gradio.Blocks(title=f"mmembed explore {name}", analytics_enabled=False) as page:
        models = " and ".join(side.name for side in sides)
        reranks = explorer.reranker is not None
        behind = f", reranked by {explorer.reranker[0]}" if explorer.reranker is not None else ""
        _html(_heading("h1", name, f"{len(explorer.documents):,} documents, found by {models}{behind}"))
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                text = gradio.Textbox(label="Query", placeholder="Type a text", autofocus=True)
                image = gradio.Image(label="Image", sources=["upload", "clipboard"], height=180)
                instruction = gradio.Textbox(label="Instruction", placeholder="None: the model's own")
                shown = gradio.Slider(1, max(MOST, top_k), value=top_k, step=1, label="Results")
                rerank = gradio.Checkbox(reranks, label="Rerank", visible=reranks)
                search = gradio.Button("Search", variant="primary")
            with gradio.Column(scale=3, min_width=300, elem_classes="found"), gradio.Tabs():
                with gradio.Tab("Results"):
                    results = _html('<p class="about">Type a query, or drop an image.</p>')
                with gradio.Tab("Map"), gradio.Row():
                    plots = []
                    for place, side in enumerate(sides):
                        with gradio.Column(min_width=300):
                            _html(_heading("h3", side.name, planes[place].title))
                            plots.append(gradio.Plot(plot(place), show_label=False))
        asked = {
            "fn": ask,
            "inputs": [text, image, instruction, shown, rerank],
            "outputs": [results, *plots],
            "preprocess": False,  # an image comes as its file; whether it can be opened is the explorer's to say
            "api_visibility": "private",
            "concurrency_limit": 1,
            "concurrency_id": "ask",
            "show_progress_on": results,
        }
        answered = gradio.on([search.click, text.submit, instruction.submit, image.upload], **asked)
        answered.then(None, js=SCROLL)
    return page


def _heading(level: str, name: str, about: str) -> str:
    return f'<{level}>{escape(name)}</{level}><p class="about">{escape(about)}</p>'


def _html(text: str) -> gradio.HTML:
    """HTML in our own style alone."""
    return gradio.HTML(text, apply_default_css=False)
