"""Norms and rotary positions of CPU inference: the stock's results, only where the stock computes this formula."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, contents, picture
from torch import nn

from mmembed.content import to_content
from mmembed.inference import elementwise
from mmembed.inference.cpu import accelerate
from mmembed.inference.elementwise import accelerate_elementwise, rms_norm
from mmembed.models.embedding_model import EmbedderSettings, build_from_settings
from mmembed.preprocess import Item


class RootMeanSquare(nn.Module):
    """w * x / sqrt(mean(x^2) + eps), as transformers writes it, and what a subclass makes of it."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.momentum = nn.Parameter(torch.ones(width)), eps, 0.1

    def forward(self, hidden):
        scale = torch.rsqrt(hidden.float().square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * (hidden.float() * scale).to(hidden.dtype)


class OnePlus(RootMeanSquare):
    def forward(self, hidden):
        return super().forward(hidden) / self.weight * (1 + self.weight)


class OutsideTheRoot(RootMeanSquare):
    def forward(self, hidden):
        return self.weight * hidden / (hidden.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)


class Centred(RootMeanSquare):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(-1, keepdim=True))


class TwoInputs(RootMeanSquare):
    def forward(self, hidden, gate):
        return super().forward(hidden) * gate


class Clamped(RootMeanSquare):
    def forward(self, hidden):
        return super().forward(hidden).clamp(-1, 1)


def exact(hidden, weight, eps):
    return hidden.double() / (hidden.double().square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def replaced(model):
    """Names of the modules whose class stands in for the stock's."""
    return [name for name, module in model.named_modules() if isinstance(module, elementwise.Quick)]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("shape", [(7, 33), (2, 5, 3, 16), (1, 1)])
def test_norm_in_blocks_is_the_formula(monkeypatch, dtype, tolerance, shape):
    """Blocks that divide the rows, that do not, and one of a single row; a view that is not contiguous."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(shape).mul(3).to(dtype), torch.rand(shape[-1]).to(dtype)
    for numbers in (1, 3 * shape[-1], 2**17):
        monkeypatch.setattr(elementwise, "BLOCK", numbers)
        for given in (hidden, hidden.transpose(0, -2)):
            before = given.clone()
            ours = rms_norm(given, weight, 1e-3)
            assert ours.dtype == dtype and torch.equal(given, before)
            torch.testing.assert_close(ours.double(), exact(given, weight, 1e-3), rtol=tolerance, atol=1e-9)


@pytest.mark.parametrize("stock", [RootMeanSquare, OnePlus])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_norms_of_this_formula_are_replaced(stock, eps):
    norm = stock(24, eps)
    torch.nn.init.normal_(norm.weight, 1.0, 0.2)
    small = torch.randn(5, 24) * 1e-4
    with torch.no_grad():
        expected = norm(small)
        accelerate_elementwise(norm)
        assert isinstance(norm, elementwise.Quick) and norm.epsilon == "variance_epsilon"
        torch.testing.assert_close(norm(small), expected, rtol=1e-5, atol=0)
        norm.variance_epsilon = 1.0  # read when needed
        assert norm(small).abs().max() < 1e-2


@pytest.mark.parametrize("stock", [OutsideTheRoot, Centred, TwoInputs, Clamped])
def test_norms_of_another_formula_are_left_alone(stock):
    norm = stock(24, 1e-3)
    accelerate_elementwise(norm)
    assert type(norm) is stock


def test_other_layers_are_left_alone():
    layers = nn.ModuleList(
        [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.PReLU(8), nn.BatchNorm1d(8), nn.Linear(8, 8)]
    )
    hooked = RootMeanSquare(8)
    hooked.forward = lambda hidden: hidden  # as wrappers of other libraries do
    layers.append(hooked)
    before = [type(layer) for layer in layers]
    accelerate_elementwise(layers)
    assert [type(layer) for layer in layers] == before


def test_torchs_own_norm_is_replaced():
    norm, hidden = nn.RMSNorm(16, eps=1e-5), torch.randn(3, 16)
    expected = norm(hidden).detach()
    accelerate_elementwise(norm)
    assert isinstance(norm, elementwise.Quick)
    with torch.no_grad():
        torch.testing.assert_close(norm(hidden), expected)


def test_a_mixture_of_types_is_left_to_the_stock():
    norm, hidden = RootMeanSquare(16), torch.randn(3, 16).bfloat16()
    expected = norm(hidden).detach()  # float32: the weight's
    accelerate_elementwise(norm)
    with torch.no_grad():
        assert norm(hidden).dtype == torch.float32 and torch.equal(norm(hidden), expected)
        assert norm.double()(hidden.double()).dtype == torch.float64


def test_copies_pickles_and_weights_are_the_stocks():
    norm = RootMeanSquare(16)
    weights = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    accelerate_elementwise(norm)
    assert type(norm).__name__ == "RootMeanSquare" and isinstance(norm, RootMeanSquare)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is RootMeanSquare and other.variance_epsilon == 1e-6
        assert other.weight is not norm.weight and torch.equal(other.weight, norm.weight)
    assert norm.state_dict().keys() == weights.keys()


def test_norms_are_called_as_the_stock_is():
    norm, hidden = RootMeanSquare(16), torch.randn(3, 16)
    with torch.no_grad():
        expected = norm(hidden)
        accelerate_elementwise(norm)
        torch.testing.assert_close(norm(hidden=hidden), expected)
        with pytest.raises(TypeError, match="hidden_states"):  # a name that this stock does not know
            norm(hidden_states=hidden)


class FeedForward(nn.Module):
    def __init__(self, width: int = 8, gated: bool = True) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(width, 12), nn.Linear(12, width), nn.SiLU()
        self.gate = nn.Linear(width, 12) if gated else None

    def forward(self, hidden):
        inside = self.act(self.up(hidden))
        return self.down(inside if self.gate is None else inside * self.gate(hidden))


class LooksBack(FeedForward):
    """Rows meet."""

    def forward(self, hidden):
        return super().forward(hidden).cumsum(-2)


class OfBatches(FeedForward):
    """Refuses rows without a batch."""

    def forward(self, hidden):
        _, _, _ = hidden.shape
        return super().forward(hidden)


class WithState(FeedForward):
    def forward(self, hidden):
        return super().forward(hidden), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_feed_forwards_take_some_rows_after_the_others(monkeypatch, gated, dtype):
    monkeypatch.setattr(elementwise, "ROWS", 3)
    layer, hidden = FeedForward(gated=gated).to(dtype), torch.randn(2, 10 * torch.get_num_threads(), 8).to(dtype)
    expected, seen = layer(hidden).detach(), []
    accelerate_elementwise(layer)
    layer.up.register_forward_hook(lambda module, given, output: seen.append(len(given[0])))
    with torch.no_grad():
        torch.testing.assert_close(layer(hidden), expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)
        size = 3 * torch.get_num_threads()
        assert len(seen) > 2 and set(seen[:-1]) == {size} and sum(seen) == hidden.shape[0] * hidden.shape[1]
        assert torch.equal(layer(hidden[:, :1]), layer(hidden=hidden[:, :1]))  # few rows, and by name: as the stock
    seen.clear()
    layer(hidden).sum().backward()
    assert seen == [2] and layer.up.weight.grad is not None


@pytest.mark.parametrize("stock", [LooksBack, OfBatches, WithState])
def test_what_is_no_feed_forward_is_left_alone(stock):
    layer = stock()
    accelerate_elementwise(layer)
    assert type(layer) is stock


class Gated(nn.Module):
    """Three maps and an activation, whichever of the first two it follows."""

    def __init__(self, activation: nn.Module, gate: int = 0, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(32, 48, bias), nn.Linear(32, 48, bias), nn.Linear(48, 32, bias)
        self.activation, self.gate = activation, gate

    def forward(self, hidden):
        one, other = (self.first, self.second) if self.gate == 0 else (self.second, self.first)
        return self.last(self.activation(one(hidden)) * other(hidden))


class Between(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(32, 48), nn.Linear(48, 32), activation

    def forward(self, hidden):
        return self.last(self.activation(self.first(hidden)))


class Squared(nn.Module):
    def forward(self, hidden):
        return hidden.relu().square()


fusing = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor has no bfloat16 products in oneDNN"
)


@fusing
@pytest.mark.parametrize("size", [1e-2, 1.0])
@pytest.mark.parametrize(
    ("make", "form"),
    [
        (lambda: Gated(nn.SiLU()), (0, "swish", "")),
        (lambda: Gated(nn.SiLU(), gate=1, bias=True), (1, "swish", "")),
        (lambda: Gated(nn.GELU(approximate="tanh")), (0, "gelu", "tanh")),
        (lambda: Between(nn.GELU()), (0, "gelu", "none")),
        (lambda: Between(nn.GELU(approximate="tanh")), (0, "gelu", "tanh")),
    ],
)
def test_products_apply_the_activation(monkeypatch, make, form, size):
    """In rounds of some rows; as near to float32 as the stock is."""
    monkeypatch.setattr(elementwise, "FUSED_ROWS", 3)
    exact = make()
    layer, hidden = copy.deepcopy(exact).bfloat16(), size * torch.randn(2, 10 * torch.get_num_threads(), 32)
    with torch.no_grad():
        expected, stock = exact(hidden), layer(hidden.bfloat16()).float()
        accelerate_elementwise(layer, fused=True)
        assert type(layer).form == form
        ours = layer(hidden.bfloat16())
    assert ours.dtype == torch.bfloat16 and ours.shape == hidden.shape
    assert (ours.float() - expected).norm() < 1.05 * (stock - expected).norm()


@fusing
def test_an_activation_that_products_do_not_have_stays(monkeypatch):
    monkeypatch.setattr(elementwise, "fused_rows", None)
    layer, hidden = Between(Squared()).bfloat16(), torch.randn(4, 32).bfloat16()
    expected = layer(hidden).detach()
    accelerate_elementwise(layer, fused=True)
    with torch.no_grad():
        assert type(layer).form is None and torch.equal(layer(hidden), expected)


@fusing
@pytest.mark.parametrize("change", ["adapter", "hook", "float32"])
def test_what_was_put_into_a_feed_forward_later_is_called(monkeypatch, change):
    layer, hidden = Gated(nn.SiLU()).bfloat16(), torch.randn(4, 32).bfloat16()
    accelerate_elementwise(layer, fused=True)
    monkeypatch.setattr(elementwise, "fused_rows", None)
    called = []
    if change == "adapter":
        inner = layer.second
        layer.second = nn.Sequential(inner)
        layer.second.in_features = inner.in_features
    elif change == "hook":
        layer.last.register_forward_pre_hook(lambda module, given: called.append(given))
    else:
        layer, hidden = layer.float(), hidden.float()
    with torch.no_grad():
        assert layer(hidden).shape == hidden.shape
    assert called or change != "hook"


def interleaved(query, key, cos, sin, unsqueeze_dim=1):
    """Neighbouring columns are a pair, not columns of the two halves."""
    return tuple(
        one * cos.unsqueeze(unsqueeze_dim)
        + torch.stack([-one[..., 1::2], one[..., ::2]], -1).flatten(-2) * sin.unsqueeze(unsqueeze_dim)
        for one in (query, key)
    )


def test_another_rotation_is_not_ours():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    name = "apply_rotary_pos_emb"
    assert elementwise._rotates(apply_rotary_pos_emb, name)
    assert not elementwise._rotates(interleaved, name)
    assert not elementwise._rotates(lambda query, key, cos: (query, key), name)


def test_a_rotation_that_is_replaced_later_is_looked_at_again(monkeypatch):
    """As libraries of kernels do: what is prepared from then on calls theirs, and not ours in its place."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    def attention():
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
        return modeling_llama.LlamaAttention(LlamaConfig(**sizes, vocab_size=8), 0)

    before = attention()
    accelerate_elementwise(before)
    assert isinstance(before, elementwise.Quick)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", interleaved)
    after = attention()
    accelerate_elementwise(after)
    assert not isinstance(after, elementwise.Quick)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("axis", [1, 2])
def test_rotation_is_the_stocks(dtype, tolerance, axis):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def no_stock(*arguments):
        raise AssertionError("the stock was called")

    torch.manual_seed(0)
    angle = torch.rand(2, 5, 8) * 6
    cos, sin = (torch.cat([one, one], -1).to(dtype) for one in (angle.cos(), angle.sin()))
    query, key = (torch.randn(2, 5, heads, 16).to(dtype) for heads in (4, 2))
    query, key = (one if axis == 2 else one.transpose(1, 2) for one in (query, key))
    expected = apply_rotary_pos_emb(*(one.double() for one in (query, key, cos, sin)), unsqueeze_dim=axis)
    with torch.no_grad():
        ours = elementwise.rotate(no_stock, query, key, cos, sin, unsqueeze_dim=axis)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)
        with pytest.raises(AssertionError):
            elementwise.rotate(no_stock, query, key, cos[..., :8], sin[..., :8], axis)  # a part of each head
    with pytest.raises(AssertionError):
        elementwise.rotate(no_stock, query, key, cos, sin, axis)  # gradients are wanted


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_rotation_of_patches_in_blocks_is_the_stocks(monkeypatch, dtype, tolerance):
    from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision

    def no_stock(*arguments):
        raise AssertionError("the stock was called")

    torch.manual_seed(0)
    angle = torch.rand(7, 4) * 6
    cos, sin = (torch.cat([one, one], -1) for one in (angle.cos(), angle.sin()))
    query, key, _ = torch.randn(7, 3, 2, 8).to(dtype).unbind(1)
    expected = apply_rotary_pos_emb_vision(query, key, cos, sin)
    for numbers in (1, 3 * 16, 2**16):
        monkeypatch.setattr(elementwise, "ROTATED", numbers)
        with torch.no_grad():
            ours = elementwise.rotate_vision(no_stock, query, key, cos, sin)
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    with pytest.raises(AssertionError):
        elementwise.rotate_vision(no_stock, query, key, cos, sin)  # gradients are wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_stock_vectors_and_gradients(family_folder, monkeypatch, family):
    """Texts and pictures, float32 and bfloat16; afterwards the model trains as if nothing had happened."""
    model, preprocessor = build_from_settings(EmbedderSettings(str(family_folder(family)), dtype="float32"))
    monkeypatch.setattr(elementwise, "ROWS", 4)
    model.eval()
    rough = copy.deepcopy(model).bfloat16()
    batch = preprocessor([Item(to_content(content)) for content in contents(family)])

    def vectors(model):
        with torch.inference_mode():
            return model(batch).vectors.float()

    def gradients():
        model.zero_grad()
        model(batch).vectors[:, 0].sum().backward()
        return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}

    stock, stock_rough, stock_gradients, names = vectors(model), vectors(rough), gradients(), set(model.state_dict())
    for one in (model, rough):
        accelerate_elementwise(one.backbone)
    for part in ("norm", "attn", "mlp"):
        assert any(part in name for name in replaced(model)), f"no {part} was replaced, so nothing is tested"
    if family in ("qwen2_5_vl", "qwen2_vl", "qwen3_vl"):
        assert any("visual" in name and "attn" in name for name in replaced(model))
    torch.testing.assert_close(vectors(model), stock, atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(vectors(rough), stock_rough).min() > 0.999
    assert set(model.state_dict()) == names
    assert gradients() and all(torch.equal(one, stock_gradients[name]) for name, one in gradients().items())


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_one_size_are_attended_in_one_call(family_folder, monkeypatch, family):
    """Neighbours alone; the vectors are those of a call for each. A gradient is the stock's."""
    model, preprocessor = build_from_settings(EmbedderSettings(str(family_folder(family)), dtype="float32"))
    sizes = [(64, 64), (64, 64), (64, 64), (96, 64), (64, 64)]
    given = [Item(to_content({"image": picture(seed, *size)})) for seed, size in enumerate(sizes)]
    batch, tower = preprocessor(given), model.eval().base.visual
    with torch.no_grad():
        stock = model(batch).vectors
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def counted(query, *others, **options):
        calls.append(tuple(query.shape[:1]))
        return kernel(query, *others, **options)

    accelerate(model.backbone)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        ours = model(batch).vectors
        pictures = [count for (count,) in calls[: len(calls) - model.config.num_hidden_layers]]
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=0)
    if family != "qwen2_5_vl":  # whose layers attend in windows
        assert pictures == [3, 1, 1] * len(tower.blocks)
    calls.clear()
    model(batch)
    assert len(calls) >= 5 * len(tower.blocks)
