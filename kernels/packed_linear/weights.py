"""Weights of linear layers as ``packed_linear`` takes them: int8, bf16 or fp32, in panels of 64 outputs."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

PANEL = 64  # as in csrc/linear_tiles.h
STEPS = {torch.int8: 4, torch.bfloat16: 2, torch.float32: 1}  # inputs that one instruction multiplies and adds up


class PackedWeight(NamedTuple):
    """Weights ``w`` [outputs, inputs] and their bias, packed by :func:`pack_weight`.

    Attributes:
        panels: [outputs / 64, inputs / step, 64, step] in the precision's dtype, zeros beyond the ends.
        columns: fp32 [1, outputs up to whole panels], the bias; int8 [3, ...]: besides what a byte's unit stands for,
            and the sum of the bytes.
    """

    panels: Tensor
    columns: Tensor
    inputs: int
    outputs: int


class PackedNorm(NamedTuple):
    """A layer norm over the channels: fp32 [2, C], its gain and bias, and its eps."""

    table: Tensor
    eps: float


def pack_weight(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedWeight:
    """Pack ``x w^T + b`` for inference on a CPU.

    int8: an output's weights are ``scale * byte``, bytes -127 to 127, the largest weight being 127. An output whose
    weights are all zero has scale 0, so its result is its bias.

    Args:
        weight: floating [outputs, inputs].
        bias: [outputs], or None for zeros.
        dtype: int8, bfloat16 or float32.

    Raises:
        ValueError: a number is not finite, or int8 sums would overflow (more than 65,536 inputs).
    """
    weight = weight.detach().float()
    outputs, inputs = weight.shape
    bias = torch.zeros(outputs) if bias is None else bias.detach().float()
    strange = (~(weight.isfinite().all(1) & bias.isfinite())).nonzero().flatten().tolist()
    if strange:
        raise ValueError(
            f"expected finite weights, got NaN or infinity in {len(strange)} of {outputs} output channels, "
            f"the first is {strange[0]}; load other weights"
        )
    if dtype == torch.int8 and inputs > 65536:
        raise ValueError(f"int8 sums hold at most 65536 inputs, got {inputs}; use fp32 or bf16")
    step, rows = STEPS[dtype], -(-outputs // PANEL) * PANEL
    padded = torch.zeros(rows, -(-inputs // step) * step)
    columns = torch.zeros(3 if dtype == torch.int8 else 1, rows)
    columns[0, :outputs] = bias
    if dtype == torch.int8:
        scale = weight.abs().amax(1) / 127
        padded[:outputs, :inputs] = (weight / scale.clamp_min(1e-38)[:, None]).round()
        columns[1, :outputs] = scale
        columns[2] = padded.sum(1)
    else:
        padded[:outputs, :inputs] = weight
    panels = padded.to(dtype).view(-1, PANEL, padded.shape[1] // step, step).transpose(1, 2).contiguous()
    return PackedWeight(panels, columns, inputs, outputs)


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """The weights [outputs, inputs] and bias [outputs] that a packed one stands for, fp64."""
    panels, columns = packed.panels.double(), packed.columns.double()
    weight = panels.transpose(1, 2).flatten(0, 1).flatten(1)
    if packed.panels.dtype == torch.int8:
        weight = weight * columns[1, :, None]
    return weight[: packed.outputs, : packed.inputs], columns[0, : packed.outputs]


def pack_norm(norm: nn.LayerNorm) -> PackedNorm:
    """A layer norm over the last dimension, as ``packed_linear`` takes it."""
    return PackedNorm(torch.stack([norm.weight.detach(), norm.bias.detach()]).float(), norm.eps)
