"""``label_map`` in the compiled library: on the CPU by csrc/label_map.cpp, on a GPU by csrc/label_map_cuda.cu."""

import torch
from torch import Tensor

from ..checks import why_too_old
from ..extension import why_missing
from .options import Options
from .tables import tables_of

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("label_map_cpu", "cpu")
MISSING_CUDA = why_missing("label_map_cuda", "cuda")
MOST_K = 8  # of the CUDA kernel: the best are kept in registers
ACTIVATION_CODES = {"sigmoid": 0, "softmax": 1, "none": 2}


def why_not_cpu(logits: Tensor) -> str | None:
    """None if it can take these logits, else the reason. Logits of another device are copied, they are small."""
    if logits.dtype == torch.float64:
        return "the logits are float64"
    return MISSING


def why_not_cuda(logits: Tensor, top_k: int) -> str | None:
    """None if it can take these logits, else the reason."""
    if logits.device.type != "cuda":
        return f"the logits are on {logits.device}"
    if logits.dtype == torch.float64:
        return "the logits are float64"
    if top_k > MOST_K:
        return f"top_k is {top_k}; expected up to {MOST_K}"
    return MISSING_CUDA or why_too_old(logits.device)


def label_map_cpu(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[k, H', W']`` and, if asked for, scores alike, on the logits' device."""
    device, logits = logits.device, logits.cpu()
    labels, scores = options.empty(logits.device)
    torch.ops.fastzs.label_map_cpu(
        logits.contiguous(),
        torch.tensor(windows, dtype=torch.int64),
        *options.image_size,
        ACTIVATION_CODES[options.activation],
        None if options.penalty is None else options.penalty.cpu(),
        options.threshold,
        labels,
        scores,
    )
    return labels.to(device), None if scores is None else scores.to(device)


def label_map_cuda(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    options: Options,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[k, H', W']`` and, if asked for, scores alike."""
    labels, scores = options.empty(logits.device)
    torch.ops.fastzs.label_map_cuda(
        logits.contiguous(),
        *tables_of(logits, windows, options),
        options.resized,
        ACTIVATION_CODES[options.activation],
        options.penalty,
        options.threshold,
        labels,
        scores,
    )
    return labels, scores
