"""``bridged_attention`` on the CPU: the operator ``fastzs::bridged_attention`` (csrc/bridged_attention.cpp)."""

import torch
from torch import Tensor

from ..extension import why_missing
from .operator import register

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("bridged_attention", "cpu")
HEAD_SIZES = range(8, 128 + 1, 8)

if MISSING is None:
    register("bridged_attention")


def why_not_cpu(q: Tensor) -> str | None:
    """None if it can take these queries ``[B, H, L, d]``, else the reason."""
    return why_not_blocked(q) or MISSING


def why_not_blocked(q: Tensor) -> str | None:
    """None if the blocked attention of the library takes such queries, should the library be there."""
    if q.device.type != "cpu":
        return f"q is on {q.device}"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; expected float32, bfloat16 or float16"
    if q.shape[3] not in HEAD_SIZES:
        return f"heads have size {q.shape[3]}; expected a multiple of 8 up to {HEAD_SIZES[-1]}"
    return None
