"""What the real worker and the real server of vLLM are asked and say, kept for tests where there is no vLLM.

python -m tests.synthesis.record         writes tests/synthesis/recorded.json; needs `make vllm-env`
"""

import base64
import json
import shlex
import tempfile
from pathlib import Path

from data_tools.generators import GENERATORS, Request, RequestFailed, Sampling
from data_tools.generators.child import vllm_python
from mmembed.media import MediaStore
from tests.synthesis.conftest import ENGINE
from tests.synthesis.servers import RecordingProxy
from tests.synthesis.stand_in import RECORDED

PICTURE = base64.b64decode(  # 4 x 4 pixels of red
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAIAAAAmkwkpAAAAEElEQVR42mM4wcUFRwzEcQBxow3BFUWSxAAAAABJRU5ErkJggg=="
)
SCHEMA = {
    "type": "object",
    "properties": {"query": {"type": "string", "maxLength": 20}, "level": {"type": "integer", "enum": [0, 1, 2, 3]}},
    "required": ["query", "level"],
    "additionalProperties": False,
}


def _request(key, content, schema=None, **sampling):
    messages = ({"role": "system", "content": "Answer."}, {"role": "user", "content": content})
    return Request(key, messages, Sampling(**{"max_tokens": 16, "seed": 3, **sampling}), schema)


CASES = (
    _request("text", "a red bus"),
    _request("schema", "a red bus", SCHEMA, max_tokens=64),
    _request("picture", [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is it?"}]),
    _request("stop", "a red bus", SCHEMA, stop=("level",), max_tokens=64),
    _request("length", "a red bus", SCHEMA, max_tokens=3),
    _request("greedy", "caf\u00e9 \u2603", temperature=0.0, top_p=0.5),
    _request("too long", "word " * 600),
    _request("wrong schema", "a red bus", {"type": "nonsense"}),
)


def main():
    recorded = {"worker": _worker(), "server": _server()}
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


def ask(generator):
    """The answers to all cases by key, or the kinds of their failures."""
    futures = {case.key: generator.submit(case) for case in CASES}
    answers = {}
    for key, future in futures.items():
        try:
            answers[key] = future.result(300)
        except RequestFailed as error:
            answers[key] = error.kind
    return answers


def _worker():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        python = shlex.quote(str(Path(vllm_python(None, "record")).absolute()))
        listening = folder / "python"
        listening.write_text(f'#!/bin/sh\ntee {folder}/in | {python} "$@" | tee {folder}/out\n')
        listening.chmod(0o755)
        generator = GENERATORS.build(
            {"type": "vllm", "model": "mmembed-nano", "python": str(listening), "engine": ENGINE}
        )
        generator.start(MediaStore())
        try:
            ask(generator)
        finally:
            generator.close()
        first, *asked = [json.loads(line) for line in (folder / "in").read_text().splitlines()]
        ready, *said = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    answers = {one.pop("id"): one for one in said}
    first["model"] = "mmembed-nano"
    return {"first": first, "ready": ready, "exchanges": [[one, answers[one.pop("id")]] for one in asked]}


def _server():
    served = GENERATORS.build({"type": "openai", "model": "mmembed-nano", "serve": {"options": ENGINE}})
    served.start(MediaStore())
    proxy = RecordingProxy(served.server.port)
    try:
        generator = GENERATORS.build({"type": "openai", "model": "mmembed-nano", "url": proxy.url})
        generator.start(MediaStore())
        ask(generator)
        generator.close()
    finally:
        served.close()
        proxy.close()
    return proxy.exchanges


if __name__ == "__main__":
    main()
