"""Smoothing over time of what a model says of consecutive frames."""

from collections.abc import Iterable

import torch
from torch import Tensor


class Smoothing:
    """Exponential smoothing of class maps: ``s[t] = weight * s[t - 1] + (1 - weight) * maps[t]``, ``s[0] = maps[0]``.

    Maps are those of an image's windows before labels are made of them, logits or cosines at low resolution, so it
    costs next to nothing. A class that appears has half its strength after ``log(0.5) / log(weight)`` frames.

    Args:
        weight: of what was before, from 0 (no smoothing) to below 1.
        state: :attr:`state` of another one, to go on from there.

    Attributes:
        state: fp32 [W, C, h, w], the last smoothed maps; None before the first.

    Raises:
        ValueError: the weight is out of range.
    """

    def __init__(self, weight: float, state: Tensor | None = None):
        if not 0 <= weight < 1:
            raise ValueError(f"smoothing: expected a weight from 0 to below 1, got {weight}")
        self.weight, self.state = weight, state

    def __call__(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """The smoothed maps of one image, from its maps [W', C, h, w] in any number of parts."""
        maps = torch.cat(list(parts))
        if self.state is not None and self.state.shape == maps.shape:
            maps = torch.lerp(maps, self.state.to(maps), self.weight)
        self.state = maps
        return [maps]
