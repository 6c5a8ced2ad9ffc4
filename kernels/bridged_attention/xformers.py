"""The unmasked attention of the split by xformers, which is imported when it is first asked for."""

import functools
import importlib.util

from torch import Tensor


def why_not_xformers(q: Tensor) -> str | None:
    """Why xformers cannot take these queries ``[B, H, L, d]``, or None; what an import would tell is not asked here."""
    if q.device.type != "cuda":
        return f"xformers has no attention for {q.device}; expected cuda"
    return None if _installed() else "xformers is not installed"


@functools.cache
def _installed() -> bool:
    """Looked up once: a search of the path takes 30 us, and every layer asks."""
    return importlib.util.find_spec("xformers") is not None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, H, L, d] and log-sum-exp [B, H, L]."""
    from xformers.ops import fmha

    length = q.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, L, H, d]
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q, k, v, scale=scale)
    return out.transpose(1, 2), lse[..., :length].contiguous()  # some of its kernels fill lse up


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from xformers.ops import fmha

    grad, out, q, k, v = (t.transpose(1, 2) for t in (grad, out, q, k, v))
    dq, dk, dv = fmha.memory_efficient_attention_backward(grad, out, lse, q, k, v, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
