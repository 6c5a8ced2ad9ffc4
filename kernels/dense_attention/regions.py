"""``dense_attention(regions=...)``: a patch attends to the patches of its own region only.

One region at a time in plain PyTorch, so nothing is larger than the pairs of a region. Patches of no region attend to
all, as they do without regions.
"""

import torch
from torch import Tensor

from .proxy import LINEAR_EPS, joined, resampled, split, unit_and_shift


def check(regions: Tensor, images: int, grid: tuple[int, int], device: torch.device) -> None:
    """Raises ValueError unless ``regions`` are integers ``[images, *grid]`` on ``device``."""
    fits = tuple(regions.shape) == (images, *grid) and regions.device == device
    if not fits or regions.is_floating_point() or regions.is_complex():
        raise ValueError(
            f"dense_attention: expected regions [{images}, {grid[0]}, {grid[1]}] of integers on {device}, got "
            f"{regions.dtype} {list(regions.shape)} on {regions.device}"
        )


def members(regions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each region of ``[h, w]`` its patches, and the patches that they may see."""
    flat = regions.flatten().clamp_min(0)
    everything = torch.arange(len(flat), device=flat.device)
    found = ((region, everything[flat == region]) for region in flat.unique().tolist())
    return [(own, own if region else everything) for region, own in found]


def plain(
    pairs: list[tuple[Tensor, Tensor]],
    v: Tensor,
    grid: tuple[int, int],
    scale: float,
    std: float | None,
    regions: Tensor,
) -> Tensor:
    """The sum over ``pairs`` of queries and keys of softmax(scale q k^T) v, with ``std`` NACLIP's Gaussian inside.

    The tokens before the patches are seen by all.
    """
    prefix = v.shape[2] - grid[0] * grid[1]
    out = torch.empty_like(v[:, :, prefix:])
    first = torch.arange(prefix, device=v.device)
    for image, one in enumerate(regions):
        for own, seen in members(one):
            keys = torch.cat([first, prefix + seen])
            weights = pairs[0][0].new_zeros(())
            for a, b in pairs:
                scores = a[image][:, prefix + own] @ b[image][:, keys].mT * scale
                if std is not None:
                    down = own[:, None] // grid[1] - seen // grid[1]
                    across = own[:, None] % grid[1] - seen % grid[1]
                    scores[:, :, prefix:] += torch.exp(-(down**2 + across**2).to(scores.dtype) / (2 * std**2))
                weights = weights + scores.softmax(-1)
            out[image][:, own] = (weights @ v[image][:, keys].to(weights.dtype)).to(v.dtype)
    return out


def proxy(
    v: Tensor,
    affinity: Tensor,
    grid: tuple[int, int],
    beta: float,
    gamma: float,
    floor: float | None,
    regions: Tensor,
) -> Tensor:
    """ "proxy" inside regions of the affinity's grid; the shift stays that of the whole image."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    unit, shift = unit_and_shift(affinity, beta, floor, dtype)
    values = resampled(joined(v, grid, dtype), grid, (affinity.shape[2], affinity.shape[3]))
    out = torch.empty_like(values)
    for image, one in enumerate(regions):
        for own, seen in members(one):
            likeness = unit[image][:, own].T @ unit[image][:, seen]
            left_out = (likeness < shift[image]) & (own[:, None] != seen)
            if floor is None:
                weights = (gamma * (likeness - shift[image])).masked_fill(left_out, -torch.inf).softmax(-1)
            else:
                weights = likeness.masked_fill(left_out, 0)
                weights = weights / (weights.sum(-1, keepdim=True) + LINEAR_EPS)
            out[image, own] = weights @ values[image, seen]
    return split(out, v)
