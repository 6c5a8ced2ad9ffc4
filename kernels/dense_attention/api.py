"""Attention operators that turn CLIP's last block into a dense encoder without training."""

from typing import Literal, get_args

from torch import Tensor

from ..dispatch import choose
from . import reference

Kind = Literal["identity", "qk", "qq", "kk", "vv", "qq+kk", "kk+gaussian"]
KINDS: tuple[str, ...] = get_args(Kind)


def dense_attention(
    q: Tensor,  # [B, H, P + h * w, d]
    k: Tensor,  # [B, H, P + h * w, d]
    v: Tensor,  # [B, H, P + h * w, d]
    kind: str,
    grid: tuple[int, int],
    *,
    std: float = 5.0,
    impl: str = "auto",
) -> Tensor:  # [B, H, h * w, d]
    """Patch rows of the last block's attention under one of the training-free operators.

    ===============  ============================================================  ==========================
    kind             rows of the attention                                         source
    ===============  ============================================================  ==========================
    ``identity``     each patch keeps its own value                                MaskCLIP, ECCV 2022
    ``qk``           softmax(q k^T), CLIP's own                                    CLIP
    ``qq``           softmax(q q^T)                                                ClearCLIP, ECCV 2024
    ``kk``, ``vv``   softmax(k k^T), softmax(v v^T)                                CLIP Surgery, NACLIP's base
    ``qq+kk``        softmax(q q^T) + softmax(k k^T)                               SCLIP, ECCV 2024
    ``kk+gaussian``  softmax(k k^T + Gaussian of the distance between patches)     NACLIP, WACV 2025
    ===============  ============================================================  ==========================

    The products are scaled by d^-1/2. Keys are all tokens; rows are the patches only.

    Args:
        q, k, v: the last block's projections; the ``P`` tokens before the patches (CLS, prompts) come first.
        grid: rows and columns of the patches.
        std: of NACLIP's Gaussian, in patches.
        impl: backend, see :mod:`fastzs.kernels.dispatch`.

    Raises:
        ValueError: unknown ``kind``, shapes that disagree, fewer tokens than patches, ``std`` not positive.
    """
    if kind not in KINDS:
        raise ValueError(f"dense_attention: kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if not (q.ndim == 4 and q.shape == k.shape == v.shape):
        raise ValueError(
            "dense_attention: q, k and v must share one shape [B, H, L, d], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if q.shape[-2] < grid[0] * grid[1]:
        raise ValueError(f"dense_attention: {q.shape[-2]} tokens are fewer than the {grid[0]} x {grid[1]} patches")
    if std <= 0:
        raise ValueError(f"dense_attention: std must be positive, got {std}")
    choose("dense_attention", impl, {"reference": None})
    return reference.dense_attention(q, k, v, kind, grid, std)
