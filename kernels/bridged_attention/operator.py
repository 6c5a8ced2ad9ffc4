"""What makes a backend of ``bridged_attention`` a PyTorch operator: its fake implementation and its gradient.

Every backend is a pair of operators of one schema: ``fastzs::bridged_attention`` with ``_backward`` in the compiled
library (csrc/bridged_attention.cpp), and the same with ``_triton`` behind it. ``h, w`` are
the grid's rows and columns and ``rh, rw`` the bridge's, 0 and 0 without one. ``out`` is ``[B, H, L, d]`` in memory
``[B, L, H, d]``, so that joining the heads afterwards is a view, and so are ``dq``, ``dk`` and ``dv``. ``lse`` is
``[B, H, L]`` fp32: of every row the logarithm of its softmax's denominator. Prompts are ``[1 or B, H, P, d]``, their
gradients always ``[B, H, P, d]`` fp32 (P = 0 without prompts), summed over the batch here.
"""

import torch
from torch import Tensor

from .. import library
from .layout import TokenLayout

FORWARD = (
    "(Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, int prefix, int h, int w, int rh, int rw, "
    "float scale) -> (Tensor out, Tensor lse)"
)
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? prompt_k, Tensor? prompt_v, Tensor out, Tensor lse, "
    "int prefix, int h, int w, int rh, int rw, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dprompt_k, Tensor dprompt_v)"
)


def register(name: str) -> None:
    """Give the operator ``name`` its fake implementation and, through ``name_backward``, its gradient."""
    backward = getattr(torch.ops.fastzs, f"{name}_backward")

    def differentiate(ctx, grad: Tensor, _):
        *tensors, prompt_k, prompt_v, out, lse = ctx.saved_tensors
        if prompt_k is not None and not any(ctx.needs_input_grad[:3]):  # the first layer of a frozen tower
            dq = dk = dv = None
            dprompt_k, dprompt_v = _of_prompts(grad, tensors[0], prompt_k, prompt_v, out, lse, *ctx.options)
        else:
            dq, dk, dv, dprompt_k, dprompt_v = backward(grad, *tensors, prompt_k, prompt_v, out, lse, *ctx.options)
        if prompt_k is None:
            return dq, dk, dv, *(None,) * 8
        if prompt_k.shape[0] < grad.shape[0]:
            dprompt_k, dprompt_v = dprompt_k.sum(0, keepdim=True), dprompt_v.sum(0, keepdim=True)
        return dq, dk, dv, dprompt_k.to(prompt_k.dtype), dprompt_v.to(prompt_v.dtype), *(None,) * 6

    library.register(name, _fake, differentiate, _setup_context)
    library.register_backward("bridged_attention", f"{name}_backward", _fake_backward)


def joined_heads(q: Tensor) -> Tensor:
    """An empty ``[B, H, L, d]`` in memory ``[B, L, H, d]``, for a fake implementation."""
    B, H, L, d = q.shape
    return q.new_empty((B, L, H, d)).transpose(1, 2)


def _fake(q, k, v, prompt_k, prompt_v, prefix, h, w, rh, rw, scale):
    return joined_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad, q, k, v, prompt_k, prompt_v, out, lse, prefix, h, w, rh, rw, scale):
    B, H, _, d = q.shape
    P = 0 if prompt_k is None else prompt_k.shape[2]
    prompts = (q.new_empty((B, H, P, d), dtype=torch.float32) for _ in range(2))
    return joined_heads(q), joined_heads(q), joined_heads(q), *prompts


def _setup_context(ctx, inputs, output):
    q, k, v, prompt_k, prompt_v, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, prompt_k, prompt_v, out, lse)


def _of_prompts(grad, q, prompt_k, prompt_v, out, lse, prefix, h, w, rh, rw, scale) -> tuple[Tensor, Tensor]:
    """dprompt_k and dprompt_v alone, from the prompts' columns of the map."""
    grad, q, out, lse = (
        x[:, :, : prefix + h * w].float() for x in (grad, q, out, lse)
    )  # region tokens do not attend to the prompts
    weights = torch.exp(q @ prompt_k.float().transpose(2, 3) * scale - lse.unsqueeze(-1))  # [B, H, prefix + N, P]
    d_weights = grad @ prompt_v.float().transpose(2, 3) - (grad * out).sum(-1, keepdim=True)
    d_scores = weights * d_weights * scale
    return d_scores.transpose(2, 3) @ q, weights.transpose(2, 3) @ grad


def _triton(q, k, v, prompt_k, prompt_v, prefix, h, w, rh, rw, scale):
    from .triton import forward  # imports triton, which not every machine has

    return forward(q, k, v, prompt_k, prompt_v, _layout(prefix, h, w, rh, rw), scale)


def _triton_backward(grad, q, k, v, prompt_k, prompt_v, out, lse, prefix, h, w, rh, rw, scale):
    from .triton import backward

    return backward(grad, q, k, v, prompt_k, prompt_v, out, lse, _layout(prefix, h, w, rh, rw), scale)


def _layout(prefix: int, h: int, w: int, rh: int, rw: int) -> TokenLayout:
    return TokenLayout(prefix, (h, w), (rh, rw) if rh else None)


library.define("bridged_attention_triton", FORWARD, _triton)
library.define("bridged_attention_triton_backward", BACKWARD, _triton_backward)
register("bridged_attention_triton")
