"""``key_smoothing`` and ``prompt_denoising``: the two refinements of MaskCLIP (ECCV 2022, section 3.2)."""

import math

import torch
from torch import Tensor

from fastzs.trace import traced

from ..dispatch import choose
from ..triton_runtime import why_not_triton
from . import operator, pairwise  # noqa: F401  declare the operators
from .linear import key_smoothing_linear
from .reference import key_smoothing_reference, prompt_denoising_reference

WIDEST_TRITON = 1024  # channels that a program of its first kernel can hold
MODES = ("paper", "official")


@traced("ops.key_smoothing")
def key_smoothing(
    keys: Tensor,
    probs: Tensor,
    *,
    mode: str = "paper",
    threshold: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Spread each position's class scores to the positions with similar keys.

    ``out[c, i] = sum_j cos(k_i, k_j) probs[c, j]``, the weights not normalised.

    Args:
        keys: ``[B, N, D]`` floating point, of any length each; a zero vector is similar to nothing.
        probs: ``[B, C, N]`` floating point on the same device, any values. Differentiable in both.
        mode: ``"paper"``, the cosine of the two keys; or ``"official"``, what the published code computes:
            the keys normalised along the positions instead of along their own entries, and only positions
            whose largest score is below ``threshold`` replaced.
        threshold: see ``mode``; 1.0 with ``"paper"``.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`.

    Returns:
        ``[B, C, N]`` in the dtype of ``probs``, computed in fp32 at least, as ``K (K^T P)``, linear in N, unless N
        is so small that all pairs are quicker (:func:`pairs_are_quicker`); no backend but the reference holds an
        N x N matrix.

    Raises:
        ValueError: shapes or options do not fit.
        TypeError: an input is not floating point.
        RuntimeError: ``impl`` cannot run here.
    """
    if keys.ndim != 3 or probs.ndim != 3 or keys.shape[0] != probs.shape[0] or keys.shape[1] != probs.shape[2]:
        raise ValueError(
            f"key_smoothing: keys has shape {tuple(keys.shape)} and probs {tuple(probs.shape)}; "
            "expected [B, N, D] and [B, C, N]"
        )
    if 0 in keys.shape or 0 in probs.shape:
        raise ValueError(f"key_smoothing: keys {tuple(keys.shape)} or probs {tuple(probs.shape)} is empty")
    if not (keys.is_floating_point() and probs.is_floating_point()):
        raise TypeError(f"key_smoothing: keys is {keys.dtype} and probs {probs.dtype}; expected floating point")
    if keys.device != probs.device:
        raise ValueError(f"key_smoothing: keys is on {keys.device} and probs on {probs.device}; expected one device")
    if mode not in MODES:
        raise ValueError(f"key_smoothing: mode={mode!r} is unknown; use one of {', '.join(MODES)}")
    if mode == "paper" and threshold != 1.0:
        raise ValueError(f"key_smoothing: threshold={threshold} belongs to mode='official'; mode is 'paper'")
    if not math.isfinite(threshold):
        raise ValueError(f"key_smoothing: threshold={threshold}; expected a finite number")
    backend = choose("key_smoothing", impl, _reasons(keys, probs))
    with torch.autocast(keys.device.type, enabled=False):
        if backend == "triton":
            return torch.ops.fastzs.key_smoothing_triton(keys, probs, mode, threshold)
        wide = torch.promote_types(torch.promote_types(keys.dtype, probs.dtype), torch.float32)
        k, p = keys.to(wide), probs.to(wide)
        if backend == "reference":
            out = key_smoothing_reference(k, p, mode, threshold)
        # an exported program is for any N
        elif mode == "paper" and not torch.compiler.is_exporting() and pairs_are_quicker(keys, probs):
            out = torch.ops.fastzs.key_smoothing_pairwise(k, p)
        else:
            out = key_smoothing_linear(k, p, mode, threshold)
        return out.to(probs.dtype)


def pairs_are_quicker(keys: Tensor, probs: Tensor) -> bool:
    """Whether the form over pairs, ``2 N^2 (D + C)`` operations, takes less time than ``4 N D C`` of the linear one.

    It does where there are few positions for many classes and channels: below N 778 for D 2048 and C 847, below N 181
    for D 768 and C 171. The form over pairs makes a copy of the keys and does its operations less quickly, so it needs
    a third fewer of them. Measured on one core with AVX-512 by ``python -m bench.key_smoothing_forms``, pairs to linear
    with 0.5, 0.65, 0.8 and 1 times the operations: 0.59, 0.69, 0.87, 1.08 for the first shape; 0.90, 0.99, 1.02, 1.31
    for the second; about 1.5, or 0.05 ms, throughout for D 768 and C 20, N 19 to 39. Not measured on a GPU.
    """
    (_, N, D), C = keys.shape, probs.shape[1]
    return N * (D + C) < 1.3 * D * C


def _reasons(keys: Tensor, probs: Tensor) -> dict[str, str | None]:
    """Of each backend, best first, why it cannot run.

    ``torch`` is matrix products of PyTorch in fp32 or fp64, on any device. A compiled kernel of ours could save only
    one read of the keys, for their norms. On a GPU Triton multiplies bf16 and fp16 on tensor cores without an fp32 copy
    of the keys; exact fp32 products are cuBLAS's.
    """
    reasons = {"torch": None, "triton": _why_not_triton(keys, probs), "reference": None}
    if keys.is_cuda and torch.float32 not in (keys.dtype, probs.dtype):
        reasons = {"triton": reasons.pop("triton"), **reasons}
    return reasons


def _why_not_triton(keys: Tensor, probs: Tensor) -> str | None:
    if reason := why_not_triton("the keys are", keys.device):
        return reason
    for name, tensor in (("keys", keys), ("probs", probs)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {tensor.dtype}; expected float32, bfloat16 or float16"
    if keys.shape[2] > WIDEST_TRITON:
        return f"the keys are {keys.shape[2]} wide; expected at most {WIDEST_TRITON}"
    return None


@traced("ops.prompt_denoising")
def prompt_denoising(scores: Tensor, threshold: float) -> Tensor:
    """Which classes an image contains at all: those that somewhere reach the threshold.

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
        raise ValueError(f"prompt_denoising: scores has shape {tuple(scores.shape)}; expected [B, C, N], N at least 1")
    if not math.isfinite(threshold):
        raise ValueError(f"prompt_denoising: threshold={threshold}; expected a finite number")
    return prompt_denoising_reference(scores, threshold)
