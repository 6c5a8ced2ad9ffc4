"""Where pixels and windows lie, worked out on the host in fp64, as tables for the GPU kernels."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .common import resize_taps, taps_at, window_spans
from .options import Options


class Places(NamedTuple):
    """Where an axis of each window lies on the grid, and its grid rows between its nodes."""

    first: Tensor  # [W] int32
    count: Tensor  # [W] int32
    lo: Tensor  # [W, span] int32
    weight: Tensor  # [W, span] fp32


def axis_places(starts, length: int, nodes: int, picture: int, grid: int) -> Places:
    """Of windows ``length`` long that start at the given pixels."""
    spans = [window_spans(start, length, picture, grid) for start in starts]
    span = max(1, *(last - first for first, last, _ in spans))
    lo, weight = torch.zeros(len(spans), span, dtype=torch.int32), torch.zeros(len(spans), span)
    for n, (first, last, position) in enumerate(spans):
        taps = taps_at(position * nodes / length - 0.5, nodes)
        lo[n, : last - first], weight[n, : last - first] = taps.low.int(), taps.weight.float()
    first = torch.tensor([first for first, _, _ in spans], dtype=torch.int32)
    last = torch.tensor([last for _, last, _ in spans], dtype=torch.int32)
    return Places(first, last - first, lo, weight)


class Tables(NamedTuple):
    """On the device of the logits, in the order in which kernels take them."""

    box: Tensor  # [W, 4] int32: first grid row and column, how many
    row_windows: Tensor  # [H', most] int32: windows over the grid rows of each output row, packed to the left
    row_counts: Tensor  # [H'] int32: how many
    rows_lo: Tensor  # [W, span] int32: the lower node of each of a window's grid rows
    rows_weight: Tensor  # [W, span] fp32
    cols_lo: Tensor  # [W, span] int32
    cols_weight: Tensor  # [W, span] fp32
    taps_y: Tensor  # [3, H'] fp64: the two grid rows that each output row mixes, weight of the second
    taps_x: Tensor  # [3, W'] fp64


def tables_of(logits: Tensor, windows, options: Options) -> Tables:
    """For logits ``[W, C, h, w]`` of ``windows``."""
    places = tuple(tuple(window) for window in windows)
    sizes = (options.image_size, options.grid, options.output_size)
    return build_tables((logits.shape[2], logits.shape[3]), places, *sizes, logits.device)


KEPT = 32  # calls of one size and one set of windows: a table for 12 megapixels takes 0.3 MB


@functools.lru_cache(KEPT)
def build_tables(
    nodes: tuple[int, int],
    windows: tuple[tuple[int, ...], ...],
    picture: tuple[int, int],
    grid: tuple[int, int],
    output: tuple[int, int],
    device: torch.device,
) -> Tables:
    """For maps of ``nodes`` rows and columns over ``windows`` of a picture; the arguments are those of ``Options``.

    Kept on the device, for pictures of one size ask for the same: built anew, a picture would cost nine copies from
    pageable memory, each of which waits for the GPU.
    """
    h, w = nodes
    rows = axis_places([p[0] for p in windows], windows[0][2], h, picture[0], grid[0])
    cols = axis_places([p[1] for p in windows], windows[0][3], w, picture[1], grid[1])
    taps_y, taps_x = (torch.stack([t.double() for t in resize_taps(grid[i], output[i])]) for i in (0, 1))
    if grid == output:
        taps_y[1], taps_x[1] = taps_y[0], taps_x[0]
    over = (rows.first < taps_y[1][:, None] + 1) & (taps_y[0][:, None] < rows.first + rows.count)  # [H', W]
    row_counts = over.sum(1).int()
    row_windows = (~over).int().argsort(dim=1, stable=True)[:, : int(row_counts.max())].int().contiguous()
    box = torch.stack([rows.first, cols.first, rows.count, cols.count], 1).contiguous()
    tables = (box, row_windows, row_counts, rows.lo, rows.weight, cols.lo, cols.weight, taps_y, taps_x)
    return Tables(*(table.to(device) for table in tables))
