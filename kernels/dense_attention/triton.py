"""``dense_attention`` in Triton: NACLIP's neighbour bias is computed from the patches' places, in registers.

A program owns a block of patches of one head and goes once over all keys, the softmax's denominator with it. Sums are
fp32.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it does not know that a grid launches a kernel)
import math

import torch
import triton
import triton.language as tl

from ..configs import tile
from ..strides import in_units
from ..triton_runtime import architecture, interpreted

LOG2_E = math.log2(math.e)


@triton.jit(do_not_specialize=["H", "prefix", "patches", "w"])
def dense_attention_fwd_kernel(
    q_ptr,  # [B, H, P + N, d]
    k_ptr,
    v_ptr,
    out_ptr,  # [B, H, N, d]
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    out_stride_b, out_stride_h, out_stride_l,
    H, prefix, patches, w,
    scale,  # of the scores, times log2(e)
    falloff,  # of the bias: -log2(e) / (2 std^2), for a squared distance of 1
    height,  # of the bias: log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides, in numbers
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    GAUSSIAN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    q_stride_l, k_stride_l, v_stride_l = q_stride_l * UNIT, k_stride_l * UNIT, v_stride_l * UNIT
    out_stride_l *= UNIT
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS], patches
    inside = row < patches
    q = tl.load(
        q_ptr + (prefix + row)[:, None].to(tl.int64) * q_stride_l + d[None, :],
        mask=inside[:, None] & (d < D)[None, :],
        other=0.0,
    )  # [ROWS, BLOCK_D]
    if UPCAST:
        q = q.to(tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    count = prefix + patches
    for start in range(0, count, KEYS):
        key = start + tl.arange(0, KEYS)
        there = (key < count)[:, None] & (d < D)[None, :]
        at = key[:, None].to(tl.int64)
        k = tl.load(k_ptr + at * k_stride_l + d[None, :], mask=there, other=0.0)
        v = tl.load(v_ptr + at * v_stride_l + d[None, :], mask=there, other=0.0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS]
        if GAUSSIAN:
            patch = tl.maximum(key - prefix, 0)
            dy = (row // w)[:, None] - (patch // w)[None, :]
            dx = (row % w)[:, None] - (patch % w)[None, :]
            bias = tl.exp2((dy * dy + dx * dx).to(tl.float32) * falloff) * height
            scores += tl.where((key >= prefix)[None, :], bias, 0.0)
        scores = tl.where((key < count)[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = highest
    out = out_ptr + row[:, None].to(tl.int64) * out_stride_l + d[None, :]
    tl.store(out, acc / total[:, None], mask=inside[:, None] & (d < D)[None, :])


def attention(
    q: torch.Tensor,  # [B, H, P + N, d]
    k: torch.Tensor,
    v: torch.Tensor,
    grid: tuple[int, int],
    std: float | None,
) -> torch.Tensor:  # [B, H, N, d]
    """softmax(q k^T / sqrt(d)) v for the rows of the N patches; with ``std``, NACLIP's bias among the patches."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, L, D = q.shape
    patches = grid[0] * grid[1]
    upcast = interpreted()  # it cuts what it rounds to bf16, so it gets fp32
    out = q.new_empty((B, patches, H, D), dtype=torch.float32 if upcast else q.dtype).transpose(1, 2)
    if out.numel() > 0:
        unit, strides = in_units([q, k, v, out])
        rows, keys, warps, stages = tile("dense", q.element_size(), D, architecture(q.device))
        with torch.cuda.device(q.device.index if q.is_cuda else -1):
            dense_attention_fwd_kernel[triton.cdiv(patches, rows), B * H](
                q,
                k,
                v,
                out,
                *strides,
                H,
                L - patches,
                patches,
                grid[1],
                D**-0.5 * LOG2_E,
                -LOG2_E / (2 * std**2) if std else 0.0,
                LOG2_E,
                D=D,
                BLOCK_D=max(triton.next_power_of_2(D), 16),
                UNIT=unit,
                ROWS=rows,
                KEYS=keys,
                GAUSSIAN=std is not None,
                UPCAST=upcast,
                num_warps=warps,
                num_stages=stages,
                enable_fp_fusion=True,
            )
    return out.to(q.dtype)
