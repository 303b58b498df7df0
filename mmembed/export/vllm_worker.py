"""vLLM's offline engine on one folder: `mmembed.export.vllm_runtime` starts it in the environment that has vLLM.

    {"model": ..., "kind": "embedder", "template": ..., "engine": {...}, "inputs": [{"messages": [...]}, ...]}   in
    {"results": [[0.1, ...], ...], "vllm": "0.32.0"}                                                            out

Inputs are written as the folder's card tells: an embedder's prompt by the chat template, with the pictures beside it; a
reranker's pair as it is, with the template beside it. Pictures are PNG in base64. Imports nothing of mmembed.
"""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from typing import Any


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(sys.stdin.read())
    import vllm
    from vllm import LLM

    engine = LLM(job["model"], **job["engine"])
    results = (scores if job["kind"] == "reranker" else vectors)(engine, job)
    answers.write(json.dumps({"results": results, "vllm": vllm.__version__}))
    answers.close()
    return 0


def vectors(engine: Any, job: dict[str, Any]) -> list[list[float]]:
    tokenizer = engine.get_tokenizer()
    prompts = []
    for one in job["inputs"]:
        pictures = [picture(part["image"]) for part in parts_of(one["messages"]) if part["type"] == "image"]
        prompt: dict[str, Any] = {
            "prompt": tokenizer.apply_chat_template(one["messages"], chat_template=job["template"], tokenize=False)
        }
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
        prompts.append(prompt)
    outputs = engine.embed(prompts, use_tqdm=False, tokenization_kwargs={"add_special_tokens": False})
    return [list(output.outputs.embedding) for output in outputs]


def scores(engine: Any, job: dict[str, Any]) -> list[list[float]]:
    found = []
    for one in job["inputs"]:
        query, document = ({"content": [sent(part) for part in one[side]]} for side in ("query", "document"))
        query, document = (plain(side) for side in (query, document))
        [output] = engine.score(query, document, use_tqdm=False, chat_template=job["template"])
        found.append([float(output.outputs.score)])
    return found


def plain(side: dict[str, Any]) -> Any:
    """A text as a text: what a model without pictures takes."""
    parts = side["content"]
    return parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else side


def sent(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return part
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + part["image"]}}


def parts_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for message in messages for part in message["content"]]


def picture(encoded: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


if __name__ == "__main__":
    sys.exit(main())
