"""What makes the Triton backend a PyTorch operator: its declaration, fake implementation and gradient.

``fastzs::pixel_text_logits_triton`` takes features ``[B, D, h, w]`` and text ``[C, D]`` and multiplies in the dtype
of the text, which is that of the result ``[B, C, h, w]``. Backward keeps the two inputs, no more.
"""

import torch

from .reference import SMALLEST_NORM

NAME = "fastzs::pixel_text_logits_triton"

torch.library.define(NAME, "(Tensor features, Tensor text, float scale) -> Tensor")


@torch.library.impl(NAME, ("CUDA", "CPU"))  # on the CPU: Triton's interpreter
def _pixel_text_logits_triton(features, text, scale):
    from .triton import pixel_text_logits  # imports triton, which not every machine has

    return pixel_text_logits(features, text, scale)


@torch.library.register_fake(NAME)
def _(features, text, scale):
    B, _, h, w = features.shape
    return features.new_empty((B, text.shape[0], h, w), dtype=text.dtype)


def _setup_context(ctx, inputs, output):
    features, text, ctx.scale = inputs
    ctx.save_for_backward(features, text)


def _backward(ctx, grad):
    features, text = ctx.saved_tensors
    grad_features = grad_text = None
    with torch.autocast(features.device.type, enabled=False):
        length = torch.linalg.vector_norm(features, dim=1, keepdim=True, dtype=torch.float32)  # [B, 1, h, w]
        norm = length.clamp_min(SMALLEST_NORM)
        grad_dot = (grad * (ctx.scale / norm)).to(text.dtype)  # [B, C, h, w]
        if ctx.needs_input_grad[0]:
            # through the product, less its part along the feature: a cosine does not change with the length
            straight = (text.t() @ grad_dot.flatten(2)).view(features.shape)
            along = (straight * features).sum(1, keepdim=True, dtype=torch.float32) / norm
            along = torch.where(length >= SMALLEST_NORM, along / norm, 0)
            grad_features = (straight - features * along).to(features.dtype)
        if ctx.needs_input_grad[1]:
            tokens = features.to(text.dtype).flatten(2).transpose(1, 2)  # [B, h * w, D]
            grad_text = (grad_dot.flatten(2) @ tokens).sum(0)
    return grad_features, grad_text, None


torch.library.register_autograd(NAME, _backward, setup_context=_setup_context)
