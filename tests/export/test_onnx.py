"""A text model as an ONNX graph, which ONNX Runtime runs before it is kept."""

import json

import numpy as np
import pytest

from mmembed.export import export
from mmembed.export.subject import load_subject
from mmembed.inference.embedder import Embedder
from tests.export.making import JUDGE, save

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)
CASES = {
    "qwen3": {"pooling": "last_token", "prompt": "instruct"},
    "llama": {"pooling": "mean", "attention": "bidirectional", "projection": 16},
    "mistral": JUDGE,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_a_graph_gives_the_models_numbers(family, family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder(family), **CASES[family])
    export(load_subject(str(path)), "onnx", tmp_path / "out")
    assert json.loads((tmp_path / "out/mmembed_export.json").read_text())["difference"] < 1e-4
    if family != "qwen3":
        return
    import onnxruntime
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out/model.onnx"))
    given = [{"role": "query", "content": "a red bus"}]
    ids = tokenizer.apply_chat_template(given, tokenize=True, return_dict=True)
    inputs = {name: np.array([ids[name]], np.int64) for name in ("input_ids", "attention_mask")}
    expected = Embedder.from_pretrained(path, dtype="float32", device="cpu").encode(["a red bus"], role="query")
    assert np.abs(session.run(None, inputs)[0] - expected).max() < 1e-5
