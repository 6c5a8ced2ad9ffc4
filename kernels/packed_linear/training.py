"""Linear layers in training on CPUs: weights packed anew in each call, and what lies inside of an MLP kept.

Packing takes a few hundredths of the time of a product with 2,000 rows, so nothing is held between the calls.
"""

import torch
from torch import Tensor

from .. import library
from .compiled import MISSING, NUMBERS
from .weights import PANEL, PackedNorm, PackedWeight


def pack_now(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, turned: bool = False) -> PackedWeight:
    """:func:`pack_weight`, but nothing is checked, and ``turned`` packs ``x w`` instead of ``x w^T``.

    Args:
        weight: fp32 or bf16 [outputs, inputs], or turned [inputs, outputs], of dense rows.
        bias: [outputs].
        dtype: fp32 or bf16.
    """
    weight = weight.detach()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    inputs, outputs = weight.shape if turned else weight.shape[::-1]
    columns = torch.zeros(1, -(-outputs // PANEL) * PANEL, dtype=torch.float32)
    if bias is not None:
        columns[0, :outputs] = bias.detach()
    panels = torch.ops.fastzs.pack_panels(weight, turned, dtype == torch.bfloat16)
    return PackedWeight(panels, columns, inputs, outputs)


def mlp(x: Tensor, norm: PackedNorm, first: PackedWeight, last: PackedWeight, activation: str) -> tuple[Tensor, Tensor]:
    """``x + last(activation(first(norm(x))))`` of fp32 or bf16 rows x [N, C], and the hidden layer [N, hidden].

    The hidden layer is as it was before the activation, in the dtype of the weights.
    """
    number = NUMBERS[activation]
    return torch.ops.fastzs.packed_mlp(
        x, norm.table, norm.eps, first.panels, first.columns, first.outputs, number, last.panels, last.columns
    )


def mlp_backward(
    grad: Tensor,
    x: Tensor,
    norm: PackedNorm,
    hidden: Tensor,
    last: PackedWeight,
    first: PackedWeight,
    activation: str,
) -> Tensor:
    """The gradient [N, C] of what :func:`mlp` was given, of that of its result; ``last`` and ``first`` are turned."""
    number = NUMBERS[activation]
    return torch.ops.fastzs.packed_mlp_backward(
        grad, x, norm.table, norm.eps, hidden, last.panels, last.columns, number, first.panels, first.columns
    )


def linear_backward(grad: Tensor, x: Tensor, norm: PackedNorm, weight: PackedWeight) -> Tensor:
    """The gradient of rows x [N, C] of ``norm(x) w^T + b``, of that [N, D] of the result; the weights are turned."""
    return torch.ops.fastzs.packed_linear_backward(grad, x, norm.table, norm.eps, weight.panels, weight.columns)


def _fake_panels(weight, turned, pairs):
    outputs, inputs = weight.shape[turned], weight.shape[not turned]
    step = 2 if pairs else 1
    dtype = torch.bfloat16 if pairs else torch.float32
    return weight.new_empty(-(-outputs // PANEL), -(-inputs // step), PANEL, step, dtype=dtype)


def _fake_mlp(x, norm, eps, weight, columns, outputs, activation, weight2, columns2):
    return torch.empty_like(x), x.new_empty(x.shape[0], outputs, dtype=weight.dtype)


def _fake_mlp_backward(grad, x, norm, eps, hidden, weight, columns, activation, weight2, columns2):
    return torch.empty_like(grad)


def _fake_linear_backward(grad, x, norm, eps, weight, columns):
    return torch.empty_like(x)


if MISSING is None:
    library.register("pack_panels", _fake_panels)
    library.register("packed_mlp", _fake_mlp)
    library.register("packed_mlp_backward", _fake_mlp_backward)
    library.register("packed_linear_backward", _fake_linear_backward)
