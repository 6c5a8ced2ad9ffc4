"""What makes a backend's ``mask_sums`` a PyTorch operator: its fake implementation and its gradient.

Every backend is an operator of one schema: ``fastzs::mask_sums`` in the compiled library (csrc/mask_loss*) and
``fastzs::mask_sums_triton``. ``sums`` is ``[B, C, 4]`` fp32 as in ``reference.py``. ``nodes`` is ``[B, C, 3, h, w]``
fp32: the gradients of the first three sums with respect to the logits, taken in the same pass over the pixels, so
that backward is one small product at low resolution. Without ``with_nodes`` it is empty.
"""

import torch

from .. import library

FIELDS = 3
SCHEMA = (
    "(Tensor logits, Tensor target, float alpha, float gamma, int ignore_index, bool with_nodes)"
    " -> (Tensor sums, Tensor nodes)"
)


def logits_gradient(grad_sums: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
    """``[B, C, 4]`` and ``[B, C, 3, h, w]`` to the gradient of the logits ``[B, C, h, w]``, fp32."""
    with torch.autocast(nodes.device.type, enabled=False):
        grad = grad_sums[..., None, :FIELDS] @ nodes.flatten(3)  # [B, C, 1, h * w]
    return grad.squeeze(2).unflatten(2, nodes.shape[3:])


def _fake(logits, target, alpha, gamma, ignore_index, with_nodes):
    return fake_sums(logits, logits.shape, with_nodes)


def fake_sums(like, shape, with_nodes):
    """Sums and nodes of logits of this shape, on the device of ``like``, without values."""
    B, C, h, w = shape
    size = (h, w) if with_nodes else (0, 0)
    new_empty = like.new_empty
    return new_empty((B, C, 4), dtype=torch.float32), new_empty((B, C, FIELDS, *size), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    logits, with_nodes = inputs[0], inputs[-1]
    if not with_nodes:
        raise RuntimeError("mask_sums: logits require a gradient, so with_nodes must be True")
    nodes = output[1]
    ctx.mark_non_differentiable(nodes)
    ctx.save_for_backward(nodes, logits)


def _backward(ctx, grad_sums, _):
    grad_logits = torch.ops.fastzs.mask_sums_backward(grad_sums, *ctx.saved_tensors)
    return grad_logits, None, None, None, None, None


def register(name: str) -> None:
    """Give the operator ``name`` its fake implementation and its gradient."""
    library.register(name, _fake, _backward, _setup_context)


def _mask_sums_backward(grad_sums: torch.Tensor, nodes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return logits_gradient(grad_sums, nodes).to(logits.dtype)


def _fake_backward(grad_sums, nodes, logits):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


# logits gives shape and dtype, and makes the result depend on it: a second derivative then raises, rather than
# leaving this loss out of it.
library.define(
    "mask_sums_backward", "(Tensor grad_sums, Tensor nodes, Tensor logits) -> Tensor grad_logits", _mask_sums_backward
)
library.register_backward("mask_loss", "mask_sums_backward", _fake_backward)
library.define("mask_sums_triton", SCHEMA, library.lazily(f"{__package__}.triton", "mask_sums"))
register("mask_sums_triton")
