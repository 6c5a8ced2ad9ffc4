"""Key smoothing with the cosine of every pair of positions, some rows of the ``N x N`` cosines at a time.

It is quicker than the linear form where there are few positions (see ``api.py``). Memory is bounded: no more than
``PIECE`` cosines exist at once, forward or backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import library
from .common import EPS

PIECE = 1 << 20  # cosines at a time: 4 MB of fp32


def pieces(batch: int, positions: int) -> list[slice]:
    rows = max(1, PIECE // (batch * positions))
    return [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]


def _forward(keys: Tensor, probs: Tensor) -> Tensor:
    """``[B, N, D]``, ``[B, C, N]`` -> ``[B, C, N]``, of one dtype; see :func:`fastzs.ops.key_smoothing`."""
    unit = F.normalize(keys, dim=2, eps=EPS)
    out = torch.empty_like(probs, memory_format=torch.contiguous_format)
    for rows in pieces(*keys.shape[:2]):
        out[:, :, rows] = probs @ (unit[:, rows] @ unit.mT).mT
    return out


def _backward(grad: Tensor, keys: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of keys and probs."""
    length = torch.linalg.vector_norm(keys, dim=2, keepdim=True)  # [B, N, 1]
    norm = length.clamp_min(EPS)
    unit = keys / norm
    grad_unit, grad_probs = torch.zeros_like(unit), torch.zeros_like(probs)
    for rows in pieces(*keys.shape[:2]):
        grad_probs += grad[:, :, rows] @ (unit[:, rows] @ unit.mT)
        slope = grad[:, :, rows].mT @ probs  # of the cosines, [B, n, N]
        grad_unit[:, rows] += slope @ unit
        grad_unit += slope.mT @ unit[:, rows]
    # a unit vector does not change with the length; below EPS the length counts as EPS
    along = (unit * grad_unit).sum(2, keepdim=True).where(length >= EPS, 0)
    return (grad_unit - unit * along) / norm, grad_probs


def _fake(keys, probs):
    return torch.empty_like(probs, memory_format=torch.contiguous_format)


def _fake_backward(grad, keys, probs):
    return keys.new_empty(keys.shape), probs.new_empty(probs.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return torch.ops.fastzs.key_smoothing_pairwise_backward(grad, *ctx.saved_tensors)


library.define("key_smoothing_pairwise", "(Tensor keys, Tensor probs) -> Tensor", _forward)
library.define(
    "key_smoothing_pairwise_backward", "(Tensor grad, Tensor keys, Tensor probs) -> (Tensor, Tensor)", _backward
)
library.register("key_smoothing_pairwise", _fake, _differentiate, _setup_context)
library.register_backward("key_smoothing", "key_smoothing_pairwise_backward", _fake_backward)
