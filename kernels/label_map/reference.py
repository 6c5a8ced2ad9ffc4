"""The specification of ``label_map``, in plain PyTorch, in pieces small enough for any image.

The output is computed tile by tile. A tile asks for the image pixels its own bilinear step reads, and for
each of the windows over them only for the part they share, so the largest tensor is ``[C, tile rows, tile
columns]`` and no tensor has both all classes and all pixels.
"""

import torch
from torch import Tensor

from .common import Taps, resize_taps
from .options import Options

TILE_BYTES = 32 << 20  # all live tensors of a tile together
LIVE_TENSORS = 4  # of a tile's size, at the moment when most exist


def interpolate(x: Tensor, rows: Taps, cols: Taps) -> Tensor:
    """``[C, h, w]`` -> ``[C, len(rows), len(cols)]``."""
    weight = rows.weight.to(x.dtype)[:, None]
    x = x[:, rows.low] * (1 - weight) + x[:, rows.high] * weight
    weight = cols.weight.to(x.dtype)
    return x[:, :, cols.low] * (1 - weight) + x[:, :, cols.high] * weight


def activate(logits: Tensor, activation: str, penalty: Tensor | None) -> Tensor:
    """Scores ``[C, r, c]`` of one window's interpolated logits."""
    if activation == "sigmoid":
        scores = logits.sigmoid()
    elif activation == "softmax":
        scores = logits.softmax(0)
    else:
        scores = logits
    return scores if penalty is None else scores - penalty[:, None, None]


class Averaged:
    """Averaged scores of any rectangle of the resized image, from the windows' low-resolution maps."""

    def __init__(self, logits: Tensor, windows, activation: str, penalty: Tensor | None):
        self.logits, self.activation, self.penalty = logits, activation, penalty
        h, w = logits.shape[2:]
        # Of each window: first and last + 1 row of the image, the same of columns, taps along both.
        self.places = []
        for top, left, height, width in windows:
            rows, cols = resize_taps(h, height), resize_taps(w, width)
            self.places.append((top, top + height, left, left + width, rows, cols))

    def band(self, top: int, bottom: int) -> list[int]:
        """The windows over rows ``top`` to ``bottom``."""
        return [n for n, place in enumerate(self.places) if place[0] < bottom and top < place[1]]

    def scores(self, band: list[int], top: int, bottom: int, left: int, right: int) -> Tensor:
        """``[C, bottom - top, right - left]``: the mean over the covering windows."""
        classes = self.logits.shape[1]
        total = self.logits.new_zeros(classes, bottom - top, right - left)
        visits = self.logits.new_zeros(bottom - top, right - left)
        for n in band:
            place_top, place_bottom, place_left, place_right, rows, cols = self.places[n]
            r0, r1 = max(top, place_top), min(bottom, place_bottom)
            c0, c1 = max(left, place_left), min(right, place_right)
            if r0 >= r1 or c0 >= c1:
                continue
            rows, cols = (
                rows.part(r0 - place_top, r1 - place_top),
                cols.part(c0 - place_left, c1 - place_left),
            )
            part = activate(interpolate(self.logits[n], rows, cols), self.activation, self.penalty)
            total[:, r0 - top : r1 - top, c0 - left : c1 - left] += part
            visits[r0 - top : r1 - top, c0 - left : c1 - left] += 1
        return total.div_(visits)


def tile_shape(classes: int, size, image_size, itemsize: int) -> tuple[int, int]:
    """Rows and columns of an output tile: whole rows if some of them fit, else a square."""
    reads = max(1.0, image_size[0] / size[0]) * max(1.0, image_size[1] / size[1])  # image pixels per output pixel
    pixels = max(1, int(TILE_BYTES / (LIVE_TENSORS * itemsize * classes * reads)))
    if pixels >= 4 * size[1]:
        return min(size[0], pixels // size[1]), size[1]
    side = max(1, int(pixels**0.5))
    return min(size[0], side), min(size[1], side)


def best(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values and classes ``[k, r, c]``, best first, of equal ones the lower class first."""
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if top_k == 1:
        return scores.max(0, keepdim=True)
    values, classes = scores.sort(dim=0, descending=True, stable=True)
    return values[:top_k], classes[:top_k]


def label_map_reference(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[k, H', W']`` and, if asked for, scores alike, on the logits' device; see ``label_map``."""
    device = logits.device
    logits = logits.detach().cpu()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = torch.where(logits.isfinite(), logits, torch.nan)
    penalty = None if options.penalty is None else options.penalty.cpu().to(logits.dtype)
    image_size, output_size, resized = options.image_size, options.output_size, options.resized
    averaged = Averaged(logits, windows, options.activation, penalty)
    row_taps, col_taps = (resize_taps(image_size[i], output_size[i]) for i in (0, 1))
    labels, values = options.empty(logits.device, logits.dtype)
    tile_rows, tile_cols = tile_shape(logits.shape[1], output_size, image_size, logits.element_size())
    for r0 in range(0, output_size[0], tile_rows):
        r1 = min(r0 + tile_rows, output_size[0])
        top, bottom = (int(row_taps.low[r0]), int(row_taps.high[r1 - 1]) + 1) if resized else (r0, r1)
        band = averaged.band(top, bottom)
        for c0 in range(0, output_size[1], tile_cols):
            c1 = min(c0 + tile_cols, output_size[1])
            left, right = (int(col_taps.low[c0]), int(col_taps.high[c1 - 1]) + 1) if resized else (c0, c1)
            scores = averaged.scores(band, top, bottom, left, right)
            if resized:
                scores = interpolate(scores, row_taps.part(r0, r1, top), col_taps.part(c0, c1, left))
            value, label = best(scores, options.top_k)
            label = torch.where(value < options.threshold, logits.shape[1], label)
            if values is not None:
                values[:, r0:r1, c0:c1] = value
            labels[:, r0:r1, c0:c1] = label
    return labels.to(device), None if values is None else values.to(device)
