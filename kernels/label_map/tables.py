"""Where pixels and windows lie, worked out on the host in fp64, as tables for the GPU kernels."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .common import resize_taps
from .options import Options


class Tables(NamedTuple):
    """On the device of the logits, in the order in which kernels take them."""

    box: Tensor  # [W, 4] int32: first image row and column, how many
    row_windows: Tensor  # [H', most] int32: windows over the image rows of each output row, packed to the left
    row_counts: Tensor  # [H'] int32: how many
    rows_lo: Tensor  # [W, span] int32: the lower node of each of a window's rows
    rows_weight: Tensor  # [W, span] fp32
    cols_lo: Tensor  # [W, span] int32
    cols_weight: Tensor  # [W, span] fp32
    taps_y: Tensor  # [3, H'] fp64: the two image rows that each output row mixes, weight of the second
    taps_x: Tensor  # [3, W'] fp64


def tables_of(logits: Tensor, windows, options: Options) -> Tables:
    """For logits ``[W, C, h, w]`` of ``windows``."""
    places = tuple(tuple(window) for window in windows)
    nodes = (logits.shape[2], logits.shape[3])
    return build_tables(nodes, places, options.image_size, options.output_size, logits.device)


KEPT = 32  # calls of one size and one set of windows: a table for 12 megapixels takes 0.3 MB


@functools.lru_cache(KEPT)
def build_tables(
    nodes: tuple[int, int],
    windows: tuple[tuple[int, ...], ...],
    image: tuple[int, int],
    output: tuple[int, int],
    device: torch.device,
) -> Tables:
    """For maps of ``nodes`` rows and columns over ``windows`` of an image; the arguments are those of ``Options``.

    Kept on the device, for images of one size ask for the same: built anew, an image would cost nine copies from
    pageable memory, each of which waits for the GPU.
    """
    return Tables(*(table.to(device) for table in host_tables(nodes, windows, image, output)))


def host_tables(
    nodes: tuple[int, int], windows: tuple[tuple[int, ...], ...], image: tuple[int, int], output: tuple[int, int]
) -> Tables:
    """As :func:`build_tables`, on the host."""
    box = torch.tensor(windows, dtype=torch.int32)
    first, height, count = box[:, 0], windows[0][2], len(windows)
    rows, cols = (resize_taps(nodes[i], windows[0][2 + i]) for i in (0, 1))
    taps_y, taps_x = (torch.stack([t.double() for t in resize_taps(image[i], output[i])]) for i in (0, 1))
    if image == output:
        taps_y[1], taps_x[1] = taps_y[0], taps_x[0]
    over = (first < taps_y[1][:, None] + 1) & (taps_y[0][:, None] < first + height)  # [H', W]
    row_counts = over.sum(1).int()
    row_windows = (~over).int().argsort(dim=1, stable=True)[:, : int(row_counts.max())].int().contiguous()
    inside = [t.expand(count, -1).contiguous() for taps in (rows, cols) for t in (taps.low.int(), taps.weight.float())]
    row_low, row_weight, col_low, col_weight = inside
    return Tables(box, row_windows, row_counts, row_low, row_weight, col_low, col_weight, taps_y, taps_x)
