"""Dropout for training on CPUs: 16 random bits decide about an element, where PyTorch draws a number for each.

Of the elements a share of ``rate`` is dropped, rounded to 1 / 65536. Randomness comes from torch's default generator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 1 << 16


def kept_share(rate: float) -> float:
    """The share of elements that is kept."""
    return 1 - round(rate * _STEPS) / _STEPS


def draw_kept(shape: tuple[int, ...], rate: float, device: torch.device) -> Tensor:
    """Which elements are kept: int8, 1 or 0, since products with integers run in vectors and those with bool do not."""
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    # with both bounds given, all 64 bits are random
    bits.random_(-(2**63), None)
    least = round(rate * _STEPS) - _STEPS // 2
    return (bits.view(torch.int16)[:count] >= least).view(torch.int8).view(shape)


def dropout(x: Tensor, rate: float) -> Tensor:
    """x without a share of its elements, the others enlarged to keep the mean; differentiable once on a CPU."""
    if not rate or x.device.type != "cpu":
        return F.dropout(x, rate)
    return _Dropout.apply(x, rate)  # pyright: ignore


def relu_dropout(x: Tensor, rate: float) -> Tensor:
    """dropout(relu(x)); on a CPU only the result is kept for backward, since it is positive where both let through."""
    if not rate or x.device.type != "cpu":
        return F.dropout(F.relu(x), rate)
    return _ReluDropout.apply(x, rate)  # pyright: ignore


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rate):
        kept = draw_kept(x.shape, rate, x.device)
        ctx.save_for_backward(kept)
        ctx.factor = 1 / kept_share(rate)
        return (x * kept).mul_(ctx.factor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        return (grad * kept).mul_(ctx.factor), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rate):
        ctx.factor = 1 / kept_share(rate)
        out = F.relu(x).mul_(draw_kept(x.shape, rate, x.device)).mul_(ctx.factor)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grad, out, 0).mul_(ctx.factor), None
