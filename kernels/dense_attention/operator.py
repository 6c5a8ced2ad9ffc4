"""What makes the Triton kernel of ``dense_attention`` a PyTorch operator: its schema and fake; it has no gradient."""

from .. import library


def _triton(q, k, v, h, w, std):
    from .triton import attention  # imports triton, which not every machine has

    return attention(q, k, v, (h, w), std)


def _fake(q, k, v, h, w, std):
    B, H, _, d = q.shape
    return q.new_empty((B, h * w, H, d)).transpose(1, 2)


library.define("dense_attention_triton", "(Tensor q, Tensor k, Tensor v, int h, int w, float? std) -> Tensor", _triton)
library.register("dense_attention_triton", _fake)
