"""ProxyCLIP's attention in the order of work of the published code: all pairs, then a copy of the weights a head."""

import torch
import torch.nn.functional as F
from torch import Tensor


def published_proxy(
    v: Tensor, affinity: Tensor, grid: tuple[int, int], beta: float = 1.2, gamma: float = 3.0
) -> Tensor:
    """``v`` ``[1, H, P + h * w, d]``, ``affinity`` ``[1, D, H', W']`` -> ``[1, H, H' * W', d]``.

    NaN in every row without a score of at least 0, as published.
    """
    heads, size = v.shape[1], v.shape[3]
    values = v[0, :, v.shape[2] - grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
    values = F.interpolate(values, affinity.shape[2:], mode="bilinear", align_corners=False)
    unit = F.normalize(affinity.flatten(2), dim=1)
    scores = torch.einsum("bci,bcj->bij", unit, unit)
    scores = (scores - scores.mean() * beta) * gamma
    scores[scores < 0] = float("-inf")
    weights = scores.softmax(-1).repeat(heads, 1, 1)
    return torch.bmm(weights, values.reshape(heads, size, -1).transpose(1, 2))[None]
