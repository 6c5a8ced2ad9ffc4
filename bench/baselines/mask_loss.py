"""Focal and dice loss at full resolution: as published systems compute it, and as well as PyTorch allows.

All take logits ``[B, C, h, w]`` and a target ``[B, H, W]`` (255: ignored, a negative of every class) and return
(focal, dice) as :func:`fastzs.ops.mask_loss` does by default.
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def focal_loss(z, y):
    """Sum over images and classes of the pixels' mean focal loss; z and y ``[B, C, H * W]``."""
    p = z.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(z, y, reduction="none")
    missed = 1 - (p * y + (1 - p) * (1 - y))
    loss = (0.25 * y + 0.75 * (1 - y)) * cross_entropy * missed**2
    return loss.mean(-1).sum()


def dice_loss(z, y):
    """Dice loss of each mask; z and y ``[masks, H * W]``."""
    p = z.sigmoid()
    return 1 - (2 * (p * y).sum(-1) + 1) / (p.sum(-1) + y.sum(-1) + 1)


def published(logits, target):
    """A dense one-hot target, logits upsampled once for focal and once, for the classes present, for dice."""
    C = logits.shape[1]
    size = target.shape[1:]
    y = F.one_hot(target.long().clamp(max=C), C + 1)[..., :C].permute(0, 3, 1, 2).float()  # 255 -> C -> no class
    present = y.flatten(2).any(-1)  # [B, C]
    masks = present.sum().clamp(min=1)
    z = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    focal = focal_loss(z.flatten(2), y.flatten(2)) / masks
    z = F.interpolate(logits[present][:, None], size, mode="bilinear", align_corners=False)
    dice = dice_loss(z.flatten(1), y[present].flatten(1)).sum() / masks
    return focal, dice


def some_classes(logits, target, first):
    """Focal sum, dice sum and number of masks of some classes, the first of which is ``first``."""
    z = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False).flatten(2)
    classes = torch.arange(first, first + logits.shape[1], device=target.device).view(1, -1, 1)
    y = (target.flatten(1)[:, None] == classes).float()  # [B, classes, H * W]
    present = y.any(-1)
    dice = torch.where(present, dice_loss(z, y), 0).sum()
    return focal_loss(z, y), dice, present.sum()


def one_graph(logits, target):
    """All classes at once without a data-dependent shape, so that torch.compile gets a single graph."""
    focal, dice, masks = some_classes(logits, target, 0)
    masks = masks.clamp(min=1)
    return focal / masks, dice / masks


def chunked(logits, target, classes=8):
    """A few classes at a time, recomputed in backward: the memory of one chunk, no dense one-hot."""
    focal = dice = masks = torch.zeros((), device=logits.device)
    for first in range(0, logits.shape[1], classes):
        part = logits[:, first : first + classes]
        f, d, m = checkpoint(some_classes, part, target, first, use_reentrant=False)
        focal, dice, masks = focal + f, dice + d, masks + m
    masks = masks.clamp(min=1)
    return focal / masks, dice / masks
