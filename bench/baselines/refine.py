"""Pixel-adaptive refinement in the order of work of the published code: all neighbours of all classes at once.

What ``refine`` is compared with, in bench/ and in its tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .label_map import published_scores


def around(maps: Tensor, dilations: tuple[int, ...], centre: bool) -> Tensor:
    """``[C, H, W]`` -> ``[C, 8 |D|, H, W]`` (9 |D| with the centre), by convolutions that pick one neighbour each."""
    taps = [tap for tap in range(9) if centre or tap != 4]
    kernel = torch.eye(9, dtype=maps.dtype, device=maps.device)[taps].view(-1, 1, 3, 3)
    parts = [F.conv2d(F.pad(maps[:, None], [d] * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
    return torch.cat(parts, 1)


def published_pamr(maps: Tensor, image: Tensor, dilations: tuple[int, ...] = (8, 16), iterations: int = 10) -> Tensor:
    """Refined ``maps`` ``[C, h, w]`` at the size of ``image`` ``[K, H, W]``."""
    maps = F.interpolate(maps[None], image.shape[-2:], mode="bilinear", align_corners=True)[0]
    deviation = around(image, dilations, True).std(1, keepdim=True)
    difference = (around(image, dilations, False) - image[:, None]).abs()
    weights = (-difference / (1e-8 + 0.1 * deviation)).mean(0, keepdim=True).softmax(1)
    for _ in range(iterations):
        maps = (around(maps, dilations, False) * weights).sum(1)
    return maps


def published_refined(logits: Tensor, windows, picture_size, image: Tensor, **options) -> Tensor:
    """``[C, H', W']``: windows averaged, resized to the picture, refined."""
    maps = published_scores(logits, windows, picture_size, image.shape[-2:], activation="none")
    return published_pamr(maps, image, **options)
