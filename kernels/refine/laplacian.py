"""PEARL's refinement: scores on a coarse grid, drawn together by a graph Laplacian with the image's edges as weights.

Everything is fp64. The system is badly conditioned and 25 steps do not solve it, so that rounding shows: the published
code, in fp32, is off by 2e-3 of the scores.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .kept import grey_weights


def self_similarity(text: Tensor) -> Tensor:
    """``[C]`` from text vectors ``[C, D]``: the diagonal of PEARL's matrix of likeness between names.

    The published code uses no other entry of it.
    """
    unit = F.normalize(text.double(), dim=-1)
    likeness = (unit @ unit.T / 0.5).softmax(-1).diagonal() + 10
    return likeness / (11 + 1e-6)


def steps_of(size: Sequence[int], cells: int) -> list[int]:
    """Pixels of a cell along both axes, for about ``cells`` of them a side."""
    return [max(1, round(length / cells)) for length in size]


def laplacian(
    nodes: Tensor,  # [C, I, J]
    down: Tensor,  # [h, I], see kept.pools
    across: Tensor,  # [w, J]
    image: Tensor,  # [3, H', W']
    likeness: Tensor,  # [C]
    cells: int,
    iterations: int,
    absent: Tensor | None = None,  # bool [C]
) -> Tensor:
    """Refined scores ``[C, h, w]`` fp64 on the coarse grid of about ``cells`` cells a side.

    Classes that are ``absent``, whose nodes must be 0, take part in nothing: their scores stay 0.
    """
    scores = down @ nodes.double() @ across.T
    grey = torch.tensordot(
        grey_weights(image.device), F.avg_pool2d(image.double(), steps_of(image.shape[1:], cells)), 1
    )
    share = (scores if absent is None else scores.masked_fill(absent[:, None, None], -torch.inf)).softmax(0)
    weighted = likeness[:, None, None] * share
    trust = share.amax(0).clamp_min(0.05).square() * (1 + (weighted * share).sum(0))
    right = edge_weights(grey.diff(dim=1), (weighted[:, :, 1:] * share[:, :, :-1]).sum(0))
    below = edge_weights(grey.diff(dim=0), (weighted[:, 1:] * share[:, :-1]).sum(0))
    return conjugate_gradient(scores, trust, right, below, iterations)


def edge_weights(step: Tensor, agreement: Tensor) -> Tensor:
    """Of neighbours that differ by ``step`` in grey; names that both have make a weight larger."""
    size = step.abs()
    mean = size.mean() if size.numel() else 0.0
    return ((-5 * size / (mean + 1e-6)).exp() * (1 + agreement)).clamp(0, 1)


def conjugate_gradient(scores: Tensor, trust: Tensor, right: Tensor, below: Tensor, iterations: int) -> Tensor:
    """Steps from X = ``scores`` towards (diag(trust) + L) X = trust * scores; one length a step for all names."""

    def apply(x: Tensor) -> Tensor:
        y = trust * x
        flow = right * x.diff(dim=2)
        y[:, :, :-1] -= flow
        y[:, :, 1:] += flow
        flow = below * x.diff(dim=1)
        y[:, :-1] -= flow
        y[:, 1:] += flow
        return y

    x = scores.clone()
    residual = trust * scores - apply(x)
    direction = residual.clone()
    size = residual.square().sum()
    for _ in range(iterations):
        step = apply(direction)
        length = size / ((direction * step).sum() + 1e-12)
        x += length * direction
        residual -= length * step
        before, size = size, residual.square().sum()
        direction = residual + size / (before + 1e-12) * direction
    return x
