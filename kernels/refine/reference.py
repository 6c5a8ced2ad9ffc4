"""The specification of ``refine``, in plain PyTorch, a few classes at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Options, Result

CHUNK = 8  # classes whose maps exist at a time
SHIFTS = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]


def neighbour(maps: Tensor, down: int, right: int) -> Tensor:
    """``maps`` ``[..., H, W]`` read at ``(y + down, x + right)``; beyond a border, its nearest pixel."""
    H, W = maps.shape[-2:]
    rows = (torch.arange(H, device=maps.device) + down).clamp(0, H - 1)
    cols = (torch.arange(W, device=maps.device) + right).clamp(0, W - 1)
    return maps[..., rows[:, None], cols]


def pamr_weights(image: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """``[8 |D|, H, W]``, sum 1 at each pixel: how alike the neighbours are (Araslanov & Roth, CVPR 2020)."""
    steps = [(d * y, d * x) for d in dilations for y, x in SHIFTS]
    deviation = torch.stack([neighbour(image, *step) for step in steps]).std(0)  # n - 1; the centre once a dilation
    ring = [step for step in steps if step != (0, 0)]
    alike = [-((image - neighbour(image, *step)).abs() / (1e-8 + 0.1 * deviation)).mean(0) for step in ring]
    return torch.stack(alike).softmax(0)


def pamr(maps: Tensor, weights: Tensor, dilations: tuple[int, ...], iterations: int) -> Tensor:
    """``maps`` ``[C, H, W]``, each pixel ``iterations`` times replaced by the weighted mean of its neighbours."""
    ring = [(d * y, d * x) for d in dilations for y, x in SHIFTS if (y, x) != (0, 0)]
    for _ in range(iterations):
        total = torch.zeros_like(maps)
        for weight, step in zip(weights, ring, strict=True):
            total += weight * neighbour(maps, *step)
        maps = total
    return maps


def averaged(logits: Tensor, windows: list[list[int]], image_size, output_size) -> Tensor:
    """Windows' maps ``[W, C, h, w]`` at their pixels, averaged, at the output's size ``[C, H', W']``."""
    height, width = image_size
    total = logits.new_zeros(logits.shape[1], height, width)
    visits = logits.new_zeros(height, width)
    for window, (top, left, rows, cols) in zip(logits, windows, strict=True):
        pixels = F.interpolate(window[None], (rows, cols), mode="bilinear", align_corners=False)[0]
        inside = slice(max(top, 0), top + rows), slice(max(left, 0), left + cols)
        total[:, *inside] += pixels[:, max(-top, 0) :, max(-left, 0) :][
            :, : height - max(top, 0), : width - max(left, 0)
        ]
        visits[inside] += 1
    return F.interpolate((total / visits)[None], output_size, mode="bilinear", align_corners=False)[0]


def refine_reference(logits: Tensor, windows: list[list[int]], image: Tensor, options: Options) -> Result:
    """See :func:`fastzs.kernels.refine.api.refine`; ``logits`` ``[W, C, h, w]``, ``image`` ``[K, H', W']``."""
    size = (image.shape[1], image.shape[2])
    weights = pamr_weights(image, options.dilations) if options.iterations else image[:0]
    result = Result.empty(logits[0], size, options)
    result.labels.fill_(0)
    result.scores.fill_(-torch.inf)
    total = torch.zeros_like(result.scores)
    for first in range(0, logits.shape[1], CHUNK):
        maps = averaged(logits[:, first : first + CHUNK], windows, options.image_size, size)
        maps = pamr(maps, weights, options.dilations, options.iterations)
        best, label = maps.max(0)
        most = torch.maximum(best, result.scores)
        if options.scale is not None:
            total = total * (options.scale * (result.scores - most)).exp()
            total += (options.scale * (maps - most)).exp().sum(0)
        result.labels.copy_(torch.where(best > result.scores, first + label, result.labels))
        result.scores.copy_(most)
        if result.maps is not None:
            result.maps[first : first + CHUNK] = maps
    if result.probabilities is not None:
        result.probabilities.copy_(1 / total)
    return result
