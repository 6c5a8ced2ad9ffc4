"""Attention with dropout on its weights, for training on CPUs, where PyTorch's own keeps every map in memory.

The weights of a few hundred rows exist at a time, in forward and, computed again, in backward. What is dropped follows
from a seed, so that it can be had again too. What a share is, see :mod:`fastzs.decoders.dropout`.
"""

import torch
from torch import Tensor

from fastzs.decoders.dropout import draw_kept, kept_share

ROWS = 512  # of the maps at a time: with 1024 keys 2 MiB, which stays in cache


def dropout_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """drop(softmax(q k^T / sqrt(d))) v, q [B, H, Q, d], k and v [B, H, N, d] -> [B, H, Q, d].

    Randomness is drawn from torch's default generator: one number a call. Differentiable once.
    """
    return _DropoutAttention.apply(q, k, v, dropout, int(torch.randint(1 << 62, ())))  # pyright: ignore


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout, seed):
        batch, heads, length, dim = q.shape
        out = torch.empty(batch, length, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)
        scaled = v / kept_share(dropout)
        for b, h, rows, weights, kept in _maps(q, k, dropout, seed):
            torch.mm(weights.mul_(kept).to(v.dtype), scaled[b, h], out=out[b, h, rows])
        ctx.save_for_backward(q, k, v, out)
        ctx.dropout, ctx.seed = dropout, seed
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        scaled, scale = v / kept_share(ctx.dropout), q.shape[-1] ** -0.5
        # The rows of weights . d_weights sum to those of grad . out, with dropout as without.
        sums = (grad * out).sum(-1, keepdim=True, dtype=torch.promote_types(q.dtype, torch.float32))
        for b, h, rows, weights, kept in _maps(q, k, ctx.dropout, ctx.seed):
            g = grad[b, h, rows]
            d_weights = torch.mm(g, scaled[b, h].T).to(weights.dtype).mul_(kept)
            d_scores = d_weights.sub_(sums[b, h, rows]).mul_(weights).mul_(scale).to(q.dtype)
            dv[b, h].addmm_(weights.mul_(kept).to(v.dtype).T, g)
            torch.mm(d_scores, k[b, h], out=dq[b, h, rows])
            dk[b, h].addmm_(d_scores.T, q[b, h, rows])
        return dq, dk, dv.div_(kept_share(ctx.dropout)), None, None


def _maps(q: Tensor, k: Tensor, dropout: float, seed: int):
    """Pieces of the maps: picture, head, rows, their weights in fp32 at least, which of them are kept."""
    wide = torch.promote_types(q.dtype, torch.float32)
    generator = torch.Generator(q.device).manual_seed(seed)
    scale = q.shape[-1] ** -0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for start in range(0, q.shape[2], ROWS):
                rows = slice(start, start + ROWS)
                scores = torch.mm(q[b, h, rows], k[b, h].T).to(wide).mul_(scale)
                kept = draw_kept(scores.shape, dropout, q.device, generator)
                yield b, h, rows, torch.softmax(scores, -1), kept
