"""Linear layers by packed_linear: results and every gradient against fp64, and when they are left to torch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from fastzs.clip import products
from fastzs.clip.blocks import Block
from fastzs.clip.products import Linear, linear
from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.ops import TokenLayout, bridged_attention
from tests.clip.test_frozen import Adapted
from tests.kernels.tolerances import errors

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    monkeypatch.setattr(products, "packed_pays", lambda dtype: dtype in (torch.float32, torch.bfloat16))
    monkeypatch.setattr(products, "LEAST_ROWS", 1)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(terms, low=False):
    """A sum of products, each within rounding, and one more rounding of the bias.

    In bf16 both operands and the result are rounded, each by half a step at most. The operands' errors are independent,
    so those of a sum grow as the sum does.
    """
    exact = 0.5 * math.sqrt(terms) * torch.finfo(torch.float32).eps + torch.finfo(torch.float32).eps
    return exact + (2 * 3 * torch.finfo(torch.bfloat16).eps / 2 if low else 0)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("shape", [(5, 7), (2, 33, 24), (2, 3, 17, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients(shape, bias, low):
    x, w, b = numbers(*shape), numbers(19, shape[-1], seed=1), numbers(19, seed=2) if bias else None
    upstream = numbers(*shape[:-1], 19, seed=3)
    found = []
    for dtype, function in ((torch.float32, linear), (torch.float64, F.linear)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b) if t is not None]
        with torch.autocast("cpu", torch.bfloat16, enabled=low and dtype == torch.float32):
            y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))])
    assert found[0][0].dtype == (torch.bfloat16 if low else torch.float32)
    assert all(grad.dtype == torch.float32 for grad in found[0][1:])
    rows = x.shape[:-1].numel()
    terms = (shape[-1], 19, rows, rows)
    for mine, right, n in zip(*found, terms, strict=False):
        assert mine.shape == right.shape
        assert errors(mine, right)[0] <= bound(n, low)


def test_every_gradient_alone_and_strided_inputs():
    x, w, b = numbers(24, 9, 4).permute(2, 1, 0), numbers(24, 19, seed=1).t(), numbers(38, seed=2)[::2]
    upstream = numbers(19, 9, 4, seed=3).permute(2, 1, 0)
    right = [t.double().requires_grad_() for t in (x, w, b)]
    wanted = torch.autograd.grad(F.linear(*right), right, upstream.double())
    for i, n in enumerate((19, 36, 36)):
        leaves = [t.detach().requires_grad_(k == i) for k, t in enumerate((x, w, b))]
        (mine,) = torch.autograd.grad(linear(*leaves), [leaves[i]], upstream)
        assert errors(mine, wanted[i])[0] <= bound(n)


@pytest.mark.parametrize("what", ["fp64", "bf16", "no rows", "a vector", "few rows", "fp16 autocast"])
def test_what_is_left_to_torch(what, monkeypatch):
    monkeypatch.setattr(products, "product", None)
    monkeypatch.setattr(products, "LEAST_ROWS", 5 if what == "few rows" else 1)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(what, torch.float32)
    x = numbers(*{"no rows": (0, 6), "a vector": (6,)}.get(what, (4, 6))).to(dtype).requires_grad_()
    layer = Linear(6, 3).to(dtype)
    with torch.autocast("cpu", torch.float16, enabled=what == "fp16 autocast"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_compiled_layer_is_one_graph():
    layer = Linear(6, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = numbers(4, 6)
    assert torch.allclose(compiled(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("shape", [(256, 24), (2, 128, 24)])
def test_results_can_be_changed_in_place(shape):
    x, w = numbers(*shape), numbers(24, 24, seed=1).requires_grad_()
    linear(x, w).add_(x).sum().backward()
    assert errors(w.grad, x.double().flatten(0, -2).sum(0).expand(24, 24))[0] <= bound(256)


def test_derivatives_of_other_kinds_are_torchs_own():
    x, along, w = numbers(4, 6), numbers(4, 6, seed=1), numbers(3, 6, seed=2)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, along), w)).tangent
    assert tangent is not None
    torch.testing.assert_close(tangent, along @ w.t())
    torch.testing.assert_close(torch.func.grad(lambda x: linear(x, w).sum())(x), w.sum(0).expand(4, 6))


def test_results_of_a_frozen_block_can_be_changed_in_place():
    made, x = Block(24, 3, 96, True, 1e-5).requires_grad_(False).train(), numbers(2, 11, 24).requires_grad_()
    for y in (made.add_mlp(x), made.add_attended(x, x.unflatten(-1, (3, -1)).transpose(1, 2))):
        y.mul_(2).sum().backward()


def test_an_adapter_in_the_place_of_a_frozen_blocks_projection_is_heard():
    made, x = Block(24, 3, 96, True, 1e-5).requires_grad_(False).train(), numbers(2, 11, 24).requires_grad_()
    heads = x.unflatten(-1, (3, -1)).transpose(1, 2)
    right = made.add_attended(x, heads) - x
    made.attn.out_proj = Adapted(made.attn.out_proj)
    torch.testing.assert_close(made.add_attended(x, heads) - x, 2 * right)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_traced_layer_has_torchs_own_products():
    """torch.jit.trace, and torch.onnx.export without dynamo, know no others."""
    layer = Linear(6, 3).requires_grad_(False)
    traced = torch.jit.trace(layer, (numbers(4, 6),))
    assert "aten::linear" in str(traced.inlined_graph)
    x = numbers(5, 6, seed=1)
    assert torch.allclose(traced(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("low", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_frozen_block(quick_gelu, low, monkeypatch):
    """Its parts in training, which are fused with the products: tokens and prompts' keys and values alike."""
    monkeypatch.setattr(F, "linear", None)
    torch.manual_seed(0)
    made = Block(24, 3, 96, quick_gelu, 1e-5).requires_grad_(False).train()
    for parameter in made.parameters():
        parameter.normal_(std=0.2)
    layout = TokenLayout(1, (2, 5))
    x, upstream = numbers(2, 11, 24), numbers(2, 11, 24, seed=1)
    found = []
    for dtype in (torch.float32, torch.float64):
        made.to(dtype)
        if dtype == torch.float64:
            monkeypatch.undo()
        leaf = x.to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=low and dtype == torch.float32):
            q, k, v = made.project(leaf)
            y = made.add_mlp(made.add_attended(leaf, bridged_attention(q, k, v, layout)))
        assert y.dtype == dtype
        found.append([y.detach(), *torch.autograd.grad(y, leaf, upstream.to(dtype))])
    # six sums of up to 96 terms, one after the other, forward and as many backward; roundings to bf16 are independent
    for mine, right in zip(*found, strict=True):
        assert errors(mine, right)[0] <= (12**0.5 if low else 12) * bound(96, low)
