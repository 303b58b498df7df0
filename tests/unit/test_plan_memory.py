"""What a plan says of memory, against judges that know nothing of it: autograd's own hooks on a real model, the real
optimizer's state, the real 4-bit weights."""

import json

import bitsandbytes
import pytest
import torch
from families import FAMILIES, TEXT_FAMILIES, items, picture
from torch import nn
from transformers import Adafactor

from mmembed.config import build_config
from mmembed.config.blocks import RerankerConfig
from mmembed.content import to_content
from mmembed.data.collate import plan_chunks
from mmembed.models.embedding_model import build_embedding_model
from mmembed.plan import plan_run, read_size
from mmembed.preprocess import Item
from mmembed.training.batch_report import count_visual
from mmembed.training.estimate import outline
from mmembed.training.memory import measure_chunk, measure_vision, optimizer_bytes, prefix_copies
from mmembed.training.optimizers import Lion
from tests.runs import build_trainer

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.1}


def run_config(folder, adapter, **model):
    return build_config({
        "model": {"name_or_path": str(folder), "dtype": "float32", **model}, "adapter": adapter,
        "data": {"train": [{"path": "x"}]},
    })  # fmt: skip


class Saved:
    """Bytes of what autograd saves inside, each storage once, parameters left out."""

    def __init__(self, model):
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self.held = {}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.held[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.held.values())


def same_length(preprocessor, rows, length=48):
    """Rows of real text, cut to one length."""
    text = "Photosynthesis turns sunlight, water and carbon dioxide into sugar. " * 20
    found = preprocessor.tokenize([Item(to_content(f"{at} {text}"), "document") for at in range(rows)])
    return [type(row)(row.ids[:length]) for row in found]


@pytest.mark.parametrize("adapter", [{"type": "none"}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_bytes_are_those_that_autograd_saves(family_folder, family, adapter):
    config = run_config(family_folder(family), adapter)
    model, preprocessor = build_embedding_model(config)
    inputs = preprocessor.collate(same_length(preprocessor, 6))
    with Saved(model) as saved:
        vectors = model.train()(inputs).vectors
    graph = measure_chunk(outline(config, None)[0], 48)
    assert vectors.requires_grad
    assert graph.kept(6 * 48) == pytest.approx(saved.bytes, rel=0.01)


def test_a_lower_layer_keeps_what_its_norm_and_pooling_save(family_folder):
    config = run_config(family_folder("qwen3"), {"type": "none"})
    model, preprocessor = build_embedding_model(config)
    bare, inputs = outline(config, None)[0], preprocessor.collate(same_length(preprocessor, 6))
    planned, kept = [], []
    for layers in ([], [1]):
        for one in (model, bare):
            one.give_layers(layers)
        with Saved(model) as saved:
            embeddings = model.train()(inputs)  # noqa: F841  keeps the graph
        planned.append(measure_chunk(bare, 48).kept(6 * 48))
        kept.append(saved.bytes)
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.05)
    assert kept[1] - kept[0] > 6 * 48 * 64 * 4  # at least the states of a layer, normed


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_a_shared_prefix_is_kept_once_but_for_keys_and_values(family_folder, family):
    config = run_config(family_folder(family), LORA)
    model, preprocessor = build_embedding_model(config)
    rows = same_length(preprocessor, 6)
    rows = [type(row)((*rows[0].ids[:32], *row.ids[32:])) for row in rows]
    [chunk] = plan_chunks(rows, 10_000, shareable=[32] * 6)
    with Saved(model) as saved:
        vectors = model.train()(chunk.inputs(preprocessor)).vectors  # noqa: F841  keeps the graph
    bare = outline(config, None)[0]
    found = measure_chunk(bare, 48).kept(chunk.padded_tokens) + prefix_copies(bare) * chunk.saved_tokens
    assert chunk.saved_tokens == 5 * 32
    assert found == pytest.approx(saved.bytes, rel=0.1)


YES_NO = {"type": "yes_no", "words": ["a", "b"]}


@pytest.mark.parametrize(
    ("family", "head"), [("qwen3", "linear"), ("qwen3", YES_NO), ("qwen3_vl", YES_NO), ("gemma3", "linear")], ids=str
)
def test_pairs_of_a_reranker_keep_what_autograd_saves(family_folder, family, head):
    """Documents of one query, whose tokens are computed once, and the logits of each pair."""
    config = build_config({
        "model": {"name_or_path": str(family_folder(family)), "dtype": "float32"}, "adapter": LORA, "head": head,
        "prompt": {"type": "judge", "words": ["a", "b"]}, "data": {"train": [{"path": "x"}]},
    }, kind=RerankerConfig)  # fmt: skip
    model, preprocessor = build_embedding_model(config)
    text = "Photosynthesis turns sunlight, water and carbon dioxide into sugar. " * 2
    pairs = [Item(to_content("what is sugar?"), "query", None, to_content(f"{at} {text}")) for at in range(6)]
    rows = preprocessor.tokenize(pairs)
    [chunk] = plan_chunks(rows, 100_000, shareable=[preprocessor.shareable(row) for row in rows])
    with Saved(model) as saved:
        logits = model.train()(chunk.inputs(preprocessor)).vectors
    bare = outline(config, None)[0]
    graph = measure_chunk(bare, max(map(len, rows)))
    found = graph.kept(chunk.padded_tokens) + prefix_copies(bare) * chunk.saved_tokens
    assert logits.shape == (6, bare.embedding_size) and logits.requires_grad
    assert chunk.saved_tokens > 0 or family == "gemma3"
    assert found == pytest.approx(saved.bytes, rel=0.1)


@pytest.mark.parametrize("layer", [1, 2])
def test_lists_of_an_in_context_reranker_keep_what_autograd_saves(family_folder, tmp_path, layer):
    text = "Photosynthesis turns sunlight, water and carbon dioxide into sugar. " * 2
    listed = [{"content": f"{at} {text}", "relevance": int(not at)} for at in range(8)]
    records = [{"query": f"what is sugar {at}?", "documents": listed} for at in range(4)]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    config = build_config({
        "model": {"name_or_path": str(family_folder("qwen3")), "dtype": "float32"}, "adapter": LORA,
        "head": {"type": "attention", "layer": layer, "offset": 512}, "prompt": "in_context",
        "objective": [{"type": "answer"}, {"type": "ranking", "loss": "infonce"}],
        "data": {"train": [{"path": str(tmp_path / "lists.jsonl")}], "train_group_size": 8},
        "training": {"per_device_train_batch_size": 2, "max_steps": 1, "output_dir": str(tmp_path / "out")},
    }, kind=RerankerConfig)  # fmt: skip
    trainer, plan = build_trainer(config), plan_run(config, sample=1)
    batch = trainer.collator([trainer.train_dataset[draw] for draw in next(iter(trainer.plan))])
    model = trainer.model.train()
    with Saved(model) as saved:
        logits = [model.model(chunk.inputs(trainer.preprocessor)) for chunk in batch.chunks]
    assert sum(len(one.vectors) for one in logits) == 16
    assert plan.stages[0].activations == pytest.approx(saved.bytes, rel=0.1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_precision_and_attention_count(family_folder, attention, autocast):
    config = run_config(family_folder("qwen3"), {"type": "none"}, attn_implementation=attention)
    model, preprocessor = build_embedding_model(config)
    inputs = preprocessor.collate(same_length(preprocessor, 6))
    with Saved(model) as saved, torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        vectors = model.train()(inputs).vectors  # noqa: F841  keeps the graph
    graph = measure_chunk(outline(config, None)[0], 48, autocast)
    assert graph.kept(6 * 48) == pytest.approx(saved.bytes, rel=0.01)


def test_gradient_checkpointing_keeps_a_fraction(family_folder):
    config, on = (run_config(family_folder("qwen3"), LORA, gradient_checkpointing=flag) for flag in (False, True))
    whole, checkpointed = (measure_chunk(outline(one, None)[0], 48) for one in (config, on))
    assert checkpointed.kept(1000) < 0.35 * whole.kept(1000)  # two layers' inputs, of about 27 tensors
    assert checkpointed.working(1000) > whole.working(1000)  # a layer is computed again


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TEXT_FAMILIES])
def test_a_trained_vision_tower_keeps_what_autograd_saves(family_folder, family):
    config = run_config(family_folder(family), {"type": "none"}, freeze=[])
    model, preprocessor = build_embedding_model(config)
    rows = preprocessor.tokenize([Item(to_content({"image": picture(seed)}), "document") for seed in range(3)])
    tensors = preprocessor.collate(rows).tensors
    media = {name: tensor for name, tensor in tensors.items() if name not in ("input_ids", "attention_mask")}
    seen = count_visual(rows, preprocessor)
    base, wanted = model.backbone, ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask")
    given = {name: tensor for name, tensor in media.items() if name in wanted}
    if family in ("gemma3", "paligemma"):
        given = {"pixel_values": given["pixel_values"]}
    with Saved(model) as saved:
        features = base.train().get_image_features(**given)  # noqa: F841  keeps the graph
    layers = model.family.vision_layers
    found = measure_vision(lambda depth: outline(config, None, vision_layers=depth)[0], layers, media, seen, None)
    assert found.kept * seen == pytest.approx(saved.bytes, rel=0.06)  # and the features, which come out


def test_a_frozen_vision_tower_keeps_nothing(family_folder):
    config = run_config(family_folder("qwen3_vl"), LORA)
    _, preprocessor = outline(config, None)
    rows = preprocessor.tokenize(items("qwen3_vl")[3:4])
    tensors = preprocessor.collate(rows).tensors
    media = {name: tensors[name] for name in ("pixel_values", "image_grid_thw")}
    found = measure_vision(lambda depth: outline(config, None, vision_layers=depth)[0], 2, media, 10, None)
    assert found.kept < 0.1 * 10 * 32 * 4 * 10  # not even a tensor a layer


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("adamw", torch.optim.AdamW),
        ("adamw_8bit", lambda params: bitsandbytes.optim.AdamW(params, optim_bits=8)),
        ("lion", Lion),
        ("adafactor", lambda params: Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False)),
        ("sgd", lambda params: torch.optim.SGD(params, lr=1e-3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimizer_state_is_that_of_the_real_optimizer(name, build, dtype):
    parameters = [nn.Parameter(torch.randn(*shape).to(dtype)) for shape in ((256, 320), (640,), (16, 16))]
    optimizer = build(parameters)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    tensors = [
        value
        for parameter in parameters
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, torch.Tensor) and value.numel() > 1 and "qmap" not in key  # a table of all tensors
    ]
    real = sum(value.numel() * value.element_size() for value in tensors)
    found, known = optimizer_bytes(name, [(parameter, False) for parameter in parameters])
    assert known
    assert found == pytest.approx(real, rel=0.01, abs=1)


def test_an_unknown_optimizer_is_said_to_be():
    assert optimizer_bytes("galore_adamw", [(torch.zeros(10), False)]) == (80.0, False)


def test_sizes_are_read():
    assert read_size("80GB") == read_size("80 GiB") == read_size("80g") == 80 * 2**30
    assert read_size("512MB") == 2**29
    for wrong in ("80 bananas", "-1GB", "0GB", ""):
        with pytest.raises(ValueError, match="80GB"):
            read_size(wrong)
