"""``label_map`` as one PyTorch operator, opaque to torch.compile and torch.export, whatever backend computes it.

What depends on values, the checks of the windows and the warning, happens in the operator, so that a traced program
has it too.
"""

import math
import warnings

import torch
from torch import Tensor

from .. import library
from .compiled import label_map_cpu, label_map_cuda
from .options import Options
from .reference import label_map_reference


def label_map(
    logits: Tensor,  # [W, C, h, w]
    windows: Tensor,  # [W, 4] int64
    image_size: list[int],
    output_size: list[int],
    activation: str,
    penalty: Tensor | None,  # [C]
    threshold: float | None,
    top_k: int,
    wide: bool,
    return_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Labels ``[k, H', W']`` and scores alike (empty unless asked for); see :func:`fastzs.ops.label_map`."""
    places = windows.tolist()
    check_windows(places, *image_size)
    if logits.device.type == "cpu" and not all(math.isfinite(extreme) for extreme in torch.aminmax(logits)):
        message = "label_map: logits has NaN or infinite values; classes lose where they have one"
        warnings.warn(message, stacklevel=3)
    if backend == "triton":
        from .triton import label_map_triton as run
    else:
        run = {"cpu": label_map_cpu, "cuda": label_map_cuda, "reference": label_map_reference}[backend]
    options = Options(
        (image_size[0], image_size[1]),
        (output_size[0], output_size[1]),
        activation,
        penalty,
        -math.inf if threshold is None else threshold,
        top_k,
        torch.int16 if wide else torch.uint8,
        return_scores,
    )
    labels, scores = run(logits, places, options)
    return labels, scores if scores is not None else _no_scores(logits)


def _fake(
    logits,
    windows,
    image_size,
    output_size,
    activation,
    penalty,
    threshold,
    top_k,
    wide,
    return_scores,
    backend,
):
    labels = logits.new_empty((top_k, *output_size), dtype=torch.int16 if wide else torch.uint8)
    if not return_scores:
        return labels, _no_scores(logits)
    return labels, logits.new_empty((top_k, *output_size), dtype=score_dtype(logits))


def score_dtype(logits: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _no_scores(logits: Tensor) -> Tensor:
    return logits.new_empty((0,), dtype=score_dtype(logits))


def check_windows(places: list[list[int]], height: int, width: int) -> None:
    """Raise ValueError unless the windows have one size, lie in the image and leave none of its pixels out."""
    for n, (top, left, window_height, window_width) in enumerate(places):
        if [window_height, window_width] != places[0][2:]:
            raise ValueError(
                f"label_map: window {n} is {window_height} x {window_width}, the first {places[0][2]} x "
                f"{places[0][3]}; expected one size for all"
            )
        inside = top >= 0 and left >= 0 and top + window_height <= height and left + window_width <= width
        if window_height < 1 or window_width < 1 or not inside:
            raise ValueError(
                f"label_map: window {n} (top {top}, left {left}, height {window_height}, "
                f"width {window_width}) does not lie in the image of {height} x {width}"
            )
    # Count visits on the grid of the windows' edges: between neighbouring edges all pixels have one count.
    rows = sorted({0, height, *(p[0] for p in places), *(p[0] + p[2] for p in places)})
    cols = sorted({0, width, *(p[1] for p in places), *(p[1] + p[3] for p in places)})
    row_of, col_of = {y: n for n, y in enumerate(rows)}, {x: n for n, x in enumerate(cols)}
    change = torch.zeros(len(rows), len(cols), dtype=torch.int32)
    for top, left, window_height, window_width in places:
        r0, r1, c0, c1 = row_of[top], row_of[top + window_height], col_of[left], col_of[left + window_width]
        change[r0, c0] += 1
        change[r1, c0] -= 1
        change[r0, c1] -= 1
        change[r1, c1] += 1
    empty = (change.cumsum(0).cumsum(1)[:-1, :-1] == 0).nonzero().tolist()
    if empty:
        pixels = sum((rows[r + 1] - rows[r]) * (cols[c + 1] - cols[c]) for r, c in empty)
        r, c = empty[0]
        raise ValueError(
            f"label_map: {pixels} of the image's {height} x {width} pixels lie in no window, among them "
            f"rows {rows[r]} to {rows[r + 1] - 1}, columns {cols[c]} to {cols[c + 1] - 1}"
        )


library.define(
    "label_map",
    "(Tensor logits, Tensor windows, int[] image_size, int[] output_size, str activation, Tensor? penalty, "
    "float? threshold, int top_k, bool wide, bool return_scores, str backend) -> (Tensor labels, Tensor scores)",
    label_map,
)
library.register("label_map", _fake)
