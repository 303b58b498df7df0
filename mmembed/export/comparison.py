"""The same inputs through each runtime, and how far its results are from those of the model itself.

Everything is computed in float32, where equal arithmetic gives differences of rounding alone (1e-6), so that a prompt
that is written otherwise, another pooling or an adapter without effect shows as what it is. The reference is the
checkpoint as it was trained, its adapter beside the weights; `merged` is the same with the adapter in them.

Of an embedder vectors are compared, number by number; of a reranker the probabilities that the runtime gives as its
usual output.
"""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmembed import guard
from mmembed.content import Image, Text
from mmembed.errors import MmembedError
from mmembed.export import export
from mmembed.export.merging import merged
from mmembed.export.probing import Probe
from mmembed.export.subject import Refused, Subject
from mmembed.heads import log_odds
from mmembed.models.embedding_model import EmbeddingModel
from mmembed.models.probes import vectors_of
from mmembed.preprocess import Preprocessor
from mmembed.vllm_environment import find_vllm

RUNTIMES = ("sentence-transformers", "vllm", "vllm-server")
TOLERANCE = 1e-3  # of a number of a unit vector, or of a probability
Results = NDArray[np.float32]  # (N, E), of a reranker (N, 1)


@dataclass(frozen=True)
class Row:
    """How one runtime compares.

    Attributes:
        difference: the largest; None where there is none.
        at: the input that has it.
        note: why there is none.
        judged: whether the tolerance is still to be applied.
    """

    runtime: str
    inputs: int = 0
    difference: float | None = None
    at: str = ""
    note: str = ""
    judged: bool = True


def compare_all(subject: Subject, runtimes: Sequence[str], python: str | None = None, must: bool = False) -> list[Row]:
    """A row for the adapter in the weights, and one a runtime, through the folder that is exported for it.

    Args:
        subject: loaded without merging; its adapter is merged here.
        python: interpreter of the environment that has vLLM; None: the one of `make vllm-env`.
        must: a runtime that is not installed is an error; else a row that says so.

    Raises:
        MmembedError: a runtime is missing that must be there, or cannot load what was exported for it.
    """
    for runtime in runtimes:
        if must and (missing := _missing(runtime, python)):
            raise MmembedError(f"--runtimes {runtime}: {missing}")
    rows, expected = [], reference(subject.model, subject.preprocessor, subject.spoken)
    if subject.model.settings.adapter_type != "none":
        try:
            subject.model = merged(subject.model)
        except MmembedError as refusal:
            return [Row(name, note=f"refused: {refusal}") for name in ("merged", *runtimes)]
        rows = [
            row_of("merged", subject.spoken, expected, reference(subject.model, subject.preprocessor, subject.spoken))
        ]
    with tempfile.TemporaryDirectory(prefix="mmembed-verify-") as scratch:
        return rows + [_through(runtime, Path(scratch), subject, expected, python) for runtime in runtimes]


def _through(runtime: str, scratch: Path, subject: Subject, expected: Results, python: str | None) -> Row:
    target = "vllm" if runtime.startswith("vllm") else runtime
    folder = scratch / target
    if missing := _missing(runtime, python):
        return Row(runtime, note=f"left out: {missing}")
    try:
        if not folder.exists():
            export(subject, target, folder)
    except Refused as refusal:
        return Row(runtime, note=f"refused: {refusal}")
    return row_of(runtime, subject.spoken, expected, RUNNERS[runtime](folder, subject, python))


@torch.inference_mode()
def reference(model: EmbeddingModel, preprocessor: Preprocessor, probes: Sequence[Probe]) -> Results:
    """What the model itself gives, an input at a time: vectors (of many a content their sum), or probabilities. Of a
    model that reads lists the shares of one list, as `mmembed.models.probes` has it."""
    if preprocessor.prompt.reads_lists:
        return vectors_of(model, preprocessor).float().numpy()
    rows = []
    for probe in probes:
        vectors, mask, *_ = model(preprocessor([probe.item]).to(model.device))
        vector = (
            vectors[0].float() if mask is None else (vectors[0] * mask[0].unsqueeze(-1)).float().sum(0)
        )  # (E,) or (L,)
        rows.append(torch.sigmoid(log_odds(vector)).reshape(1) if probe.document is not None else vector)
    return torch.stack(rows).cpu().numpy()


def row_of(runtime: str, probes: Sequence[Probe], expected: Results, found: Results) -> Row:
    """The largest difference, and where. Raises MmembedError where the results have another shape."""
    if expected.shape != found.shape:
        raise MmembedError(f"{runtime}: gives results {found.shape}, the model {expected.shape}; export it again")
    differences = np.abs(expected - found).max(1)  # (N,)
    worst = int(np.nan_to_num(differences, nan=np.inf).argmax())
    at = probes[worst].name if len(probes) == len(expected) else ""
    return Row(runtime, len(expected), float(differences[worst]), at)


def _missing(runtime: str, python: str | None) -> str:
    if runtime == "sentence-transformers":
        return "" if find_spec("sentence_transformers") else "it is not installed; pip install 'mmembed[export]'"
    if python is not None:
        return "" if os.access(python, os.X_OK) and not Path(python).is_dir() else f"{python} is no interpreter"
    return "" if find_vllm() else "there is no environment with vLLM; run `make vllm-env`"


# sentence-transformers ------------------------------------------------------------------------------------------------


def through_sentence_transformers(folder: Path, subject: Subject, python: str | None = None) -> Results:
    """Contents as its documentation has them: a string, a picture, or a dictionary of both."""
    options: dict[str, Any] = {"device": "cpu", "local_files_only": True, "model_kwargs": {"dtype": torch.float32}}
    if subject.reranks:
        from sentence_transformers import CrossEncoder

        judge = CrossEncoder(str(folder), **options)
        pairs = [(_as_input(probe.content), _as_input(probe.document or ())) for probe in subject.spoken]
        return np.asarray(judge.predict(pairs, batch_size=8, show_progress_bar=False), np.float32).reshape(-1, 1)
    from mmembed.runtimes.sentence_transformers import load

    model = load(folder, **options)
    rows = []
    for probe in subject.spoken:
        encode: Any = model.encode_query if probe.role == "query" else model.encode_document
        told = {} if probe.instruction == subject.instructions.get(probe.role) else {"prompt": probe.instruction}
        rows.append(encode([_as_input(probe.content)], show_progress_bar=False, **told)[0])
    return np.stack(rows).astype(np.float32)


def _as_input(content: Sequence[Any]) -> Any:
    texts = [part.text for part in content if isinstance(part, Text)]
    images = [part.source for part in content if isinstance(part, Image)]
    if not images:
        return texts[0]
    image = images[0] if len(images) == 1 else images
    return {"image": image, "text": texts[0]} if texts else image


# vLLM -----------------------------------------------------------------------------------------------------------------

_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def engine_options(subject: Subject) -> dict[str, Any]:
    """Of both engines: float32, the arithmetic as it is written, and room for the longest of the fixed inputs."""
    longest = max(len(row) for row in subject.preprocessor.tokenize([probe.item for probe in subject.spoken]))
    options: dict[str, Any] = {"runner": "pooling", "dtype": "float32", "enforce_eager": True}
    if not subject.reranks:
        options["convert"] = "embed"
    if subject.multimodal:
        options["limit_mm_per_prompt"] = {"image": 2}
    return {**options, "max_model_len": max(512, longest + 16), "max_num_batched_tokens": max(2048, longest + 16)}


def through_vllm(folder: Path, subject: Subject, python: str | None = None) -> Results:
    """The offline engine, in a process of its own."""
    from mmembed.export import vllm_worker
    from mmembed.export.folder import TEMPLATE
    from mmembed.export.to_vllm import SCORE_TEMPLATE

    template = folder / (SCORE_TEMPLATE if subject.reranks else TEMPLATE)
    job = {
        "model": str(folder),
        "kind": "reranker" if subject.reranks else "embedder",
        "template": template.read_text(encoding="utf-8"),
        "engine": engine_options(subject),
        "inputs": [_wire(probe, subject) for probe in subject.spoken],
    }
    done = subprocess.run(
        _guarded([_python(python), vllm_worker.__file__]),
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env={**_ENVIRONMENT, **os.environ, "PYTHONSAFEPATH": "1"},
    )
    if done.returncode:
        raise MmembedError(f"vllm: the engine failed on {folder.name}; its last lines:\n{_tail(done.stderr)}")
    return np.array(json.loads(done.stdout)["results"], np.float32)


def through_vllm_server(folder: Path, subject: Subject, python: str | None = None) -> Results:
    """The server over HTTP, started as the folder says: messages to /v1/embeddings, pairs to /score."""
    from mmembed.export.served import Served

    with Served(folder, engine_options(subject), _guarded([_python(python)]), _ENVIRONMENT) as server:
        return np.array([server.ask(_wire(probe, subject)) for probe in subject.spoken], np.float32)


def _wire(probe: Probe, subject: Subject) -> dict[str, Any]:
    if probe.document is not None:
        return {"query": _parts(probe.content), "document": _parts(probe.document)}
    own = None if probe.instruction == subject.instructions.get(probe.role) else probe.instruction
    system = [{"role": "system", "content": [{"type": "text", "text": own}]}] if own else []
    return {"messages": [*system, {"role": probe.role, "content": _parts(probe.content)}]}


def _parts(content: Sequence[Any]) -> list[dict[str, str]]:
    return [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": _png(part)}
        for part in content
    ]


def _png(image: Image) -> str:
    picture: Any = image.source  # of probes, which are drawn
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _python(python: str | None) -> str:
    found = python or find_vllm()
    assert found is not None, "it was looked for"
    return found


def _guarded(command: Sequence[str]) -> list[str]:
    """A command that ends with this process, and all that it started with it."""
    return [sys.executable, "-I", guard.__file__, str(os.getpid()), *command]


def _tail(log: str) -> str:
    return "\n".join(f"    {line[:300]}" for line in log.splitlines()[-25:])


RUNNERS: dict[str, Callable[[Path, Subject, str | None], Results]] = {
    "sentence-transformers": through_sentence_transformers,
    "vllm": through_vllm,
    "vllm-server": through_vllm_server,
}
