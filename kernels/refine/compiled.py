"""``refine`` on the CPU by the compiled library (csrc/refine.cpp)."""

import torch
from torch import Tensor

from ..extension import why_missing
from .common import Axis, Options, Result

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("refine_cpu", "cpu")
MOST_DILATIONS = 16


def why_not_cpu(logits: Tensor, dilations: tuple[int, ...]) -> str | None:
    """None if it can take these logits, else the reason."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device}"
    if logits.dtype == torch.float64:
        return "the logits are float64"
    if len(dilations) > MOST_DILATIONS:
        return f"there are {len(dilations)} dilations; expected at most {MOST_DILATIONS}"
    return MISSING


def refine_cpu(nodes: Tensor, rows: Axis, cols: Axis, image: Tensor, options: Options) -> Result:
    """Of ``nodes`` ``[C, I, J]``, read as ``rows`` and ``cols`` say, along the edges of ``image`` ``[K, H', W']``."""
    result = Result.empty(nodes, (image.shape[1], image.shape[2]), options)
    torch.ops.fastzs.refine_cpu(
        nodes.contiguous(),
        *(
            table
            for axis in (rows, cols)
            for table in (axis.index.int().contiguous(), axis.weight.float().contiguous())
        ),
        image.contiguous(),
        options.dilations,
        options.iterations,
        options.scale,
        result.labels,
        result.scores,
        result.probabilities,
        result.maps,
    )
    return result
