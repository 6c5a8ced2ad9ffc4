"""Which labels train a zero-shot model: the three published settings and one that uses fewer labels; and the softmax
loss of dense models.

Source: the label handling of ZegCLIP and CLIP-RC. All three functions take labels of the whole vocabulary and keep
ignored labels as they are. In :func:`fastzs.ops.mask_loss`, ignored pixels, and pixels of unseen classes in the
inductive setting, count as negatives of every class unless an option says otherwise.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.ops import label_map
from fastzs.trace import traced


def inductive_target(target: Tensor, seen: Sequence[int], classes: int, ignore_index: int = 255) -> Tensor:
    """Labels among the seen classes only: the n-th of ``seen`` becomes n, all other classes ``ignore_index``.

    Args:
        target: integer labels of any shape, in [0, ``classes``) or ``ignore_index``.
        seen: class indices.

    Returns:
        int64, of the same shape.

    Raises:
        ValueError: a label is out of range.
    """
    among = _among(classes, tuple(seen), target.device)
    table = torch.where(among.is_seen, among.place, ignore_index)
    target, ignored = _wide(target, ignore_index)
    return torch.where(ignored, ignore_index, table[_in_range(target, ignored, classes)])


def transductive_target(target: Tensor, logits: Tensor, seen: Sequence[int], ignore_index: int = 255) -> Tensor:
    """Pixels of unseen classes get the model's own best unseen class. The labels say which pixels these are.

    This is the published protocol (ZegCLIP, then CLIP-RC): it uses the positions of unseen classes, but not their
    labels. :func:`honest_target` uses neither.

    Args:
        target: integer labels [B, H, W], in [0, C) or ``ignore_index``.
        logits: low-resolution logits [B, C, h, w].
        seen: class indices; the others are unseen.

    Returns:
        int64 [B, H, W].

    Raises:
        ValueError: every class is seen, or a label is out of range.
    """
    target, ignored = _wide(target, ignore_index)
    is_seen, unseen = _split(logits.shape[1], seen, target.device)
    replaced = ~ignored & ~is_seen[_in_range(target, ignored, len(is_seen))]
    best, _ = _best(logits, unseen, target.shape, scores=False)
    return torch.where(replaced, best, target)


def honest_target(
    target: Tensor, logits: Tensor, seen: Sequence[int], ignore_index: int = 255, threshold: float = 0.5
) -> Tensor:
    """Pixels without a seen label get the model's own best unseen class, where its probability is high enough.

    Unlike the published protocol, this treats pixels of unseen classes and ignored pixels alike. Where no unseen class
    has a probability of at least ``threshold``, both become ``ignore_index``.

    Args, result and errors: as :func:`transductive_target`.
    """
    target, ignored = _wide(target, ignore_index)
    is_seen, unseen = _split(logits.shape[1], seen, target.device)
    labelled = ~ignored & is_seen[_in_range(target, ignored, len(is_seen))]
    best, probability = _best(logits, unseen, target.shape, scores=True)
    return torch.where(labelled, target, torch.where(probability >= threshold, best, ignore_index))


class _Among(NamedTuple):
    """The seen classes among all."""

    is_seen: Tensor  # bool [C]
    place: Tensor  # int64 [C]: the how many-th of the seen ones it is
    unseen: Tensor  # int64, the others


@functools.lru_cache(16)
def _among(classes: int, seen: tuple[int, ...], device: torch.device) -> _Among:
    """Copied to the device once, for a copy in every step would wait for it."""
    is_seen, place = [False] * classes, [0] * classes
    for n, c in enumerate(seen):
        is_seen[c], place[c] = True, n
    unseen = [c for c in range(classes) if not is_seen[c]]
    with torch.inference_mode(False):
        tables = (torch.tensor(is_seen), torch.tensor(place), torch.tensor(unseen, dtype=torch.int64))
        return _Among(*(table.to(device) for table in tables))


def _split(classes: int, seen: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Which classes are seen, bool [C], and the indices of the others."""
    among = _among(classes, tuple(seen), device)
    if len(among.unseen) == 0:
        raise ValueError("transductive training: every class is seen; leave out `seen` to train on all labels")
    return among.is_seen, among.unseen


def _best(logits: Tensor, unseen: Tensor, shape: torch.Size, scores: bool) -> tuple[Tensor, Tensor]:
    """The best unseen class of each pixel, int64 [B, H, W], and, if ``scores``, its probability."""
    size = (shape[1], shape[2])
    maps = [
        label_map(image[None, unseen], [[0, 0, *size]], size, activation="sigmoid", return_scores=scores)
        for image in logits.detach()
    ]
    labels = unseen[torch.stack([found.labels for found in maps]).long()]
    return labels, torch.stack([found.scores for found in maps if found.scores is not None]) if scores else labels


@traced("train.loss")
def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = 255,
    *,
    align_corners: bool = False,
    over_all: bool = False,
) -> Tensor:
    """Mean cross-entropy of the labelled pixels, computed at the labels' size; 0 if no pixel is labelled.

    Args:
        logits: [B, C, h, w], enlarged (bilinear) to the labels' size.
        target: integer labels [B, H, W], in [0, C) or ``ignore_index``.
        align_corners: of the enlargement.
        over_all: divide by the number of all pixels, as mmsegmentation does, instead of the labelled ones.

    Raises:
        ValueError: a label is out of range.
    """
    size = (target.shape[1], target.shape[2])
    if logits.shape[2:] != size:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    target, ignored = _wide(target, ignore_index)
    index = _in_range(target, ignored, logits.shape[1]).masked_fill(ignored, ignore_index)
    total = F.cross_entropy(logits, index, ignore_index=ignore_index, reduction="sum")
    return total / (index.numel() if over_all else (~ignored).sum().clamp(min=1))


def _wide(target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """int64 labels, and which are ignored: in a byte -100 would be 156, and 65535 would be 255."""
    target = target.long()
    return target, target == ignore_index


def _in_range(target: Tensor, ignored: Tensor, classes: int) -> Tensor:
    """``target`` as indices, 0 where ignored."""
    index = target.masked_fill(ignored, 0)
    if index.numel() and target.device.type == "cpu":
        low, high = index.min().item(), index.max().item()
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels: expected 0 to {classes - 1} (the {classes} classes of the vocabulary) or the ignored label, "
                f"got {low} to {high}"
            )
    return index
