"""Specification of packed_linear in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import PackedNorm, PackedWeight, unpack_weight

ACTIVATIONS = {
    "none": lambda y: y,
    "relu": F.relu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


def packed_linear_reference(
    x: Tensor,
    first: PackedWeight,
    second: PackedWeight | None,
    activation: str,
    before: PackedNorm | None,
    residual: Tensor | None,
    after: PackedNorm | None,
    dtype: torch.dtype,
) -> Tensor:
    """See :func:`fastzs.kernels.packed_linear.api.packed_linear`; computes in fp64."""
    y = x.double()
    if before is not None:
        y = _norm(y, before)
    y = ACTIVATIONS[activation](_linear(y, first))
    if second is not None:
        y = _linear(y, second)
    if residual is not None:
        y = y + residual.double()
    if after is not None:
        y = _norm(y, after)
    return y.to(dtype)


def _norm(y: Tensor, norm: PackedNorm) -> Tensor:
    weight, bias = norm.table.double()
    return F.layer_norm(y, y.shape[-1:], weight, bias, norm.eps)


def _linear(y: Tensor, packed: PackedWeight) -> Tensor:
    weight, bias = unpack_weight(packed)
    dtype = packed.panels.dtype
    return F.linear(round_rows(y) if dtype == torch.int8 else y.to(dtype).double(), weight, bias)


def round_rows(y: Tensor) -> Tensor:
    """Rows as multiples, -127 to 127, of a 127th of their largest magnitude; NaN where a number is not finite."""
    scale = y.abs().amax(-1, keepdim=True) / 127
    rounded = (y / scale.clamp_min(1e-38)).round() * scale
    return torch.where(y.isfinite().all(-1, keepdim=True), rounded, torch.nan)
