"""``dense_attention`` on the CPU: the operator ``fastzs::dense_attention`` (csrc/dense_attention.cpp), no gradient.

It is of the schema of ``fastzs::dense_attention_triton``, but for the scores' ``scale`` and a ``std`` of 0 without the
Gaussian.
"""

import torch
from torch import Tensor

from .. import library
from ..bridged_attention.compiled import why_not_blocked
from ..extension import why_missing

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("dense_attention", "cpu")


def why_not_cpu(*tensors: Tensor) -> str | None:
    """None if it can take these queries, keys and values ``[B, H, L, d]``, else the reason."""
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return why_not_blocked(tensors[0]) or ("it has no gradient, and one is needed" if wanted else MISSING)


def _fake(q, k, v, h, w, scale, std):
    B, H, _, d = q.shape
    return q.new_empty((B, h * w, H, d)).transpose(1, 2)


if MISSING is None:
    library.register("dense_attention", _fake)
