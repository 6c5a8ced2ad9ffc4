"""``refine`` as one PyTorch operator, opaque to torch.compile and torch.export, whatever backend computes it.

What depends on values happens in the operator, so that a traced program has it too: the checks of windows and image,
the warning, and which classes can be left out. Triton's backend asks a GPU for no value: see
:mod:`fastzs.kernels.refine.unread`.
"""

import warnings

import torch
from torch import Tensor

from .. import library
from .common import Options, Result, grid_of, possible_winners, side_by_side, window_axis
from .compiled import refine_cpu
from .kept import pools
from .laplacian import laplacian, self_similarity, steps_of
from .reference import refine_reference


def refine(
    logits: Tensor,  # [W, C, h, w]
    windows: Tensor,  # [W, 4] int64
    image: Tensor,  # [3, H', W']
    image_size: list[int],
    method: str,
    dilations: list[int],
    iterations: int,
    text: Tensor | None,  # [C, D]
    cells: int,
    scale: float | None,
    return_maps: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels and scores ``[H', W']``; probabilities alike and maps ``[C, H', W']``, empty unless asked for."""
    size, places, classes = (image.shape[1], image.shape[2]), windows.tolist(), logits.shape[1]
    tops, lefts = grid_of(places, (image_size[0], image_size[1]))
    logits, image = logits.to(score_dtype(logits)), image.to(score_dtype(logits))
    finite = logits.isfinite().all((0, 2, 3))  # [C]
    if logits.device.type == "cpu":  # a GPU would have to be waited for
        if not image.isfinite().all():
            raise ValueError("refine: image has NaN or infinite values; expected finite ones")
        if not finite.all():
            message = "refine: logits has NaN or infinite values; classes that have one lose everywhere"
            warnings.warn(message, stacklevel=3)
    options = Options((image_size[0], image_size[1]), tuple(dilations), iterations, scale, return_maps)
    axes = [
        (tuple(starts), places[0][2 + i], logits.shape[2 + i], image_size[i], size[i])
        for i, starts in enumerate((tops, lefts))
    ]
    likeness = None if method != "laplacian" or text is None else self_similarity(text)
    if backend == "triton":
        from .unread import refine_unread

        nodes = side_by_side(logits, places, tops, lefts)
        result = refine_unread(nodes, finite, axes, image, likeness, cells, options)
        return returned(result, classes)
    kept = finite.nonzero().flatten()
    if len(kept) == 0:
        return nothing(logits, size, scale, return_maps)
    nodes = side_by_side(logits if len(kept) == classes else logits[:, kept], places, tops, lefts)
    if method != "laplacian" and scale is None and not return_maps:
        winners = possible_winners(nodes).nonzero().flatten()
        kept, nodes = kept[winners], nodes if len(winners) == len(nodes) else nodes[winners]
    rows, cols = (window_axis(*axis) for axis in axes)
    if likeness is not None:
        down, across = pools(axes, steps_of(size, cells), nodes.device)
        nodes = laplacian(nodes, down, across, image, likeness[kept], cells, iterations).to(nodes.dtype)
        rows, cols = (window_axis((0,), out, n, out, out) for out, n in zip(size, nodes.shape[1:], strict=True))
        logits, places = nodes[None], [[0, 0, *size]]
        options = options._replace(image_size=size, iterations=0)
    elif backend == "reference":
        logits = logits[:, kept]
    if backend == "cpu":
        result = refine_cpu(nodes, rows, cols, image, options)
    else:
        result = refine_reference(logits, places, image, options)
    if len(kept) < classes:
        maps = result.maps
        if maps is not None:
            maps = maps.new_full((classes, *size), torch.nan).index_copy_(0, kept, maps)
        result = result._replace(labels=kept[result.labels], maps=maps)
    return returned(result, classes)


def returned(result: Result, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the operator returns."""
    none = result.scores.new_empty(0)
    probabilities = none if result.probabilities is None else result.probabilities
    maps = none if result.maps is None else result.maps
    return result.labels.to(label_dtype(classes)), result.scores, probabilities, maps


def _fake(logits, windows, image, image_size, method, dilations, iterations, text, cells, scale, return_maps, backend):
    size, classes, dtype = image.shape[1:], logits.shape[1], score_dtype(logits)
    return (
        logits.new_empty(size, dtype=label_dtype(classes)),
        logits.new_empty(size, dtype=dtype),
        logits.new_empty(0 if scale is None else size, dtype=dtype),
        logits.new_empty((classes, *size) if return_maps else 0, dtype=dtype),
    )


def nothing(logits: Tensor, size: tuple[int, int], scale: float | None, return_maps: bool):
    """The answer where no class has finite logits."""
    none = logits.new_empty(0)
    return (
        torch.zeros(size, dtype=label_dtype(logits.shape[1]), device=logits.device),
        logits.new_full(size, -torch.inf),
        none if scale is None else logits.new_full(size, torch.nan),
        logits.new_full((logits.shape[1], *size), torch.nan) if return_maps else none,
    )


def score_dtype(logits: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 logits."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def label_dtype(classes: int) -> torch.dtype:
    """uint8 where that holds every label, 255 left out; else int16."""
    return torch.uint8 if classes <= 255 else torch.int16


library.define(
    "refine",
    "(Tensor logits, Tensor windows, Tensor image, int[] image_size, str method, int[] dilations, int iterations, "
    "Tensor? text, int cells, float? scale, bool return_maps, str backend) "
    "-> (Tensor labels, Tensor scores, Tensor probabilities, Tensor maps)",
    refine,
)
library.register("refine", _fake)
