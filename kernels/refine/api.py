"""``refine``: labels from the windows' low-resolution class maps, smoothed along the image's own edges."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastzs.renamed import old_arguments
from fastzs.trace import traced

from ..dispatch import choose
from ..triton_runtime import why_not_triton
from . import operator as operator  # registers the operator
from .compiled import why_not_cpu

METHODS = ("pamr", "laplacian", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_CLASSES = 1 << 15  # labels are int16
ITERATIONS = {"pamr": 10, "laplacian": 25, "none": 0}  # as published


class Refined(NamedTuple):
    """What :func:`refine` gives."""

    labels: Tensor  # [H', W'], uint8, or int16 for more than 255 classes
    scores: Tensor  # [H', W'], fp32 (fp64 for fp64 logits): the label's refined logit
    probabilities: Tensor | None  # [H', W']: of the label, by a softmax over all classes
    maps: Tensor | None  # [C, H', W']: every class's refined logits


@old_arguments(picture_size="image_size")
@traced("ops.refine")
def refine(
    logits: Tensor,
    image: Tensor,
    *,
    windows: Tensor | Sequence[Sequence[int]] | None = None,
    image_size: Sequence[int] | None = None,
    method: str = "pamr",
    dilations: Sequence[int] = (8, 16),
    iterations: int | None = None,
    text: Tensor | None = None,
    cells: int = 80,
    scale: float | None = None,
    return_maps: bool = False,
    impl: str = "auto",
) -> Refined:
    """Label every pixel of an image from class maps that are refined along the image's edges.

    The windows' maps are interpolated to their pixels and averaged, and the average is interpolated to the size of
    ``image``, each bilinear with ``align_corners=False``. What is refined are these logits as they are (cosines, in
    the published systems), before any scale or softmax; the label is the class of the largest refined logit, of equal
    ones the lowest.

    ``"pamr"`` (Araslanov & Roth, CVPR 2020; NACLIP, ResCLIP): ``iterations`` times, each pixel becomes a weighted mean
    of its 8 neighbours at every distance of ``dilations``; beyond the border its nearest pixel counts. A neighbour
    weighs exp(-mean over channels of abs(difference) / (1e-8 + 0.1 sigma)), divided by the sum of all, where sigma is
    the channel's standard deviation (n - 1) over the neighbours and the centre, counted once a dilation.

    ``"laplacian"`` (PEARL, CVPR 2026): the averaged maps are pooled to about ``cells`` cells a side, ``iterations``
    steps of conjugate gradients draw cells together where the image has no edge, and the result is interpolated
    bilinearly. It is computed in fp64 on every backend, ``[C, cells, cells]`` numbers.

    ``"none"`` refines nothing: the label and its probability by one softmax of the averaged logits, as SCLIP, ClearCLIP
    and ProxyCLIP threshold them (:func:`label_map` averages the windows' probabilities instead).

    Every class is smoothed by the same weights, so the published ``[C, 8 |D|, H', W']`` is never there, and unless
    ``return_maps`` asks for it, neither is ``[C, H', W']``: a few classes at a time are interpolated, smoothed and
    compared with the best so far. All of that is exact. Where neither probabilities nor maps are asked for, classes
    that lie below one other class at every node of the low-resolution maps are left out (not with "laplacian"); since
    refined logits are positive mixtures of these nodes with the same weights for all, they cannot win: labels and
    scores stay exact.

    Args:
        logits: ``[W, C, h, w]`` fp32, bf16, fp16 or fp64, one map per window, of one image. A class with a logit that
            is not finite loses everywhere, and one warning says so (on a GPU it is not looked for, that would wait for
            the device); where all have one the label is 0. Not differentiable.
        image: ``[3, H', W']`` floating, RGB, finite (checked on CPUs): the guide, and the size of the results. As
            published it is the image as the model sees it (normalised), enlarged to the original size. "pamr" does not
            mind a factor common to all pixels and channels, nor a shift; in areas of one colour all neighbours weigh
            the same, but a guide that was enlarged has rounding noise there, and the noise then decides.
        windows: ``[W, 4]`` integers (top, left, height, width) in pixels of the resized image: rows and columns of
            windows of one size that together cover it, as :func:`fastzs.windows.window_grid` lays them. They may reach
            beyond it. By default one window over everything.
        image_size: (H, W) of the resized image, by default the image's.
        dilations: distances of the neighbours in pixels, for "pamr"; (8, 16) was tuned at about 500 x 375.
        iterations: steps, by default 10 ("pamr") or 25 ("laplacian").
        text: ``[C, D]`` vectors of the names, for "laplacian"; of any length.
        cells: of the coarse grid, for "laplacian"; published: 80, for Cityscapes 224.
        scale: factor of the refined logits in the softmax (published: 40). With it ``probabilities`` are returned.
        return_maps: also return all classes' refined logits.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`. The compiled library (``"cpu"``) and Triton
            compute in fp32 and take no fp64.

    Returns:
        :class:`Refined`. Labels are of single names: where a class has several, map them
        (``classes_of_names[labels]``), which is the maximum over a class's names.

    Raises:
        ValueError: shapes, sizes or options do not fit, windows do not cover the image, or the image has NaN.
        TypeError: a tensor has another dtype.
        RuntimeError: ``impl`` cannot run here.
    """
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(f"refine: expected logits [W, C, h, w], none of them 0, got shape {list(logits.shape)}")
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise ValueError(f"refine: expected an image [3, H, W], got shape {list(image.shape)}")
    if logits.dtype not in DTYPES:
        raise TypeError(f"refine: expected float32, bfloat16, float16 or float64 logits, got {logits.dtype}")
    if not image.is_floating_point():
        raise TypeError(f"refine: expected a floating image, got {image.dtype}; divide uint8 by 255")
    if image.device != logits.device:
        raise ValueError(f"refine: expected image and logits on one device, got {image.device} and {logits.device}")
    if logits.shape[1] > MOST_CLASSES:
        raise ValueError(f"refine: expected at most {MOST_CLASSES} classes, got {logits.shape[1]}")
    if method not in METHODS:
        raise ValueError(f"refine: expected a method of {', '.join(METHODS)}, got {method!r}")
    if not dilations or any(d < 1 for d in dilations):
        raise ValueError(f"refine: expected dilations of at least 1, got {tuple(dilations)}")
    iterations = ITERATIONS[method] if iterations is None else iterations
    if iterations < 0:
        raise ValueError(f"refine: expected iterations of at least 0, got {iterations}")
    if method == "none" and iterations > 0:
        raise ValueError(f"refine: expected no iterations with method='none', got {iterations}")
    if cells < 1:
        raise ValueError(f"refine: expected cells of at least 1, got {cells}")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"refine: expected a positive, finite scale, got {scale}")
    if method == "laplacian":
        if text is None:
            raise ValueError("refine: method='laplacian' needs the names' vectors; pass text=")
        if text.ndim != 2 or len(text) != logits.shape[1]:
            raise ValueError(f"refine: expected text [{logits.shape[1]}, D], got shape {list(text.shape)}")
    size = (image.shape[1], image.shape[2]) if image_size is None else tuple(int(n) for n in image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"refine: expected image_size (height, width), both at least 1, got {size}")
    places = torch.tensor([[0, 0, *size]]) if windows is None else torch.as_tensor(windows)
    if places.is_floating_point() or places.shape != (logits.shape[0], 4):
        raise ValueError(
            f"refine: expected windows as integers [{logits.shape[0]}, 4], one for each map of logits, got "
            f"{places.dtype} of shape {list(places.shape)}"
        )
    reasons = {
        "cpu": why_not_cpu(logits, tuple(dilations)),
        "triton": _why_not_triton(logits),
        "reference": None,
    }
    labels, scores, probabilities, maps = torch.ops.fastzs.refine(
        logits.detach(),
        places.to("cpu", torch.int64),
        image.detach(),
        size,
        method,
        list(dilations),
        iterations,
        None if text is None else text.detach(),
        cells,
        scale,
        return_maps,
        choose("refine", impl, reasons),
    )
    return Refined(labels, scores, None if scale is None else probabilities, maps if return_maps else None)


def _why_not_triton(logits: Tensor) -> str | None:
    if reason := why_not_triton("the logits are", logits.device):
        return reason
    return "the logits are float64" if logits.dtype == torch.float64 else None
