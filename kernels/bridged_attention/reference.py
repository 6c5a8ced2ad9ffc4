"""The specification of ``bridged_attention``: softmax attention under the dense mask."""

import torch
from torch import Tensor

from .common import with_prompts
from .layout import TokenLayout


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
