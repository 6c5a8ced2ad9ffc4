"""The two halves of a transformer block whose weights are frozen, in training: the gradient goes to the tokens alone.

They give what the ordinary layers give, to rounding, and keep and move less. No weight gets a gradient, so each
product has one other in backward, and the factor of QuickGELU goes into the products on its two sides. Under autocast
no weights in low precision are kept for backward. On a CPU wide tensors are never made: their columns are cut into
parts as wide as the tokens, whose products are added up, and what is kept is taken before what is not: else glibc's
allocator leaves holes between. Where :func:`fastzs.clip.products.takes` says so, :mod:`fastzs.clip.frozen_packed`
computes them with everything around a product fused.

A layer norm's means and deviations are kept, two numbers a token: found again in backward, they cost a pass that reads
and writes all tokens. In fp32 that is 8 bytes of the 34 that a norm and the cast behind it move for each number of a
token under autocast, forward and backward (counted).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastzs.clip import frozen_packed
from fastzs.clip.plain import plain
from fastzs.clip.products import precision, takes

QUICK_GELU = 1.702  # of the activation OpenAI trained CLIP with, x sigmoid(1.702 x)
aten = torch.ops.aten


def passes_through(x: Tensor, *layers: nn.Module) -> bool:
    """Whether a gradient is wanted of the tokens ``x`` and of no weight of the ``layers``, which are :func:`plain`."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(p.requires_grad for y in layers for p in y.parameters())
        and plain(*layers)
    )


def projections(x: Tensor, norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, L, C] of tokens x [B, L, C]: ``norm(x) w^T + b``.

    Args:
        weight, bias: [3 C, C], [3 C].
    """
    if takes(x):
        return frozen_packed.projections(x, norm, weight, bias)
    return _Projections.apply(x.contiguous(), norm.weight, norm.bias, norm.eps, weight, bias, precision(x))


def mlp(x: Tensor, norm: nn.LayerNorm, first: nn.Linear, last: nn.Linear, quick_gelu: bool) -> Tensor:
    """``x + last(gelu(first(norm(x))))`` of tokens x [B, L, C]; QuickGELU or the exact GELU.

    The hidden layer before its activation, 4 of the 10 token-sized tensors that a block keeps for backward, is kept and
    not computed again there from ``x``: that is one product more beside four, and activation checkpointing is there for
    who needs the memory.
    """
    if takes(x):
        return frozen_packed.mlp(x, norm, first, last, quick_gelu)
    part = x.shape[-1] if x.device.type == "cpu" else first.out_features
    weights = (first.weight, first.bias, last.weight, last.bias)
    return _Mlp.apply(x.contiguous(), norm.weight, norm.bias, norm.eps, *weights, quick_gelu, part, precision(x))


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        y = y.to(dtype)
        parts = zip(weight.to(dtype).chunk(3), bias.to(dtype).chunk(3), strict=True)
        outs = [_biased_product(y, w, b) for w, b in parts]
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        *norm, weight = ctx.saved_tensors
        dy = torch.zeros_like(norm[0])
        for grad, w in zip(grads, weight.to(grads[0].dtype).chunk(3), strict=True):
            dy = _add_product(dy, grad, w)
        return _norm_backward(dy, *norm), *(None,) * 6


class _Mlp(torch.autograd.Function):
    """With QuickGELU h is 1.702 times the hidden layer, since x sigmoid(1.702 x) = silu(1.702 x) / 1.702."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, w1, b1, w2, b2, quick_gelu, part, dtype):  # pyright: ignore[reportIncompatibleMethodOverride]
        factor, activation = (QUICK_GELU, F.silu) if quick_gelu else (1.0, F.gelu)
        parts = list(zip(w1.to(dtype).split(part), b1.to(dtype).split(part), w2.to(dtype).split(part, 1), strict=True))
        out = x + b2
        y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        y = y.to(dtype)
        hidden = [_biased_product(y, w, b, factor).flatten(0, -2) for w, b, _ in parts]  # [B L, part]
        for h, (_, _, v) in zip(hidden, parts, strict=True):
            out = _add_product(out, activation(h), v.t(), 1 / factor)
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, w1, w2, *hidden)
        ctx.quick_gelu, ctx.part = quick_gelu, part
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        x, mean, rstd, norm_weight, norm_bias, w1, w2, *hidden = ctx.saved_tensors
        slope = aten.silu_backward if ctx.quick_gelu else aten.gelu_backward
        dtype = hidden[0].dtype
        rows = grad.to(dtype).flatten(0, -2)
        dy = torch.zeros_like(grad)
        for h, w, v in zip(hidden, w1.to(dtype).split(ctx.part), w2.to(dtype).split(ctx.part, 1), strict=True):
            dh = rows @ v
            slope.grad_input(dh, h, grad_input=dh)
            dy = _add_product(dy, dh, w)
        return _norm_backward(dy, x, mean, rstd, norm_weight, norm_bias).add_(grad), *(None,) * 10


def _biased_product(x: Tensor, weight: Tensor, bias: Tensor, factor: float = 1.0) -> Tensor:
    """``factor (x w^T + b)``, [B, L, D], of x [B, L, C]."""
    rows = x.flatten(0, -2)
    # with a beta that is not 1 PyTorch writes the bias into every row first, and the product reads it again
    bias = bias if factor == 1 else bias * factor
    return torch.addmm(bias, rows, weight.t(), alpha=factor).view(*x.shape[:-1], -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
    """``total + factor a b`` [B, L, C] in its dtype, perhaps in place; a [B L, D] or [B, L, D], b [D, C]."""
    rows, a = total.view(-1, total.shape[-1]), a.flatten(0, -2)
    if a.dtype != total.dtype:
        rows.add_(a @ b, alpha=factor)
    else:
        rows.addmm_(a, b, alpha=factor)
    return total


def _norm_backward(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gradient of a LayerNorm's input."""
    wanted = [True, False, False]
    return aten.native_layer_norm_backward(dy, x, x.shape[-1:], mean, rstd, weight, bias, wanted)[0]
