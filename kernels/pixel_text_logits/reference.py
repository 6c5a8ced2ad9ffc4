"""The specification of ``pixel_text_logits`` in plain PyTorch, differentiable.

The product is one matrix product, which BLAS does best; what is ours is the order of the operations: dividing
the product by the feature's norm, not the feature itself, gives the same cosine and no normalised copy.
"""

import torch

from .common import SMALLEST_NORM


def pixel_text_logits_reference(features: torch.Tensor, text: torch.Tensor, scale: float) -> torch.Tensor:
    """``scale * <f, t> / |f|`` for features ``[B, D, h, w]`` and text ``[C, D]``: ``[B, C, h, w]``."""
    h, w = features.shape[2:]
    norm_dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(features, dim=1, dtype=norm_dtype).clamp_min(SMALLEST_NORM)  # [B, h, w]
    dot = text.to(features.dtype) @ features.flatten(2)  # [B, C, h * w]
    return (dot.unflatten(2, (h, w)) * (scale / norm).unsqueeze(1)).to(dot.dtype)
