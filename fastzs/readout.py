"""From the cosines of windows to labels, as the training-free systems since SCLIP do it.

The cosines of every name are averaged over the windows, refined along the image's edges where the system does so, and
compared: the label is the class of the best name. A pixel's score is the softmax of ``scale`` times the cosines over
all names, at the best name. Nothing of the size [names, H, W] is ever made.

Source: Wang et al., "SCLIP", ECCV 2024, whose order of work its successors share.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.models.base import kept_groups
from fastzs.ops import refine

Refinement = Literal["none", "pamr", "laplacian"]


@dataclass(frozen=True)
class Readout:
    """How a system reads averaged cosines.

    Attributes:
        scale: of the cosines in the softmax that gives scores.
        refine: what smooths the cosines: "pamr" (Araslanov & Roth, 2020), "laplacian" (PEARL) or "none".
        cells: of the Laplacian's grid, a side.
        area: classes, other than the first, that cover at most this share of the pixels outside the first class give
            them to the next best class; SCLIP's rule for PASCAL VOC with its background as the first class.
        guide: what "pamr" follows: the "photograph" itself, or the image as the model sees it, "enlarged" again, as
            published.
        working_side: images are refined at a size whose shorter side is at most this many pixels, since PAMR's reach is
            fixed in pixels and was tuned at about 500 x 375; labels are enlarged from there. None: at their own size.
        direct: cosines of an image that is taken whole go from the patches to the image's own size in one step.
    """

    scale: float = 40.0
    refine: Refinement = "none"
    cells: int = 80
    area: float = 0.0
    guide: Literal["photograph", "enlarged"] = "photograph"
    working_side: int | None = 672
    direct: bool = False

    def threshold(self, names: int) -> float:
        """The score below which a pixel is background unless told otherwise: a tenth of the way from chance to 1.

        With n names the best score lies between 1 / n and 1. Published thresholds, about 0.1 with 56 to 113 names, lie
        near 1 / n + 0.1 (1 - 1 / n); with two names that is 0.55.
        """
        return 1 / names + 0.1 * (1 - 1 / names)


class Read(NamedTuple):
    """What is read of an image."""

    labels: Tensor  # int64 [H, W], indices of classes
    scores: Tensor | None  # fp32 [H, W]
    probabilities: Tensor | None = None  # fp16 [C, H, W]


def read_image(
    readout: Readout,
    cosines: Tensor,
    windows: Tensor,
    size: tuple[int, int],
    image: Tensor,
    text: Tensor,
    **options: Any,
) -> Read:
    """Labels of an image uint8 [3, H, W], on the device of the cosines; other arguments as of :func:`read`.

    Large images are refined at the readout's ``working_side`` and the labels enlarged.
    """
    own = (image.shape[1], image.shape[2])
    working = _working_size(readout, own)
    found = read(readout, cosines, windows, size, _guide(readout, image, size, working), text, **options)
    if working == own:
        return found
    labels = F.interpolate(found.labels[None, None].double(), own, mode="nearest-exact")[0, 0].long()
    scores, every = (
        None if some is None else F.interpolate(some[None], own, mode="bilinear")[0]
        for some in (None if found.scores is None else found.scores[None], found.probabilities)
    )
    return Read(labels, None if scores is None else scores[0], every)


def read(
    readout: Readout,
    cosines: Tensor,
    windows: Tensor,
    size: tuple[int, int],
    guide: Tensor,
    text: Tensor,
    *,
    classes: Tensor | None,
    threshold: float | None = None,
    below: int = 0,
    scores: bool = False,
    probabilities: bool = False,
) -> Read:
    """Labels of the size of ``guide``.

    Args:
        readout: the system's.
        cosines: [W, T, h, w], of every window and name.
        windows: int64 [W, 4], what the maps cover in the resized image: top, left, height, width; they may reach
            beyond it.
        size: of the resized image.
        guide: the image [3, H, W], floating, whose edges a refinement follows.
        text: [T, D], the names' vectors.
        classes: int64 [T], the class of each name; None if each name is a class.
        threshold: pixels whose score is lower get the label ``below``.
        below: that label.
        scores: also return the scores.
        probabilities: also return every class's score, the largest of its names: the one thing that makes all maps.
    """
    if readout.direct and len(windows) == 1:
        windows, size = torch.tensor([[0, 0, *guide.shape[1:]]]), (guide.shape[1], guide.shape[2])
    wanted = scores or probabilities or threshold is not None or readout.area > 0
    options: dict[str, Any] = {
        "windows": windows,
        "image_size": size,
        "method": readout.refine,
        "cells": readout.cells,
        "scale": readout.scale if wanted else None,
    }
    vectors = text if readout.refine == "laplacian" else None
    found = refine(cosines, guide, text=vectors, return_maps=probabilities, **options)
    labels = _classes(found.labels.long(), classes)
    score = found.probabilities
    if readout.area > 0:
        assert score is not None
        kept = _kept_names(labels, readout.area, classes, cosines.shape[1])
        if not kept.all():
            rows = kept.nonzero().flatten().to(cosines.device)
            total = readout.scale * found.scores - score.log()  # log of the sum of exponentials over all names
            again = refine(cosines[:, rows], guide, text=None if vectors is None else vectors[rows], **options)
            labels = _classes(rows[again.labels.long()], classes)
            score = (readout.scale * again.scores - total).exp()
    if threshold is not None:
        assert score is not None
        labels = labels.masked_fill(score < threshold, below)
    every = None
    if probabilities:
        assert found.maps is not None
        every = (readout.scale * found.maps).softmax(0)
        if classes is not None:
            placed, count = kept_groups(tuple(classes.tolist()), every.device)
            index = placed[:, None, None].expand_as(every)
            joined = every.new_zeros(count, *every.shape[1:])
            every = joined.scatter_reduce(0, index, every, "amax")
    return Read(labels, score.float() if scores and score is not None else None, every)


def _classes(names: Tensor, classes: Tensor | None) -> Tensor:
    return names if classes is None else kept_groups(tuple(classes.tolist()), names.device)[0][names]


def _working_size(readout: Readout, size: tuple[int, int]) -> tuple[int, int]:
    if readout.refine == "none" or readout.working_side is None or min(size) <= readout.working_side:
        return size
    factor = readout.working_side / min(size)
    return (max(1, round(size[0] * factor)), max(1, round(size[1] * factor)))


def _guide(readout: Readout, image: Tensor, size: tuple[int, int], working: tuple[int, int]) -> Tensor:
    """The image [3, H, W] that the refinement follows, fp32 in 0..1."""
    if readout.refine == "none":
        return torch.zeros(1, 1, 1, device=image.device).expand(3, *working)
    guide = image.float()[None] / 255
    if readout.guide == "enlarged":
        guide = F.interpolate(guide, size, mode="bilinear", antialias=True)
        return F.interpolate(guide, working, mode="bilinear")[0]
    same = working == (image.shape[1], image.shape[2])
    return guide[0] if same else F.interpolate(guide, working, mode="bilinear", antialias=True)[0]


def _kept_names(labels: Tensor, area: float, classes: Tensor | None, names: int) -> Tensor:
    """bool [T]: the names of the first class and of classes that are large enough."""
    classes = torch.arange(names) if classes is None else classes.cpu()
    counts = torch.bincount(labels.flatten().cpu(), minlength=int(classes.max()) + 1)
    large = counts > area * counts[1:].sum()
    large[0] = True
    return large[classes]
