"""``refine`` in Triton: weights once, then a few classes at a time from map to map; sums are fp32.

How many classes take part only the GPU knows; the others come after them, and programs for those end at once.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# (it does not know what a grid and a static_range are in a kernel)
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import Axis, Options, Result

PIXELS, CLASSES, WARPS = 128, 4, 4  # a program's tile
CHUNK = 32  # classes whose maps exist at a time
# Of images of many sizes: a variant of the kernels for each kind of number would be compiled as they come.
SIZES = [
    "neighbours",
    "pixels",
    "height",
    "width",
    "node_rows",
    "node_cols",
    "row_taps",
    "col_taps",
    "first",
    "classes",
]


def _jit(function):
    return triton.jit(function, do_not_specialize=[name for name in SIZES if name in function.__code__.co_varnames])


@triton.jit
def neighbour_of(y, x, dilations_ptr, n, height, width):
    """Where in a map neighbour ``n`` of the pixels lies: of 8 round the centre, row by row, for each dilation."""
    d = tl.load(dilations_ptr + n // 8)
    place = n % 8
    place += place > 3  # the centre, 4 of 9, is left out
    down = tl.minimum(tl.maximum(y + (place // 3 - 1) * d, 0), height - 1)
    right = tl.minimum(tl.maximum(x + (place % 3 - 1) * d, 0), width - 1)
    return down.to(tl.int64) * width + right


@triton.jit
def unlikeness(image_ptr, at, other, inside, pixels, red, green, blue):
    r = tl.abs(tl.load(image_ptr + other, mask=inside, other=0.0) - tl.load(image_ptr + at, mask=inside, other=0.0))
    image_ptr += pixels
    g = tl.abs(tl.load(image_ptr + other, mask=inside, other=0.0) - tl.load(image_ptr + at, mask=inside, other=0.0))
    image_ptr += pixels
    b = tl.abs(tl.load(image_ptr + other, mask=inside, other=0.0) - tl.load(image_ptr + at, mask=inside, other=0.0))
    return r * red + g * green + b * blue


@triton.jit
def inverse_spread(image_ptr, dilations_ptr, at, y, x, inside, neighbours, height, width):
    """1 / (3 (1e-8 + 0.1 sigma)) of one channel; deviations are summed as differences from the centre."""
    centre = tl.load(image_ptr + at, mask=inside, other=0.0)
    total = tl.zeros_like(centre)
    squares = tl.zeros_like(centre)
    for n in range(neighbours):
        other = neighbour_of(y, x, dilations_ptr, n, height, width)
        d = tl.load(image_ptr + other, mask=inside, other=0.0) - centre
        total += d
        squares += d * d
    values = neighbours / 8 * 9.0
    variance = tl.maximum(squares - total * total / values, 0.0) / (values - 1.0)
    return 1.0 / (3.0 * (1e-8 + 0.1 * tl.sqrt(variance)))


@_jit
def refine_weights_kernel(
    image_ptr,  # [3, H, W] fp32
    dilations_ptr,  # [|D|] int32
    weights_ptr,  # [8 |D|, H, W] fp32
    neighbours,
    pixels,  # H W
    height,
    width,
    PIXELS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = at < pixels
    y, x = (at // width).to(tl.int32), (at % width).to(tl.int32)
    y = tl.minimum(y, height - 1)
    red = inverse_spread(image_ptr, dilations_ptr, at, y, x, inside, neighbours, height, width)
    green = inverse_spread(image_ptr + pixels, dilations_ptr, at, y, x, inside, neighbours, height, width)
    blue = inverse_spread(image_ptr + 2 * pixels, dilations_ptr, at, y, x, inside, neighbours, height, width)
    least = tl.full([PIXELS], float("inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    for n in range(neighbours):
        other = neighbour_of(y, x, dilations_ptr, n, height, width)
        a = unlikeness(image_ptr, at, other, inside, pixels, red, green, blue)
        smaller = tl.minimum(least, a)
        total = total * tl.exp(smaller - least) + tl.exp(smaller - a)
        least = smaller
    for n in range(neighbours):
        other = neighbour_of(y, x, dilations_ptr, n, height, width)
        a = unlikeness(image_ptr, at, other, inside, pixels, red, green, blue)
        tl.store(weights_ptr + n * pixels + at, tl.exp(least - a) / total, mask=inside)


@_jit
def refine_maps_kernel(
    nodes_ptr,  # [C, I, J] fp32, from the first class of the chunk on
    row_index_ptr,  # [H, row_taps] int32
    row_weight_ptr,  # [H, row_taps] fp32
    col_index_ptr,  # [W, col_taps] int32
    col_weight_ptr,  # [W, col_taps] fp32
    maps_ptr,  # [chunk, H, W] fp32
    count_ptr,  # int32: the classes that take part
    first,  # class of the chunk
    classes,  # of the chunk
    node_rows,
    node_cols,
    row_taps,
    col_taps,
    pixels,
    height,
    width,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    classes = tl.minimum(tl.load(count_ptr) - first, classes)
    if tl.program_id(1) * CLASSES >= classes:
        return
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = at < pixels
    y, x = at // width, at % width
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    plane = c.to(tl.int64)[:, None] * node_rows * node_cols
    wanted = (c < classes)[:, None] & inside[None, :]
    total = tl.zeros([CLASSES, PIXELS], tl.float32)
    for i in range(row_taps):
        row = tl.load(row_index_ptr + y * row_taps + i, mask=inside, other=0)
        share = tl.load(row_weight_ptr + y * row_taps + i, mask=inside, other=0.0)
        part = tl.zeros([CLASSES, PIXELS], tl.float32)
        for j in range(col_taps):
            col = tl.load(col_index_ptr + x * col_taps + j, mask=inside, other=0)
            weight = tl.load(col_weight_ptr + x * col_taps + j, mask=inside, other=0.0)
            node = tl.load(nodes_ptr + plane + (row * node_cols + col)[None, :], mask=wanted, other=0.0)
            part += node * weight[None, :]
        total += part * share[None, :]
    tl.store(maps_ptr + c.to(tl.int64)[:, None] * pixels + at[None, :], total, mask=wanted)


@_jit
def refine_step_kernel(
    source_ptr,  # [chunk, H, W] fp32
    weights_ptr,  # [8 |D|, H, W] fp32
    dilations_ptr,  # [|D|] int32
    target_ptr,  # [chunk, H, W] fp32
    count_ptr,
    first,
    classes,
    neighbours,
    pixels,
    height,
    width,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    classes = tl.minimum(tl.load(count_ptr) - first, classes)
    if tl.program_id(1) * CLASSES >= classes:
        return
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = at < pixels
    y, x = tl.minimum((at // width).to(tl.int32), height - 1), (at % width).to(tl.int32)
    c = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    plane = c.to(tl.int64)[:, None] * pixels
    wanted = (c < classes)[:, None] & inside[None, :]
    total = tl.zeros([CLASSES, PIXELS], tl.float32)
    for n in range(neighbours):
        other = neighbour_of(y, x, dilations_ptr, n, height, width)
        weight = tl.load(weights_ptr + n * pixels + at, mask=inside, other=0.0)
        total += tl.load(source_ptr + plane + other[None, :], mask=wanted, other=0.0) * weight[None, :]
    tl.store(target_ptr + plane + at[None, :], total, mask=wanted)


@_jit
def refine_take_kernel(
    maps_ptr,  # [chunk, H, W] fp32
    labels_ptr,  # [H, W] int32
    scores_ptr,  # [H, W] fp32
    total_ptr,  # [H, W] fp32: sum of exp(scale (score - best)), or not read
    order_ptr,  # [C] int64: classes that take part, then others
    count_ptr,
    first,  # of the chunk, in that order
    classes,
    pixels,
    scale,
    PROBABILITY: tl.constexpr,
    LAST: tl.constexpr,  # the total becomes the probability
    PIXELS: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = at < pixels
    seen = inside & (first > 0)
    best = tl.load(scores_ptr + at, mask=seen, other=float("-inf"))
    label = tl.load(labels_ptr + at, mask=seen, other=0)
    total = tl.zeros([PIXELS], tl.float32)
    if PROBABILITY:
        total = tl.load(total_ptr + at, mask=seen, other=0.0)
    count = tl.load(count_ptr)
    for c in range(tl.minimum(count - first, classes)):
        score = tl.load(maps_ptr + at, mask=inside, other=0.0)
        maps_ptr += pixels
        better = score > best
        if PROBABILITY:
            e = tl.exp(-tl.abs(score - best) * scale)
            total = tl.where(better, total * e + 1.0, total + e)
        best = tl.where(better, score, best)
        label = tl.where(better, tl.load(order_ptr + first + c).to(tl.int32), label)
    tl.store(scores_ptr + at, best, mask=inside)
    tl.store(labels_ptr + at, label, mask=inside)
    if PROBABILITY:
        if LAST:
            total = tl.where(count > 0, 1.0 / total, float("nan"))
        tl.store(total_ptr + at, total, mask=inside)


def refine_triton(
    nodes: Tensor,  # [C, I, J]
    order: Tensor,  # int64 [C]: classes that take part, ascending, then others
    count: Tensor,  # int32 []: how many take part
    rows: Axis,  # int32 and fp32, contiguous, as are columns
    cols: Axis,
    dilations: Tensor,  # int32 [|D|]
    image: Tensor,  # [3, H', W']
    options: Options,
) -> Result:
    """Of the classes that take part; maps of others hold anything. If none does, scores are -inf, probabilities NaN."""
    device, classes = nodes.device, len(nodes)
    height, width = image.shape[1:]
    result = Result.empty(nodes, (height, width), options)
    nodes, image = nodes[order], image.contiguous()
    pixels = height * width
    blocks, neighbours = triton.cdiv(pixels, PIXELS), 8 * len(options.dilations)
    chunk = min(CHUNK, classes)
    source = nodes.new_empty((chunk, height, width))
    launch = {"num_warps": WARPS, "enable_fp_fusion": True}
    with torch.cuda.device(device.index if nodes.is_cuda else -1):
        if options.iterations:
            weights, target = nodes.new_empty((neighbours, height, width)), torch.empty_like(source)
            refine_weights_kernel[(blocks,)](
                image, dilations, weights, neighbours, pixels, height, width, PIXELS=PIXELS, **launch
            )
        for first in range(0, classes, chunk):
            here = min(chunk, classes - first)
            grid, tile = (blocks, triton.cdiv(here, CLASSES)), {"PIXELS": PIXELS, "CLASSES": CLASSES}
            taps = (rows.index.shape[1], cols.index.shape[1])
            refine_maps_kernel[grid](
                nodes[first:],
                *rows,
                *cols,
                source,
                count,
                first,
                here,
                *nodes.shape[1:],
                *taps,
                pixels,
                height,
                width,
                **tile,
                **launch,
            )
            for _ in range(options.iterations):
                refine_step_kernel[grid](
                    source,
                    weights,
                    dilations,
                    target,
                    count,
                    first,
                    here,
                    neighbours,
                    pixels,
                    height,
                    width,
                    **tile,
                    **launch,
                )
                source, target = target, source
            refine_take_kernel[(blocks,)](
                source,
                result.labels,
                result.scores,
                result.scores if result.probabilities is None else result.probabilities,
                order,
                count,
                first,
                here,
                pixels,
                options.scale or 0.0,
                PROBABILITY=result.probabilities is not None,
                LAST=first + here == classes,
                PIXELS=PIXELS,
                **launch,
            )
            if result.maps is not None:
                result.maps.index_copy_(0, order[first : first + here], source[:here])
    return result
