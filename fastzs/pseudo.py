"""Labels that a model gives to pixels without one: the rules of the published self-training schemes.

A rule takes labels int64 [B, h, w], some of them ``ignore_index``, and a teacher's scores [B, C, h, w] of the same
size; classes beyond the labels' own (CaGNet's extra one) may be among the scores. It returns labels of the same shape
and weights [B, h, w] or None. None of the rules is told which pixels show unseen classes: background, padding and
unseen pixels are all without a label.

- ``best``: the best unseen class. STRICT's hard labels (Pastore et al., CVPR workshops 2021).
- ``rank``: the best unseen class where it is among the first ``within`` of all. CaGNet (Gu et al., ACM MM 2020).
- ``share``: for each image the most confident part of them. ZS5 (Bucher et al., NeurIPS 2019).
- ``consistent``: the best unseen class where several views of the image agree on it. STRICT.
- ``annealed``: the best unseen class, the more weight the surer it is. SIGN (Cheng et al., ICCV 2021) as it is meant:
  w = exp(T (p - max p)), the maximum over the image's unlabelled pixels. Its released code gives weights of 0.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
RULES = ("best", "rank", "share", "consistent", "annealed")


def best(labels: Tensor, scores: Tensor, unseen: Sequence[int], ignore_index: int = IGNORE) -> Tensor:
    """Every unlabelled pixel gets its best unseen class."""
    return torch.where(labels == ignore_index, _best(scores, unseen), labels.long())


def rank(labels: Tensor, scores: Tensor, unseen: Sequence[int], within: int, ignore_index: int = IGNORE) -> Tensor:
    """An unlabelled pixel gets its best unseen class if fewer than ``within`` of all classes score higher."""
    found = _best(scores, unseen)
    higher = (scores > scores.gather(1, found[:, None])).sum(1)
    return torch.where((labels == ignore_index) & (higher < within), found, labels.long())


def share(labels: Tensor, scores: Tensor, unseen: Sequence[int], percent: float, ignore_index: int = IGNORE) -> Tensor:
    """In each image the most confident ``percent`` of the pixels that the model calls unseen get that label.

    Only unlabelled pixels count. Published: 25 (VOC), 75 (PASCAL-Context).
    """
    confidence, found = scores.softmax(1).max(1)  # [B, h, w]
    candidates = (labels == ignore_index) & torch.isin(found, torch.tensor(list(unseen), device=found.device))
    out = labels.long().clone()
    for picture, open_pixels, sure, guess in zip(out, candidates, confidence, found, strict=True):
        count = int(open_pixels.sum() * percent / 100)
        if count:
            flat = sure.masked_fill(~open_pixels, -1).flatten().topk(count).indices
            picture.view(-1)[flat] = guess.flatten()[flat]
    return out


def annealed(
    labels: Tensor, scores: Tensor, unseen: Sequence[int], temperature: float, ignore_index: int = IGNORE
) -> tuple[Tensor, Tensor]:
    """:func:`best`, and the weights: 1 for given labels, exp(T (p - max p)) for new ones, p being their probability."""
    open_pixels, found = labels == ignore_index, _best(scores, unseen)
    p = scores.softmax(1).gather(1, found[:, None])[:, 0]
    top = p.masked_fill(~open_pixels, 0).flatten(1).amax(1)[:, None, None]
    weights = torch.where(open_pixels, (temperature * (p - top)).exp(), torch.ones_like(p))
    return torch.where(open_pixels, found, labels.long()), weights


def consistent(labels: Tensor, views: Sequence[Tensor], unseen: Sequence[int], ignore_index: int = IGNORE) -> Tensor:
    """An unlabelled pixel gets the unseen class on which all views agree; without agreement it stays as it is.

    Args:
        views: the teacher's scores [B, C, h, w] of each, see :func:`views_of`.
        ignore_index: the label of unlabelled pixels; with STRICT's background class, that class.
    """
    first, *others = (_best(view, unseen) for view in views)
    agreed = torch.ones_like(first, dtype=torch.bool)
    for other in others:
        agreed &= other == first
    return torch.where((labels == ignore_index) & agreed, first, labels.long())


def views_of(teacher: Callable[[Tensor], Tensor], images: Tensor, scales: Sequence[float]) -> list[Tensor]:
    """The teacher's scores of an image, its mirror image, and both at every scale, all on the image's own grid.

    A mirrored image is mirrored first and resized then, by the factor itself (cell i lies at (i + 1/2) / q - 1/2).

    Args:
        teacher: images [B, 3, H, W] -> scores [B, C, h, w].
        scales: factors q; published: (1.5, 1.75).
    """
    out: list[Tensor] = []
    for factor in (None, *scales):
        for mirrored in (False, True):
            view = images.flip(3) if mirrored else images
            if factor is not None:
                view = F.interpolate(view, scale_factor=factor, mode="bilinear", recompute_scale_factor=False)
            scores = teacher(view)
            scores = scores.flip(3) if mirrored else scores
            out.append(scores if not out else F.interpolate(scores, out[0].shape[2:], mode="bilinear"))
    return out


def _best(scores: Tensor, unseen: Sequence[int]) -> Tensor:
    """The best of the unseen classes, int64 [B, h, w]."""
    if not len(unseen):
        raise ValueError("self-training: every class is seen, so there is nothing to label; leave it out")
    index = torch.tensor(list(unseen), device=scores.device)
    return index[scores[:, index].argmax(1)]
