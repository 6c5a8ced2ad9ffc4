"""``label_map`` in the compiled library: on the CPU by csrc/label_map.cpp, on a GPU by csrc/label_map_cuda.cu."""

import math

import torch
from torch import Tensor

from ..extension import why_missing
from .tables import build_tables

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("label_map_cpu", "cpu")
MISSING_CUDA = why_missing("label_map_cuda", "cuda")
MOST_K = 8  # of the CUDA kernel: the best are kept in registers
ACTIVATION_CODES = {"sigmoid": 0, "softmax": 1, "none": 2}


def why_not_cpu(logits: Tensor) -> str | None:
    """None if it can take these logits, else the reason."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device}"
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
        return f"top_k is {top_k}; wanted up to {MOST_K}"
    return MISSING_CUDA


def label_map_cpu(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    picture_size: tuple[int, int],
    output_size: tuple[int, int],
    activation: str,
    penalty: Tensor | None,  # [C]
    threshold: float | None,
    background: int,
    top_k: int,
    resize: str,
    label_dtype: torch.dtype,
    return_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[k, H', W']`` and, if asked for, scores alike."""
    labels = torch.empty((top_k, *output_size), dtype=label_dtype)
    scores = torch.empty((top_k, *output_size)) if return_scores else None
    torch.ops.fastzs.label_map_cpu(
        logits.contiguous(),
        torch.tensor(windows, dtype=torch.int64),
        *picture_size,
        resize == "single",
        ACTIVATION_CODES[activation],
        penalty,
        -math.inf if threshold is None else threshold,
        background,
        labels,
        scores,
    )
    return labels, scores


def label_map_cuda(
    logits: Tensor,  # [W, C, h, w]
    windows,  # W x (top, left, height, width)
    picture_size: tuple[int, int],
    output_size: tuple[int, int],
    activation: str,
    penalty: Tensor | None,  # [C]
    threshold: float | None,
    background: int,
    top_k: int,
    resize: str,
    label_dtype: torch.dtype,
    return_scores: bool,
) -> tuple[Tensor, Tensor | None]:
    """Labels ``[k, H', W']`` and, if asked for, scores alike."""
    grid = picture_size if resize == "two-stage" else output_size
    labels = torch.empty((top_k, *output_size), dtype=label_dtype, device=logits.device)
    scores = torch.empty((top_k, *output_size), device=logits.device) if return_scores else None
    torch.ops.fastzs.label_map_cuda(
        logits.contiguous(),
        *build_tables(logits, windows, picture_size, grid, output_size),
        tuple(grid) != tuple(output_size),
        ACTIVATION_CODES[activation],
        penalty,
        -math.inf if threshold is None else threshold,
        background,
        labels,
        scores,
    )
    return labels, scores
