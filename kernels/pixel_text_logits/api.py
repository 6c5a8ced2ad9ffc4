"""``pixel_text_logits``: cosine scores of every pixel feature against every class embedding."""

import math

import torch

from ..dispatch import choose
from .reference import pixel_text_logits_reference


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
        impl: ``"auto"`` or ``"reference"``, see :mod:`fastzs.kernels.dispatch`.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``features`` (under autocast, in the autocast dtype), between
        -scale and scale up to rounding. A zero feature scores 0. Differentiable in both tensors.

    Raises:
        TypeError: an argument is not a floating-point tensor, or ``scale`` is not a number.
        ValueError: shapes do not fit, tensors lie on different devices, or ``scale`` is not finite.
    """
    for name, tensor, dims in (("features", features, "[B, D, h, w]"), ("text", text, "[C, D]")):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            seen = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"pixel_text_logits: {name} is {seen}; wanted a floating-point tensor {dims}")
        if tensor.dim() != dims.count(",") + 1:
            raise ValueError(f"pixel_text_logits: {name} has shape {list(tensor.shape)}; wanted {dims}")
    if features.shape[1] != text.shape[1] or text.shape[1] == 0:
        raise ValueError(
            f"pixel_text_logits: features {list(features.shape)} have {features.shape[1]} channels and text "
            f"{list(text.shape)} has {text.shape[1]}; wanted [B, D, h, w] and [C, D] with the same D > 0"
        )
    if features.device != text.device:
        raise ValueError(f"pixel_text_logits: features are on {features.device}, text is on {text.device}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"pixel_text_logits: scale is {type(scale).__name__}; wanted a number")
    if not math.isfinite(scale):
        raise ValueError(f"pixel_text_logits: scale is {scale}; wanted a finite number")

    choose("pixel_text_logits", impl, {"reference": None})
    return pixel_text_logits_reference(features, text, float(scale))
