"""Mixtures of experts: what LoRA trains, that both passes of GradCache route alike, the balance loss, and plain files.

The yardsticks are the whole batch in one pass, and transformers' own `load_balancing_loss_func`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import EXPERTS, MOE_FAMILIES, TEXTS, build, items, picture, vectors
from torch import nn
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from mmembed.backbones.experts import active_parameters, expert_parameters, router_names, watch_routers
from mmembed.config import build_config
from mmembed.config.blocks import SourceConfig
from mmembed.content import Document, Example, to_content
from mmembed.data.collate import Chunk, Collator
from mmembed.embeddings import Embeddings
from mmembed.errors import ConfigError, MmembedError
from mmembed.inference.embedder import Embedder
from mmembed.models.checkpoint import load_checkpoint, save_checkpoint
from mmembed.models.continuing import inherit_settings
from mmembed.objectives import build_objective
from mmembed.preprocess import Item
from mmembed.training.gradcache import contrastive_step
from mmembed.training.trained import Trained

LORA = {"type": "lora", "r": 4, "alpha": 8, "dropout": 0.0, "target_modules": "auto"}
LORA |= {"experts": True, "router": True}
BALANCED = [{"type": "infonce", "temperature": 0.1}, {"type": "router_balance", "weight": 0.5}]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "dog",
    "slept",
    "in",
    "garden",
    "and",
    "bus",
    "drives",
    "through",
    "old",
    "town",
    "of",
    "Prague",
]


def examples(count: int = 6, pictures: bool = False) -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def text(most: int) -> str:
        length = int(torch.randint(2, most, (1,), generator=generator))
        return " ".join(WORDS[int(one)] for one in torch.randint(len(WORDS), (length,), generator=generator))

    made = []
    for at in range(count):
        document = {"text": text(24), **({"image": picture(at)} if pictures and at % 2 else {})}
        made.append(
            Example(
                to_content(text(9)), (Document(to_content(document)), Document(to_content(text(12)), 0.0)),
                instruction="Find it", source="s", id=str(at), where=f"here:{at}",
            )
        )  # fmt: skip
    return made


def step(folder, adapter=LORA, keep_tokens=None, chunk_rows=None, objective=BALANCED, share_prefix=False):
    """One GradCache step of a model: loss, metrics, gradients by name, and each forward's choices of experts."""
    torch.manual_seed(3)
    model, preprocessor = build(folder, adapter=adapter, prompt="instruct")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    whole = Trained(model, build_objective(objective)).train()
    if not whole.objective.routes:
        watch_routers(model.base, "a test")
    source = {"s": SourceConfig(path="s")}
    options = {"train_group_size": 2, "share_prefix": share_prefix, "chunk_rows": chunk_rows}
    batch = Collator(preprocessor, source, 10**6, **options)(examples(pictures=preprocessor.family.multimodal))
    chosen = []

    def encode(chunk: Chunk) -> Embeddings:
        noted = []
        hooks = [
            model.base.get_submodule(name).register_forward_hook(lambda module, given, output: noted.append(output[2]))
            for name in router_names(model.base)
        ]
        found = whole(chunk.inputs(preprocessor))
        for hook in hooks:
            hook.remove()
        chosen.append(noted)
        return found

    torch.manual_seed(5)
    loss, metrics = contrastive_step(encode, whole.objective, batch, keep_tokens)
    gradients = {name: one.grad for name, one in whole.named_parameters() if one.requires_grad}
    return loss, metrics, gradients, chosen, len(batch.chunks)


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_mixed_batch_equals_single_inputs(name, family_folder) -> None:
    for attention in ("causal", "bidirectional"):
        model, preprocessor = build(family_folder(name), attention=attention, prompt="instruct")
        together = vectors(model, preprocessor, items(name))
        alone = torch.cat([vectors(model, preprocessor, [item]) for item in items(name)])
        assert torch.allclose(together, alone, atol=1e-5)
        assert torch.allclose(together, vectors(model, preprocessor, items(name), "left"), atol=1e-5)
        assert (torch.cdist(alone, alone) + torch.eye(len(alone))).min() > 1e-2


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_both_passes_route_alike_under_dropout(name, family_folder) -> None:
    """All chunks are computed twice: the second time each token goes to the experts of the first, in each layer."""
    adapter = {**LORA, "dropout": 0.3, "experts": False}
    _, _, gradients, chosen, chunks = step(family_folder(name), adapter, keep_tokens=0, chunk_rows=4)
    assert chunks >= 3 and len(chosen) == 2 * chunks
    first, second = chosen[:chunks], chosen[chunks:]
    for one, again in zip(first, second, strict=True):
        assert len(one) == 2, "two layers"
        assert all(torch.equal(before, after) for before, after in zip(one, again, strict=True))
    _, _, _, others, _ = step(family_folder(name), {**adapter, "dropout": 0.0}, keep_tokens=0, chunk_rows=4)
    pairs = [pair for both in zip(first, others, strict=False) for pair in zip(*both, strict=True)]
    differ = [not torch.equal(one, other) for one, other in pairs]
    assert any(differ), "dropout moves tokens to other experts, or this test could not see a mix-up"
    assert all(gradient is not None and gradient.any() for name, gradient in gradients.items() if ".gate." in name)


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_gradients_do_not_depend_on_chunks(name, family_folder) -> None:
    """Whole batch in one pass, chunks kept, chunks computed twice, and prefixes computed once: one gradient, the
    balance loss's included, whose means are over the whole batch."""
    layouts = [{}, {"chunk_rows": 3}, {"chunk_rows": 4, "keep_tokens": 0}, {"chunk_rows": 1, "keep_tokens": 0}]
    layouts += [{"share_prefix": True}, {"share_prefix": True, "chunk_rows": 4, "keep_tokens": 0}]
    whole_loss, metrics, expected, _, chunks = step(family_folder(name))
    assert chunks == (2 if "vl" in name else 1), "pictures apart from texts"
    assert {kind for kind in ("gate.", "experts.", "self_attn.") if any(kind in key for key in expected)} == {
        "gate.", "experts.", "self_attn."
    }  # fmt: skip
    assert all(gradient.any() for key, gradient in expected.items() if "lora_A" not in key)
    for layout in layouts[1:]:
        loss, found, gradients, _, _ = step(family_folder(name), **layout)
        assert torch.allclose(loss, whole_loss, atol=1e-6), layout
        assert found["loss_router_balance"] == pytest.approx(metrics["loss_router_balance"].item(), rel=1e-6)
        for key, gradient in expected.items():
            assert torch.allclose(gradients[key], gradient, atol=2e-6, rtol=1e-4), (layout, key)


def test_balance_is_that_of_transformers(family_folder) -> None:
    """`load_balancing_loss_func` over all tokens of the batch's inputs, and its gradient in a router's weight."""
    for name in ("qwen3_moe", "mixtral"):
        model, preprocessor = build(family_folder(name), prompt="instruct")
        whole = Trained(model, build_objective(BALANCED))
        inputs = preprocessor(items(name))
        found = whole(inputs)
        objective = whole.objective.objectives[1]
        some, others = found.rows(torch.arange(2)), found.rows(torch.arange(2, len(inputs)))
        loss, metrics = objective.compare(objective.gather(some, others, None))
        output = model.backbone(**inputs.tensors, output_router_logits=True)
        theirs = load_balancing_loss_func(output.router_logits, 4, 2, inputs.tensors["attention_mask"])
        assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
        weight = model.base.layers[0].mlp.gate.weight
        ours, expected = (torch.autograd.grad(one, weight, retain_graph=True)[0] for one in (loss, theirs))
        assert expected.abs().max() > 1e-6
        assert torch.allclose(ours, expected, atol=1e-7)
        assert 0 <= metrics["idle_experts"] <= 1 and 0.25 <= metrics["busiest_expert"] <= 0.5


def test_balance_spreads_tokens(family_folder) -> None:
    """Alone with a small contrast it lowers the share of the busiest expert."""
    torch.manual_seed(0)
    model, preprocessor = build(family_folder("qwen3_moe"), prompt="instruct")
    whole = Trained(model, build_objective(BALANCED))
    objective = whole.objective.objectives[1]
    optimizer = torch.optim.SGD([one for name, one in whole.named_parameters() if ".gate." in name], lr=1.0)
    shares = []
    for _ in range(30):
        found = whole(preprocessor(items("qwen3_moe")))
        loss, metrics = objective.compare(objective.gather(found, found, None))
        shares.append((loss.item(), metrics["busiest_expert"].item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert shares[-1][0] < shares[0][0] and shares[-1][1] <= shares[0][1]
    assert shares[-1][0] < 2.02, "two of four experts each: 2 at best"


@pytest.mark.parametrize("name", MOE_FAMILIES)
def test_lora_of_experts_reloads_and_merges(name, family_folder, tmp_path) -> None:
    torch.manual_seed(0)
    model, preprocessor = build(family_folder(name), adapter=LORA, prompt="instruct")
    before = vectors(model, preprocessor, items(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora_B" in key or "modules_to_save" in key):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    towers = {model.parameter_towers()[key] for key in trained}
    assert towers == {"language", "router"}
    assert sum(".experts." in key for key in trained) == 2 * 2 * 2, "A and B of both parameters of two layers"
    adapted = vectors(model, preprocessor, items(name))
    assert (adapted - before).abs().max() > 1e-2
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    reloaded, other = load_checkpoint(tmp_path / "saved")
    assert torch.allclose(adapted, vectors(reloaded, other, items(name)), atol=1e-6)
    reloaded.merge_adapter()
    assert torch.allclose(adapted, vectors(reloaded, other, items(name)), atol=1e-5)
    unloaded, other = load_checkpoint(tmp_path / "saved")
    unloaded.backbone = unloaded.backbone.merge_and_unload()
    assert torch.allclose(adapted, vectors(unloaded, other, items(name)), atol=1e-5)


def test_full_training_saves_and_freezes_routers(family_folder, tmp_path) -> None:
    """Experts are saved apart, as their authors published them, and come back as one tensor."""
    for name in MOE_FAMILIES:
        model, preprocessor = build(family_folder(name), freeze=("vision", "router"))
        frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
        towers = model.parameter_towers()
        assert {towers[key] for key in frozen} == {"router"} | ({"vision"} if "vl" in name else set())
        assert not any(".gate." in key for key in set(towers) - frozen)
        with torch.no_grad():
            for key in expert_parameters(model.backbone):
                model.backbone.get_parameter(key).mul_(1.5)
        expected = vectors(model, preprocessor, items(name))
        save_checkpoint(tmp_path / name, model, preprocessor)
        assert torch.allclose(expected, vectors(*load_checkpoint(tmp_path / name), items(name)), atol=1e-6)


def test_active_parameters(family_folder) -> None:
    """Of 4 experts a token goes through 2; the rest of the model it goes through whole."""
    model, _ = build(family_folder("qwen3_moe"))
    one_expert = 3 * 64 * EXPERTS["moe_intermediate_size"]
    every = sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(model, model.family.config) == every - 2 * 2 * one_expert
    dense, _ = build(family_folder("qwen3"))
    assert active_parameters(dense, dense.family.config) == sum(one.numel() for one in dense.parameters())


def test_refusals_name_the_remedy(family_folder) -> None:
    with pytest.raises(ConfigError, match="set dropout: 0"):
        build_config({"adapter": {"experts": True}})
    with pytest.raises(ConfigError, match="'experts' has no effect with type 'dora'"):
        build_config({"adapter": {"type": "dora", "experts": True, "dropout": 0}})
    with pytest.raises(ConfigError, match="it is trained or it is not"):
        build_config({"adapter": {"router": True}, "model": {"freeze": ["router"]}})
    with pytest.raises(ConfigError, match="'qwen3' has no experts"):
        build(family_folder("qwen3"), adapter=LORA)
    with pytest.raises(ConfigError, match="'qwen3' has no router"):
        build(family_folder("qwen3"), adapter={**LORA, "experts": False})
    model, _ = build(family_folder("qwen3"))
    with pytest.raises(ConfigError, match="'router_balance': reads routers, and the decoder 'qwen3' has none"):
        Trained(model, build_objective(BALANCED))
    with pytest.raises(ConfigError, match="looks at no vectors"):
        build_objective("router_balance")


def test_a_second_stage_keeps_the_adapter_of_experts(family_folder, tmp_path) -> None:
    model, preprocessor = build(family_folder("qwen3_moe"), adapter=LORA)
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    cfg = build_config({"model": {"name_or_path": str(tmp_path / "saved")}})
    assert inherit_settings(cfg).adapter.experts and inherit_settings(cfg).adapter.router
    with pytest.raises(ConfigError, match="adapter.router"):
        inherit_settings(build_config({**cfg.model_dump(exclude_unset=True), "adapter": {"router": False}}))


# Domains --------------------------------------------------------------------------------------------------------------


def tagged(texts, domain):
    return [Item(to_content(text), "query" if at % 2 else "document", "Find it", domain=domain) for at, text in texts]


@pytest.mark.parametrize("name", MOE_FAMILIES)
@pytest.mark.parametrize("adapter", [None, LORA])
def test_a_domain_changes_nothing_at_first_and_routing_later(name, adapter, family_folder, tmp_path) -> None:
    plain, preprocessor = build(family_folder(name), adapter=adapter, prompt="instruct")
    torch.manual_seed(0)
    model, _ = build(family_folder(name), adapter=adapter, prompt="instruct", domains=("code", "health"))
    texts = list(enumerate(TEXTS))
    if adapter is None:
        expected = vectors(plain, preprocessor, tagged(texts, None))
        for domain in ("code", "health", "unheard of", None):
            assert torch.equal(vectors(model, preprocessor, tagged(texts, domain)), expected)
    assert model.domain_bias.shape == (2, 2, 4)
    assert model.parameter_towers()["domain_bias"] == "router"
    with torch.no_grad():
        model.domain_bias[0].normal_(std=3.0)
    found = {one: vectors(model, preprocessor, tagged(texts, one)) for one in ("code", "health", None)}
    assert torch.equal(found["health"], found[None])
    assert (found["code"] - found[None]).abs().max() > 1e-2
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    embedder = Embedder.from_pretrained(str(tmp_path / "saved"))
    for share in ("auto", "off"):
        given = {"role": "query", "instruction": "Find it", "output": "torch", "share_prefix": share}
        again = embedder.encode(TEXTS, **given, domain="code")
        alone = vectors(
            model, preprocessor, [Item(to_content(text), "query", "Find it", domain="code") for text in TEXTS]
        )
        assert torch.allclose(again, alone, atol=1e-5)
        assert (again - embedder.encode(TEXTS, **given)).abs().max() > 1e-2
    with pytest.raises(MmembedError, match="domain: there is no 'cod'; did you mean 'code'"):
        embedder.encode(TEXTS, domain="cod")


def test_domains_are_learned_from_the_source_of_a_batch(family_folder) -> None:
    """Gradients reach the bias of the batch's domain alone, the same in one chunk and in many that run twice."""
    found = []
    for rows, keep in ((None, None), (2, 0)):
        torch.manual_seed(0)
        model, preprocessor = build(family_folder("qwen3_moe"), prompt="instruct", domains=("code", "health"))
        whole = Trained(model, build_objective(BALANCED)).train()
        source = {"s": SourceConfig(path="s", domain="health")}
        batch = Collator(preprocessor, source, 10**6, train_group_size=2, chunk_rows=rows)(
            [replace(one, domain="health") for one in examples()]
        )
        contrastive_step(lambda chunk: whole(chunk.inputs(preprocessor)), whole.objective, batch, keep)  # noqa: B023
        found.append(model.domain_bias.grad)
    code, health = found[0]
    assert not code.any() and health.abs().max() > 1e-6
    assert torch.allclose(found[0], found[1], atol=2e-6, rtol=1e-4)


def test_domains_are_refused_where_they_cannot_act(family_folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="domain: conditions routers, and the decoder 'qwen3' has none"):
        build(family_folder("qwen3"), domains=("code",))
    train = [{"path": "a", "domain": "code"}]
    with pytest.raises(ConfigError, match="gradient_checkpointing . data.train domain"):
        build_config({"model": {"gradient_checkpointing": True}, "data": {"train": train}})
    with pytest.raises(ConfigError, match="domain 'cod' is of no source of data.train; did you mean 'code'"):
        build_config({"data": {"train": train, "dev": [{"path": "b", "domain": "cod"}]}})
    model, preprocessor = build(family_folder("qwen3_moe"), domains=("code",))
    save_checkpoint(tmp_path / "saved", model, preprocessor)
    for given in (train, [{"path": "a"}]):
        inherit_settings(build_config({"model": {"name_or_path": str(tmp_path / "saved")}, "data": {"train": given}}))
    other = {"model": {"name_or_path": str(tmp_path / "saved")}, "data": {"train": [{"path": "a", "domain": "law"}]}}
    with pytest.raises(ConfigError, match="domain 'law', but .* was saved with .'code'."):
        inherit_settings(build_config(other))
