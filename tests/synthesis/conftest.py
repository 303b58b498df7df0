"""Generators: one that a test scripts, and real ones that are started once: the nano model in this process, behind a
server, and in vLLM where it is there."""

import json
from pathlib import Path

import pytest

from data_tools import generators
from data_tools.generators import GENERATORS, GeneratorDown
from data_tools.generators.child import vllm_python
from data_tools.synthesis.stages import STAGES, Context, Dropped, Items, Trimmed
from mmembed.media import MediaStore
from tests.synthesis.scripted import Scripted
from tests.synthesis.servers import ChatServer, answering_with

# float32: in bfloat16 an answer may depend on what else is in the batch
ENGINE = {
    "dtype": "float32",
    "max_model_len": 512,
    "enforce_eager": True,
    "max_num_seqs": 32,
    "kv_cache_memory_bytes": 1 << 28,
}


@pytest.fixture
def scripted(monkeypatch):
    """The class of a generator `scripted`; set its `script`."""
    kind = type("Scripted", (Scripted,), {"name": "scripted", "asked": [], "started": 0})
    classes = {**generators.GENERATORS.classes(), "scripted": kind}
    monkeypatch.setattr(generators.GENERATORS, "_classes", classes)
    return kind


@pytest.fixture
def write_lines(tmp_path):
    def write(name: str, rows) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def sift(tmp_path):
    """Applies one filter to items: what is kept, why items are dropped, what is taken out of records, and the notes."""

    def call(block, items, kind="records", media=None, seed=0):
        path = tmp_path / "items-of-a-test.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        stage = STAGES.build(block, below_root=lambda name: Path(name).absolute())
        assert stage.gives(kind) == kind
        folder = tmp_path / f"01-{stage.name}"
        folder.mkdir(exist_ok=True)
        context = Context(seed, media or MediaStore(None), folder, lambda name: Path(name).absolute())
        made = list(stage.apply(Items(path, len(items)), context))
        kept = [one for one in made if isinstance(one, dict)]
        dropped = {one.item["id"]: one.reason for one in made if isinstance(one, Dropped)}
        trimmed = [(one.item, one.document["content"], one.reason) for one in made if isinstance(one, Trimmed)]
        assert len(kept) + len(dropped) == len(items)
        return kept, dropped, trimmed, context.notes

    return call


@pytest.fixture(scope="session")
def need_vllm():
    """Skips where there is no environment with vLLM, and says what makes one."""
    try:
        vllm_python(None, "tests")
    except GeneratorDown as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A media folder: red.png, noise.jpg, half.jpg (truncated)."""
    import numpy as np
    import PIL.Image

    folder = tmp_path_factory.mktemp("media")
    PIL.Image.new("RGB", (120, 80), (200, 10, 10)).save(folder / "red.png")
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "noise.jpg")
    encoded = (folder / "noise.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(encoded[: len(encoded) // 2])
    return MediaStore(folder)


@pytest.fixture(scope="session")
def started(request, store):
    """started(name, **block) -> a generator that is closed after the last test; one a name."""
    running = {}

    def get(name, **block):
        if name not in running:
            running[name] = GENERATORS.build(block)
            request.addfinalizer(running[name].close)
            running[name].start(store)
        return running[name]

    return get


@pytest.fixture(scope="session")
def nano(started):
    return started("transformers", type="transformers", model="mmembed-nano", batch_size=8)


@pytest.fixture(scope="session")
def behind_http(started, nano, request):
    """The nano model behind a server of the chat API."""
    server = ChatServer(answering_with(nano), model="mmembed-nano")
    request.addfinalizer(server.close)
    return started("openai", type="openai", model="mmembed-nano", url=server.url, concurrency=8)


@pytest.fixture(scope="session")
def vllm(need_vllm, started):
    return started("vllm", type="vllm", model="mmembed-nano", engine=ENGINE)


@pytest.fixture(scope="session")
def served(need_vllm, started):
    return started("served", type="openai", model="mmembed-nano", serve={"options": ENGINE}, concurrency=32)


KINDS = [
    "nano",
    "behind_http",
    pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow]),
    pytest.param("served", marks=[pytest.mark.vllm, pytest.mark.slow]),
]


@pytest.fixture(scope="session", params=KINDS)
def generator(request):
    return request.getfixturevalue(request.param)
