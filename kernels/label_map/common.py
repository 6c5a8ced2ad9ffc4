"""Where pixels lie along an axis, for the reference and for the tables of the GPU kernels."""

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
