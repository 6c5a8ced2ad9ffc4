"""Linear layers by oneDNN: results and every gradient against fp64, and when they are left to torch."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastzs.clip import products
from fastzs.clip.blocks import Block
from fastzs.clip.products import Linear, linear
from tests.kernels.tolerances import errors

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    monkeypatch.setattr(products, "onednn_pays", lambda dtype: dtype == torch.float32)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bound(terms):
    """A sum of products, each within rounding, and one more rounding of the bias."""
    return 0.5 * math.sqrt(terms) * torch.finfo(torch.float32).eps + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("shape", [(5, 7), (2, 33, 24), (2, 3, 17, 40)])
@pytest.mark.parametrize("bias", [True, False])
def test_result_and_gradients(shape, bias):
    x, w, b = numbers(*shape), numbers(19, shape[-1], seed=1), numbers(19, seed=2) if bias else None
    upstream = numbers(*shape[:-1], 19, seed=3)
    found = []
    for dtype, function in ((torch.float32, linear), (torch.float64, F.linear)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b) if t is not None]
        y = function(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype))])
    rows = x.shape[:-1].numel()
    terms = (shape[-1], 19, rows, rows)
    for mine, right, n in zip(*found, terms, strict=False):
        assert mine.shape == right.shape
        assert errors(mine, right)[0] <= bound(n)


def test_every_gradient_alone_and_strided_inputs():
    x, w, b = numbers(24, 9, 4).permute(2, 1, 0), numbers(24, 19, seed=1).t(), numbers(38, seed=2)[::2]
    upstream = numbers(19, 9, 4, seed=3).permute(2, 1, 0)
    right = [t.double().requires_grad_() for t in (x, w, b)]
    wanted = torch.autograd.grad(F.linear(*right), right, upstream.double())
    for i, n in enumerate((19, 36, 36)):
        leaves = [t.detach().requires_grad_(k == i) for k, t in enumerate((x, w, b))]
        (mine,) = torch.autograd.grad(linear(*leaves), [leaves[i]], upstream)
        assert errors(mine, wanted[i])[0] <= bound(n)


@pytest.mark.parametrize("what", ["fp64", "bf16", "no rows", "a vector", "autocast"])
def test_what_is_left_to_torch(what, monkeypatch):
    monkeypatch.setattr(products, "product", None)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(what, torch.float32)
    x = numbers(*{"no rows": (0, 6), "a vector": (6,)}.get(what, (4, 6))).to(dtype).requires_grad_()
    layer = Linear(6, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_a_compiled_layer_is_one_graph():
    layer = Linear(6, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    x = numbers(4, 6)
    assert torch.allclose(compiled(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_a_traced_layer_has_torchs_own_products():
    """torch.jit.trace, and torch.onnx.export without dynamo, know no others."""
    layer = Linear(6, 3).requires_grad_(False)
    traced = torch.jit.trace(layer, (numbers(4, 6),))
    assert "aten::linear" in str(traced.inlined_graph)
    x = numbers(5, 6, seed=1)
    assert torch.allclose(traced(x), F.linear(x, layer.weight, layer.bias), atol=1e-6)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_frozen_block(quick_gelu):
    """Its halves in training, whose products do not go through :func:`linear`."""
    torch.manual_seed(0)
    made = Block(24, 3, 96, quick_gelu, 1e-5).requires_grad_(False).train()
    x, upstream = numbers(2, 11, 24), numbers(2, 11, 24, seed=1)
    found = []
    for dtype in (torch.float32, torch.float64):
        made.to(dtype)
        leaf = x.to(dtype).requires_grad_()
        y = made(leaf)
        found.append([y.detach(), *torch.autograd.grad(y, leaf, upstream.to(dtype))])
    # six sums of up to 96 terms, one after the other, forward and as many backward
    for mine, right in zip(*found, strict=True):
        assert errors(mine, right)[0] <= 12 * bound(96)


def test_only_what_has_gaps_is_copied():
    """oneDNN takes its reference code for it."""
    whole = numbers(19, 40)
    assert products._dense(whole) is whole
    turned = whole.t()
    assert products._dense(turned) is turned
    for part in (whole[:, 5:29], whole[:, 5:29].t()):
        assert products._dense(part).is_contiguous()
        assert torch.equal(products._dense(part), part)
