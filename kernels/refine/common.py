"""What all backends of ``refine`` share: where windows lie, which classes can win, what is asked for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MARGIN = 1e-5  # of the largest logit: by how much a class must lie below another before it is left out


class Options(NamedTuple):
    """Everything about a call but its tensors."""

    image_size: tuple[int, int]
    dilations: tuple[int, ...]
    iterations: int  # 0: the maps as they are
    scale: float | None  # None: no probabilities
    return_maps: bool


class Result(NamedTuple):
    """What a backend returns; ``None`` where it was not asked for."""

    labels: Tensor  # [H', W'] int32
    scores: Tensor  # [H', W']
    probabilities: Tensor | None  # [H', W']
    maps: Tensor | None  # [C, H', W']

    @classmethod
    def empty(cls, nodes: Tensor, output_size: tuple[int, int], options: Options) -> "Result":
        """Room for the labels of ``nodes`` ``[C, ...]``."""
        return cls(
            nodes.new_empty(output_size, dtype=torch.int32),
            nodes.new_empty(output_size),
            None if options.scale is None else nodes.new_empty(output_size),
            nodes.new_empty((len(nodes), *output_size)) if options.return_maps else None,
        )


class Axis(NamedTuple):
    """Along one axis of the image, what each output pixel mixes of the windows' nodes, side by side."""

    index: Tensor  # [n, taps] int64, of windows * nodes
    weight: Tensor  # [n, taps] fp64; rows sum to 1


def grid_of(windows: list[list[int]], image_size: tuple[int, int]) -> tuple[list[int], list[int]]:
    """Top and left edges of the windows, ascending.

    Raises:
        ValueError: the windows have several sizes, form no grid, or leave a pixel out.
    """
    tops, lefts = (sorted({window[side] for window in windows}) for side in (0, 1))
    for window in windows:
        if window[2:] != windows[0][2:] or min(window[2:]) < 1:
            raise ValueError(f"refine: expected windows of one size, got {windows[0][2:]} and {window[2:]}")
    if sorted(window[:2] for window in windows) != [[top, left] for top in tops for left in lefts]:
        raise ValueError("refine: expected windows in rows and columns, each once, as fastzs.windows lays them")
    for name, starts, length, size in zip(("rows", "columns"), (tops, lefts), windows[0][2:], image_size, strict=True):
        ends = [0, *(start + length for start in starts)]
        gaps = [end for end, start in zip(ends, [*starts, size], strict=True) if start > end]
        if gaps or starts[0] >= size or ends[1] < 1:
            raise ValueError(f"refine: expected windows that cover the image, got none over {name} {gaps[:1]}")
    return tops, lefts


def side_by_side(logits: Tensor, windows: list[list[int]], tops: list[int], lefts: list[int]) -> Tensor:
    """``[W, C, h, w]`` -> ``[C, rows of windows * h, columns of windows * w]``."""
    order = sorted(range(len(windows)), key=lambda n: windows[n][:2])
    maps = logits if order == list(range(len(windows))) else logits[order]
    maps = maps.unflatten(0, (len(tops), len(lefts)))
    return maps.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def window_axis(starts: Sequence[int], length: int, nodes: int, picture: int, output: int) -> Axis:
    """Windows' nodes to their pixels, the mean over windows, then the image's pixels to the output's: one mixture.

    Both steps are bilinear with ``align_corners=False``. A window may reach beyond the image.
    """
    pixel = torch.arange(picture)
    place = pixel[:, None] - torch.tensor(starts)  # [image, windows]
    covers = ((place >= 0) & (place < length)).double()
    low, high, part = bilinear((place + 0.5) * nodes / length - 0.5, nodes)
    share = covers / covers.sum(1, keepdim=True)
    first = torch.arange(len(starts)) * nodes
    index = torch.cat([first + low, first + high], 1)
    weight = torch.cat([share * (1 - part), share * part], 1)
    low, high, part = bilinear((torch.arange(output) + 0.5) * picture / output - 0.5, picture)
    index = torch.cat([index[low], index[high]], 1)
    weight = torch.cat([weight[low] * (1 - part)[:, None], weight[high] * part[:, None]], 1)
    order = (weight == 0).int().argsort(dim=1, stable=True)[:, : int((weight != 0).sum(1).max())]
    return Axis(index.gather(1, order), weight.gather(1, order))


def bilinear(position: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of fractional positions among ``n`` entries: the lower and the higher entry, and the weight of the higher."""
    position = position.double().clamp(0, n - 1)
    low = position.floor().long()
    return low, (low + 1).clamp_max(n - 1), position - low


def possible_winners(nodes: Tensor) -> Tensor:
    """bool ``[C]``: the classes of ``nodes`` ``[C, I, J]`` that could be the label of some pixel.

    A refined score is a weighted mean of the nodes, the weights being positive and the same for all classes. So a
    class that lies below one other class at every node lies below it at every pixel, however the image looks.
    """
    flat = nodes.flatten(1)
    margin = MARGIN * flat.abs().max()
    beaten = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    for rival in flat[flat.mean(1).topk(min(RIVALS, len(flat))).indices]:
        beaten |= (flat - rival).amax(1) < -margin
    return ~beaten


RIVALS = 8  # classes of the highest mean that the others are compared with
