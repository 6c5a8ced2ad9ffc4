"""``mask_sums`` in Triton: dual cells.

All pixels between four neighbouring logits interpolate these four, with weights that depend on the place inside
the cell only. With the half cells beyond the border there are (h + 1) x (w + 1) cells per class. One row of a tile
is one cell's columns, a loop walks the cell's pixel rows, and at the end the gradients collapse to the cell's four
corners: no atomics, the same bits every time. A second kernel adds the corners that meet at each logit. Cells of
one band, over all classes, form one sequence, so tiles are full whatever h and w are. Nothing asks for whole
scales: a cell that has fewer pixel columns than its tile row masks the rest.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportAssignmentType=false
# (it does not know that a grid launches a kernel)
import torch
import triton
import triton.language as tl

from .common import check_labels, narrow

FIELDS = 3  # focal, prob, overlap: the sums that have a gradient
TILE = (
    256  # pixels of a tile, two for each thread; see tests/kernels/test_mask_loss_triton.py for what it takes of an SM
)
# Cells of as many images at a time as fit in this many bytes: bounds what is kept beside the result.
WORKSPACE = 64 << 20


@triton.jit
def first_pixel(cell, nodes, pixels):
    """The first pixel of a cell of an axis: cell k lies between nodes k - 1 and k; exact, in integers."""
    start = ((2 * cell - 1) * pixels + nodes - 1) // (2 * nodes)
    return tl.where(cell == 0, 0, tl.where(cell > nodes, pixels, start))


@triton.jit
def upper_weight(pixel, cell, nodes, pixels):
    """Weight of a cell's upper node at a pixel; in the half cells at the border all weight is on the one node."""
    weight = ((2 * pixel + 1) * nodes - (2 * cell - 1) * pixels).to(tl.float32) / (2 * pixels)
    return tl.where(cell == 0, 1.0, tl.where(cell == nodes, 0.0, weight))


@triton.jit
def log1p_unit(e):
    """log(1 + e) for e in [0, 1], relative error 4e-7: a minimax polynomial (tl.log loses small e in 1 + e)."""
    p = e * -0.00853919842 + 0.0440895962
    p = p * e - 0.107681664
    p = p * e + 0.177452381
    p = p * e - 0.244954616
    p = p * e + 0.332754796
    p = p * e - 0.499974054
    p = p * e + 0.999999806
    return p * e


@triton.jit
def mask_sums_fwd_kernel(
    logits_ptr,  # [B, C, h, w]
    target_ptr,  # [B, H, W]
    cells_ptr,  # [16, images, h + 1, C, w + 1]: 4 sums, then 4 corners (top left, top right, ...) x 3 fields
    logits_stride_b,
    logits_stride_c,
    logits_stride_y,
    logits_stride_x,
    target_stride_b,
    target_stride_y,
    target_stride_x,
    first_image,
    images,
    C,
    h,
    w,
    H,
    W,
    alpha,
    gamma,
    ignore_index,
    CELLS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SQUARE: tl.constexpr,  # gamma is 2
    NODES: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    band = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    b = first_image + image
    n = tl.program_id(0) * CELLS + tl.arange(0, CELLS)  # [CELLS] cells of the band, class by class
    exists = n < C * (w + 1)
    c = n // (w + 1)
    cell = n % (w + 1)

    # The four logits of each cell.
    left = tl.maximum(cell - 1, 0).to(tl.int64) * logits_stride_x
    right = tl.minimum(cell, w - 1).to(tl.int64) * logits_stride_x
    top_row = logits_ptr + b * logits_stride_b + c.to(tl.int64) * logits_stride_c
    bottom_row = top_row + tl.minimum(band, h - 1).to(tl.int64) * logits_stride_y
    top_row += tl.maximum(band - 1, 0).to(tl.int64) * logits_stride_y
    top_left = tl.load(top_row + left, mask=exists, other=0.0).to(tl.float32)  # [CELLS]
    top_right = tl.load(top_row + right, mask=exists, other=0.0).to(tl.float32)
    bottom_left = tl.load(bottom_row + left, mask=exists, other=0.0).to(tl.float32)
    bottom_right = tl.load(bottom_row + right, mask=exists, other=0.0).to(tl.float32)

    # Pixel columns, and the logit along them as t + d * wy.
    start = first_pixel(cell, w, W)
    end = first_pixel(cell + 1, w, W)
    x = start[:, None] + tl.arange(0, COLUMNS)[None, :]  # [CELLS, COLUMNS]
    inside = exists[:, None] & (x < end[:, None])
    wx = upper_weight(x, cell[:, None], w, W)
    t = top_left[:, None] + wx * (top_right - top_left)[:, None]
    d = bottom_left[:, None] + wx * (bottom_right - bottom_left)[:, None] - t
    labels = target_ptr + b * target_stride_b + x.to(tl.int64) * target_stride_x

    focal = tl.zeros([CELLS, COLUMNS], tl.float32)
    prob = tl.zeros([CELLS, COLUMNS], tl.float32)
    overlap = tl.zeros([CELLS, COLUMNS], tl.float32)
    count = tl.zeros([CELLS, COLUMNS], tl.float32)
    g0 = tl.zeros([CELLS, COLUMNS], tl.float32)  # gradients of the first three, summed over the rows
    g1 = tl.zeros([CELLS, COLUMNS], tl.float32)
    g2 = tl.zeros([CELLS, COLUMNS], tl.float32)
    g0_wy = tl.zeros([CELLS, COLUMNS], tl.float32)  # the same, weighted with wy
    g1_wy = tl.zeros([CELLS, COLUMNS], tl.float32)
    g2_wy = tl.zeros([CELLS, COLUMNS], tl.float32)
    for y in range(first_pixel(band, h, H), first_pixel(band + 1, h, H)):
        wy = upper_weight(y, band, h, H)
        label = tl.load(labels + tl.cast(y, tl.int64) * target_stride_y, mask=inside, other=0).to(tl.int32)
        hit = (label == c[:, None]) & (label != ignore_index)
        z = t + d * wy
        e = tl.exp2(tl.abs(z) * -LOG2E)
        high = 1.0 / (1.0 + e)  # sigmoid(|z|)
        low = e * high
        p = tl.where(z < 0, low, high)
        # With u = -z on the class and z off it: s = sigmoid(u), softplus(u).
        off = (z < 0) != hit  # u < 0
        s = tl.where(off, low, high)
        log1p = log1p_unit(e)
        softplus = log1p + tl.where(off, 0.0, tl.abs(z))
        if SQUARE:
            power = s * s
            slope = 2.0 * tl.where(off, high, low)
        else:
            power = tl.exp2((tl.where(off, -tl.abs(z), 0.0) - log1p) * (gamma * LOG2E))
            slope = gamma * tl.where(off, high, low)
        value = power * softplus
        g = slope * value + power * s  # d value / d u
        weight = tl.where(hit, alpha, 1.0 - alpha)
        dp = low * high
        focal += weight * value
        prob += p
        overlap += tl.where(hit, p, 0.0)
        count += tl.where(hit, 1.0, 0.0)
        if NODES:
            g *= tl.where(hit, -weight, weight)
            dp_hit = tl.where(hit, dp, 0.0)
            g0 += g
            g0_wy += g * wy
            g1 += dp
            g1_wy += dp * wy
            g2 += dp_hit
            g2_wy += dp_hit * wy

    size = tl.cast(images, tl.int64) * (h + 1) * C * (w + 1)  # cells of a launch
    out = cells_ptr + (image * (h + 1) + band) * C * (w + 1) + n
    tl.store(out, tl.sum(tl.where(inside, focal, 0.0), 1), mask=exists)
    tl.store(out + size, tl.sum(tl.where(inside, prob, 0.0), 1), mask=exists)
    tl.store(out + 2 * size, tl.sum(tl.where(inside, overlap, 0.0), 1), mask=exists)
    tl.store(out + 3 * size, tl.sum(tl.where(inside, count, 0.0), 1), mask=exists)
    if NODES:
        to_right = tl.where(inside, wx, 0.0)
        to_left = tl.where(inside, 1.0 - wx, 0.0)
        out += 4 * size
        tl.store(out, tl.sum((g0 - g0_wy) * to_left, 1), mask=exists)
        tl.store(out + size, tl.sum((g0 - g0_wy) * to_right, 1), mask=exists)
        tl.store(out + 2 * size, tl.sum(g0_wy * to_left, 1), mask=exists)
        tl.store(out + 3 * size, tl.sum(g0_wy * to_right, 1), mask=exists)
        out += 4 * size
        tl.store(out, tl.sum((g1 - g1_wy) * to_left, 1), mask=exists)
        tl.store(out + size, tl.sum((g1 - g1_wy) * to_right, 1), mask=exists)
        tl.store(out + 2 * size, tl.sum(g1_wy * to_left, 1), mask=exists)
        tl.store(out + 3 * size, tl.sum(g1_wy * to_right, 1), mask=exists)
        out += 4 * size
        tl.store(out, tl.sum((g2 - g2_wy) * to_left, 1), mask=exists)
        tl.store(out + size, tl.sum((g2 - g2_wy) * to_right, 1), mask=exists)
        tl.store(out + 2 * size, tl.sum(g2_wy * to_left, 1), mask=exists)
        tl.store(out + 3 * size, tl.sum(g2_wy * to_right, 1), mask=exists)


@triton.jit
def mask_sums_nodes_kernel(
    cells_ptr,  # [16, images, h + 1, C, w + 1]
    nodes_ptr,  # [B, C, 3, h, w]
    first_image,
    images,
    C,
    h,
    w,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,  # an image has more nodes than 32 bits count; dividing 64 bits takes several times as long
):
    """Adds the corners of the four cells that meet at a logit; one program for some nodes of one field."""
    field = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    n = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK] over C * h * w
    exists = n < C * h * w
    j = n % w
    i = (n // w) % h
    c = n // (h * w)
    band = C * (w + 1)  # cells of a band
    size = tl.cast(images, tl.int64) * (h + 1) * band
    cell = cells_ptr + (4 + 4 * field) * size + (image * (h + 1) + i) * band + c * (w + 1) + j
    # cell (i, j) ends at node (i, j): its bottom right corner; cell (i + 1, j + 1) begins there
    total = tl.load(cell + 3 * size, mask=exists, other=0.0)
    total += tl.load(cell + 2 * size + 1, mask=exists, other=0.0)
    total += tl.load(cell + size + band, mask=exists, other=0.0)
    total += tl.load(cell + band + 1, mask=exists, other=0.0)
    node = (((first_image + image) * C + c) * 3 + field) * h * w + i * w + j
    tl.store(nodes_ptr + node, total, mask=exists)


def mask_sums(
    logits: torch.Tensor,
    target: torch.Tensor,
    alpha: float,
    gamma: float,
    ignore_index: int,
    with_nodes: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mask_sums`` as in ``operator.py``."""
    B, C, h, w = logits.shape
    H, W = target.shape[1:]
    check_labels(target, C, ignore_index)
    target = narrow(target, C, ignore_index)
    columns = triton.next_power_of_2(triton.cdiv(W, w))
    cells = max(TILE // columns, 1)
    fields = 4 + 4 * FIELDS if with_nodes else 4
    image_bytes = 4 * fields * (h + 1) * C * (w + 1)
    chunk = min(max(WORKSPACE // image_bytes, 1), B)

    sums = logits.new_empty((B, C, 4), dtype=torch.float32)
    nodes = logits.new_empty((B, C, FIELDS, h, w) if with_nodes else (B, C, FIELDS, 0, 0), dtype=torch.float32)
    # fp_fusion: products and sums become one instruction, whatever this version of Triton does by default.
    options = {"num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device(logits.device.index if logits.is_cuda else -1):
        for first in range(0, B, chunk):
            images = min(chunk, B - first)
            work = logits.new_empty((fields, images, h + 1, C, w + 1), dtype=torch.float32)
            mask_sums_fwd_kernel[triton.cdiv(C * (w + 1), cells), h + 1, images](
                logits,
                target,
                work,
                *logits.stride(),
                *target.stride(),
                first,
                images,
                C,
                h,
                w,
                H,
                W,
                alpha,
                gamma,
                ignore_index,
                CELLS=cells,
                COLUMNS=columns,
                SQUARE=gamma == 2,
                NODES=with_nodes,
                **options,
            )
            sums[first : first + images] = work[:4].sum((2, 4)).permute(1, 2, 0)
            if with_nodes:
                block = 1024
                mask_sums_nodes_kernel[triton.cdiv(C * h * w, block), FIELDS, images](
                    work, nodes, first, images, C, h, w, BLOCK=block, WIDE=C * h * w + block >= 1 << 31, **options
                )
    return sums, nodes
