"""The parts of a block with frozen weights in training on a CPU, everything around a product fused with it.

Weights are packed in each call, see :func:`fastzs.kernels.packed_linear.training.pack_now`. Tokens and their gradients
keep their dtype; queries, keys, values and the hidden layer are in that of the products, bf16 under autocast.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastzs.clip.products import precision, turned
from fastzs.kernels.packed_linear import training
from fastzs.kernels.packed_linear.training import pack_now
from fastzs.kernels.packed_linear.weights import PackedNorm, pack_norm
from fastzs.ops import packed_linear


def projections(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """See :func:`fastzs.clip.frozen.projections`."""
    qkv = _Projections.apply(x.contiguous(), *pack_norm(norm), weight, bias, precision(x))
    return qkv.unflatten(-1, (3, -1)).unbind(2)


def add_attended(x: Tensor, heads: Tensor, out: nn.Linear) -> Tensor:
    """``x + out(heads)`` of tokens x [B, L, C] and what attention made of them, heads [B, L, C]."""
    return _AddAttended.apply(x, heads.contiguous(), out.weight, out.bias, precision(x))


def mlp(x: Tensor, norm: nn.LayerNorm, first: nn.Linear, last: nn.Linear, quick_gelu: bool) -> Tensor:
    """See :func:`fastzs.clip.frozen.mlp`."""
    weights = (first.weight, first.bias, last.weight, last.bias)
    activation = "quick_gelu" if quick_gelu else "gelu"
    return _Mlp.apply(x.contiguous(), *pack_norm(norm), *weights, activation, precision(x))


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, eps, weight, bias, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, table, weight)
        ctx.eps, ctx.dtype = eps, dtype
        norm = PackedNorm(table, eps)
        return packed_linear(x, pack_now(weight, bias, dtype), before=norm, dtype=dtype, impl="cpu")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, table, weight = ctx.saved_tensors
        norm = PackedNorm(table, ctx.eps)
        packed = pack_now(weight, None, ctx.dtype, turned=True)
        dx = training.linear_backward(grad.flatten(0, -2).contiguous(), x.flatten(0, -2), norm, packed)
        return dx.view(x.shape), *(None,) * 5


class _AddAttended(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, heads, weight, bias, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight)
        ctx.dtype, ctx.of_heads = dtype, heads.dtype
        return packed_linear(heads, pack_now(weight, bias, dtype), residual=x, dtype=x.dtype, impl="cpu")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        return grad, turned(grad, weight, ctx.dtype, ctx.of_heads), None, None, None


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, eps, w1, b1, w2, b2, activation, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        norm = PackedNorm(table, eps)
        first, last = pack_now(w1, b1, dtype), pack_now(w2, b2, dtype)
        out, hidden = training.mlp(x.flatten(0, -2), norm, first, last, activation)
        ctx.save_for_backward(x, table, w1, w2, hidden)
        ctx.eps, ctx.activation, ctx.dtype = eps, activation, dtype
        return torch.ops.aten._unsafe_view(out, x.shape)  # a view could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, table, w1, w2, hidden = ctx.saved_tensors
        norm = PackedNorm(table, ctx.eps)
        last, first = (pack_now(w, None, ctx.dtype, turned=True) for w in (w2, w1))
        rows = grad.flatten(0, -2).contiguous()
        dx = training.mlp_backward(rows, x.flatten(0, -2), norm, hidden, last, first, ctx.activation)
        return dx.view(x.shape), *(None,) * 8
