"""Key smoothing with a weight for every pair of positions, some rows of the ``N x N`` weights at a time.

What non-linear weights need, and what is quicker for the cosine where there are few positions (see ``api.py``).
Memory is bounded: no more than ``PIECE`` weights exist at once, forward or backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import EPS

PIECE = 1 << 20  # weights at a time: 4 MB of fp32

NAME = "fastzs::key_smoothing_pairwise"
torch.library.define(NAME, "(Tensor keys, Tensor probs, str weights, float temperature) -> Tensor")
torch.library.define(
    f"{NAME}_backward",
    "(Tensor grad, Tensor keys, Tensor probs, str weights, float temperature) -> (Tensor, Tensor)",
)


def weigh(similarity: Tensor, weights: str, temperature: float) -> Tensor:
    """Weights of the pairs, from their cosines ``[B, n, N]``."""
    if weights == "relu":
        return similarity.relu()
    return (similarity / temperature).softmax(2) if weights == "softmax" else similarity


def pieces(batch: int, positions: int) -> list[slice]:
    rows = max(1, PIECE // (batch * positions))
    return [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]


@torch.library.impl(NAME, "CompositeExplicitAutograd")
def _key_smoothing_pairwise(keys: Tensor, probs: Tensor, weights: str, temperature: float) -> Tensor:
    """``[B, N, D]``, ``[B, C, N]`` -> ``[B, C, N]``, of one dtype; see :func:`fastzs.ops.key_smoothing`."""
    unit = F.normalize(keys, dim=2, eps=EPS)
    out = torch.empty_like(probs, memory_format=torch.contiguous_format)
    for rows in pieces(*keys.shape[:2]):
        similarity = unit[:, rows] @ unit.mT  # [B, n, N]
        out[:, :, rows] = probs @ weigh(similarity, weights, temperature).mT
    return out


@torch.library.impl(f"{NAME}_backward", "CompositeExplicitAutograd")
def _key_smoothing_pairwise_backward(
    grad: Tensor, keys: Tensor, probs: Tensor, weights: str, temperature: float
) -> tuple[Tensor, Tensor]:
    """Gradients of keys and probs, in fp32 at least inside."""
    wide = torch.promote_types(torch.promote_types(keys.dtype, probs.dtype), torch.float32)
    k, p, g = keys.to(wide), probs.to(wide), grad.to(wide)
    length = torch.linalg.vector_norm(k, dim=2, keepdim=True)  # [B, N, 1]
    norm = length.clamp_min(EPS)
    unit = k / norm
    grad_unit, grad_probs = torch.zeros_like(unit), torch.zeros_like(p)
    for rows in pieces(*keys.shape[:2]):
        similarity = unit[:, rows] @ unit.mT  # [B, n, N]
        weight = weigh(similarity, weights, temperature)
        grad_probs += g[:, :, rows] @ weight
        slope = g[:, :, rows].mT @ p  # of the weights, then of the similarities
        if weights == "relu":
            slope *= similarity > 0
        elif weights == "softmax":
            slope = weight * (slope - (weight * slope).sum(2, keepdim=True)) / temperature
        grad_unit[:, rows] += slope @ unit
        grad_unit += slope.mT @ unit[:, rows]
    # a unit vector does not change with the length; below EPS the length counts as EPS
    along = (unit * grad_unit).sum(2, keepdim=True).where(length >= EPS, 0)
    return ((grad_unit - unit * along) / norm).to(keys.dtype), grad_probs.to(probs.dtype)


@torch.library.register_fake(NAME)
def _(keys, probs, weights, temperature):
    return torch.empty_like(probs, memory_format=torch.contiguous_format)


@torch.library.register_fake(f"{NAME}_backward")
def _(grad, keys, probs, weights, temperature):
    return keys.new_empty(keys.shape), probs.new_empty(probs.shape)


def setup_context(ctx, inputs, output):
    keys, probs, ctx.weights, ctx.temperature = inputs
    ctx.save_for_backward(keys, probs)


def backward(ctx, grad):
    keys, probs = ctx.saved_tensors
    of_keys, of_probs = torch.ops.fastzs.key_smoothing_pairwise_backward(
        grad, keys, probs, ctx.weights, ctx.temperature
    )
    return of_keys, of_probs, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("key_smoothing over pairs is differentiable once: its second derivative is not implemented")


torch.library.register_autograd(NAME, backward, setup_context=setup_context)
torch.library.register_autograd(f"{NAME}_backward", _no_second_derivative)
