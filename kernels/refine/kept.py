"""Tables of ``refine`` that stay on a device: images of one size ask for the same.

Made anew for each image they would be copies from pageable memory, each of which waits for the GPU.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .common import Axis, window_axis

KEPT = 32
GREY = (0.299, 0.587, 0.114)


@functools.lru_cache(KEPT)
def axis_table(axis: tuple, device: torch.device) -> Axis:
    """:func:`window_axis` of the arguments ``axis``, in int32 and fp32."""
    index, weight = window_axis(*axis)
    return Axis(index.int().contiguous().to(device), weight.float().contiguous().to(device))


@functools.lru_cache(KEPT)
def dilation_table(dilations: tuple[int, ...], device: torch.device) -> Tensor:
    """int32."""
    return torch.tensor(dilations, dtype=torch.int32).to(device)


def pools(axes: Sequence[tuple], steps: Sequence[int], device: torch.device) -> list[Tensor]:
    """Of rows and columns ``[n // step, nodes]`` fp64: means of ``step`` output pixels, from the windows' nodes.

    Args:
        axes: what :func:`window_axis` takes of each.
        steps: pixels that follow each other.
    """
    return [_pool(axis, step, device) for axis, step in zip(axes, steps, strict=True)]


@functools.lru_cache(KEPT)
def _pool(axis: tuple, step: int, device: torch.device) -> Tensor:
    starts, _, nodes = axis[:3]
    index, weight = window_axis(*axis)
    dense = weight.new_zeros(len(index), len(starts) * nodes).scatter_add(1, index, weight)
    count = len(dense) // step
    return dense[: count * step].unflatten(0, (count, step)).mean(1).to(device)


@functools.lru_cache(KEPT)
def grey_weights(device: torch.device) -> Tensor:
    """``[3]`` fp64, of red, green and blue."""
    return torch.tensor(GREY, dtype=torch.float64).to(device)


TABLES = (axis_table, dilation_table, _pool, grey_weights)
