"""What several backends of ``bridged_attention`` share."""

import torch
from torch import Tensor


def with_prompts(prompt_kv: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with the prompts' before them, [B, H, P + L, d]."""
    if prompt_kv is None:
        return k, v
    pk, pv = (t.expand(k.shape[0], -1, -1, -1) for t in prompt_kv)
    return torch.cat([pk, k], dim=2), torch.cat([pv, v], dim=2)
