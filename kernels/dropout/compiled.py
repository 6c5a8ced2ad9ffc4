"""``dropout`` on the CPU: the operator ``fastzs::dropout`` (csrc/dropout.cpp)."""

import torch
from torch import Tensor

from .. import library
from ..extension import why_missing

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("dropout", "cpu")


def why_not_cpu(x: Tensor) -> str | None:
    """None if it can take x, else the reason."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"x is {x.dtype}; expected float32, bfloat16 or float16"
    return MISSING


def _setup_context(ctx, inputs, output):
    _, relu, ctx.rate, seed = inputs
    ctx.save_for_backward(seed, *([output] if relu else []))


def _differentiate(ctx, grad: Tensor):
    seed, *out = ctx.saved_tensors
    grad = torch.ops.fastzs.dropout_backward(grad.contiguous(), out[0] if out else None, ctx.rate, seed)
    return grad, None, None, None


if MISSING is None:
    library.register("dropout", lambda x, relu, rate, seed: torch.empty_like(x), _differentiate, _setup_context)
    library.register_backward("dropout", "dropout_backward", lambda grad, out, rate, seed: torch.empty_like(grad))
