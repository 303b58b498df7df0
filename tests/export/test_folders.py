"""Folders give the vectors and scores of the checkpoint that they were made of, its adapter merged; in float32."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mmembed.errors import MmembedError
from mmembed.export import export
from mmembed.export.comparison import compare_all, reference
from mmembed.export.subject import Refused, load_subject
from mmembed.inference.embedder import Embedder
from mmembed.models.checkpoint import load_checkpoint
from tests.export.making import JUDGE, LENGTHS, LORA, save

pytest.importorskip("sentence_transformers")
LATENT = {"type": "latent_attention", "num_latents": 8, "num_heads": 2}
EMBEDDERS = {
    "last": ("qwen3_vl", {"pooling": "last_token", "prompt": "instruct"}),
    "mean of a chat": ("qwen3_vl", {"pooling": "mean", "prompt": {"type": "chat", "mask_instruction": False}}),
    "bidirectional": ("qwen3", {"pooling": "mean", "attention": "bidirectional", "projection": 16}),
    "latent": ("llama", {"pooling": LATENT, "attention": "bidirectional"}),
    "weighted": ("qwen3", {"pooling": "weighted_mean", "normalize": False}),
    "masked": ("qwen3_vl", {"pooling": "mean", "prompt": {"type": "plain", "query_prefix": "query: "}}),
    "masked latent": ("qwen3", {"pooling": LATENT, "prompt": {"type": "plain", "query_prefix": "query: "}}),
}


def differences(path, runtimes=("sentence-transformers",), **options):
    rows = compare_all(load_subject(str(path), merge=False, dtype="float32", **options), runtimes)
    return {row.runtime: row.note or row.difference for row in rows}


@pytest.mark.parametrize("case", EMBEDDERS)
def test_embedders_in_sentence_transformers(case, family_folder, tmp_path):
    family, settings = EMBEDDERS[case]
    found = differences(save(tmp_path / "saved", family_folder(family), **settings))
    assert found["merged"] < 1e-5 and found["sentence-transformers"] < 1e-5


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3"])
@pytest.mark.parametrize("head", ["yes_no", "linear"])
def test_rerankers_in_sentence_transformers(family, head, family_folder, tmp_path):
    settings = JUDGE if head == "yes_no" else {**JUDGE, "head": {"type": "linear"}}
    found = differences(save(tmp_path / "saved", family_folder(family), **settings))
    assert found["merged"] < 1e-5 and found["sentence-transformers"] < 1e-5


def test_instructions_of_the_sides(family_folder, tmp_path):
    from sentence_transformers import SentenceTransformer

    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token", prompt="instruct")
    told = {"query": "Find the answer."}
    assert differences(path, instructions=told)["sentence-transformers"] < 1e-5
    export(load_subject(str(path), instructions=told), "sentence-transformers", tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.prompts["query"] == "Find the answer."
    ours = Embedder.from_pretrained(path, dtype="float32", device="cpu")
    expected = ours.encode(["bus"], role="query", instruction="Find the answer.")
    assert np.abs(model.encode_query(["bus"]) - expected).max() < 1e-5
    assert np.abs(model.encode(["bus"], prompt_name="query") - expected).max() < 1e-5
    assert np.abs(model.encode_document(["bus"]) - ours.encode(["bus"])).max() < 1e-5


def test_long_texts_are_cut_at_the_same_place(family_folder, tmp_path):
    """The content loses its end, and what follows it stays, on both sides' limits."""
    from sentence_transformers import SentenceTransformer

    lengths = {**LENGTHS, "query_max_length": 24, "document_max_length": 40}
    settings = {"pooling": "last_token", "prompt": "one_word", "lengths": lengths}
    path = save(tmp_path / "saved", family_folder("qwen3"), **settings)
    export(load_subject(str(path)), "sentence-transformers", tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    ours = Embedder.from_pretrained(path, dtype="float32", device="cpu")
    text = "a red bus drives through the old town of Prague " * 9
    assert np.abs(model.encode_query([text]) - ours.encode([text], role="query")).max() < 1e-5
    assert np.abs(model.encode_document([text]) - ours.encode([text])).max() < 1e-5
    assert np.abs(model.encode_query([text]) - model.encode_document([text])).max() > 1e-3


def test_the_base_of_every_folder_is_whole(family_folder, tmp_path):
    """transformers finds every weight of the backbone in it, under names of the generating class, and no other."""
    from transformers import AutoModel

    path = save(tmp_path / "saved", family_folder("qwen3_vl"), pooling="last_token")
    for target in ("sentence-transformers", "vllm"):
        export(load_subject(str(path)), target, tmp_path / target)
        names = load_file(tmp_path / target / "model.safetensors").keys()
        assert all(name.startswith(("model.language_model.", "model.visual.")) for name in names)
        _, info = AutoModel.from_pretrained(tmp_path / target, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    config = json.loads((tmp_path / "vllm/config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"] and config["dtype"] == "float32"


def test_a_rerankers_classifier(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3_vl"), **JUDGE)
    export(load_subject(str(path)), "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForSequenceClassification"] and config["id2label"] == {"0": "relevant"}
    rows = load_file(path / "pooling.safetensors")["projection.weight"]
    written = load_file(tmp_path / "out/model.safetensors")["score.weight"]
    assert torch.equal(written, rows[:1] - rows[1:])
    assert not (tmp_path / "out/chat_template.jinja").exists(), "vLLM would write a chat with it, and no score"


def test_bidirectional_attention_is_said_twice(family_folder, tmp_path):
    """The decoder reads its own part of the config, what plans its batches reads the top."""
    path = save(tmp_path / "saved", family_folder("qwen3_vl"), pooling="mean", attention="bidirectional")
    export(load_subject(str(path)), "vllm", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["is_causal"] is False and config["text_config"]["is_causal"] is False


def test_a_merged_checkpoint_needs_no_base(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    export(load_subject(str(path)), "merged", tmp_path / "out")
    described = json.loads((tmp_path / "out/mmembed.json").read_text())["settings"]
    assert described["adapter"] is None and not (tmp_path / "out/adapter_model.safetensors").exists()
    before, after = (load_checkpoint(one, "float32") for one in (path, tmp_path / "out"))
    probes = load_subject(str(path)).spoken
    assert np.abs(reference(*before, probes) - reference(*after, probes)).max() < 1e-6


def test_the_sum_is_rounded_once(family_folder, tmp_path):
    """In bfloat16, the written weights are the float32 sum rounded, not a sum of rounded products."""
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    export(load_subject(str(path), dtype="bfloat16"), "merged", tmp_path / "out")
    exact = load_subject(str(path)).model.base.state_dict()
    written = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(tensor, exact[name].to(torch.bfloat16)) for name, tensor in written.items())


def test_an_adapter_has_an_effect_where_peft_loads_it(family_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    export(load_subject(str(path), merge=False), "adapter", tmp_path / "out")
    folder = tmp_path / "out"
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    inputs = AutoTokenizer.from_pretrained(folder)("a red bus", return_tensors="pt")
    bare = AutoModel.from_pretrained(base).eval()
    with torch.inference_mode():
        without = bare(**inputs).last_hidden_state
        found = PeftModel.from_pretrained(bare, str(folder)).eval()(**inputs).last_hidden_state
        model, _ = load_checkpoint(path, "float32")
        ours = model.backbone(**inputs).last_hidden_state
    assert (found - without).abs().max() > 1e-2 and (found - ours).abs().max() < 1e-5


def test_four_bits_are_merged_into_what_was_trained_against(family_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    qlora = {**LORA, "type": "qlora", "quant_type": "nf4"}
    path = save(tmp_path / "saved", family_folder("qwen3"), adapter=qlora, pooling="last_token")
    assert differences(path)["merged"] < 1e-4


REFUSALS = [
    ("vllm", {"pooling": LATENT}, "pooling 'latent_attention': vLLM pools the last token or the mean"),
    ("vllm", {"pooling": "weighted_mean"}, "pooling 'weighted_mean'"),
    ("vllm", {"pooling": "multi_vector"}, "pooling 'multi_vector': vLLM's /v1/embeddings gives one vector"),
    ("sentence-transformers", {"pooling": "multi_vector"}, "pooling 'multi_vector': a SentenceTransformer gives one"),
    ("vllm", {"prompt": {"type": "plain", "query_prefix": "q: "}}, "leaves tokens of its prompt out of the mean"),
    ("onnx", {"prompt": {"type": "plain", "query_prefix": "q: "}}, "leaves tokens of its prompt out of pooling"),
    ("adapter", {"adapter": None}, "has no adapter"),
    ("adapter", {"projection": 8}, "'projection.weight': was trained beside the adapter"),
    (
        "merged",
        {"adapter": {"type": "prompt", "num_virtual_tokens": 4}},
        "puts trained vectors in front of every input",
    ),
]


@pytest.mark.parametrize(("target", "settings", "reason"), REFUSALS)
def test_what_a_runtime_cannot_hold(target, settings, reason, family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3"), **settings)
    with pytest.raises(MmembedError, match=reason):
        export(load_subject(str(path), merge=target != "adapter"), target, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_go_into_no_onnx_graph(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3_vl"), pooling="last_token")
    with pytest.raises(Refused, match="backbone 'qwen3_vl': reads pictures"):
        export(load_subject(str(path)), "onnx", tmp_path / "out")


def test_an_in_context_reranker_is_no_cross_encoder(family_folder, tmp_path):
    head = {"type": "attention", "offset": 512}
    settings = {"prompt": "in_context", "head": head, "pooling": "last_token", "normalize": False}
    path = save(tmp_path / "saved", family_folder("qwen3"), **settings)
    for target in ("sentence-transformers", "vllm", "onnx"):
        with pytest.raises(Refused, match="reads all documents of a query in one input"):
            export(load_subject(str(path)), target, tmp_path / "out")


def test_a_tokenizer_that_runtimes_read_by_other_rules(family_folder, tmp_path):
    """AutoTokenizer makes a Qwen2Tokenizer of it, which normalizes letters with accents; the fixed inputs show it."""
    path = save(tmp_path / "saved", family_folder("qwen2"), pooling="last_token")
    with pytest.raises(MmembedError, match="of the input 'emoji .*by rules of Qwen2Tokenizer"):
        export(load_subject(str(path)), "sentence-transformers", tmp_path / "out")


def test_bidirectional_attention_that_vllm_would_ignore(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("gemma3_text"), pooling="mean", attention="bidirectional")
    with pytest.raises(Refused, match="decoder of 'gemma3_text' is causal whatever the config says"):
        export(load_subject(str(path)), "vllm", tmp_path / "out")


def test_a_masked_model_takes_instructions_where_they_are_its_own(family_folder, tmp_path):
    """Without one it fits runtimes that pool everything; with one in the folder it does not."""
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="mean")
    export(load_subject(str(path)), "vllm", tmp_path / "out")
    with pytest.raises(Refused, match="leaves tokens of its prompt out of the mean"):
        export(load_subject(str(path), instructions={"query": "Find."}), "vllm", tmp_path / "told")
    assert differences(path, instructions={"query": "Find."})["sentence-transformers"] < 1e-5


def test_matryoshka_is_kept(family_folder, tmp_path):
    path = save(tmp_path / "saved", family_folder("qwen3"), pooling="last_token")
    export(load_subject(str(path), dims=[16, 32]), "vllm", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["matryoshka_dimensions"] == [16, 32]
    with pytest.raises(MmembedError, match="--dims 65: a vector of this model has 64 dimensions"):
        load_subject(str(path), dims=[65])
