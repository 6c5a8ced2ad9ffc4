"""``bridged_attention`` in Triton: one launch forward, two backward, no mask and no atomics.

The programs along axis 0 are of two sorts. The first own a block of rows (or, backward, of keys) of prefix and
patches: plain attention over the shared keys, after which each patch's one further key, its region's bridge token, is
folded in from registers. The last of a head owns all its bridge tokens and takes them in turn, each of which meets only
the patches of its region. A program for each would be 16 programs of 25 at CLIP-RC's 1 + 1024 + 16 tokens in blocks of
128 rows, each with the shared memory of a block and 1 / 2018 of its products (counted; the gain has not been timed).
Sums are fp32. Exponentials are taken in base 2; the softmax's denominators are kept as natural logarithms, as by every
backend.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# (it does not know what a jitted function is)
import math

import torch
import triton
import triton.language as tl

from ..configs import tile
from ..strides import in_units
from ..triton_runtime import architecture, interpreted
from .layout import TokenLayout

CELLS = 32  # patches of a region that its bridge token meets at a time
LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))
PER_LN_2 = tl.constexpr(math.log2(math.e))


@triton.jit
def _rows(ptr, row, stride, d, mask, D: tl.constexpr, UPCAST: tl.constexpr):
    """Rows [n, BLOCK_D] of one head, 0 where ``mask`` is not set."""
    x = tl.load(ptr + row[:, None].to(tl.int64) * stride + d[None, :], mask=mask[:, None] & (d < D)[None, :], other=0.0)
    # the interpreter multiplies the bits of bf16 as integers
    return x.to(tl.float32) if UPCAST else x


@triton.jit
def _row(ptr, row, stride, d, D: tl.constexpr):
    """One row [BLOCK_D] in fp32."""
    return tl.load(ptr + row.to(tl.int64) * stride + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _put(ptr, row, stride, d, mask, x, D: tl.constexpr):
    tl.store(ptr + row[:, None].to(tl.int64) * stride + d[None, :], x, mask=mask[:, None] & (d < D)[None, :])


@triton.jit
def _region(token, prefix, shared, w, cell_h, cell_w, bridge_h, bridge_w):
    """The bridge token of each of the shared tokens, and whether it has one."""
    patch = tl.maximum(token - prefix, 0)
    i, j = patch // w // cell_h, patch % w // cell_w
    owned = (token >= prefix) & (token < shared) & (i < bridge_h) & (j < bridge_w)
    return tl.where(owned, shared + i * bridge_w + j, 0), owned


@triton.jit
def _cell(start, region, prefix, w, cell_h, cell_w, bridge_w, CELLS: tl.constexpr):
    """The next patches of a region, as tokens [CELLS], and whether they are there."""
    n = start + tl.arange(0, CELLS)
    y = region // bridge_w * cell_h + n // cell_w
    x = region % bridge_w * cell_w + n % cell_w
    return prefix + y * w + x, n < cell_h * cell_w


@triton.jit
def _attend(
    q, k_ptr, v_ptr, k_stride, v_stride, count, scale, d, top, total, acc,
    D: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Softmax of ``q`` over ``count`` more keys: the rows' largest score, denominator and weighted values go on."""
    for start in range(0, count, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _rows(k_ptr, key, k_stride, d, key < count, D, UPCAST)  # [KEYS, BLOCK_D]
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS]
        scores = tl.where((key < count)[None, :], scores, float("-inf"))
        highest = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        shrink = tl.exp2(top - highest)
        v = _rows(v_ptr, key, v_stride, d, key < count, D, UPCAST)  # [KEYS, BLOCK_D]
        total = total * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = highest
    return top, total, acc


@triton.jit
def bridged_attention_fwd_kernel(
    q_ptr,  # [B, H, L, d]
    k_ptr,
    v_ptr,
    prompt_k_ptr,  # [B, H, P, d]
    prompt_v_ptr,
    out_ptr,  # [B, H, L, d]
    lse_ptr,  # [B, H, L]
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    prompt_k_stride_b, prompt_k_stride_h, prompt_k_stride_l,
    prompt_v_stride_b, prompt_v_stride_h, prompt_v_stride_l,
    out_stride_b, out_stride_h, out_stride_l,
    H, prompts, prefix, shared, length, w, cell_h, cell_w, bridge_h, bridge_w,
    scale,  # of the scores, times log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides, in numbers
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CELLS: tl.constexpr,
    BRIDGE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    q_stride_l, k_stride_l, v_stride_l = q_stride_l * UNIT, k_stride_l * UNIT, v_stride_l * UNIT
    prompt_k_stride_l, prompt_v_stride_l = prompt_k_stride_l * UNIT, prompt_v_stride_l * UNIT
    out_stride_l *= UNIT
    block = tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    lse_ptr += (b * H + h) * length
    d = tl.arange(0, BLOCK_D)
    row_blocks = tl.cdiv(shared, ROWS)

    if block < row_blocks:
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < shared
        q = _rows(q_ptr, row, q_stride_l, d, inside, D, UPCAST)  # [ROWS, BLOCK_D]
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        prompt_k = prompt_k_ptr + (b * prompt_k_stride_b + h * prompt_k_stride_h) * UNIT
        prompt_v = prompt_v_ptr + (b * prompt_v_stride_b + h * prompt_v_stride_h) * UNIT
        top, total, acc = _attend(
            q, prompt_k, prompt_v, prompt_k_stride_l, prompt_v_stride_l, prompts, scale, d, top, total, acc,
            D, KEYS, UPCAST,
        )  # fmt: skip
        top, total, acc = _attend(
            q, k_ptr, v_ptr, k_stride_l, v_stride_l, shared, scale, d, top, total, acc, D, KEYS, UPCAST
        )
        if BRIDGE:
            token, owned = _region(row, prefix, shared, w, cell_h, cell_w, bridge_h, bridge_w)
            k = _rows(k_ptr, token, k_stride_l, d, owned, D, UPCAST).to(tl.float32)  # [ROWS, BLOCK_D]
            score = tl.where(owned, tl.sum(q.to(tl.float32) * k, 1) * scale, float("-inf"))  # [ROWS]
            highest = tl.maximum(top, score)
            weight, shrink = tl.exp2(score - highest), tl.exp2(top - highest)
            v = _rows(v_ptr, token, v_stride_l, d, owned, D, UPCAST).to(tl.float32)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * v
            top = highest
        _put(out_ptr, row, out_stride_l, d, inside, acc / total[:, None], D)
        tl.store(lse_ptr + row, (top + tl.log2(total)) * LN_2, mask=inside)
    elif BRIDGE:
        for region in range(0, bridge_h * bridge_w):
            own = shared + region
            q1 = _row(q_ptr, own, q_stride_l, d, D)  # [BLOCK_D]
            top1 = tl.sum(q1 * _row(k_ptr, own, k_stride_l, d, D)) * scale
            total1 = 1.0
            acc1 = _row(v_ptr, own, v_stride_l, d, D)
            for start in range(0, cell_h * cell_w, CELLS):
                token, there = _cell(start, region, prefix, w, cell_h, cell_w, bridge_w, CELLS)
                k1 = _rows(k_ptr, token, k_stride_l, d, there, D, UPCAST).to(tl.float32)  # [CELLS, BLOCK_D]
                v1 = _rows(v_ptr, token, v_stride_l, d, there, D, UPCAST).to(tl.float32)
                scores = tl.where(there, tl.sum(k1 * q1[None, :], 1) * scale, float("-inf"))  # [CELLS]
                highest1 = tl.maximum(top1, tl.max(scores))
                weights = tl.exp2(scores - highest1)
                shrink1 = tl.exp2(top1 - highest1)
                total1 = total1 * shrink1 + tl.sum(weights)
                acc1 = acc1 * shrink1 + tl.sum(weights[:, None] * v1, 0)
                top1 = highest1
            tl.store(out_ptr + own.to(tl.int64) * out_stride_l + d, acc1 / total1, mask=d < D)
            tl.store(lse_ptr + own, (top1 + tl.log2(total1)) * LN_2)


@triton.jit
def _row_gradient(
    q, grad, lse, delta, k_ptr, v_ptr, k_stride, v_stride, count, scale, d, acc,
    D: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds to the gradient of ``q``, but for the scores' factor, what ``count`` keys give."""
    for start in range(0, count, KEYS):
        key = start + tl.arange(0, KEYS)
        k = _rows(k_ptr, key, k_stride, d, key < count, D, UPCAST)  # [KEYS, BLOCK_D]
        v = _rows(v_ptr, key, v_stride, d, key < count, D, UPCAST)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [ROWS, KEYS]
        weights = tl.where((key < count)[None, :], tl.exp2(scores - lse[:, None]), 0.0)
        d_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        d_scores = weights * (d_weights - delta[:, None])
        acc = tl.dot(d_scores.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@triton.jit
def bridged_attention_bwd_q_kernel(
    q_ptr,  # [B, H, L, d]
    k_ptr,
    v_ptr,
    prompt_k_ptr,  # [B, H, P, d]
    prompt_v_ptr,
    out_ptr,  # [B, H, L, d]
    grad_ptr,
    lse_ptr,  # [B, H, L]
    delta_ptr,  # [B, H, L], written: the rows' sums of grad * out
    dq_ptr,  # [B, H, L, d], written
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    prompt_k_stride_b, prompt_k_stride_h, prompt_k_stride_l,
    prompt_v_stride_b, prompt_v_stride_h, prompt_v_stride_l,
    out_stride_b, out_stride_h, out_stride_l,
    grad_stride_b, grad_stride_h, grad_stride_l,
    dq_stride_b, dq_stride_h, dq_stride_l,
    H, prompts, prefix, shared, length, w, cell_h, cell_w, bridge_h, bridge_w,
    scale,  # of the scores, times log2(e)
    scale_e,  # of the scores
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides, in numbers
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CELLS: tl.constexpr,
    BRIDGE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    q_stride_l, k_stride_l, v_stride_l = q_stride_l * UNIT, k_stride_l * UNIT, v_stride_l * UNIT
    prompt_k_stride_l, prompt_v_stride_l = prompt_k_stride_l * UNIT, prompt_v_stride_l * UNIT
    out_stride_l *= UNIT
    grad_stride_l, dq_stride_l = grad_stride_l * UNIT, dq_stride_l * UNIT
    block = tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    out_ptr += (b * out_stride_b + h * out_stride_h) * UNIT
    grad_ptr += (b * grad_stride_b + h * grad_stride_h) * UNIT
    dq_ptr += (b * dq_stride_b + h * dq_stride_h) * UNIT
    lse_ptr += (b * H + h) * length
    delta_ptr += (b * H + h) * length
    d = tl.arange(0, BLOCK_D)
    row_blocks = tl.cdiv(shared, ROWS)

    if block < row_blocks:
        row = block * ROWS + tl.arange(0, ROWS)
        inside = row < shared
        q = _rows(q_ptr, row, q_stride_l, d, inside, D, UPCAST)  # [ROWS, BLOCK_D]
        grad = _rows(grad_ptr, row, grad_stride_l, d, inside, D, UPCAST)
        out = _rows(out_ptr, row, out_stride_l, d, inside, D, UPCAST)
        delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)  # [ROWS]
        tl.store(delta_ptr + row, delta, mask=inside)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * PER_LN_2
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        prompt_k = prompt_k_ptr + (b * prompt_k_stride_b + h * prompt_k_stride_h) * UNIT
        prompt_v = prompt_v_ptr + (b * prompt_v_stride_b + h * prompt_v_stride_h) * UNIT
        acc = _row_gradient(
            q, grad, lse, delta, prompt_k, prompt_v, prompt_k_stride_l, prompt_v_stride_l, prompts, scale, d, acc,
            D, KEYS, UPCAST,
        )  # fmt: skip
        acc = _row_gradient(
            q, grad, lse, delta, k_ptr, v_ptr, k_stride_l, v_stride_l, shared, scale, d, acc, D, KEYS, UPCAST
        )
        if BRIDGE:
            token, owned = _region(row, prefix, shared, w, cell_h, cell_w, bridge_h, bridge_w)
            k = _rows(k_ptr, token, k_stride_l, d, owned, D, UPCAST).to(tl.float32)  # [ROWS, BLOCK_D]
            v = _rows(v_ptr, token, v_stride_l, d, owned, D, UPCAST).to(tl.float32)
            weight = tl.where(owned, tl.exp2(tl.sum(q.to(tl.float32) * k, 1) * scale - lse), 0.0)  # [ROWS]
            acc += (weight * (tl.sum(grad.to(tl.float32) * v, 1) - delta))[:, None] * k
        _put(dq_ptr, row, dq_stride_l, d, inside, acc * scale_e, D)
    elif BRIDGE:
        for region in range(0, bridge_h * bridge_w):
            own = shared + region
            q1 = _row(q_ptr, own, q_stride_l, d, D)  # [BLOCK_D]
            grad1 = _row(grad_ptr, own, grad_stride_l, d, D)
            delta1 = tl.sum(grad1 * _row(out_ptr, own, out_stride_l, d, D))
            tl.store(delta_ptr + own, delta1)
            lse1 = tl.load(lse_ptr + own) * PER_LN_2
            k1 = _row(k_ptr, own, k_stride_l, d, D)
            weight1 = tl.exp2(tl.sum(q1 * k1) * scale - lse1)
            acc1 = weight1 * (tl.sum(grad1 * _row(v_ptr, own, v_stride_l, d, D)) - delta1) * k1
            for start in range(0, cell_h * cell_w, CELLS):
                token, there = _cell(start, region, prefix, w, cell_h, cell_w, bridge_w, CELLS)
                ks = _rows(k_ptr, token, k_stride_l, d, there, D, UPCAST).to(tl.float32)  # [CELLS, BLOCK_D]
                vs = _rows(v_ptr, token, v_stride_l, d, there, D, UPCAST).to(tl.float32)
                weights = tl.where(there, tl.exp2(tl.sum(ks * q1[None, :], 1) * scale - lse1), 0.0)  # [CELLS]
                d_scores = weights * (tl.sum(vs * grad1[None, :], 1) - delta1)
                acc1 += tl.sum(d_scores[:, None] * ks, 0)
            tl.store(dq_ptr + own.to(tl.int64) * dq_stride_l + d, acc1 * scale_e, mask=d < D)


@triton.jit
def _key_gradient(
    k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride, grad_stride, count, scale, d,
    D: tl.constexpr, ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of keys (but for the scores' factor) and values [KEYS, BLOCK_D] that ``count`` rows give."""
    dk = tl.zeros([k.shape[0], k.shape[1]], tl.float32)
    dv = tl.zeros([k.shape[0], k.shape[1]], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < count
        q = _rows(q_ptr, row, q_stride, d, inside, D, UPCAST)  # [ROWS, BLOCK_D]
        grad = _rows(grad_ptr, row, grad_stride, d, inside, D, UPCAST)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * PER_LN_2
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee") * scale  # [KEYS, ROWS]
        weights = tl.exp2(scores - lse[None, :])  # rows past the end have grad and delta 0
        dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision="ieee")
        d_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
        d_scores = weights * (d_weights - delta[None, :])
        dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def bridged_attention_bwd_kv_kernel(
    q_ptr,  # [B, H, L, d]
    k_ptr,
    v_ptr,
    prompt_k_ptr,  # [B, H, P, d]
    prompt_v_ptr,
    grad_ptr,  # [B, H, L, d]
    lse_ptr,  # [B, H, L]
    delta_ptr,
    dk_ptr,  # [B, H, L, d], written
    dv_ptr,
    d_prompt_k_ptr,  # [B, H, P, d], written
    d_prompt_v_ptr,
    q_stride_b, q_stride_h, q_stride_l,
    k_stride_b, k_stride_h, k_stride_l,
    v_stride_b, v_stride_h, v_stride_l,
    prompt_k_stride_b, prompt_k_stride_h, prompt_k_stride_l,
    prompt_v_stride_b, prompt_v_stride_h, prompt_v_stride_l,
    grad_stride_b, grad_stride_h, grad_stride_l,
    dk_stride_b, dk_stride_h, dk_stride_l,  # of dv too
    d_prompt_stride_b, d_prompt_stride_h, d_prompt_stride_l,  # of both
    H, prompts, prefix, shared, length, w, cell_h, cell_w, bridge_h, bridge_w,
    scale,  # of the scores, times log2(e)
    scale_e,  # of the scores
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNIT: tl.constexpr,  # of the strides, in numbers
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CELLS: tl.constexpr,
    BRIDGE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    q_stride_l, k_stride_l, v_stride_l = q_stride_l * UNIT, k_stride_l * UNIT, v_stride_l * UNIT
    prompt_k_stride_l, prompt_v_stride_l = prompt_k_stride_l * UNIT, prompt_v_stride_l * UNIT
    grad_stride_l *= UNIT
    dk_stride_l, d_prompt_stride_l = dk_stride_l * UNIT, d_prompt_stride_l * UNIT
    block = tl.program_id(0)
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    q_ptr += (b * q_stride_b + h * q_stride_h) * UNIT
    k_ptr += (b * k_stride_b + h * k_stride_h) * UNIT
    v_ptr += (b * v_stride_b + h * v_stride_h) * UNIT
    grad_ptr += (b * grad_stride_b + h * grad_stride_h) * UNIT
    dk_ptr += (b * dk_stride_b + h * dk_stride_h) * UNIT
    dv_ptr += (b * dk_stride_b + h * dk_stride_h) * UNIT
    lse_ptr += (b * H + h) * length
    delta_ptr += (b * H + h) * length
    d = tl.arange(0, BLOCK_D)
    key_blocks = tl.cdiv(shared, KEYS)
    prompt_blocks = tl.cdiv(prompts, KEYS)

    if block < key_blocks:
        key = block * KEYS + tl.arange(0, KEYS)
        there = key < shared
        k = _rows(k_ptr, key, k_stride_l, d, there, D, UPCAST)  # [KEYS, BLOCK_D]
        v = _rows(v_ptr, key, v_stride_l, d, there, D, UPCAST)
        dk, dv = _key_gradient(
            k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride_l, grad_stride_l, shared, scale, d, D, ROWS, UPCAST
        )
        if BRIDGE:  # the one bridge row that sees the patch
            token, owned = _region(key, prefix, shared, w, cell_h, cell_w, bridge_h, bridge_w)
            q = _rows(q_ptr, token, q_stride_l, d, owned, D, UPCAST).to(tl.float32)  # [KEYS, BLOCK_D]
            grad = _rows(grad_ptr, token, grad_stride_l, d, owned, D, UPCAST).to(tl.float32)
            lse = tl.load(lse_ptr + token, mask=owned, other=0.0) * PER_LN_2
            delta = tl.load(delta_ptr + token, mask=owned, other=0.0)
            weight = tl.where(owned, tl.exp2(tl.sum(k.to(tl.float32) * q, 1) * scale - lse), 0.0)  # [KEYS]
            dv += weight[:, None] * grad
            dk += (weight * (tl.sum(v.to(tl.float32) * grad, 1) - delta))[:, None] * q
        _put(dk_ptr, key, dk_stride_l, d, there, dk * scale_e, D)
        _put(dv_ptr, key, dk_stride_l, d, there, dv, D)
    elif block < key_blocks + prompt_blocks:
        key = (block - key_blocks) * KEYS + tl.arange(0, KEYS)
        there = key < prompts
        prompt_k = prompt_k_ptr + (b * prompt_k_stride_b + h * prompt_k_stride_h) * UNIT
        prompt_v = prompt_v_ptr + (b * prompt_v_stride_b + h * prompt_v_stride_h) * UNIT
        k = _rows(prompt_k, key, prompt_k_stride_l, d, there, D, UPCAST)  # [KEYS, BLOCK_D]
        v = _rows(prompt_v, key, prompt_v_stride_l, d, there, D, UPCAST)
        dk, dv = _key_gradient(
            k, v, q_ptr, grad_ptr, lse_ptr, delta_ptr, q_stride_l, grad_stride_l, shared, scale, d, D, ROWS, UPCAST
        )
        at = (b * d_prompt_stride_b + h * d_prompt_stride_h) * UNIT
        _put(d_prompt_k_ptr + at, key, d_prompt_stride_l, d, there, dk * scale_e, D)
        _put(d_prompt_v_ptr + at, key, d_prompt_stride_l, d, there, dv, D)
    elif BRIDGE:
        for region in range(0, bridge_h * bridge_w):
            own = shared + region
            k1 = _row(k_ptr, own, k_stride_l, d, D)  # [BLOCK_D]
            v1 = _row(v_ptr, own, v_stride_l, d, D)
            q1 = _row(q_ptr, own, q_stride_l, d, D)
            grad1 = _row(grad_ptr, own, grad_stride_l, d, D)
            weight1 = tl.exp2(tl.sum(q1 * k1) * scale - tl.load(lse_ptr + own) * PER_LN_2)
            dv1 = weight1 * grad1
            dk1 = weight1 * (tl.sum(v1 * grad1) - tl.load(delta_ptr + own)) * q1
            for start in range(0, cell_h * cell_w, CELLS):
                token, there = _cell(start, region, prefix, w, cell_h, cell_w, bridge_w, CELLS)
                qs = _rows(q_ptr, token, q_stride_l, d, there, D, UPCAST).to(tl.float32)  # [CELLS, BLOCK_D]
                grads = _rows(grad_ptr, token, grad_stride_l, d, there, D, UPCAST).to(tl.float32)
                lses = tl.load(lse_ptr + token, mask=there, other=0.0) * PER_LN_2
                deltas = tl.load(delta_ptr + token, mask=there, other=0.0)
                weights = tl.where(there, tl.exp2(tl.sum(qs * k1[None, :], 1) * scale - lses), 0.0)  # [CELLS]
                dv1 += tl.sum(weights[:, None] * grads, 0)
                d_scores = weights * (tl.sum(grads * v1[None, :], 1) - deltas)
                dk1 += tl.sum(d_scores[:, None] * qs, 0)
            tl.store(dk_ptr + own.to(tl.int64) * dk_stride_l + d, dk1 * scale_e, mask=d < D)
            tl.store(dv_ptr + own.to(tl.int64) * dk_stride_l + d, dv1, mask=d < D)


def _launch(
    kernel, name: str, layout: TokenLayout, tensors: list[torch.Tensor], strided: list[torch.Tensor], factors: list
) -> None:
    """Start ``kernel``: programs for blocks of rows (for "bwd_kv" of keys and of prompts), and one for a bridge.

    Args:
        tensors: its first arguments; queries, keys, values and the prompts' keys come first.
        strided: those of them whose strides come next.
    """
    q, prompts = tensors[0], tensors[3].shape[2]
    B, H, _, D = q.shape
    rows, keys, warps, stages = tile(name, q.element_size(), D, architecture(q.device))
    blocks = triton.cdiv(layout.shared, rows)
    if name == "bwd_kv":
        blocks = triton.cdiv(layout.shared, keys) + triton.cdiv(prompts, keys)
    blocks += layout.bridge is not None
    cell = layout.cell if layout.bridge else (1, 1)
    bridge = layout.bridge or (0, 0)
    unit, strides = in_units(strided)
    with torch.cuda.device(q.device.index if q.is_cuda else -1):
        kernel[blocks, B * H](
            *tensors,
            *strides,
            H,
            prompts,
            layout.prefix,
            layout.shared,
            layout.length,
            layout.grid[1],
            *cell,
            *bridge,
            *factors,
            D=D,
            BLOCK_D=max(triton.next_power_of_2(D), 16),
            UNIT=unit,
            ROWS=rows,
            KEYS=keys,
            CELLS=CELLS,
            BRIDGE=layout.bridge is not None,
            UPCAST=interpreted(),
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )


def _dense(x: torch.Tensor) -> torch.Tensor:
    """``x`` with its last dimension in one piece, copied only if it is not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _prompts(k: torch.Tensor, prompt: torch.Tensor | None) -> torch.Tensor:
    """Prompt keys or values for every image [B, H, P, d], without a copy; P = 0 without prompts."""
    return k[:, :, :0] if prompt is None else _dense(prompt).expand(k.shape[0], -1, -1, -1)


def _like(q: torch.Tensor) -> torch.Tensor:
    """[B, H, L, d] in memory [B, L, H, d]; fp32 in the interpreter, which cuts what it rounds to bf16."""
    B, H, L, d = q.shape
    return q.new_empty((B, L, H, d), dtype=torch.float32 if interpreted() else q.dtype).transpose(1, 2)


def forward(
    q: torch.Tensor,  # [B, H, L, d]
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,  # [1 or B, H, P, d]
    prompt_v: torch.Tensor | None,
    layout: TokenLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # [B, H, L, d], [B, H, L]
    """``bridged_attention`` as in ``operator.py``."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    pk, pv = _prompts(k, prompt_k), _prompts(k, prompt_v)
    out, lse = _like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    if q.numel() > 0:
        tensors, strided = [q, k, v, pk, pv, out, lse], [q, k, v, pk, pv, out]
        _launch(bridged_attention_fwd_kernel, "fwd", layout, tensors, strided, [scale * LOG2_E])
    return out.to(q.dtype), lse


def backward(
    grad: torch.Tensor,  # [B, H, L, d]
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prompt_k: torch.Tensor | None,  # [1 or B, H, P, d]
    prompt_v: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,  # [B, H, L]
    layout: TokenLayout,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``bridged_attention_backward`` as in ``operator.py``, from what :func:`forward` gave."""
    q, k, v, grad, out = _dense(q), _dense(k), _dense(v), _dense(grad), _dense(out)
    pk, pv = _prompts(k, prompt_k), _prompts(k, prompt_v)
    dq, dk, dv, delta = _like(q), _like(q), _like(q), torch.empty_like(lse)
    dpk, dpv = (q.new_empty(pk.shape, dtype=torch.float32) for _ in range(2))
    if q.numel() > 0:
        factors = [scale * LOG2_E, scale]
        tensors, strided = [q, k, v, pk, pv, out, grad, lse, delta, dq], [q, k, v, pk, pv, out, grad, dq]
        _launch(bridged_attention_bwd_q_kernel, "bwd_q", layout, tensors, strided, factors)
        tensors, strided = [q, k, v, pk, pv, grad, lse, delta, dk, dv, dpk, dpv], [q, k, v, pk, pv, grad, dk, dpk]
        _launch(bridged_attention_bwd_kv_kernel, "bwd_kv", layout, tensors, strided, factors)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dpk, dpv
