"""``label_map`` in Triton: one program per stretch of an output row, the best class kept in registers.

Where pixels and windows lie is worked out on the host, in fp64, as tables: of each window the nodes its rows and
columns interpolate, of each output row and column the two grid rows and columns it mixes, and of each output row the
windows over it. A program goes through the classes in groups; per group it adds up the scores of the covering windows
at the pixels it mixes, then keeps the best. Softmax takes a second kernel first: the logarithm of the sum of
exponentials at every pixel of every window.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (it does not know what a grid and a static_range are in a kernel)
import torch
import triton
import triton.language as tl
from torch import Tensor

from .options import Options
from .tables import tables_of

PIXELS, CLASSES = 32, 16  # a program's tile; see tests/kernels/test_label_map_triton.py for what it takes of an SM
WARPS = 4
ACTIVATION_CODES = {"sigmoid": 0, "softmax": 1, "none": 2}


@triton.jit
def window_logits(logits_ptr, plane, nodes_y, nodes_x, y_lo, y_weight, x_lo, x_weight, inside):
    """Logits ``[CLASSES, PIXELS]`` between nodes; ``plane`` ``[CLASSES, 1]`` is where the classes' maps start."""
    y_hi = tl.minimum(y_lo + 1, nodes_y - 1)
    x_hi = tl.minimum(x_lo + 1, nodes_x - 1)
    low = plane + y_lo * nodes_x
    high = plane + y_hi * nodes_x
    a = tl.load(logits_ptr + low + x_lo[None, :], mask=inside, other=0.0).to(tl.float32)  # [CLASSES, PIXELS]
    b = tl.load(logits_ptr + low + x_hi[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(logits_ptr + high + x_lo[None, :], mask=inside, other=0.0).to(tl.float32)
    d = tl.load(logits_ptr + high + x_hi[None, :], mask=inside, other=0.0).to(tl.float32)
    # x - x is NaN where x is not finite
    a += a - a
    b += b - b
    c += c - c
    d += d - d
    left = a * (1 - y_weight) + c * y_weight
    right = b * (1 - y_weight) + d * y_weight
    return left * (1 - x_weight)[None, :] + right * x_weight[None, :]


# Sizes of images are of many values: a variant of the kernels for each kind of them would be compiled as they come.
SIZES = ["classes", "nodes_y", "nodes_x", "span_y", "span_x", "out_h", "out_w", "most_windows"]


@triton.jit(do_not_specialize=SIZES[:5])
def label_map_norm_kernel(
    logits_ptr,  # [W, C, h, w]
    rows_lo_ptr,  # [W, SPAN_Y] int32: the lower node of each of a window's grid rows
    rows_weight_ptr,  # [W, SPAN_Y] fp32
    cols_lo_ptr,  # [W, SPAN_X] int32
    cols_weight_ptr,  # [W, SPAN_X] fp32
    norm_ptr,  # [W, SPAN_Y, SPAN_X] fp32
    classes,
    nodes_y,
    nodes_x,
    span_y,
    span_x,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of W x SPAN_Y
    window = row // span_y
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = x < span_x
    y_lo = tl.load(rows_lo_ptr + row)
    y_weight = tl.load(rows_weight_ptr + row)
    x_lo = tl.load(cols_lo_ptr + window * span_x + x, mask=mask, other=0)
    x_weight = tl.load(cols_weight_ptr + window * span_x + x, mask=mask, other=0.0)
    most = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    bad = tl.zeros([PIXELS], tl.int32)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        plane = (window * classes + c)[:, None] * nodes_y * nodes_x
        inside = (c < classes)[:, None] & mask[None, :]
        z = window_logits(logits_ptr, plane, nodes_y, nodes_x, y_lo, y_weight, x_lo, x_weight, inside)
        bad |= tl.max((z != z).to(tl.int32), 0)
        z = tl.where(inside & (z == z), z, float("-inf"))
        new = tl.maximum(most, tl.max(z, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(z - shift[None, :]), 0)
        most = new
    # The largest adds 1 to the total, so 1 is its least; only pixels beyond the span have less.
    norm = tl.where(bad != 0, float("nan"), most + tl.log(tl.maximum(total, 1.0)))
    tl.store(norm_ptr + row * span_x + x, norm, mask=mask)


@triton.jit(do_not_specialize=SIZES)
def label_map_fwd_kernel(
    logits_ptr,  # [W, C, h, w]
    penalty_ptr,  # [C] fp32, or not read
    norm_ptr,  # [W, SPAN_Y, SPAN_X] fp32, or not read
    windows_ptr,  # [W, 4] int32: first image row and column, how many
    row_windows_ptr,  # [H', MOST] int32: windows over the image rows of each output row
    row_counts_ptr,  # [H'] int32: how many
    rows_lo_ptr,  # [W, SPAN_Y] int32
    rows_weight_ptr,  # [W, SPAN_Y] fp32
    cols_lo_ptr,  # [W, SPAN_X] int32
    cols_weight_ptr,  # [W, SPAN_X] fp32
    taps_y_ptr,  # [3, H'] fp64: low, high, weight
    taps_x_ptr,  # [3, W'] fp64
    labels_ptr,  # [H', W'] uint8 or int16
    scores_ptr,  # [H', W'] fp32, or not written
    classes,
    nodes_y,
    nodes_x,
    span_y,
    span_x,
    out_h,
    out_w,
    most_windows,
    threshold,
    TAPS: tl.constexpr,  # 4: the second bilinear step; 1: the output has the image's size
    ACTIVATION: tl.constexpr,
    PENALTY: tl.constexpr,
    SCORES: tl.constexpr,
    CLASSES: tl.constexpr,
    PIXELS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    mask = x < out_w
    y_part = tl.load(taps_y_ptr + 2 * out_h + r).to(tl.float32)
    x_part = tl.load(taps_x_ptr + 2 * out_w + x, mask=mask, other=0.0).to(tl.float32)
    count = tl.load(row_counts_ptr + r)
    best = tl.full([PIXELS], float("-inf"), tl.float32)
    label = tl.zeros([PIXELS], tl.int32)
    for start in range(0, classes, CLASSES):
        c = start + tl.arange(0, CLASSES)
        exists = c < classes
        mixed = tl.zeros([CLASSES, PIXELS], tl.float32)
        for tap in tl.static_range(TAPS):
            gy = tl.load(taps_y_ptr + (tap // 2) * out_h + r).to(tl.int32)
            gx = tl.load(taps_x_ptr + (tap % 2) * out_w + x, mask=mask, other=0.0).to(tl.int32)
            total = tl.zeros([CLASSES, PIXELS], tl.float32)
            visits = tl.zeros([PIXELS], tl.float32)
            for k in range(count):
                window = tl.load(row_windows_ptr + r * most_windows + k).to(tl.int64)
                y = gy - tl.load(windows_ptr + window * 4)
                u = gx - tl.load(windows_ptr + window * 4 + 1)
                outside = (y < 0) | (y >= tl.load(windows_ptr + window * 4 + 2))
                u = tl.where(outside, -1, u)
                over = mask & (u >= 0) & (u < tl.load(windows_ptr + window * 4 + 3))
                row = window * span_y + tl.minimum(tl.maximum(y, 0), span_y - 1)
                y_lo = tl.load(rows_lo_ptr + row)
                y_weight = tl.load(rows_weight_ptr + row)
                x_lo = tl.load(cols_lo_ptr + window * span_x + u, mask=over, other=0)
                x_weight = tl.load(cols_weight_ptr + window * span_x + u, mask=over, other=0.0)
                plane = (window * classes + c)[:, None] * nodes_y * nodes_x
                inside = exists[:, None] & over[None, :]
                z = window_logits(logits_ptr, plane, nodes_y, nodes_x, y_lo, y_weight, x_lo, x_weight, inside)
                if ACTIVATION == 0:
                    z = tl.sigmoid(z)
                if ACTIVATION == 1:
                    norm = tl.load(norm_ptr + row * span_x + u, mask=over, other=0.0)
                    z = tl.exp(z - norm[None, :])
                total += tl.where(inside, z, 0.0)
                visits += tl.where(over, 1.0, 0.0)
            score = total / tl.maximum(visits, 1.0)[None, :]
            if TAPS == 1:
                mixed = score
            else:
                y_share = y_part if tap // 2 == 1 else 1 - y_part
                x_share = x_part if tap % 2 == 1 else 1 - x_part
                mixed += score * (y_share * x_share)[None, :]
        if PENALTY:
            mixed -= tl.load(penalty_ptr + c, mask=exists, other=0.0)[:, None]
        mixed = tl.where(exists[:, None] & (mixed == mixed), mixed, float("-inf"))  # NaN counts as -inf
        top = tl.max(mixed, 0)
        lowest = tl.min(tl.where(mixed == top[None, :], c[:, None], classes), 0)  # of equal ones the lower class
        better = top > best
        label = tl.where(better, lowest, label)
        best = tl.where(better, top, best)
    label = tl.where(best < threshold, classes, label)
    tl.store(labels_ptr + r * out_w + x, label.to(labels_ptr.dtype.element_ty), mask=mask)
    if SCORES:
        tl.store(scores_ptr + r * out_w + x, best, mask=mask)


def label_map_triton(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[1, H', W']`` and, if asked for, scores alike; ``options.top_k`` is 1."""
    device = logits.device
    logits = logits.contiguous()
    count, classes, h, w = logits.shape
    tables = tables_of(logits, windows, options)
    most = tables.row_windows.shape[1]
    labels, scores = options.empty(device)
    span_y, span_x = tables.rows_lo.shape[1], tables.cols_lo.shape[1]
    norm = logits
    with torch.cuda.device(device.index if device.type == "cuda" else -1):
        if options.activation == "softmax":
            norm = torch.empty((count, span_y, span_x), device=device)
            label_map_norm_kernel[(count * span_y, triton.cdiv(span_x, PIXELS))](
                logits,
                *tables[3:7],
                norm,
                classes,
                h,
                w,
                span_y,
                span_x,
                CLASSES,
                PIXELS,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        label_map_fwd_kernel[(options.output_size[0], triton.cdiv(options.output_size[1], PIXELS))](
            logits,
            logits if options.penalty is None else options.penalty,
            norm,
            *tables,
            labels,
            labels if scores is None else scores,
            classes,
            h,
            w,
            span_y,
            span_x,
            *options.output_size,
            most,
            options.threshold,
            TAPS=4 if options.resized else 1,
            ACTIVATION=ACTIVATION_CODES[options.activation],
            PENALTY=options.penalty is not None,
            SCORES=scores is not None,
            CLASSES=CLASSES,
            PIXELS=PIXELS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return labels, scores
