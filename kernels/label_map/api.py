"""``label_map``: from the windows' low-resolution class maps to the labels of an image, in one pass."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastzs.renamed import old_arguments
from fastzs.trace import traced

from ..dispatch import choose
from ..triton_runtime import why_not_triton
from .compiled import why_not_cpu, why_not_cuda
from .operator import score_dtype

ACTIVATIONS = ("sigmoid", "softmax", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT16_LABELS = 1 << 15


class LabelMap(NamedTuple):
    """What :func:`label_map` gives."""

    labels: Tensor  # [H', W'] or [k, H', W'], uint8 or int16
    scores: Tensor | None  # of the same shape, fp32 (fp64 for fp64 logits)


@old_arguments(picture_size="image_size")
@traced("ops.label_map")
def label_map(
    logits: Tensor,
    windows: Tensor | Sequence[Sequence[int]],
    image_size: Sequence[int],
    *,
    output_size: Sequence[int] | None = None,
    activation: str = "sigmoid",
    seen: Tensor | Sequence[int] | None = None,
    calibration: float = 0.1,
    threshold: float | None = None,
    top_k: int = 1,
    return_scores: bool = False,
    impl: str = "auto",
) -> LabelMap:
    """Label every pixel of an image from the class maps of the windows laid over it.

    Each window's map is interpolated to the window's pixels (bilinear, ``align_corners=False``), activated,
    reduced by ``calibration`` on the seen classes, and averaged with the other windows over the same pixel;
    the average is interpolated to the output size, and the best class wins, of equal ones the lower. This is
    the sliding-window inference of ZegCLIP and CLIP-RC without its ``[C, H, W]`` score maps: memory is the
    inputs, the outputs and a working set that grows neither with ``C`` nor with the image.

    Args:
        logits: ``[W, C, h, w]`` fp32, bf16, fp16 or fp64, one map per window. A logit that is not finite
            makes its class NaN at the pixels interpolated from it. NaN scores count as ``-inf``: such a class
            loses to every other, and where all are NaN the label is class 0 (or ``C``, below a threshold). One warning
            says so (on a GPU it is not looked for, that would wait for the device). Not differentiable.
        windows: ``[W, 4]`` int64 tensor or nested sequence of (top, left, height, width) in pixels of the
            resized image, all of one height and width, inside the image, and together covering it.
        image_size: (H, W) of the resized image.
        output_size: (H', W') of the labels, by default ``image_size``.
        activation: ``"sigmoid"``, ``"softmax"`` over the classes, or ``"none"``.
        seen: indices or ``[C]`` bool mask of the classes to calibrate.
        calibration: what is taken from the seen classes' scores, after the activation.
        threshold: labels whose score is below it become ``C``, one past the last class; in 0..1, with
            ``activation="none"`` any.
        top_k: how many labels per pixel, 1 to C. Above 1 the results are ``[k, H', W']``, best first.
        return_scores: also give the winning scores.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`. Devices without a backend of their own copy
            the logits to the host, where the compiled library (``"cpu"``) labels the image.

    Returns:
        :class:`LabelMap`: labels, uint8, or int16 where there are more than 255 labels (``C``
        counted, with a threshold); scores ``None`` unless asked for.

    Raises:
        ValueError: shapes, sizes or options do not fit; a window leaves the image; a pixel has no window.
        TypeError: the logits have another dtype.
        RuntimeError: ``impl`` cannot run here.
    """
    if logits.ndim != 4 or 0 in logits.shape:
        raise ValueError(f"label_map: logits has shape {tuple(logits.shape)}; expected [W, C, h, w], none of them 0")
    if logits.dtype not in DTYPES:
        raise TypeError(f"label_map: logits is {logits.dtype}; expected float32, bfloat16, float16 or float64")
    classes = logits.shape[1]
    height, width = _size("image_size", image_size)
    out_height, out_width = (height, width) if output_size is None else _size("output_size", output_size)
    if activation not in ACTIVATIONS:
        raise ValueError(f"label_map: activation={activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    if not 1 <= top_k <= classes:
        raise ValueError(f"label_map: top_k={top_k}; expected 1 to the number of classes, {classes}")
    if not math.isfinite(calibration):
        raise ValueError(f"label_map: calibration={calibration}; expected a finite number")
    if threshold is not None:
        low, high = (-math.inf, math.inf) if activation == "none" else (0.0, 1.0)
        if not (low <= threshold <= high and math.isfinite(threshold)):
            wanted = "a finite number" if activation == "none" else f"0 to 1 with activation={activation!r}"
            raise ValueError(f"label_map: threshold={threshold}; expected {wanted}")
    count = classes + (threshold is not None)
    if count > INT16_LABELS:
        raise ValueError(f"label_map: expected at most {INT16_LABELS} labels, which are int16, got {count}")
    penalty = None if seen is None else _penalty(seen, float(calibration), classes, logits)
    labels, scores = torch.ops.fastzs.label_map(
        logits.detach(),
        _windows(windows, logits.shape[0]),
        (height, width),
        (out_height, out_width),
        activation,
        penalty,
        threshold,
        top_k,
        count > 255,
        return_scores,
        choose("label_map", impl, reasons(logits, top_k)),
    )
    if top_k == 1:
        labels, scores = labels[0], scores[0] if return_scores else None
    return LabelMap(labels, scores if return_scores else None)


def reasons(logits: Tensor, top_k: int) -> dict[str, str | None]:
    """For each backend, best first, why it cannot label an image from these logits, or None."""
    on_cpu = {"cpu": why_not_cpu(logits)}
    on_gpu = {"cuda": why_not_cuda(logits, top_k), "triton": _why_not_triton(logits, top_k)}
    host = logits.device.type == "cpu"
    return {**on_cpu, **on_gpu, "reference": None} if host else {**on_gpu, **on_cpu, "reference": None}


def _why_not_triton(logits: Tensor, top_k: int) -> str | None:
    if reason := why_not_triton("the logits are", logits.device):
        return reason
    if logits.dtype == torch.float64:
        return "the logits are float64"
    return f"top_k is {top_k}; expected 1" if top_k > 1 else None


def _size(name: str, size: Sequence[int]) -> tuple[int, int]:
    height, width = (int(n) for n in size) if len(size) == 2 else (0, 0)
    if height < 1 or width < 1:
        raise ValueError(f"label_map: {name}={tuple(size)}; expected (height, width), both at least 1")
    return height, width


def _penalty(seen: Tensor | Sequence[int], calibration: float, classes: int, logits: Tensor) -> Tensor:
    """``[C]``, ``calibration`` at the seen classes, 0 elsewhere, on the logits' device."""
    dtype = score_dtype(logits)
    if not isinstance(seen, Tensor):
        seen = tuple(seen)
        if all(isinstance(n, bool) for n in seen) and seen:
            seen = torch.tensor(seen)
        elif torch.compiler.is_compiling():
            return _penalty_of(seen, calibration, classes, dtype, logits.device)
        else:
            return _kept_penalty(tuple(int(n) for n in seen), calibration, classes, dtype, logits.device)
    if seen.dtype == torch.bool:
        if seen.shape != (classes,):
            raise ValueError(f"label_map: the seen mask has shape {tuple(seen.shape)}; expected ({classes},)")
        return calibration * seen.to(logits.device, dtype)
    if seen.device.type == "cpu" and not torch.compiler.is_compiling():
        return _kept_penalty(tuple(seen.flatten().tolist()), calibration, classes, dtype, logits.device)
    # Asking a GPU which index is wrong would wait for it: an index out of range fails there.
    index = seen.flatten().long().to(logits.device)
    return torch.zeros(classes, dtype=dtype, device=logits.device).index_fill(0, index, calibration)


def _penalty_of(
    seen: tuple[int, ...], calibration: float, classes: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    wrong = [n for n in seen if not 0 <= n < classes]
    if wrong:
        raise ValueError(f"label_map: seen names class {wrong[0]}; expected 0 to {classes - 1}")
    chosen = set(seen)
    return torch.tensor([calibration if n in chosen else 0.0 for n in range(classes)], dtype=dtype).to(device)


# A vocabulary asks for the same in every image: one copy to the device, and no wait for it in between.
_kept_penalty = functools.lru_cache(64)(_penalty_of)


def _windows(windows: Tensor | Sequence[Sequence[int]], count: int) -> Tensor:
    """``[W, 4]`` int64 on the CPU; what the windows hold is checked when the operator runs."""
    try:
        given = torch.as_tensor(windows)
    except (TypeError, ValueError) as error:
        raise ValueError(f"label_map: windows is no table of numbers: {error}; expected [{count}, 4]") from error
    if given.is_floating_point() or given.shape != (count, 4):
        raise ValueError(
            f"label_map: windows is {given.dtype} of shape {tuple(given.shape)}; expected integers of shape "
            f"[{count}, 4], one (top, left, height, width) for each of the logits' windows"
        )
    return given.to("cpu", torch.int64)
