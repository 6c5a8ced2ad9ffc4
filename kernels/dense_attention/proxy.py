"""``dense_attention(kind="proxy")``: weights from another network's features, values from CLIP.

The reference goes through the rows in blocks; csrc/proxy_attention.cpp computes a block's weights from packed features
and draws them together on the values' grid; proxy_triton.py keeps them in registers. None has all N x N in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library
from ..extension import why_missing
from ..refine.common import bilinear
from ..triton_runtime import why_not_triton as why_not_on

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("proxy_attention", "cpu")
ROWS = 512  # of the reference, at a time
SMALLEST_NORM = 1e-12  # F.normalize's
LINEAR_EPS = 1e-6  # CLIP-DINOiser's, in the denominator


def check(v: Tensor, affinity: Tensor | None, gamma: float) -> Tensor:
    """``affinity``, if it can be one for values ``v`` ``[B, H, L, d]``; raises ValueError if not."""
    if affinity is None:
        raise ValueError("dense_attention: kind='proxy' needs another network's features; pass affinity=[B, D, H', W']")
    if affinity.ndim != 4 or affinity.shape[0] != v.shape[0] or 0 in affinity.shape:
        raise ValueError(
            f"dense_attention: expected affinity [{v.shape[0]}, D, H', W'], none of them 0, got {list(affinity.shape)}"
        )
    if affinity.device != v.device or not affinity.is_floating_point():
        raise ValueError(
            f"dense_attention: expected a floating affinity on {v.device}, got {affinity.dtype} on {affinity.device}"
        )
    if gamma <= 0:
        raise ValueError(f"dense_attention: expected a positive gamma, got {gamma}")
    if not torch.compiler.is_compiling() and affinity.device.type == "cpu" and not affinity.isfinite().all():
        raise ValueError("dense_attention: affinity has NaN or infinite values; expected finite ones")
    return affinity


def why_not_cpu(v: Tensor, affinity: Tensor) -> str | None:
    """None if the compiled library can take them, else the reason."""
    if v.device.type != "cpu":
        return f"v is on {v.device}"
    if v.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"v is {v.dtype}; expected float32, bfloat16 or float16"
    if v.shape[1] * v.shape[3] % 32:
        return f"heads together have {v.shape[1] * v.shape[3]} channels; expected a multiple of 32"
    if torch.is_grad_enabled() and (v.requires_grad or affinity.requires_grad):
        return "it has no gradient, and one is needed"
    return MISSING


def why_not_triton(v: Tensor, affinity: Tensor) -> str | None:
    """None if the Triton kernel can take them, else the reason."""
    if reason := why_not_on("v is", v.device):
        return reason
    for name, dtype in (("v", v.dtype), ("affinity", affinity.dtype)):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {dtype}; expected float32, bfloat16 or float16"
    wanted = torch.is_grad_enabled() and (v.requires_grad or affinity.requires_grad)
    return "the kernel has no gradient, and one is needed" if wanted else None


def unit_and_shift(affinity: Tensor, beta: float, floor: float | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit features ``[B, D, N]``, and the similarity ``[B]`` from which a pair has a weight."""
    unit = F.normalize(affinity.to(dtype).flatten(2), dim=1)
    if floor is not None:
        return unit, unit.new_full((len(unit),), floor)
    # The mean over all pairs is the square of the mean feature.
    return unit, beta * unit.mean(2).square().sum(1)


def joined(v: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The patches' values, heads side by side: ``[B, h * w, H * d]``."""
    return v[:, :, v.shape[2] - grid[0] * grid[1] :].transpose(1, 2).flatten(2).to(dtype)


def resampled(values: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """``[B, h * w, C]`` on another grid, ``[B, H' * W', C]``."""
    maps = F.interpolate(values.transpose(1, 2).unflatten(2, grid), size, mode="bilinear", align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def split(out: Tensor, v: Tensor) -> Tensor:
    """``[B, N, H * d]`` -> ``[B, H, N, d]`` in the dtype of ``v``."""
    return out.to(v.dtype).unflatten(2, (v.shape[1], v.shape[3])).transpose(1, 2)


def reference(
    v: Tensor, affinity: Tensor, grid: tuple[int, int], beta: float, gamma: float, floor: float | None
) -> Tensor:
    """See :func:`fastzs.kernels.dense_attention.api.dense_attention`."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    unit, shift = unit_and_shift(affinity, beta, floor, dtype)
    values = resampled(joined(v, grid, dtype), grid, (affinity.shape[2], affinity.shape[3]))
    patch = torch.arange(unit.shape[2], device=v.device)
    parts = []
    for rows in patch.split(ROWS):
        likeness = unit[:, :, rows].transpose(1, 2) @ unit  # [B, rows, N]
        left_out = (likeness < shift[:, None, None]) & (rows[:, None] != patch)
        if floor is None:
            weights = (gamma * (likeness - shift[:, None, None])).masked_fill(left_out, -torch.inf).softmax(-1)
        else:
            weights = likeness.masked_fill(left_out, 0)
            weights = weights / (weights.sum(-1, keepdim=True) + LINEAR_EPS)
        parts.append(weights @ values)
    return split(torch.cat(parts, 1), v)


def compiled(
    v: Tensor, affinity: Tensor, grid: tuple[int, int], beta: float, gamma: float, floor: float | None
) -> Tensor:
    """:func:`reference` by the compiled library, in fp32."""
    unit, shift = unit_and_shift(affinity, beta, floor, torch.float32)
    size, tables = affinity.shape[2:], []
    for fine, coarse in zip(size, grid, strict=True):
        low, _, part = bilinear((torch.arange(fine) + 0.5) * coarse / fine - 0.5, coarse)
        tables += [low.int(), part.float()]
    values = joined(v, grid, torch.float32).contiguous()
    linear = floor is not None
    out = torch.ops.fastzs.proxy_attention(unit.contiguous(), values, shift, *size, *grid, *tables, gamma, linear)
    return split(out, v)


def fused(v: Tensor, affinity: Tensor, grid: tuple[int, int], beta: float, gamma: float, floor: float | None) -> Tensor:
    """:func:`reference` by the Triton kernel: sums in fp32, values and weights in the dtype of ``v``."""
    unit, shift = unit_and_shift(affinity, beta, floor, torch.float32)
    unit = unit.transpose(1, 2)  # [B, N, D]
    if torch.float32 in (affinity.dtype, v.dtype):
        features, inverse = unit, unit.new_ones(unit.shape[:2])
    else:  # tensor cores multiply 16-bit numbers exactly
        features = affinity.flatten(2).transpose(1, 2)
        inverse = features.float().norm(dim=2).clamp_min(SMALLEST_NORM).reciprocal()
    values = resampled(joined(v, grid, torch.float32), grid, (affinity.shape[2], affinity.shape[3])).to(v.dtype)
    smallest = None if floor is None else LINEAR_EPS
    out = torch.ops.fastzs.proxy_attention_triton(features, inverse, unit.norm(dim=2), values, shift, gamma, smallest)
    return split(out, v)


def _fake(features, values, shift, *arguments):
    return values.new_empty((len(features), features.shape[2], values.shape[2]))


if MISSING is None:
    library.register("proxy_attention", _fake)
