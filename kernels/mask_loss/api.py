"""``mask_loss``: focal and dice loss of class masks, from low-resolution logits."""

import math
from typing import NamedTuple

import torch

from fastzs.trace import traced

from ..checks import why_too_old
from ..dispatch import choose
from ..pixel_text_logits.api import pixel_text_logits, product_dtype, validate
from ..pixel_text_logits.api import reasons as logits_reasons
from ..triton_runtime import why_not_triton
from . import pixel_text as pixel_text  # registers the operator
from .common import FOCAL, LABEL, OVERLAP, PROB
from .compiled import MISSING
from .reference import mask_sums_reference

TARGET_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


class MaskLoss(NamedTuple):
    """The two losses, unweighted: scalars, fp32 (fp64 for fp64 logits)."""

    focal: torch.Tensor
    dice: torch.Tensor


@traced("ops.mask_loss")
def mask_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    impl: str = "auto",
) -> MaskLoss:
    """Sigmoid focal loss and dice loss of logits interpolated bilinearly to the target's resolution.

    With z the interpolated logits (corners not aligned), p = sigmoid(z) and y the one-hot target::

        focal = 1/N sum_{b, c} mean_{pixels} alpha_t (1 - p_t)^gamma CE(p, y)
        dice  = 1/N sum_{b, c present} 1 - (2 sum p y + 1) / (sum p + sum y + 1)

    as ZegCLIP and CLIP-RC define them (``SegPlusCriterion``), where N is the number of (image, class) pairs
    present in the target, at least 1; when torch.distributed is initialised, its mean over the ranks.

    Args:
        logits: ``[B, C, h, w]``, fp32, bf16 or fp16 (fp64 with the reference), any strides. Sums are taken in
            fp32 or better. NaN logits make both losses NaN; infinite ones make focal infinite or NaN.
        target: ``[B, H, W]``, uint8, int16, int32 or int64, labels in [0, C) or ``ignore_index``. Any size; H a
            multiple of h and W of w is the usual case.
        alpha: weight of the pixels of the class, in [0, 1]; 1 - alpha weighs the others.
        gamma: focusing exponent, at least 0.
        ignore_index: the label of pixels without a class, which count as background of every class, as published. A
            class of that number cannot be expressed.
        impl: ``"auto"`` or a backend, see :mod:`fastzs.kernels.dispatch`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not fit, a dimension is 0, or an option is out of range.
        RuntimeError: a label is out of range (on a GPU: a device-side assertion), or ``impl`` cannot run.
    """
    _validate(logits, target, alpha, gamma, ignore_index)
    options = (float(alpha), float(gamma), ignore_index)
    with_nodes = torch.is_grad_enabled() and logits.requires_grad
    backend = choose("mask_loss", impl, _reasons(logits, target))
    if backend == "reference":
        sums = mask_sums_reference(logits, target, *options)
    elif backend == "triton":
        sums, _ = torch.ops.fastzs.mask_sums_triton(logits, target, *options, with_nodes)
    else:
        sums, _ = torch.ops.fastzs.mask_sums(logits, target, *options, with_nodes)

    return _losses(sums, target.shape[1] * target.shape[2])


@traced("ops.pixel_text_mask_loss")
def pixel_text_mask_loss(
    features: torch.Tensor,
    text: torch.Tensor,
    target: torch.Tensor,
    scale: float = 1.0,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    ignore_index: int = 255,
    impl: str = "auto",
) -> MaskLoss:
    """:func:`mask_loss` of :func:`pixel_text_logits`: the loss of pixel features ``[B, D, h, w]`` in one call.

    One node of autograd. It keeps for backward the features, the text and three gradients of the loss's sums for each
    logit, nothing of the target's resolution and not the logits. Arguments, result and errors are those of the
    two functions; ``impl`` chooses the backend of the loss. With the loss's reference the two functions run one
    after the other.
    """
    validate(features, text, scale)
    dtype = product_dtype(features)
    (B, _, h, w), C = features.shape, text.shape[0]
    logits = features.new_empty((), dtype=dtype).expand(B, C, h, w)  # stands for them: shape, dtype and device
    _validate(logits, target, alpha, gamma, ignore_index)
    backend = choose("mask_loss", impl, _reasons(logits, target))
    if backend == "reference":
        return mask_loss(
            pixel_text_logits(features, text, scale),
            target,
            alpha=alpha,
            gamma=gamma,
            ignore_index=ignore_index,
            impl="reference",
        )
    sums, _ = torch.ops.fastzs.pixel_text_mask_sums(
        features,
        text.to(dtype),
        target,
        float(scale),
        float(alpha),
        float(gamma),
        ignore_index,
        torch.is_grad_enabled() and (features.requires_grad or text.requires_grad),
        choose("pixel_text_logits", "auto", logits_reasons(features, dtype)),
        backend,
    )
    return _losses(sums, target.shape[1] * target.shape[2])


def _reasons(logits: torch.Tensor, target: torch.Tensor) -> dict[str, str | None]:
    """For each backend, best first, why it cannot run on these tensors."""
    device = logits.device.type
    cpu, cuda = MISSING["cpu"], MISSING["cuda"]
    if device != "cpu":
        cpu = f"the logits are on {device}"
    elif logits.shape[1] >= 32767:
        cpu = f"there are {logits.shape[1]} classes; expected fewer than 32767"
    if device != "cuda":
        cuda = f"the logits are on {device}"
    elif max(*logits.shape[2:], *target.shape[1:]) >= 65535:
        cuda = f"{list(logits.shape[2:])} or {list(target.shape[1:])} is too large; expected less than 65535"
    elif cuda is None:
        cuda = why_too_old(logits.device)
    triton = why_not_triton("the logits are", logits.device)
    if triton is None and target.shape[2] > 128 * logits.shape[3]:
        triton = f"{logits.shape[3]} columns become {target.shape[2]}; expected at most 128 times as many"
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        cpu = cuda = triton = f"the logits are {logits.dtype}; expected float32, bfloat16 or float16"
    return {"cpu": cpu, "triton": triton, "cuda": cuda, "reference": None}


def _losses(
    sums: torch.Tensor,  # [B, C, 4]
    pixels: int,  # of an image
) -> MaskLoss:
    """The two losses from the sums over pixels."""
    present = sums[..., LABEL].detach() > 0  # [B, C]
    pairs = _mean_over_ranks(present.sum().to(sums.dtype)).clamp_min(1)
    focal = (sums[..., FOCAL] / pixels).sum()
    dice = 1 - (2 * sums[..., OVERLAP] + 1) / (sums[..., PROB] + sums[..., LABEL] + 1)  # [B, C]
    return MaskLoss(focal / pairs, torch.where(present, dice, 0).sum() / pairs)


def _mean_over_ranks(count: torch.Tensor) -> torch.Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return count
    torch.distributed.all_reduce(count)
    return count / torch.distributed.get_world_size()


def _validate(logits, target, alpha, gamma, ignore_index) -> None:
    for name, tensor, dims in (("logits", logits, "[B, C, h, w]"), ("target", target, "[B, H, W]")):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"mask_loss: {name} is {type(tensor).__name__}; expected a tensor {dims}")
        if tensor.dim() != dims.count(",") + 1 or tensor.numel() == 0:
            raise ValueError(
                f"mask_loss: {name} has shape {list(tensor.shape)}; expected {dims} with every size at least 1"
            )
    if not logits.is_floating_point():
        raise TypeError(f"mask_loss: logits are {logits.dtype}; expected float32, bfloat16 or float16")
    if target.dtype not in TARGET_DTYPES:
        raise TypeError(f"mask_loss: target is {target.dtype}; expected uint8, int16, int32 or int64")
    if logits.shape[0] != target.shape[0]:
        raise ValueError(
            f"mask_loss: logits {list(logits.shape)} and target {list(target.shape)} differ in batch size; "
            "expected [B, C, h, w] and [B, H, W]"
        )
    if logits.device != target.device:
        raise ValueError(f"mask_loss: logits are on {logits.device}, target is on {target.device}")
    if not -(2**31) <= ignore_index < 2**31:
        raise ValueError(f"mask_loss: ignore_index is {ignore_index}; expected a 32-bit integer")
    if not 0 <= alpha <= 1:
        raise ValueError(f"mask_loss: alpha is {alpha}; expected a number in [0, 1]")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"mask_loss: gamma is {gamma}; expected a finite number of at least 0")
