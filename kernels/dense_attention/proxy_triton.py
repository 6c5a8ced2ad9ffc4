"""``dense_attention(kind="proxy")`` in Triton: the weights stay in registers.

A program owns a block of patches and a chunk of the values' channels and goes once over all patches as keys: their
similarities, a sum over the features' channels, become weights, which multiply the values at once. No score of a unit
feature exceeds the row's own length, so the softmax subtracts that and needs no running maximum. Sums are fp32.

Every chunk of the values computes the similarities again. With N patches, E channels of the features, V of the values
and chunks of C, that is 2 N^2 (E ceil(V / C) + V) operations, where the reference needs 2 N^2 (E + V). At the least,
(E + V) N numbers are read and V N written; the reference also writes and reads N^2 scores, in fp32, at least three
times. Tensor cores multiply features of bf16 and fp16 as they are, and the products are divided by the lengths, so that
nothing is rounded to 16 bits before the mask. Products of fp32 are fp32, without tensor cores. It was never timed.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it does not know that a grid launches a kernel)
import torch
import triton
import triton.language as tl

from ..triton_runtime import interpreted
from .triton import LOG2_E

# By the bytes of a number: rows, keys, channels of the values, channels of the features in a step, warps, stages.
# Chosen from machine code; tests/kernels/test_machine_code.py compiles them.
TILES = {2: (64, 64, 128, 64, 8, 2), 4: (32, 64, 128, 16, 8, 2)}


@triton.jit(do_not_specialize=["N"])
def proxy_attention_fwd_kernel(
    features_ptr,  # [B, N, E], contiguous as all are
    inverse_ptr,  # [B, N], what makes the features unit ones
    length_ptr,  # [B, N], of the unit features: 1, of features of zero 0
    values_ptr,  # [B, N, V]
    shift_ptr,  # [B]
    out_ptr,  # [B, N, V]
    N,
    E,
    V,
    gamma,  # times log2(e)
    smallest,  # in the denominator of the linear form
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    LINEAR: tl.constexpr,
    UPCAST: tl.constexpr,
):
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    e = tl.arange(0, STEP)
    inside, wanted = row < N, c < V
    features, values = features_ptr + b * N * E, values_ptr + b * N * V
    rows = features + row[:, None].to(tl.int64) * E + e[None, :]  # [ROWS, STEP]
    inverse = tl.load(inverse_ptr + b * N + row, mask=inside, other=0.0)
    length = tl.load(length_ptr + b * N + row, mask=inside, other=0.0)
    shift = tl.load(shift_ptr + b)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, CHUNK], tl.float32)
    for start in range(0, N, KEYS):
        key = start + tl.arange(0, KEYS)
        there = key < N
        keys = features + key[:, None].to(tl.int64) * E + e[None, :]  # [KEYS, STEP]
        score = tl.zeros([ROWS, KEYS], tl.float32)
        for first in range(0, E, STEP):
            known = (first + e < E)[None, :]
            x = tl.load(rows + first, mask=inside[:, None] & known, other=0.0)
            y = tl.load(keys + first, mask=there[:, None] & known, other=0.0)
            if UPCAST:
                x, y = x.to(tl.float32), y.to(tl.float32)
            score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
        unit = tl.load(inverse_ptr + b * N + key, mask=there, other=0.0)
        score *= inverse[:, None] * unit[None, :]
        kept = ((score >= shift) | (row[:, None] == key[None, :])) & there[None, :]
        weights = score if LINEAR else tl.exp2((score - length[:, None]) * gamma)
        weights = tl.where(kept, weights, 0.0)
        total += tl.sum(weights, 1)
        at = key[:, None].to(tl.int64) * V + c[None, :]
        v = tl.load(values + at, mask=there[:, None] & wanted[None, :], other=0.0)  # [KEYS, CHUNK]
        if UPCAST:
            v = v.to(tl.float32)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    acc /= tl.where(inside, total + smallest, 1.0)[:, None]
    out = out_ptr + (b * N + row[:, None]) * V + c[None, :]
    tl.store(out, acc, mask=inside[:, None] & wanted[None, :])


def attention(
    features: torch.Tensor,  # [B, N, E]
    inverse: torch.Tensor,  # [B, N]
    length: torch.Tensor,  # [B, N]
    values: torch.Tensor,  # [B, N, V]
    shift: torch.Tensor,  # [B]
    gamma: float,
    smallest: float | None,  # of the linear form, None for the softmax
) -> torch.Tensor:  # [B, N, V] in the dtype of the values
    """Values mixed by the similarities of features that times ``inverse`` are of ``length`` 1 or, of zeros, 0."""
    (B, N, E), V = features.shape, values.shape[2]
    # Rows of channels, which are a multiple of 16, are loaded 16 bytes at a time; columns of 42 x 42 patches are not.
    features, inverse, length, values = (x.contiguous() for x in (features, inverse, length, values))
    upcast = interpreted()  # it cuts what it rounds to bf16, so it gets fp32
    out = values.new_empty((B, N, V), dtype=torch.float32 if upcast else values.dtype)
    if out.numel() > 0:
        rows, keys, chunk, step, warps, stages = TILES[max(features.element_size(), values.element_size())]
        with torch.cuda.device(values.device.index if values.is_cuda else -1):
            proxy_attention_fwd_kernel[triton.cdiv(N, rows), triton.cdiv(V, chunk), B](
                features,
                inverse,
                length,
                values,
                shift,
                out,
                N,
                E,
                V,
                gamma * LOG2_E,
                smallest or 0.0,
                ROWS=rows,
                KEYS=keys,
                CHUNK=chunk,
                STEP=step,
                LINEAR=smallest is not None,
                UPCAST=upcast,
                num_warps=warps,
                num_stages=stages,
                enable_fp_fusion=True,
            )
    return out.to(values.dtype)
