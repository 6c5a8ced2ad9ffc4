"""The specification of ``key_smoothing`` and ``prompt_denoising``, in plain PyTorch, differentiable."""

import torch.nn.functional as F
from torch import Tensor


def key_smoothing_reference(
    keys: Tensor,  # [B, N, D]
    probs: Tensor,  # [B, C, N]
    mode: str,
    threshold: float,
) -> Tensor:  # [B, C, N]
    """``out[c, i] = sum_j cos(k_i, k_j) p[c, j]``, through the ``[B, N, N]`` matrix of cosines."""
    # The published code normalises over the positions (axis 1), the paper means each key vector (axis 2).
    keys = F.normalize(keys, dim=2 if mode == "paper" else 1)
    similarity = keys @ keys.transpose(1, 2)  # [B, N, N]
    smooth = probs @ similarity.transpose(1, 2)
    if mode == "paper":
        return smooth
    return smooth.where(probs.amax(1, keepdim=True) < threshold, probs)


def prompt_denoising_reference(scores: Tensor, threshold: float) -> Tensor:
    """``[B, C, N]`` -> ``[B, C]`` bool."""
    return ~(scores.amax(2) < threshold)
