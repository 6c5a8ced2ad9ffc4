"""Dropout from random bits, alone and after a relu, against the same mask applied by hand."""

import pytest
import torch
import torch.nn.functional as F

from fastzs.decoders.dropout import draw_kept, dropout, kept_share, relu_dropout

SHAPE = (3, 5, 7)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 1e-2)])
def test_agrees_with_the_mask(relu, dtype, allowed):
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    torch.manual_seed(2)
    kept = draw_kept(SHAPE, 0.25, x.device)
    torch.manual_seed(2)
    out = (relu_dropout if relu else dropout)(x, 0.25)
    wide = x.detach().double().requires_grad_()
    expected = (F.relu(wide) if relu else wide) * kept / 0.75
    upstream = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, upstream)
    (wanted,) = torch.autograd.grad(expected, wide, upstream.double())
    assert kept.unique().tolist() == [0, 1]
    for a, b in ((out, expected), (got, wanted)):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= allowed * b.abs().max()


def test_share_that_is_kept():
    torch.manual_seed(0)
    kept = draw_kept((1000, 999), 0.1, torch.device("cpu")).float()
    assert kept.mean().item() == pytest.approx(kept_share(0.1), abs=2e-3)  # 7 standard deviations
    assert kept.mean(0).std().item() == pytest.approx((0.09 / 1000) ** 0.5, rel=0.2)
    assert torch.equal(draw_kept((9,), 0.0, torch.device("cpu")), torch.ones(9, dtype=torch.int8))


@pytest.mark.parametrize("function", [dropout, relu_dropout])
def test_follows_the_seed(function):
    x = torch.ones(100)
    torch.manual_seed(1)
    one = function(x, 0.3)
    assert not torch.equal(one, function(x, 0.3))
    torch.manual_seed(1)
    assert torch.equal(one, function(x, 0.3))


@pytest.mark.parametrize(("function", "bytes"), [(dropout, 1), (relu_dropout, 4)])
def test_what_is_kept_for_backward(function, bytes):
    kept = []

    def pack(tensor):
        kept.append(tensor.nbytes)
        return tensor

    x = torch.randn(SHAPE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(x, 0.1)
    assert kept == [bytes * x.numel()]


@pytest.mark.parametrize("function", [dropout, relu_dropout])
def test_nothing_is_dropped_at_rate_0(function):
    x = torch.randn(SHAPE)
    assert torch.equal(function(x, 0.0), x if function is dropout else F.relu(x))
