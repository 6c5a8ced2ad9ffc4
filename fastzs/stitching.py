"""One canvas from the maps of overlapping windows, so that a last step can look at the whole image at once.

The idea is OV-Stitcher's (CVPR 2026 Findings): the blocks of a transformer before the last see windows of the size they
were trained on, and the last one, whose attention makes the masks, sees the whole image.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.clip.vision import VisionTransformer
from fastzs.windows import Size, window_grid


def stitch(maps: Tensor, windows: Tensor, size: Size, grid: Size) -> Tensor:
    """Maps [W, C, h, w] of windows on one canvas, [C, H', W'] in fp32 at least.

    A cell of the canvas is the mean of the windows' cells over it, each weighted with the area that both share. Where
    windows begin and end between patches, cells lie upon cells, and this is the plain mean.

    Args:
        windows: int64 [W, 4], top, left, height and width of what the maps cover; together they cover the image.
        size: of the image, in the same unit.
        grid: rows and columns of the canvas.
    """
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    total = maps.new_zeros(maps.shape[1], *grid)
    weight = maps.new_zeros(grid)
    for one, (top, left, height, width) in zip(maps, windows.tolist(), strict=True):
        rows, down = _shared(size[0], grid[0], top, height, one.shape[1], one.dtype, one.device)
        columns, across = _shared(size[1], grid[1], left, width, one.shape[2], one.dtype, one.device)
        total[:, rows, columns] += down @ one @ across.T
        weight[rows, columns] += down.sum(1)[:, None] * across.sum(1)
    return total / weight


def stitched_tokens(
    tower: VisionTransformer, image: Tensor, crop: int | Size, stride: int | Size, batch_size: int
) -> tuple[Tensor, Size]:
    """Tokens [1, P + H' * W', C] that enter the last block, of a whole image [1, 3, H, W], and the grid (H', W').

    The blocks before the last see windows. Prefix tokens (CLS) are the means over the windows. Sides that are no
    multiple of the patch are padded with zeros at the bottom and right, as the tower itself does.

    Args:
        crop, stride: of the windows, see :func:`fastzs.windows.window_grid`; crop 0: the whole image is the window.
        batch_size: windows at a time.
    """
    patch = tower.patch_size
    image = F.pad(image, (0, -image.shape[3] % patch, 0, -image.shape[2] % patch))
    size = (image.shape[2], image.shape[3])
    windows = window_grid(size, crop, stride) if crop else torch.tensor([[0, 0, *size]])
    prefix, maps, cells = [], [], (0, 0)
    for some in windows.split(batch_size):
        tokens, cells = tower.trunk(crops_of(image, some))
        prefix.append(tokens[:, : tower.prefix])
        maps.append(tokens[:, tower.prefix :].transpose(1, 2).unflatten(2, cells))
    covered = torch.cat([windows[:, :2], torch.tensor(cells).expand(len(windows), 2) * patch], 1)
    grid = (size[0] // patch, size[1] // patch)
    patches = stitch(torch.cat(maps), covered, size, grid).flatten(1).T
    first = torch.cat(prefix)
    first = first.mean(0, dtype=patches.dtype)
    return torch.cat([first, patches])[None].to(maps[0].dtype), grid


def crops_of(image: Tensor, windows: Tensor) -> Tensor:
    """The parts [W, 3, h, w] of an image [1, 3, H, W] under windows of one size."""
    parts = [image[0, :, top : top + h, left : left + w] for top, left, h, w in windows.tolist()]
    return torch.stack(parts)


@functools.lru_cache(256)
def _shared(
    length: int, cells: int, start: int, extent: int, parts: int, dtype: torch.dtype, device: torch.device
) -> tuple[slice, Tensor]:
    """Along one side: which of ``cells`` over ``length`` meet a window, and [those, parts], what they share.

    Copied to the device once, for a copy of every window would wait for it.
    """
    first, last = start * cells // length, min(-(-(start + extent) * cells // length), cells)
    with torch.inference_mode(False):  # a training may meet it again
        own = torch.arange(first, last + 1, dtype=torch.float64) * length / cells
        theirs = start + torch.arange(parts + 1, dtype=torch.float64) * extent / parts
        ends, begins = torch.minimum(own[1:, None], theirs[1:]), torch.maximum(own[:-1, None], theirs[:-1])
        return slice(first, last), (ends - begins).clamp_min(0).to(device, dtype)
