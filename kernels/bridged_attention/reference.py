"""The specification of ``bridged_attention``: softmax attention under the dense mask."""

import torch
from torch import Tensor

from .layout import TokenLayout


def with_prompts(prompt_kv: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the prompts' before them, [B, H, P + L, d]."""
    if prompt_kv is None:
        return k, v
    pk, pv = (t.expand(k.shape[0], -1, -1, -1) for t in prompt_kv)
    return torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)


def bridged_attention_reference(
    q: Tensor,  # [B, H, L, d]
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    prompt_kv: tuple[Tensor, Tensor] | None,  # [1 or B, H, P, d] each
    scale: float,
) -> Tensor:  # [B, H, L, d]
    """See :func:`fastzs.ops.bridged_attention`."""
    k, v = with_prompts(prompt_kv, k, v)
    mask = layout.dense_mask(k.shape[2] - layout.length, q.device)
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v
