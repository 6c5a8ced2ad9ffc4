"""``bridged_attention``: attention of CLIP-RC's tower under its region mask, which never becomes a matrix."""

import torch
from torch import Tensor

from fastzs.trace import traced

from ..checks import check_alike
from ..dispatch import choose
from ..triton_runtime import why_not_triton
from . import operator as operator  # registers the Triton backend
from .compiled import why_not_cpu
from .layout import TokenLayout
from .reference import bridged_attention_reference
from .split import bridged_attention_split
from .xformers import why_not_xformers

# The order in which auto tries the backends, best first, by `pytest bench/test_attention.py -s -m "full or not full"`:
# times faster than scaled_dot_product_attention with the dense mask, forward / forward + backward. On 2 cores of an
# Intel Xeon with AVX-512 but without AVX512-BF16 (bench/results/intel-xeon-2.80ghz-2-threads.md):
#
#               fp32          bf16          fp16
#   cpu         1.31 / 1.26   1.17 / 2.96   1.44 / 18.1
#   split       0.96 / 0.89   0.22 / 0.95   1.03 / 1.04
#   reference   0.26 / 0.36   0.19 / 0.74   0.03 / 0.35
#
# So one order serves all three; fp64, which only the last two take, gets the split. Unmeasured: a processor without
# AVX2, where auto stays with PyTorch's attention; any GPU, where Triton needs one launch and the others many.
WIDE_VECTORS = torch.backends.cpu.get_cpu_capability().startswith("AVX")
CPU_ORDER = ("cpu", "split", "reference", "triton", "xformers")
PORTABLE_ORDER = ("split", "cpu", "reference", "triton", "xformers")
CUDA_ORDER = ("triton", "split", "reference", "cpu", "xformers")
# Without a bridge the split is one call of PyTorch's attention, on GPUs cuDNN's or flash attention, tuned for each.
UNMASKED_CUDA_ORDER = ("split", "triton", "reference", "cpu", "xformers")


@traced("ops.bridged_attention")
def bridged_attention(
    q: Tensor,  # [B, H, L, d]
    k: Tensor,  # [B, H, L, d]
    v: Tensor,  # [B, H, L, d]
    layout: TokenLayout,
    *,
    prompt_kv: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:  # [B, H, L, d]
    """softmax(scale q k^T) v where every row's softmax runs over the keys that ``layout`` lets it see.

    Args:
        q, k, v: fp32, bf16, fp16 or fp64, one dtype and device, any strides; ``L = layout.length`` tokens.
        layout: order of the tokens and who sees whom.
        prompt_kv: keys and values ``[B, H, P, d]``, or ``[1, H, P, d]`` for all images, of P more tokens that have
            no queries: deep prompts, whose outputs the next layer would overwrite. Prefix and patches see them.
        scale: factor on the scores, by default d^-1/2.
        impl: ``"auto"``, ``"reference"`` (dense mask), ``"split"`` (unmasked attention of the shared rows, bridge
            keys merged exactly), ``"cpu"`` (the compiled library, heads of a multiple of 8 up to 128), ``"triton"``
            (a GPU, heads up to 128) or ``"xformers"`` (a GPU, the split on xformers' attention), see
            :mod:`fastzs.kernels.dispatch`. All are differentiable once.

    Raises:
        TypeError: dtypes differ or are not floating.
        ValueError: shapes or devices do not fit each other or the layout.
        RuntimeError: ``impl`` cannot run here.
    """
    tensors = {"q": q, "k": k, "v": v}
    if prompt_kv is not None:
        tensors |= {"prompt_kv[0]": prompt_kv[0], "prompt_kv[1]": prompt_kv[1]}
    check_alike("bridged_attention", tensors)
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"bridged_attention: q, k and v are {list(q.shape)}, {list(k.shape)}, {list(v.shape)}; "
            "expected one shape [B, H, L, d]"
        )
    if q.shape[2] != layout.length:
        raise ValueError(
            f"bridged_attention: {q.shape[2]} tokens, but the layout has {layout.prefix} before the patches, "
            f"{layout.grid[0]} x {layout.grid[1]} patches and {layout.regions} bridge tokens: {layout.length}"
        )
    if prompt_kv is not None:
        pk, pv = prompt_kv
        wanted = (q.shape[1], q.shape[3])
        fits = pk.ndim == 4 and (pk.shape[1], pk.shape[3]) == wanted and pk.shape[0] in (1, q.shape[0])
        if pk.shape != pv.shape or not fits:
            raise ValueError(
                f"bridged_attention: prompt_kv is {list(pk.shape)}, {list(pv.shape)}; "
                f"expected [1 or {q.shape[0]}, {wanted[0]}, P, {wanted[1]}] for both"
            )
    split = None
    if layout.bridge is not None and q.device.type != "cpu":
        split = f"the merge needs an attention that returns its log-sum-exp, taken here only on the CPU, not {q.device}"
    found = {"cpu": why_not_cpu(q), "split": split, "triton": _why_not_triton(q), "xformers": why_not_xformers(q)}
    reasons = {name: found.get(name) for name in _order(q, layout)}
    chosen = choose("bridged_attention", impl, reasons)
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen in ("cpu", "triton"):
        pk, pv = prompt_kv or (None, None)
        sizes = (layout.prefix, *layout.grid, *(layout.bridge or (0, 0)))
        ops = torch.ops.fastzs
        op = ops.bridged_attention if chosen == "cpu" else ops.bridged_attention_triton
        return op(q, k, v, pk, pv, *sizes, factor)[0]
    if chosen == "reference":
        return bridged_attention_reference(q, k, v, layout, prompt_kv, factor)
    return bridged_attention_split(q, k, v, layout, prompt_kv, factor, chosen == "xformers")


def _order(q: Tensor, layout: TokenLayout) -> tuple[str, ...]:
    """All backends, as auto prefers them for such queries."""
    if q.device.type == "cuda":
        return UNMASKED_CUDA_ORDER if layout.bridge is None else CUDA_ORDER
    return CPU_ORDER if WIDE_VECTORS else PORTABLE_ORDER


def _why_not_triton(q: Tensor) -> str | None:
    """Why Triton cannot take these queries ``[B, H, L, d]``, or None."""
    if reason := why_not_triton("q is", q.device):
        return reason
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}; expected float32, bfloat16 or float16"
    return None if q.shape[3] <= 128 else f"heads have size {q.shape[3]}; expected at most 128"


__all__ = ["TokenLayout", "bridged_attention"]
