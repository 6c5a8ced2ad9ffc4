"""Key smoothing in Triton: K (K^T P) with the norms taken from the tiles on their way.

Two kernels. The first adds up ``sums = P K^`` (``[C, D]``, K^ the normalised keys) over some positions: it
holds whole keys, so it has their norms before it multiplies, and each program writes the sums of its own positions.
The second adds those up and multiplies with the keys again; the norm of a key is a factor of its position's column,
so it divides at the end. No normalised copy of the keys exists and no norm is stored.

Products of fp32 are fp32. Keys of bf16 and fp16 fit into tf32 whole, and tensor cores multiply them with both parts of
the other side: 8 N D C operations in both kernels together, where one product each would be 4 N D C and lose 13 bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportGeneralTypeIssues=false
# (it does not know that a grid launches a kernel)

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_runtime import architecture, interpreted
from .common import EPS

# tests/kernels/test_machine_code.py compiles these for six architectures.
SUMS_TILE, SUMS_POSITIONS, SUMS_WARPS = 16384, 16, 8  # classes x channels, at least 16 classes
SPREAD_CLASSES, SPREAD_POSITIONS, SPREAD_CHANNELS = 64, 64, 32
SPREAD_WARPS = {"ieee": 8, "tf32": 4}  # with 4, fp32 spills registers on sm_86 and 89
SMALL = (86, 89, 120)  # architectures whose blocks have 99 KB of shared memory: whole keys are not loaded ahead
PROGRAMS = 264  # two for each of an H200's 132 SMs: positions are split so far


@triton.jit
def product(a, k, total, PRECISION: tl.constexpr):
    """total + a k. tf32 holds 11 bits of a number: all of k's, which come from bf16 or fp16. Of a's it would cut 13, so
    a goes in two parts, and what is lost is 2^-22 of it."""
    if PRECISION == "ieee":
        total = tl.dot(a, k, total, input_precision="ieee")
    else:
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(high, k, total, input_precision="tf32")
        total = tl.dot(tl.where(a == high, 0.0, a - high), k, total, input_precision="tf32")  # 0: of infinities
    return total


@triton.jit(do_not_specialize=["C", "splits", "per_split"])
def key_smoothing_sums_fwd_kernel(
    keys_ptr,  # [B, N, D], contiguous
    probs_ptr,  # [B, C, N], contiguous
    sums_ptr,  # [B, SPLITS, C, D] fp32
    squares_ptr,  # [B, SPLITS, D] fp32, written with OFFICIAL
    N,
    C,
    D,
    splits,
    per_split,  # positions, a multiple of POSITIONS
    eps,
    OFFICIAL: tl.constexpr,
    CLASSES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,  # at least D
    PRECISION: tl.constexpr,
):
    c = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)  # [CLASSES]
    split = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, CHANNELS)
    sums = tl.zeros([CLASSES, CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, N), POSITIONS):
        n = start + tl.arange(0, POSITIONS)
        row = b * N + n
        k = tl.load(keys_ptr + row[:, None] * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
        k = k.to(tl.float32)  # [POSITIONS, CHANNELS]
        p = tl.load(
            probs_ptr + (b * C + c)[:, None] * N + n[None, :], mask=(c < C)[:, None] & (n < N)[None, :], other=0.0
        ).to(tl.float32)  # [CLASSES, POSITIONS]
        if OFFICIAL:
            squares += tl.sum(k * k, 0)
        else:
            p = p / tl.maximum(tl.sqrt_rn(tl.sum(k * k, 1)), eps)[None, :]
        sums = product(p, k, sums, PRECISION)
    at = (b * splits + split) * C + c  # [CLASSES]
    tl.store(sums_ptr + at[:, None] * D + d[None, :], sums, mask=(c < C)[:, None] & (d < D)[None, :])
    if OFFICIAL:
        # the programs of all classes write the same numbers here
        tl.store(squares_ptr + (b * splits + split) * D + d, squares, mask=d < D)


@triton.jit(do_not_specialize=["C", "splits"])
def key_smoothing_spread_fwd_kernel(
    keys_ptr,  # [B, N, D], contiguous
    probs_ptr,  # [B, C, N], read with OFFICIAL
    sums_ptr,  # [B, SPLITS, C, D] fp32
    squares_ptr,  # [B, SPLITS, D] fp32, read with OFFICIAL
    out_ptr,  # [B, C, N]
    N,
    C,
    D,
    splits,
    eps,
    threshold,
    OFFICIAL: tl.constexpr,
    CLASSES: tl.constexpr,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([CLASSES, POSITIONS], tl.float32)
    squares = tl.zeros([POSITIONS], tl.float32)
    for start in range(0, D, CHANNELS):
        d = start + tl.arange(0, CHANNELS)
        row = b * N + n
        k = tl.load(keys_ptr + row[None, :] * D + d[:, None], mask=(n < N)[None, :] & (d < D)[:, None], other=0.0)
        k = k.to(tl.float32)  # [CHANNELS, POSITIONS]
        inside = (c < C)[:, None] & (d < D)[None, :]
        sums = tl.zeros([CLASSES, CHANNELS], tl.float32)
        length = tl.zeros([CHANNELS], tl.float32)
        for split in range(splits):
            at = (b * splits + split) * C + c
            sums += tl.load(sums_ptr + at[:, None] * D + d[None, :], mask=inside, other=0.0)
            if OFFICIAL:
                length += tl.load(squares_ptr + (b * splits + split) * D + d, mask=d < D, other=1.0)
        if OFFICIAL:
            sums = sums / tl.maximum(length, eps * eps)[None, :]
        else:
            squares += tl.sum(k * k, 0)
        total = product(sums, k, total, PRECISION)
    inside = (c < C)[:, None] & (n < N)[None, :]
    place = (b * C + c)[:, None] * N + n[None, :]
    if OFFICIAL:
        most = tl.full([POSITIONS], float("-inf"), tl.float32)
        unsure = tl.zeros([POSITIONS], tl.int32)
        for start in range(0, C, CLASSES):
            other = start + tl.arange(0, CLASSES)
            p = tl.load(
                probs_ptr + (b * C + other)[:, None] * N + n[None, :],
                mask=(other < C)[:, None] & (n < N)[None, :],
                other=float("-inf"),
            ).to(tl.float32)
            unsure |= tl.max((p != p).to(tl.int32), 0)
            most = tl.maximum(most, tl.max(p, 0))
        p = tl.load(probs_ptr + place, mask=inside, other=0.0).to(tl.float32)
        # a maximum with NaN is NaN, which is not below the threshold
        total = tl.where(((most < threshold) & (unsure == 0))[None, :], total, p)
    else:
        total = total / tl.maximum(tl.sqrt_rn(squares), eps)[None, :]
    tl.store(out_ptr + place, total, mask=inside)


def class_tile(classes: int, most: int) -> int:
    return min(max(triton.next_power_of_2(classes), 16), most)


def precision(keys: Tensor, probs: Tensor) -> str:
    """Of the products: tf32 holds keys of bf16 and fp16 whole."""
    return "ieee" if torch.float32 in (keys.dtype, probs.dtype) else "tf32"


def key_smoothing(keys: Tensor, probs: Tensor, mode: str, threshold: float) -> Tensor:
    """``[B, N, D]``, ``[B, C, N]`` -> ``[B, C, N]`` in the dtype of ``probs``; ``D`` at most 1024."""
    keys, probs = keys.contiguous(), probs.contiguous()
    (B, N, D), C = keys.shape, probs.shape[1]
    channels = max(triton.next_power_of_2(D), 16)
    classes = class_tile(C, max(16, SUMS_TILE // channels))
    blocks = triton.cdiv(C, classes)
    splits = min(triton.cdiv(N, 4 * SUMS_POSITIONS), max(1, PROGRAMS // (B * blocks)))
    per_split = triton.cdiv(triton.cdiv(N, splits), SUMS_POSITIONS) * SUMS_POSITIONS
    splits = triton.cdiv(N, per_split)
    sums = keys.new_empty((B, splits, C, D), dtype=torch.float32)
    official = mode == "official"
    squares = keys.new_empty((B, splits, D), dtype=torch.float32) if official else sums
    out = _empty(probs)
    with torch.cuda.device(keys.device.index if keys.is_cuda else -1):
        key_smoothing_sums_fwd_kernel[(blocks, splits, B)](
            keys,
            probs,
            sums,
            squares,
            N,
            C,
            D,
            splits,
            per_split,
            EPS,
            OFFICIAL=official,
            CLASSES=classes,
            POSITIONS=SUMS_POSITIONS,
            CHANNELS=channels,
            PRECISION=precision(keys, probs),
            num_warps=SUMS_WARPS,
            num_stages=1 if architecture(keys.device) in SMALL else 3,
            enable_fp_fusion=True,
        )
        classes = class_tile(C, SPREAD_CLASSES)
        key_smoothing_spread_fwd_kernel[(triton.cdiv(N, SPREAD_POSITIONS), triton.cdiv(C, classes), B)](
            keys,
            probs,
            sums,
            squares,
            out,
            N,
            C,
            D,
            splits,
            EPS,
            threshold,
            OFFICIAL=official,
            CLASSES=classes,
            POSITIONS=SPREAD_POSITIONS,
            CHANNELS=SPREAD_CHANNELS,
            PRECISION=precision(keys, probs),
            num_warps=SPREAD_WARPS[precision(keys, probs)],
            enable_fp_fusion=True,
        )
    return out.to(probs.dtype)


def _empty(probs: Tensor) -> Tensor:
    # The interpreter cuts what it rounds to bf16: it gets fp32 instead.
    return torch.empty_like(probs, dtype=torch.float32 if interpreted() else probs.dtype)
