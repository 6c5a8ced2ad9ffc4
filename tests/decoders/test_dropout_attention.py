"""Attention with dropout that keeps no map, against PyTorch's own operations."""

import pytest
import torch
import torch.nn.functional as F

from fastzs.decoders import dropout_attention as module
from fastzs.decoders.dropout_attention import dropout_attention


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 8)  # so that 20 rows are three pieces, the last one shorter


def inputs(dtype=torch.float64, queries=20, keys=13):
    shapes = ((2, 3, queries, 16), (2, 3, keys, 16), (2, 3, keys, 16))
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def dropped(q, k, dropout, seed):
    """What the pieces drop, bool [B, H, Q, N]."""
    out = torch.zeros(*q.shape[:3], k.shape[2], dtype=torch.bool)
    for b, h, rows, _, kept in module._maps(q.detach(), k.detach(), dropout, seed):
        out[b, h, rows] = kept == 0
    return out


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_agrees_with_the_formula(dtype, allowed):
    tensors = inputs(dtype)
    q, k, v = (x.detach().double().requires_grad_() for x in tensors)
    torch.manual_seed(4)
    out = dropout_attention(*tensors, 0.25)
    torch.manual_seed(4)
    keep = ~dropped(q, k, 0.25, int(torch.randint(1 << 62, ())))
    expected = (torch.softmax(q @ k.transpose(2, 3) / 4, -1) * keep / 0.75) @ v
    upstream = torch.randn_like(expected)
    got = torch.autograd.grad(out, tensors, upstream.to(dtype))
    wanted = torch.autograd.grad(expected, (q, k, v), upstream.to(dtype).double())
    for a, b in zip((out, *got), (expected, *wanted), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= allowed * b.abs().max()


def test_without_dropout_it_is_attention():
    q, k, v = inputs()
    assert torch.allclose(dropout_attention(q, k, v, 0.0), F.scaled_dot_product_attention(q, k, v), atol=1e-14)


def test_gradient_by_differences():
    small = inputs(queries=9, keys=5)
    assert torch.autograd.gradcheck(lambda *x: module._DropoutAttention.apply(*x, 0.2, 7), small)


def test_share_that_is_dropped():
    q, k = torch.zeros(1, 2, 500, 4), torch.zeros(1, 2, 400, 4)
    shares = dropped(q, k, 0.1, 3).float()
    assert shares.mean().item() == pytest.approx(0.1, abs=3e-3)  # 7 standard deviations
    assert shares.mean((0, 1, 2)).std() < 0.015  # in no column more than in others
    assert not torch.equal(shares[0, 0], shares[0, 1])
    assert dropped(q, k, 0.0, 3).sum() == 0


def test_follows_the_seed():
    q, k, v = inputs()
    torch.manual_seed(1)
    one = dropout_attention(q, k, v, 0.3)
    assert not torch.equal(one, dropout_attention(q, k, v, 0.3))
    torch.manual_seed(1)
    assert torch.equal(one, dropout_attention(q, k, v, 0.3))


def test_keeps_no_map():
    kept = []

    def pack(tensor):
        kept.append(tensor.numel())
        return tensor

    q, k, v = inputs(queries=64, keys=64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        dropout_attention(q, k, v, 0.1)
    assert max(kept) == q.numel()
