"""What makes a backend of ``pixel_text_logits`` a PyTorch operator: its fake implementation and its gradient.

Every backend is an operator of one schema: ``fastzs::pixel_text_logits`` in the compiled library
(csrc/pixel_text_logits*) and ``fastzs::pixel_text_logits_triton``. It takes features ``[B, D, h, w]`` and text
``[C, D]`` and multiplies in the dtype of the text, which is that of the result ``[B, C, h, w]``. Backward keeps the
two inputs, no more.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import library
from ..extension import why_missing
from .common import SMALLEST_NORM

SCHEMA = "(Tensor features, Tensor text, float scale) -> Tensor"

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = {device: why_missing("pixel_text_logits", device) for device in ("cpu", "cuda")}


class Gradients(NamedTuple):
    """Of the two inputs; None where none was asked for."""

    features: torch.Tensor | None
    text: torch.Tensor | None


def gradients(
    grad: torch.Tensor,
    features: torch.Tensor,
    text: torch.Tensor,
    scale: float,
    with_features: bool,
    with_text: bool,
) -> Gradients:
    """The gradients of ``scale * cos(feature, text)`` by matrix products, differentiable again."""
    grad_features = grad_text = None
    if not (with_features or with_text):
        return Gradients(None, None)
    with torch.autocast(features.device.type, enabled=False):
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)  # [B, 1, h, w]
        norm = length.clamp_min(SMALLEST_NORM)
        grad_dot = (grad * (scale / norm)).to(text.dtype)  # [B, C, h, w]
        if with_features:
            # through the product, less its part along the feature: a cosine does not change with the length
            straight = (text.t() @ grad_dot.flatten(2)).view(features.shape)
            along = (straight * features).sum(1, keepdim=True, dtype=torch.float32) / norm
            along = torch.where(length >= SMALLEST_NORM, along / norm, 0)
            grad_features = (straight - features * along).to(features.dtype)
        if with_text:
            tokens = features.to(text.dtype).flatten(2).transpose(1, 2)  # [B, h * w, D]
            grad_text = (grad_dot.flatten(2) @ tokens).sum(0)
    return Gradients(grad_features, grad_text)


def compiled_gradients(
    grad: torch.Tensor,
    features: torch.Tensor,
    text: torch.Tensor,
    scale: float,
    with_features: bool,
    with_text: bool,
) -> Gradients:
    """:func:`gradients` with the features' part from csrc/pixel_text_logits.cpp where they are on the CPU."""
    on_cpu = features.device.type == "cpu"
    found = gradients(grad, features, text, scale, with_features and not on_cpu, with_text)
    if with_features and on_cpu:
        by_features = torch.ops.fastzs.pixel_text_logits_backward(grad, features, text, scale)
        found = found._replace(features=by_features)
    return found


def _fake(features, text, scale):
    B, _, h, w = features.shape
    return features.new_empty((B, text.shape[0], h, w), dtype=text.dtype)


def _setup_context(ctx, inputs, output):
    features, text, ctx.scale = inputs
    ctx.save_for_backward(features, text)


def register(name: str, gradients: Callable[..., Gradients]) -> None:
    """Give the operator ``name`` its fake implementation and its gradient."""

    def backward(ctx, grad):
        return *gradients(grad, *ctx.saved_tensors, ctx.scale, *ctx.needs_input_grad[:2]), None

    library.register(name, _fake, backward, _setup_context)


def _fake_backward(grad, features, text, scale):
    return torch.empty_like(features, memory_format=torch.contiguous_format)


if None in MISSING.values():
    register("pixel_text_logits", compiled_gradients)
    library.register_backward("pixel_text_logits", "pixel_text_logits_backward", _fake_backward)

library.define("pixel_text_logits_triton", SCHEMA, library.lazily(f"{__package__}.triton", "pixel_text_logits"))
register("pixel_text_logits_triton", gradients)
