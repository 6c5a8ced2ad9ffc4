"""``dense_attention(kind="procrustes")``: keys are turned towards the queries before they are compared (PEARL).

For each head, in fp32 at least, with weights w = |q| / sum |q| over the patches::

    M = (k - sum w k)' (q - sum w q)                    R: the rotation closest to M, by five Newton-Schulz steps
    A = softmax(q (k R)' d^-1/2 + a (k - sum w k) (k - sum w k)' d^-1/2)

Five steps do not converge where singular values are small, so R is not quite a rotation; that is as published. Source:
"PEARL", CVPR 2026.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def turned(
    q: Tensor, k: Tensor, prefix: int, key_weight: float, rotation: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, L, 2 d]`` of ``[B, H, L, d]`` whose products, times d^-1/2, are the scores.

    Args:
        prefix: tokens before the patches, which have no part in the means.
        key_weight: a, at least 0.
        rotation: what makes R of M ``[..., d, d]``; :func:`polar` if omitted.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    lengths = q.norm(dim=-1, keepdim=True)  # [B, H, L, 1]
    lengths = torch.cat([torch.zeros_like(lengths[:, :, :prefix]), lengths[:, :, prefix:]], 2)
    weights = lengths / (lengths.sum(2, keepdim=True) + 1e-6)
    q_mean, k_mean = ((weights * x).sum(2, keepdim=True) for x in (q, k))
    centred = k - k_mean
    rotated = k @ (rotation or polar)(centred.mT @ (q - q_mean))
    own = key_weight**0.5 * centred
    return torch.cat([q, own], -1), torch.cat([rotated, own], -1)


def procrustes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: int,
    key_weight: float,
    rotation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The attention's rows of all tokens, ``[B, H, L, d]``, fp32 at least; arguments as of :func:`turned`."""
    a, b = turned(q, k, prefix, key_weight, rotation)
    return F.scaled_dot_product_attention(a, b, v.to(a.dtype), scale=q.shape[-1] ** -0.5)


def polar(m: Tensor, steps: int = 5) -> Tensor:
    """M (M' M)^-1/2 of ``[..., d, d]``, by coupled Newton-Schulz steps."""
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    a = m.mT @ m
    norm = torch.linalg.matrix_norm(a, keepdim=True)
    y, z = a / norm + 1e-6 * eye, eye.expand_as(a)
    for _ in range(steps):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return m @ z / norm.sqrt()
