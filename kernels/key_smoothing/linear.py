"""Cosine smoothing without the ``N x N`` matrix.

Nothing non-linear stands between the two products, so ``(K K^T) P = K (K^T P)``: ``4 N D C`` operations
instead of ``2 N^2 (D + C)``. The normalisation is a factor of the small matrices, so no normalised copy of
the keys is made.
"""

import torch
from torch import Tensor

from .common import EPS


def key_smoothing_linear(keys: Tensor, probs: Tensor, mode: str, threshold: float) -> Tensor:
    """``[B, N, D]``, ``[B, C, N]`` -> ``[B, C, N]``, of one dtype; see :func:`fastzs.ops.key_smoothing`."""
    if mode == "paper":
        inverse = torch.linalg.vector_norm(keys, dim=2).clamp_min(EPS).reciprocal()[:, None]  # [B, 1, N]
        sums = (probs * inverse) @ keys  # [B, C, D]
        return (sums @ keys.transpose(1, 2)).mul_(inverse)
    square = torch.linalg.vector_norm(keys, dim=1).clamp_min(EPS)[:, None] ** 2  # [B, 1, D]
    sums = (probs @ keys) / square  # [B, C, D]
    smooth = sums @ keys.transpose(1, 2)
    return smooth.where(probs.amax(1, keepdim=True) < threshold, probs)
