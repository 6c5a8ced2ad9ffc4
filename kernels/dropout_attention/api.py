"""Attention whose weights are dropped at random, as decoders are trained."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.trace import traced

from ..checks import check_alike
from ..dispatch import choose
from .compiled import why_not_cpu
from .reference import dropout_attention_reference


@traced("ops.dropout_attention")
def dropout_attention(
    q: Tensor,  # [B, H, Q, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    dropout: float,
    *,
    impl: str = "auto",
) -> Tensor:  # [B, H, Q, d]
    """drop(softmax(q k^T / sqrt(d))) v, where drop zeroes a share of the weights and enlarges the others.

    What ``F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)`` computes. On GPUs that one keeps no map; on CPUs
    it keeps several. The compiled library keeps ``out`` and a number a row, and finds the dropped weights again in
    backward from a seed, the one number drawn from torch's default generator.

    Args:
        q, k, v: one floating dtype, of any strides.
        dropout: share of the weights to drop, 0 to below 1.
        impl: backend, see :mod:`fastzs.kernels.dispatch`: ``"cpu"`` (fp32, bf16 or fp16, d a multiple of 8 up to 128,
            differentiable once); ``"torch"``, PyTorch's own, which auto takes on other devices and for what the library
            cannot take; or ``"reference"``, which holds the maps. ``"cpu"`` and ``"reference"`` drop the same weights
            for one state of the generator, PyTorch's own drops others.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes or devices do not fit each other, there are no keys, or ``dropout`` is out of range.
        RuntimeError: ``impl`` cannot run here.
    """
    check_alike("dropout_attention", {"q": q, "k": k, "v": v})
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits:
        raise ValueError(
            f"dropout_attention: q, k and v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; "
            "expected [B, H, Q, d] and twice [B, H, N, d]"
        )
    if k.shape[2] == 0:
        raise ValueError(f"dropout_attention: k and v are {list(k.shape)}; expected at least 1 key")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout_attention: dropout={dropout}; expected 0 to below 1")
    backend = choose("dropout_attention", impl, {"cpu": why_not_cpu(q), "torch": None, "reference": None})
    if backend == "torch":
        return F.scaled_dot_product_attention(q, k, v, dropout_p=float(dropout))
    # evaluation, which drops nothing, leaves the generator alone
    seed = torch.randint(1 << 62, ()) if dropout else torch.zeros((), dtype=torch.int64)
    scale = q.shape[-1] ** -0.5
    if backend == "cpu":
        return torch.ops.fastzs.dropout_attention(q, k, v, scale, float(dropout), seed)[0]
    return dropout_attention_reference(q, k, v, scale, dropout, seed)
