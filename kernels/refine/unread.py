"""``refine`` by Triton without asking the GPU for a value: an image's labels are on their way before it is done.

Which classes lose everywhere, and which can win, is known only there. So no class is cut off: those that take part are
sorted to the front, and the kernels are told where their number stands; programs for others end at once. Tables of
places stay on the GPU.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import Options, Result, possible_winners
from .kept import axis_table, dilation_table, pools
from .laplacian import laplacian, steps_of
from .triton import refine_triton


def refine_unread(
    nodes: Tensor,  # [C, I, J], perhaps not finite
    finite: Tensor,  # bool [C]: classes whose logits all are
    axes: Sequence[tuple],
    image: Tensor,  # [3, H', W']
    likeness: Tensor | None,  # [C], for PEARL's refinement
    cells: int,
    options: Options,
) -> Result:
    """The same as by the other backends; ``axes`` is what :func:`window_axis` takes of rows and columns."""
    size, absent = (image.shape[1], image.shape[2]), ~finite
    taking_part = finite
    if likeness is not None:
        down, across = pools(axes, steps_of(size, cells), nodes.device)
        nodes = nodes.masked_fill(absent[:, None, None], 0)
        nodes = laplacian(nodes, down, across, image, likeness, cells, options.iterations, absent).to(nodes.dtype)
        axes = [((0,), out, n, out, out) for out, n in zip(size, nodes.shape[1:], strict=True)]
        options = options._replace(image_size=size, iterations=0)
    elif options.scale is None and not options.return_maps:
        # where a class is absent the margin is infinite, and all others stay
        taking_part = finite & possible_winners(nodes.masked_fill(absent[:, None, None], -torch.inf))
    order = (~taking_part).int().argsort(stable=True)
    count = taking_part.sum(dtype=torch.int32)
    rows, cols = (axis_table(axis, nodes.device) for axis in axes)
    dilations = dilation_table(options.dilations, nodes.device)
    result = refine_triton(nodes, order, count, rows, cols, dilations, image, options)
    if result.maps is not None:
        result.maps.masked_fill_(absent[:, None, None], torch.nan)
    return result
