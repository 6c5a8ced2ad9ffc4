"""Specification of attention with dropout on its weights, in plain PyTorch."""

import torch
from torch import Tensor

from ..dropout.reference import dropout_reference


def dropout_attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, seed: Tensor) -> Tensor:
    """See :func:`fastzs.kernels.dropout_attention.api.dropout_attention`; seed is an int64 of no dimension."""
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax((q @ k.transpose(-1, -2)).to(wide) * scale, -1)  # [B, H, Q, N]
    return dropout_reference(weights, False, dropout, seed).to(v.dtype) @ v
