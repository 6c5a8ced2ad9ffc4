"""``label_map``: from the windows' low-resolution class maps to the labels of a picture, in one pass."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import choose
from .reference import label_map_reference

ACTIVATIONS = ("sigmoid", "softmax", "none")
RESIZES = ("two-stage", "single")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT16_LABELS = 1 << 15


class LabelMap(NamedTuple):
    """What :func:`label_map` gives."""

    labels: Tensor  # [H', W'] or [k, H', W'], uint8 or int16
    scores: Tensor | None  # of the same shape, fp32 (fp64 for fp64 logits)


def label_map(
    logits: Tensor,
    windows: Tensor | Sequence[Sequence[int]],
    picture_size: Sequence[int],
    *,
    output_size: Sequence[int] | None = None,
    activation: str = "sigmoid",
    seen: Tensor | Sequence[int] | None = None,
    calibration: float = 0.1,
    threshold: float | None = None,
    background: int | None = None,
    top_k: int = 1,
    resize: str = "two-stage",
    return_scores: bool = False,
    impl: str = "auto",
) -> LabelMap:
    """Label every pixel of a picture from the class maps of the windows laid over it.

    Each window's map is interpolated to the window's pixels (bilinear, ``align_corners=False``), activated,
    reduced by ``calibration`` on the seen classes, and averaged with the other windows over the same pixel;
    the average is interpolated to the output size, and the best class wins, of equal ones the lower. This is
    the sliding-window inference of ZegCLIP and CLIP-RC without its ``[C, H, W]`` score maps: memory is the
    inputs, the outputs and a working set that grows neither with ``C`` nor with the picture.

    Args:
        logits: ``[W, C, h, w]`` fp32, bf16, fp16 or fp64, one map per window. A logit that is not finite
            makes its class NaN at the pixels interpolated from it. NaN scores count as ``-inf``: such a class
            loses to every other, and where all are NaN class 0 (or the background) is the label. One warning
            says so (on a GPU it is not looked for, that would wait for the device). Not differentiable.
        windows: ``[W, 4]`` int64 tensor or nested sequence of (top, left, height, width) in pixels of the
            resized picture, all of one height and width, inside the picture, and together covering it.
        picture_size: (H, W) of the resized picture.
        output_size: (H', W') of the labels, by default ``picture_size``.
        activation: ``"sigmoid"``, ``"softmax"`` over the classes, or ``"none"``.
        seen: indices or ``[C]`` bool mask of the classes to calibrate.
        calibration: what is taken from the seen classes' scores, after the activation.
        threshold: labels whose score is below it become ``background``; in 0..1, with ``activation="none"``
            any.
        background: the label used with ``threshold``, by default ``C``, one past the last class.
        top_k: how many labels per pixel, 1 to C. Above 1 the results are ``[k, H', W']``, best first.
        resize: ``"two-stage"`` as published; ``"single"`` takes every output pixel straight from the
            low-resolution maps at its centre, one bilinear step: cheaper, and not the same numbers when
            ``output_size`` differs from ``picture_size``.
        return_scores: also give the winning scores.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`.

    Returns:
        :class:`LabelMap`: labels, uint8, or int16 where there are more than 255 labels (the background
        counted); scores ``None`` unless asked for.

    Raises:
        ValueError: shapes, sizes or options do not fit; a window leaves the picture; a pixel has no window.
        TypeError: the logits have another dtype.
        RuntimeError: ``impl`` cannot run here.
    """
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(
            f"label_map: logits has shape {tuple(logits.shape)}; wanted [W, C, h, w], none of them 0"
        )
    if logits.dtype not in DTYPES:
        raise TypeError(f"label_map: logits is {logits.dtype}; wanted float32, bfloat16, float16 or float64")
    classes = logits.shape[1]
    height, width = _size("picture_size", picture_size)
    out_height, out_width = (height, width) if output_size is None else _size("output_size", output_size)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"label_map: activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}"
        )
    if resize not in RESIZES:
        raise ValueError(f"label_map: resize={resize!r} is unknown; use one of {', '.join(RESIZES)}")
    if not 1 <= top_k <= classes:
        raise ValueError(f"label_map: top_k={top_k}; wanted 1 to the number of classes, {classes}")
    if not math.isfinite(calibration):
        raise ValueError(f"label_map: calibration={calibration}; wanted a finite number")
    if threshold is not None:
        low, high = (-math.inf, math.inf) if activation == "none" else (0.0, 1.0)
        if not (low <= threshold <= high and math.isfinite(threshold)):
            wanted = "a finite number" if activation == "none" else f"0 to 1 with activation={activation!r}"
            raise ValueError(f"label_map: threshold={threshold}; wanted {wanted}")
        background = classes if background is None else background
    elif background is not None:
        raise ValueError(
            f"label_map: background={background} is used only with a threshold, and there is none"
        )
    last = max(classes - 1, -1 if background is None else background)
    if (background or 0) < 0 or last >= INT16_LABELS:
        raise ValueError(
            f"label_map: {classes} classes and background={background}; labels are int16, "
            f"so 0 to {INT16_LABELS - 1}"
        )
    count = classes + (background is not None and background >= classes)
    label_dtype = torch.uint8 if count <= 255 and last <= 255 else torch.int16
    penalty = None if seen is None else calibration * _seen_mask(seen, classes, logits)
    places = _windows(windows, logits.shape[0], height, width)
    if logits.device.type == "cpu" and not math.isfinite(logits.sum(dtype=torch.float64).item()):
        warnings.warn(
            "label_map: logits has NaN or infinite values; classes lose where they have one", stacklevel=2
        )
    choose("label_map", impl, {"reference": None})
    labels, scores = label_map_reference(
        logits,
        places,
        (height, width),
        (out_height, out_width),
        activation,
        penalty,
        threshold,
        0 if background is None else background,
        top_k,
        resize,
        label_dtype,
    )
    if top_k == 1:
        labels, scores = labels[0], scores[0]
    return LabelMap(labels, scores if return_scores else None)


def _size(name: str, size: Sequence[int]) -> tuple[int, int]:
    height, width = (int(n) for n in size) if len(size) == 2 else (0, 0)
    if height < 1 or width < 1:
        raise ValueError(f"label_map: {name}={tuple(size)}; wanted (height, width), both at least 1")
    return height, width


def _seen_mask(seen: Tensor | Sequence[int], classes: int, logits: Tensor) -> Tensor:
    """``[C]``, 1 at the seen classes, 0 elsewhere."""
    given = torch.as_tensor(seen, device=logits.device)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    if given.dtype == torch.bool:
        if given.shape != (classes,):
            raise ValueError(f"label_map: the seen mask has shape {tuple(given.shape)}; wanted ({classes},)")
        return given.to(dtype)
    given = given.flatten().long()
    wrong = [n for n in given.tolist() if not 0 <= n < classes]
    if wrong:
        raise ValueError(f"label_map: seen names class {wrong[0]}; wanted 0 to {classes - 1}")
    mask = torch.zeros(classes, dtype=dtype, device=logits.device)
    mask[given] = 1
    return mask


def _windows(windows, count: int, height: int, width: int) -> list[list[int]]:
    """The windows as lists, after seeing that each is inside the picture and no pixel is left out."""
    given = torch.as_tensor(windows)
    if given.is_floating_point() or given.shape != (count, 4):
        raise ValueError(
            f"label_map: windows is {given.dtype} of shape {tuple(given.shape)}; wanted integers of shape "
            f"[{count}, 4], one (top, left, height, width) for each of the logits' windows"
        )
    places = given.long().tolist()
    for n, (top, left, window_height, window_width) in enumerate(places):
        if [window_height, window_width] != places[0][2:]:
            raise ValueError(
                f"label_map: window {n} is {window_height} x {window_width}, the first {places[0][2]} x "
                f"{places[0][3]}; wanted one size for all"
            )
        inside = top >= 0 and left >= 0 and top + window_height <= height and left + window_width <= width
        if window_height < 1 or window_width < 1 or not inside:
            raise ValueError(
                f"label_map: window {n} (top {top}, left {left}, height {window_height}, "
                f"width {window_width}) does not lie in the picture of {height} x {width}"
            )
    _require_cover(places, height, width)
    return places


def _require_cover(places: list[list[int]], height: int, width: int) -> None:
    """Count visits on a grid of the windows' edges: between two edges all pixels have one count."""
    rows = sorted({0, height, *(p[0] for p in places), *(p[0] + p[2] for p in places)})
    cols = sorted({0, width, *(p[1] for p in places), *(p[1] + p[3] for p in places)})
    row_of, col_of = {y: n for n, y in enumerate(rows)}, {x: n for n, x in enumerate(cols)}
    change = torch.zeros(len(rows), len(cols), dtype=torch.int32)
    for top, left, window_height, window_width in places:
        r0, r1, c0, c1 = row_of[top], row_of[top + window_height], col_of[left], col_of[left + window_width]
        change[r0, c0] += 1
        change[r1, c0] -= 1
        change[r0, c1] -= 1
        change[r1, c1] += 1
    empty = (change.cumsum(0).cumsum(1)[:-1, :-1] == 0).nonzero().tolist()
    if empty:
        pixels = sum((rows[r + 1] - rows[r]) * (cols[c + 1] - cols[c]) for r, c in empty)
        r, c = empty[0]
        raise ValueError(
            f"label_map: {pixels} of the picture's {height} x {width} pixels lie in no window, among them "
            f"rows {rows[r]} to {rows[r + 1] - 1}, columns {cols[c]} to {cols[c + 1] - 1}"
        )
