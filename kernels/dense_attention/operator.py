"""What makes the Triton kernel of ``dense_attention`` a PyTorch operator: its schema and fake; it has no gradient."""

import torch

torch.library.define(
    "fastzs::dense_attention_triton", "(Tensor q, Tensor k, Tensor v, int h, int w, float? std) -> Tensor"
)


@torch.library.impl("fastzs::dense_attention_triton", ("CUDA", "CPU"))  # on the CPU: Triton's interpreter
def _triton(q, k, v, h, w, std):
    from .triton import attention  # imports triton, which not every machine has

    return attention(q, k, v, (h, w), std)


@torch.library.register_fake("fastzs::dense_attention_triton")
def _(q, k, v, h, w, std):
    B, H, _, d = q.shape
    return q.new_empty((B, h * w, H, d)).transpose(1, 2)
