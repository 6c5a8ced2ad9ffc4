"""An image at several sizes, and what several sizes say together: the wrapper of DeepLabV2's descendants.

Source: Chen et al., "DeepLab", TPAMI 2018, section 4.3; here as SPNet (Xian et al., CVPR 2019) has it: the image
and its reductions to int(s * side), the element-wise maximum over the outputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reductions(images: Tensor, factors: Sequence[float]) -> list[Tensor]:
    """The images [B, C, H, W] and, for each factor s, their bilinear reductions [B, C, int(s H), int(s W)]."""
    height, width = images.shape[2:]
    return [images] + [
        F.interpolate(images, (max(1, int(height * s)), max(1, int(width * s))), mode="bilinear") for s in factors
    ]


def greatest(maps: Sequence[Tensor]) -> Tensor:
    """The element-wise maximum of maps [B, C, h_i, w_i], the others brought to the first one's size (bilinear)."""
    first, *others = maps
    size = first.shape[2:]
    for other in others:
        first = torch.maximum(first, F.interpolate(other, size, mode="bilinear"))
    return first


def nearest_labels(target: Tensor, size: Sequence[int]) -> Tensor:
    """Labels [B, H, W] -> [B, h, w]: cell i takes the label at floor(i H / h), in integers."""
    rows, columns = (
        torch.arange(small, device=target.device) * large // small
        for small, large in zip(size, target.shape[1:], strict=True)
    )
    return target[:, rows[:, None], columns]
