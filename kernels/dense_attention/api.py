"""Attention operators that turn CLIP's last block into a dense encoder without training."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.trace import traced

from ..dispatch import choose
from ..triton_runtime import why_not_triton
from . import operator as operator  # registers the Triton backend
from . import proxy, reference
from . import regions as within
from .compiled import why_not_cpu
from .procrustes import turned

Kind = Literal["identity", "qk", "qq", "kk", "vv", "qq+kk", "kk+gaussian", "procrustes", "proxy"]
KINDS: tuple[str, ...] = get_args(Kind)
PROCRUSTES = "kind='procrustes' has no kernel of its own"
REGIONS = "only the reference takes regions"


@traced("ops.dense_attention")
def dense_attention(
    q: Tensor,  # [B, H, P + h * w, d]
    k: Tensor,  # [B, H, P + h * w, d]
    v: Tensor,  # [B, H, P + h * w, d]
    kind: str,
    grid: tuple[int, int],
    *,
    std: float = 5.0,
    affinity: Tensor | None = None,  # [B, D, H', W']
    beta: float = 1.2,
    gamma: float = 3.0,
    floor: float | None = None,
    key_weight: float = 0.08,
    regions: Tensor | None = None,  # [B, h, w], with "proxy" [B, H', W']
    impl: str = "auto",
) -> Tensor:  # [B, H, h * w, d], with "proxy" [B, H, H' * W', d]
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
    ``procrustes``   softmax(q (k R)^T + key_weight k k^T), R turns k to q         PEARL, CVPR 2026
    ``proxy``        softmax(gamma (S - beta mean S)), negative scores masked      ProxyCLIP, ECCV 2024
    ===============  ============================================================  ==========================

    The products are scaled by d^-1/2. Keys are all tokens; rows are the patches only.

    In "procrustes" k k^T is of keys without their mean; see :mod:`fastzs.kernels.dense_attention.procrustes`.

    With "proxy", S holds the cosines of another network's features, rows and keys are its patches, and CLIP's values
    are interpolated to its grid (bilinear, ``align_corners=False``); q and k are not used, all heads share the weights.
    A patch always sees itself, so that an image of one colour, where every score is negative, has no NaN. The mean is
    over all pairs of an image. With ``floor`` the weights are the cosines themselves, those below it 0, divided by
    their sum + 1e-6 (CLIP-DINOiser, ECCV 2024: 0.2).

    Args:
        q, k, v: the last block's projections; the ``P`` tokens before the patches (CLS, prompts) come first.
        grid: rows and columns of the patches.
        std: of NACLIP's Gaussian, in patches.
        affinity: ``[B, D, H', W']``, the features of "proxy", of any length and floating dtype, finite.
        beta, gamma: of "proxy": shift and scale of the cosines. Published values work from 1.0 to 1.6 and 2 to 5.
        floor: of "proxy": weights are cosines of at least this.
        key_weight: of "procrustes", at least 0; published: 0.08, for Cityscapes and ADE20K 0.3.
        regions: integers on the rows' grid. A patch sees only the patches of its own region, and the tokens before the
            patches; one of a region of 0 or below sees everything. Only the reference takes them, a region at a time.
        impl: backend, see :mod:`fastzs.kernels.dispatch`. The compiled library (``"cpu"``: heads of a multiple of 8 up
            to 128) and Triton compute fp32, bf16 and fp16 where no gradient is wanted, in memory [B, h * w, H, d], so
            that joining the heads is a view. ``"torch"`` is PyTorch's attention, for kinds other than "proxy",
            "procrustes" and "kk+gaussian". "procrustes" has the reference only, which calls PyTorch's attention.
            Of "proxy" no backend has ``[N, N]`` in memory. The library computes it in fp32 and needs ``H * d`` to be a
            multiple of 32. Triton rounds the weights and the interpolated values to the dtype of ``v``; ``"auto"``
            takes it on a GPU where ``v`` and ``affinity`` are bf16 or fp16.

    Raises:
        RuntimeError: ``impl`` cannot run here.
        ValueError: unknown ``kind``, shapes, dtypes or devices that disagree, fewer tokens than patches, ``std`` not
            positive, ``key_weight`` negative, an ``affinity`` that does not fit or has NaN (looked for on CPUs),
            ``regions`` that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"dense_attention: kind={kind!r} is unknown; use one of {', '.join(KINDS)}")
    if not (q.ndim == 4 and q.shape == k.shape == v.shape):
        raise ValueError(
            "dense_attention: q, k and v must share one shape [B, H, L, d], "
            f"got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise ValueError(
                f"dense_attention: {name} is {tensor.dtype} on {tensor.device}; expected {q.dtype} on {q.device} as q"
            )
    if q.shape[-2] < grid[0] * grid[1]:
        raise ValueError(f"dense_attention: {q.shape[-2]} tokens are fewer than the {grid[0]} x {grid[1]} patches")
    if std <= 0:
        raise ValueError(f"dense_attention: std must be positive, got {std}")
    if key_weight < 0:
        raise ValueError(f"dense_attention: expected a key_weight of at least 0, got {key_weight}")
    if kind == "proxy":
        affinity = proxy.check(v, affinity, gamma)
        if regions is not None:
            within.check(regions, len(v), (affinity.shape[2], affinity.shape[3]), v.device)
            choose("dense_attention", impl, {"cpu": REGIONS, "triton": REGIONS, "reference": None})
            return within.proxy(v, affinity, grid, beta, gamma, floor, regions)
        reasons = {
            "cpu": proxy.why_not_cpu(v, affinity),
            "triton": proxy.why_not_triton(v, affinity),
            "reference": None,
        }
        if torch.float32 in (affinity.dtype, v.dtype):
            # After the reference: without tensor cores, similarities computed several times would set the time.
            reasons["triton"] = reasons.pop("triton")
        backend = choose("dense_attention", impl, reasons)
        run = {"cpu": proxy.compiled, "triton": proxy.fused, "reference": proxy.reference}[backend]
        return run(v, affinity, grid, beta, gamma, floor)
    if affinity is not None or floor is not None:
        raise ValueError(f"dense_attention: affinity and floor are used only by kind='proxy', got kind={kind!r}")
    prefix, scale = q.shape[2] - grid[0] * grid[1], q.shape[3] ** -0.5
    if kind == "procrustes":
        choose("dense_attention", impl, {name: PROCRUSTES for name in ("cpu", "torch", "triton")} | {"reference": None})
        pairs = [turned(q, k, prefix, key_weight)]
        if regions is None:
            (a, b), rows = pairs[0], slice(prefix, None)
            return F.scaled_dot_product_attention(a[:, :, rows], b, v.to(a.dtype), scale=scale).to(v.dtype)
    else:
        pairs = {"qk": [(q, k)], "qq": [(q, q)], "vv": [(v, v)], "qq+kk": [(q, q), (k, k)]}.get(kind, [(k, k)])
    if regions is not None:
        within.check(regions, len(v), grid, v.device)
        choose("dense_attention", impl, {name: REGIONS for name in ("cpu", "torch", "triton")} | {"reference": None})
        if kind == "identity":
            return v[:, :, prefix:]
        return within.plain(pairs, v, grid, scale, std if kind == "kk+gaussian" else None, regions)
    # PyTorch's own attention, on GPUs cuDNN's or flash attention, wherever nothing is added to the scores
    masked = "PyTorch's attention would need the Gaussian as a matrix" if kind == "kk+gaussian" else None
    reasons = {"cpu": why_not_cpu(q, k, v), "torch": masked, "triton": _why_not_triton(q, k, v), "reference": None}
    backend = choose("dense_attention", impl, reasons)
    if backend == "reference":
        return reference.dense_attention(q, k, v, kind, grid, std)
    if kind == "identity":
        return v[:, :, prefix:]
    if backend == "torch":
        rows = slice(prefix, None)
        parts = (F.scaled_dot_product_attention(a[..., rows, :], b, v) for a, b in pairs)
    elif backend == "cpu":
        options = (*grid, scale, std if kind == "kk+gaussian" else 0.0)
        parts = (torch.ops.fastzs.dense_attention(a, b, v, *options) for a, b in pairs)
    else:
        bias = std if kind == "kk+gaussian" else None
        parts = (torch.ops.fastzs.dense_attention_triton(a, b, v, *grid, bias) for a, b in pairs)
    first, *second = parts
    return first + second[0] if second else first


def _why_not_triton(*tensors: Tensor) -> str | None:
    """Why Triton cannot take these queries, keys and values, or None."""
    q = tensors[0]
    if reason := why_not_triton("q is", q.device):
        return reason
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; expected float32, bfloat16 or float16"
    if q.shape[3] > 128:
        return f"heads have size {q.shape[3]}; expected at most 128"
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return "the kernel has no gradient, and one is needed" if wanted else None
