"""``mask_sums`` of ``pixel_text_logits`` as one PyTorch operator, so that nothing between the two is kept.

``fastzs::pixel_text_mask_sums`` returns what ``mask_sums`` does for the logits of features ``[B, D, h, w]`` and text
``[C, D]`` (see ``operator.py``): sums ``[B, C, 4]`` and their gradients at low resolution, ``nodes``
``[B, C, 3, h, w]``. Backward keeps these, the features and the text; the logits are gone when forward returns.
"""

import torch

from .. import library
from ..pixel_text_logits.api import logits_by
from ..pixel_text_logits.operator import compiled_gradients, gradients
from .operator import fake_sums, logits_gradient


def _pixel_text_mask_sums(
    features, text, target, scale, alpha, gamma, ignore_index, with_nodes, logits_backend, loss_backend
):
    with torch.autocast(features.device.type, enabled=False):
        if logits_backend == "reference":
            features = features.to(text.dtype)  # the other backends take two dtypes
        logits = logits_by(logits_backend)(features, text, scale)  # [B, C, h, w]
        mask_sums = torch.ops.fastzs.mask_sums_triton if loss_backend == "triton" else torch.ops.fastzs.mask_sums
        return mask_sums(logits, target, alpha, gamma, ignore_index, with_nodes)


def _fake(features, text, target, scale, alpha, gamma, ignore_index, with_nodes, logits_backend, loss_backend):
    B, _, h, w = features.shape
    return fake_sums(features, (B, text.shape[0], h, w), with_nodes)


def _pixel_text_mask_sums_backward(grad_sums, nodes, features, text, scale, with_features, with_text, logits_backend):
    by_products = compiled_gradients if logits_backend in ("cpu", "cuda") else gradients
    grad_logits = logits_gradient(grad_sums, nodes).to(text.dtype)
    found = by_products(grad_logits, features, text, scale, with_features, with_text)
    # an operator returns tensors: an empty one where no gradient is wanted
    return tuple(features.new_empty(0) if grad is None else grad for grad in found)


def _fake_backward(grad_sums, nodes, features, text, scale, with_features, with_text, logits_backend):
    return (
        features.new_empty(features.shape if with_features else 0),
        text.new_empty(text.shape) if with_text else features.new_empty(0),
    )


def _setup_context(ctx, inputs, output):
    features, text, _, ctx.scale, *_, with_nodes, ctx.logits_backend, _ = inputs
    if not with_nodes:
        raise RuntimeError("pixel_text_mask_sums: an input requires a gradient, so with_nodes must be True")
    nodes = output[1]
    ctx.mark_non_differentiable(nodes)
    ctx.save_for_backward(nodes, features, text)


def _backward(ctx, grad_sums, _):
    with_features, with_text = ctx.needs_input_grad[:2]
    grad_features, grad_text = torch.ops.fastzs.pixel_text_mask_sums_backward(
        grad_sums, *ctx.saved_tensors, ctx.scale, with_features, with_text, ctx.logits_backend
    )
    return grad_features if with_features else None, grad_text if with_text else None, *[None] * 8


library.define(
    "pixel_text_mask_sums",
    "(Tensor features, Tensor text, Tensor target, float scale, float alpha, float gamma, int ignore_index, "
    "bool with_nodes, str logits_backend, str loss_backend) -> (Tensor sums, Tensor nodes)",
    _pixel_text_mask_sums,
)
library.define(
    "pixel_text_mask_sums_backward",
    "(Tensor grad_sums, Tensor nodes, Tensor features, Tensor text, float scale, bool with_features, bool with_text, "
    "str logits_backend) -> (Tensor grad_features, Tensor grad_text)",
    _pixel_text_mask_sums_backward,
)
library.register("pixel_text_mask_sums", _fake, _backward, _setup_context)
library.register_backward("pixel_text_mask_loss", "pixel_text_mask_sums_backward", _fake_backward)
