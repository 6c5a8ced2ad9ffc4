"""The end of the pipeline as the published code computes it: eager, with the full ``[C, H, W]`` score maps.

What ``label_map`` is compared with, in bench/ and in its tests.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def published_scores(
    logits: Tensor,  # [W, C, h, w]
    windows,
    picture_size,
    output_size=None,
    activation: str = "sigmoid",
    seen=None,
    calibration: float = 0.1,
) -> Tensor:  # [C, H', W']
    """Sliding-window inference window by window: interpolate, activate, calibrate, add up, divide, resize."""
    total = logits.new_zeros(1, logits.shape[1], *picture_size)
    visits = logits.new_zeros(1, 1, *picture_size)
    for window, (top, left, height, width) in zip(logits.split(1), windows, strict=True):
        scores = F.interpolate(window, size=(height, width), mode="bilinear", align_corners=False)
        if activation == "sigmoid":
            scores = scores.sigmoid()
        elif activation == "softmax":
            scores = scores.softmax(1)
        if seen is not None:
            scores = scores.clone()
            scores[:, seen] -= calibration
        right, bottom = picture_size[1] - left - width, picture_size[0] - top - height
        total += F.pad(scores, (left, right, top, bottom))
        visits[:, :, top : top + height, left : left + width] += 1
    scores = total / visits
    if output_size is not None:
        scores = F.interpolate(scores, size=tuple(output_size), mode="bilinear", align_corners=False)
    return scores[0]


def published_labels(*args, **kwargs) -> Tensor:
    """Labels ``[H', W']``, as mmseg takes them: argmax over the softmax over the averaged scores."""
    return published_scores(*args, **kwargs)[None].softmax(1).argmax(1)[0]


def slide_windows(picture_size, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """Windows of the published test recipe, the last of a row or column shifted back inside."""
    windows = []
    counts = [max(n - crop + stride - 1, 0) // stride + 1 for n in picture_size]
    height, width = (min(crop, n) for n in picture_size)
    for i in range(counts[0]):
        for j in range(counts[1]):
            top, left = min(i * stride, picture_size[0] - height), min(j * stride, picture_size[1] - width)
            windows.append((top, left, height, width))
    return windows


def scene(classes: int, picture_size, crop: int, windows, kind: str) -> Tensor:
    """``[W, C, 32, 32]`` fp32 logits of overlapping windows of one picture, or ``kind="noise"``.

    ``"regions"`` is what segmenters give: neighbours alike, few classes high at once, windows that agree where they
    overlap but for a little noise. ``"noise"`` is the worst case for ``label_map``: nothing is alike.
    """
    generator = torch.Generator().manual_seed(classes)
    if kind == "noise":
        return torch.randn(len(windows), classes, 32, 32, generator=generator)
    nodes = [round(n * 32 / crop) for n in picture_size]
    whole = smooth_logits(1, classes, *nodes, seed=classes)[0]
    tops = [min(round(top * 32 / crop), nodes[0] - 32) for top, *_ in windows]
    lefts = [min(round(left * 32 / crop), nodes[1] - 32) for _, left, *_ in windows]
    maps = torch.stack([whole[:, t : t + 32, x : x + 32] for t, x in zip(tops, lefts, strict=True)])
    return maps + 0.2 * torch.randn(maps.shape, generator=generator)


def smooth_logits(windows: int, classes: int, height: int, width: int, seed: int = 0, scale: float = 4.0) -> Tensor:
    """``[W, C, h, w]`` fp32 as segmenters give them: few classes stand out, in connected regions."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(windows, classes, max(2, height // 6), max(2, width // 6), generator=generator)
    maps = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return scale * maps + 0.3 * torch.randn(windows, classes, height, width, generator=generator) - scale
