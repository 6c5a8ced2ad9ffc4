"""What makes the Triton backend a PyTorch operator: its declaration, fake implementation and gradient.

``fastzs::key_smoothing_triton`` takes keys ``[B, N, D]`` and probs ``[B, C, N]``, each fp32, bf16 or fp16, and gives
``[B, C, N]`` in the dtype of ``probs``. Backward keeps the two inputs, no more, and is matrix products of PyTorch,
linear in N.
"""

import torch
from torch import Tensor

from .. import library
from .common import EPS


def _fake(keys, probs, mode, threshold):
    return torch.empty_like(probs, memory_format=torch.contiguous_format)


def linear_gradients(grad: Tensor, keys: Tensor, probs: Tensor, mode: str, threshold: float) -> tuple[Tensor, Tensor]:
    """With U the normalised keys and ``out = (P U) U^T``: ``dP = (G U) U^T`` and ``dU = G^T (P U) + P^T (G U)``."""
    k, p, g = keys.float(), probs.float(), grad.float()
    axis = 2 if mode == "paper" else 1
    length = torch.linalg.vector_norm(k, dim=axis, keepdim=True)
    norm = length.clamp_min(EPS)
    unit = k / norm
    replaced = torch.ones_like(p[:, :1], dtype=torch.bool)
    if mode == "official":
        replaced = p.amax(1, keepdim=True) < threshold
    kept, g = g.masked_fill(replaced, 0), g.masked_fill(~replaced, 0)
    sums, grad_sums = p @ unit, g @ unit  # [B, C, D]
    grad_probs = grad_sums @ unit.mT + kept
    grad_unit = g.mT @ sums + p.mT @ grad_sums
    # a unit vector does not change with the length; below EPS the length counts as EPS
    along = (unit * grad_unit).sum(axis, keepdim=True).where(length >= EPS, 0)
    return ((grad_unit - unit * along) / norm).to(keys.dtype), grad_probs.to(probs.dtype)


def _setup_context(ctx, inputs, output):
    keys, probs, ctx.mode, ctx.threshold = inputs
    ctx.save_for_backward(keys, probs)


def _backward(ctx, grad):
    keys, probs = ctx.saved_tensors
    with torch.autocast(keys.device.type, enabled=False):
        return *linear_gradients(grad, keys, probs, ctx.mode, ctx.threshold), None, None


library.define(
    "key_smoothing_triton",
    "(Tensor keys, Tensor probs, str mode, float threshold) -> Tensor",
    library.lazily(f"{__package__}.triton", "key_smoothing"),
)
library.register("key_smoothing_triton", _fake, _backward, _setup_context)
