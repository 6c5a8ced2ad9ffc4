"""An image's class maps in horizontal bands, so that those of a large image are never held at once."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MAPS_BYTES = 128 << 20  # of class maps held at a time, where an image keeps its size, ...
PIXELS = 4 << 20  # ... and labels made at a time, about


class Band(NamedTuple):
    """Class maps of a band of an image, as :func:`fastzs.ops.label_map` takes them."""

    logits: Tensor  # fp32 [W, C, h, w]
    windows: Tensor  # int64 [W, 4]
    size: tuple[int, int]
    output_size: tuple[int, int]
    rows: slice  # of the band's labels, those that are wanted


def bands(
    size: tuple[int, int], image_size: tuple[int, int], windows: Tensor, parts: Iterable[Tensor]
) -> Iterator[Band]:
    """Bands of an image from top to bottom.

    An image that keeps its size may have thousands of windows, whose maps would take gigabytes. What lies above
    the next row of windows is final, so no more than about ``MAPS_BYTES`` of maps are held, and ``PIXELS`` labels made.
    Where the labels are resized, rows mix, but the model's input is small: one band.

    Args:
        size: of the image as the model saw it.
        parts: class maps [W', C, h, w] of the windows, in their order.
    """
    if size != image_size:
        yield Band(torch.cat(list(parts)), windows, size, image_size, slice(None))
        return
    height, width = size
    held, kept, begin, stop = [], 0, 0, 0  # maps from window ``kept`` on; the rows above ``begin`` are done
    for part in parts:
        held.append(part)
        stop += len(part)
        end = height if stop == len(windows) else int(windows[stop, 0])
        few = sum(part.nbytes for part in held) < MAPS_BYTES and (end - begin) * width < PIXELS
        if stop < len(windows) and (end == begin or few):
            continue
        held = [torch.cat(held)]
        places = windows[kept:stop]
        places = places[places[:, 0] < end]
        top, bottom = int(places[0, 0]), int(places[-1, 0] + places[-1, 2])
        band = (bottom - top, width)
        moved = places - torch.tensor([top, 0, 0, 0])
        yield Band(held[0][: len(places)], moved, band, band, slice(begin - top, end - top))
        over = int((places[:, 0] + places[:, 2] <= end).sum())
        held, kept, begin = [held[0][over:].clone()], kept + over, end
