"""What makes the Triton kernels of ``dense_attention`` PyTorch operators: schemas and fakes; they have no gradients."""

import torch

from .. import library


def _triton(q, k, v, h, w, std):
    from .triton import attention  # imports triton, which not every machine has

    return attention(q, k, v, (h, w), std)


def _fake(q, k, v, h, w, std):
    B, H, _, d = q.shape
    return q.new_empty((B, h * w, H, d)).transpose(1, 2)


library.define("dense_attention_triton", "(Tensor q, Tensor k, Tensor v, int h, int w, float? std) -> Tensor", _triton)
library.register("dense_attention_triton", _fake)


def _proxy_fake(features, inverse, length, values, shift, gamma, smallest):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


library.define(
    "proxy_attention_triton",
    "(Tensor features, Tensor inverse, Tensor length, Tensor values, Tensor shift, float gamma, float? smallest)"
    " -> Tensor",
    library.lazily("fastzs.kernels.dense_attention.proxy_triton", "attention"),
)
library.register("proxy_attention_triton", _proxy_fake)
