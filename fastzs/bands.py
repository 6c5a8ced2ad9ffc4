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


class _Cut(NamedTuple):
    """A band: the windows that lie in it, and the rows of the image that are final with them."""

    first: int
    stop: int
    begin: int
    end: int


def bands(
    size: tuple[int, int], image_size: tuple[int, int], windows: Tensor, parts: Iterable[Tensor]
) -> Iterator[Band]:
    """Bands of an image from top to bottom.

    An image that keeps its size may have thousands of windows, whose maps would take gigabytes. What lies above
    the next row of windows is final, so no more than about ``MAPS_BYTES`` of maps are held, and ``PIXELS`` labels made;
    at the least those of the windows that share rows. Where the labels are resized, rows mix, but the model's input is
    small: one band. A band's maps are overwritten when the next one is asked for.

    Args:
        size: of the image as the model saw it.
        parts: class maps [W', C, h, w] of the windows, in their order.
    """
    if size != image_size:
        yield Band(torch.cat(list(parts)), windows, size, image_size, slice(None))
        return
    parts = iter(parts)
    part = next(parts)
    cuts = _cuts(windows, *size, part[0].nbytes)
    held = part.new_empty(max(cut.stop - cut.first for cut in cuts), *part.shape[1:])
    first = stop = 0  # ``held`` begins with the maps of the windows from ``first`` to ``stop``
    for cut in cuts:
        for i in range(cut.first, stop) if cut.first > first else ():  # one by one: the places may overlap
            held[i - cut.first] = held[i - first]
        first = cut.first
        while stop < cut.stop:
            if not len(part):
                part = next(parts)
            some = part[: cut.stop - stop]
            held[stop - first : stop - first + len(some)] = some
            part, stop = part[len(some) :], stop + len(some)
        places = windows[first:stop]
        top, bottom = int(places[0, 0]), int(places[-1, 0] + places[-1, 2])
        band = (bottom - top, size[1])
        moved = places - torch.tensor([top, 0, 0, 0])
        yield Band(held[: stop - first], moved, band, band, slice(cut.begin - top, cut.end - top))


def _cuts(windows: Tensor, height: int, width: int, each: int) -> list[_Cut]:
    """Where an image is cut into bands, if the class maps of a window take ``each`` bytes."""
    tops, bottoms = windows[:, 0].tolist(), (windows[:, 0] + windows[:, 2]).tolist()
    cuts, first, begin = [], 0, 0
    for stop in range(1, len(tops) + 1):
        end = tops[stop] if stop < len(tops) else height
        few = (stop - first) * each < MAPS_BYTES and (end - begin) * width < PIXELS
        if stop < len(tops) and (end == tops[stop - 1] or few):
            continue
        cuts.append(_Cut(first, stop, begin, end))
        while first < stop and bottoms[first] <= end:
            first += 1
        begin = end
    return cuts
