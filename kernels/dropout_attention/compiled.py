"""``dropout_attention`` on the CPU: the operator ``fastzs::dropout_attention`` (csrc/dropout_attention.cpp).

``out`` and ``dq`` are ``[B, H, Q, d]`` in memory ``[B, Q, H, d]``, so that joining the heads is a view; ``dk`` and
``dv`` alike. ``lse`` is ``[B, H, Q]`` fp32: of every row the logarithm of its softmax's denominator.
"""

import torch
from torch import Tensor

from .. import library
from ..bridged_attention.compiled import why_not_blocked
from ..bridged_attention.operator import joined_heads
from ..extension import why_missing

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("dropout_attention", "cpu")


def why_not_cpu(q: Tensor) -> str | None:
    """None if it can take these queries ``[B, H, Q, d]``, else the reason."""
    return why_not_blocked(q) or MISSING


def _setup_context(ctx, inputs, output):
    q, k, v, ctx.scale, ctx.dropout, seed = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, seed)


def _differentiate(ctx, grad: Tensor, _):
    *tensors, seed = ctx.saved_tensors
    grads = torch.ops.fastzs.dropout_attention_backward(grad, *tensors, ctx.scale, ctx.dropout, seed)
    return *grads, None, None, None


def _fake(q, k, v, scale, dropout, seed):
    return joined_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad, q, k, v, out, lse, scale, dropout, seed):
    return joined_heads(q), joined_heads(k), joined_heads(v)


if MISSING is None:
    library.register("dropout_attention", _fake, _differentiate, _setup_context)
    library.register_backward("dropout_attention", "dropout_attention_backward", _fake_backward)
