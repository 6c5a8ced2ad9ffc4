"""``key_smoothing`` and ``prompt_denoising``: the two refinements of MaskCLIP (ECCV 2022, section 3.2)."""

import math

import torch
from torch import Tensor

from ..dispatch import choose
from .linear import key_smoothing_linear
from .reference import key_smoothing_reference, prompt_denoising_reference

MODES = ("paper", "official")
WEIGHTS = ("cosine", "relu", "softmax")


def key_smoothing(
    keys: Tensor,
    probs: Tensor,
    *,
    mode: str = "paper",
    threshold: float = 1.0,
    weights: str = "cosine",
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Spread each position's class scores to the positions with similar keys.

    ``out[c, i] = sum_j weight(k_i, k_j) probs[c, j]``, the weights not normalised unless they are a softmax.

    Args:
        keys: ``[B, N, D]`` floating point, of any length each; a zero vector is similar to nothing.
        probs: ``[B, C, N]`` floating point on the same device, any values. Differentiable in both.
        mode: ``"paper"``, the cosine of the two keys; or ``"official"``, what the published code computes:
            the keys normalised along the positions instead of along their own entries, and only positions
            whose largest score is below ``threshold`` replaced.
        threshold: see ``mode``; 1.0 with ``"paper"``.
        weights: ``"cosine"``; ``"relu"``, the cosine where positive; ``"softmax"`` of cosine /
            ``temperature`` over the positions j. The last two with ``mode="paper"`` only.
        temperature: above 0; 1.0 unless ``weights="softmax"``.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`.

    Returns:
        ``[B, C, N]`` in the dtype of ``probs``. With ``"cosine"`` computed as ``K (K^T P)``: the cost is
        linear in N, and nothing of size N x N exists.

    Raises:
        ValueError: shapes or options do not fit.
        TypeError: an input is not floating point.
        RuntimeError: ``impl`` cannot run here.
    """
    if keys.ndim != 3 or probs.ndim != 3 or keys.shape[0] != probs.shape[0] or keys.shape[1] != probs.shape[2]:
        raise ValueError(
            f"key_smoothing: keys has shape {tuple(keys.shape)} and probs {tuple(probs.shape)}; "
            "wanted [B, N, D] and [B, C, N]"
        )
    if 0 in keys.shape or 0 in probs.shape:
        raise ValueError(f"key_smoothing: keys {tuple(keys.shape)} or probs {tuple(probs.shape)} is empty")
    if not (keys.is_floating_point() and probs.is_floating_point()):
        raise TypeError(f"key_smoothing: keys is {keys.dtype} and probs {probs.dtype}; wanted floating point")
    if keys.device != probs.device:
        raise ValueError(f"key_smoothing: keys is on {keys.device} and probs on {probs.device}; wanted one device")
    if mode not in MODES:
        raise ValueError(f"key_smoothing: mode={mode!r} is unknown; use one of {', '.join(MODES)}")
    if weights not in WEIGHTS:
        raise ValueError(f"key_smoothing: weights={weights!r} is unknown; use one of {', '.join(WEIGHTS)}")
    if mode == "paper" and threshold != 1.0:
        raise ValueError(f"key_smoothing: threshold={threshold} belongs to mode='official'; mode is 'paper'")
    if mode == "official" and weights != "cosine":
        raise ValueError(f"key_smoothing: weights={weights!r} belongs to mode='paper'; mode is 'official'")
    if not (math.isfinite(temperature) and temperature > 0) or (weights != "softmax" and temperature != 1.0):
        raise ValueError(
            f"key_smoothing: temperature={temperature} with weights={weights!r}; wanted a number above 0, "
            "and 1.0 unless weights='softmax'"
        )
    if not math.isfinite(threshold):
        raise ValueError(f"key_smoothing: threshold={threshold}; wanted a finite number")
    wide = torch.promote_types(torch.promote_types(keys.dtype, probs.dtype), torch.float32)
    backend = choose("key_smoothing", impl, _reasons(keys, weights))
    if backend == "reference":
        out = key_smoothing_reference(keys.to(wide), probs.to(wide), mode, threshold, weights, temperature)
    else:
        out = key_smoothing_linear(keys.to(wide), probs.to(wide), mode, threshold)
    return out.to(probs.dtype)


def _reasons(keys: Tensor, weights: str) -> dict[str, str | None]:
    """Of each backend why it cannot run; both ``cuda`` and ``cpu`` are two matrix products of PyTorch."""
    pairwise = None if weights == "cosine" else f"weights={weights!r} needs every pair of positions"
    return {
        "cuda": pairwise or (None if keys.is_cuda else f"the keys are on {keys.device}"),
        "cpu": pairwise or (None if keys.device.type == "cpu" else f"the keys are on {keys.device}"),
        "reference": None,
    }


def prompt_denoising(scores: Tensor, threshold: float) -> Tensor:
    """Which classes a picture contains at all: those that somewhere reach the threshold.

    The published code applies it to ``softmax(100 * logits)`` and sets the logits of the other classes to
    -100: ``logits.masked_fill(~prompt_denoising(probs, threshold)[:, :, None], -100)``.

    Args:
        scores: ``[B, C, N]``, probabilities of each class at each position.
        threshold: a class whose largest score is below it is absent (published: 0.5).

    Returns:
        ``[B, C]`` bool, true where the class is present.

    Raises:
        ValueError: the shape or the threshold does not fit.
    """
    if scores.ndim != 3 or scores.shape[2] == 0:
        raise ValueError(f"prompt_denoising: scores has shape {tuple(scores.shape)}; wanted [B, C, N], N at least 1")
    if not math.isfinite(threshold):
        raise ValueError(f"prompt_denoising: threshold={threshold}; wanted a finite number")
    return prompt_denoising_reference(scores, threshold)
