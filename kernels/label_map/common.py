"""Where pixels and windows lie along an axis, for the reference and for the tables of the GPU kernels."""

from typing import NamedTuple

import torch
from torch import Tensor


class Taps(NamedTuple):
    """A bilinear step along one axis: ``out[i] = (1 - weight[i]) * x[low[i]] + weight[i] * x[high[i]]``."""

    low: Tensor  # [n] int64
    high: Tensor  # [n] int64
    weight: Tensor  # [n] fp64, 0 <= weight < 1

    def part(self, start: int, stop: int, shift: int = 0) -> "Taps":
        """Outputs ``start`` to ``stop``, for an ``x`` whose first ``shift`` entries are left out."""
        return Taps(self.low[start:stop] - shift, self.high[start:stop] - shift, self.weight[start:stop])


def taps_at(position: Tensor, n: int) -> Taps:
    """Taps at fractional positions, in units of the ``n`` entries, the first one's middle being 0."""
    position = position.clamp(0, n - 1)
    low = position.floor().long()
    return Taps(low, (low + 1).clamp_max(n - 1), position - low)


def resize_taps(n_in: int, n_out: int) -> Taps:
    """What ``F.interpolate(mode="bilinear", align_corners=False)`` reads along an axis."""
    return taps_at((torch.arange(n_out, dtype=torch.float64) + 0.5) * n_in / n_out - 0.5, n_in)


def window_spans(start: int, length: int, n_picture: int, n_out: int) -> tuple[int, int, Tensor]:
    """Which outputs along an axis have their centre in a window, and where in it.

    Returns first and last + 1 of the outputs, and their positions from the window's start in pixels ``[n]``
    fp64. Output ``i`` has its centre at ``(i + 1/2) n_picture / n_out``; integers decide, so that no centre
    falls between two windows that touch.
    """
    twice = 2 * torch.arange(n_out) + 1
    inside = (twice * n_picture >= 2 * n_out * start) & (twice * n_picture < 2 * n_out * (start + length))
    index = inside.nonzero().flatten()
    if index.numel() == 0:
        return 0, 0, torch.empty(0, dtype=torch.float64)
    position = twice[index].double() * n_picture / (2 * n_out) - start
    return int(index[0]), int(index[-1]) + 1, position
