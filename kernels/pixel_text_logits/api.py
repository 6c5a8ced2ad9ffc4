"""``pixel_text_logits``: cosine scores of every pixel feature against every class embedding."""

import math
from collections.abc import Callable

import torch

from fastzs.trace import traced

from ..checks import why_too_old
from ..dispatch import choose
from ..triton_runtime import why_not_triton
from .operator import MISSING
from .reference import pixel_text_logits_reference


@traced("ops.pixel_text_logits")
def pixel_text_logits(
    features: torch.Tensor, text: torch.Tensor, scale: float = 1.0, impl: str = "auto"
) -> torch.Tensor:
    """Score every pixel feature against every class: ``scale * cos(feature, text)``.

    Args:
        features: ``[B, D, h, w]``, any strides, a floating dtype. No normalised copy is made.
        text: ``[C, D]``, a floating dtype, cast to the dtype of ``features``. Rows are used as given: the
            rows of a vocabulary already have unit length (published ones up to their rounding, which
            published scores contain).
        scale: factor on the cosine, for example CLIP's 100.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`. On the CPU, C++ reads fp32, bf16 and fp16
            and sums in fp32; fp64 takes the reference.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``features`` (under autocast, in the autocast dtype), between
        -scale and scale up to rounding. A zero feature scores 0. Differentiable in both tensors, on the CPU once
        unless ``impl="reference"``.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``scale`` is not a number.
        ValueError: shapes do not fit, tensors lie on different devices, or ``scale`` is not finite.
        RuntimeError: ``impl`` cannot run.
    """
    validate(features, text, scale)
    dtype = product_dtype(features)
    backend = choose("pixel_text_logits", impl, reasons(features, dtype))
    return logits_by(backend)(features, text.to(dtype), float(scale))


def product_dtype(features: torch.Tensor) -> torch.dtype:
    """The dtype of the logits: that of ``features``, or autocast's."""
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return features.dtype


def logits_by(backend: str) -> Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]:
    """What computes the logits in ``backend``, for text already in the dtype of the logits."""
    if backend == "reference":
        return pixel_text_logits_reference
    return torch.ops.fastzs.pixel_text_logits_triton if backend == "triton" else torch.ops.fastzs.pixel_text_logits


def reasons(features: torch.Tensor, dtype: torch.dtype) -> dict[str, str | None]:
    """For each backend, best first, why it cannot multiply these features in ``dtype``, or None."""
    device = features.device.type
    cpu, cuda = MISSING["cpu"], MISSING["cuda"]
    if device != "cpu":
        cpu = f"the features are on {device}"
    if device != "cuda":
        cuda = f"the features are on {device}"
    elif cuda is None:
        cuda = why_too_old(features.device)
    triton = why_not_triton("the features are", features.device)
    for seen in (features.dtype, dtype):
        if seen not in (torch.float32, torch.bfloat16, torch.float16):
            cpu = cuda = triton = f"the features are {seen}; expected float32, bfloat16 or float16"
    return {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": None}


def validate(features: torch.Tensor, text: torch.Tensor, scale: float) -> None:
    """Raise what :func:`pixel_text_logits` promises for arguments that do not fit."""
    for name, tensor, dims in (("features", features, "[B, D, h, w]"), ("text", text, "[C, D]")):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            seen = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"pixel_text_logits: {name} is {seen}; expected a floating-point tensor {dims}")
        if tensor.dim() != dims.count(",") + 1:
            raise ValueError(f"pixel_text_logits: {name} has shape {list(tensor.shape)}; expected {dims}")
    if features.shape[1] != text.shape[1] or text.shape[1] == 0:
        raise ValueError(
            f"pixel_text_logits: features {list(features.shape)} have {features.shape[1]} channels and text "
            f"{list(text.shape)} has {text.shape[1]}; expected [B, D, h, w] and [C, D] with the same D > 0"
        )
    if features.device != text.device:
        raise ValueError(f"pixel_text_logits: features are on {features.device}, text is on {text.device}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"pixel_text_logits: scale is {type(scale).__name__}; expected a number")
    if not math.isfinite(scale):
        raise ValueError(f"pixel_text_logits: scale is {scale}; expected a finite number")
