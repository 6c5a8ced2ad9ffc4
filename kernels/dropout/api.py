"""Dropout, on CPUs in one pass over memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.trace import traced

from ..dispatch import choose
from .compiled import why_not_cpu
from .reference import dropout_reference


@traced("ops.dropout")
def dropout(x: Tensor, rate: float, *, relu: bool = False, impl: str = "auto") -> Tensor:
    """``F.dropout(x, rate)``, or with ``relu`` ``F.dropout(F.relu(x), rate)``, of x ``[..., C]``; the same shape.

    On CPUs PyTorch draws a number for each element, one after the other, and keeps a mask: 5 passes over memory. The
    compiled library finds the dropped elements again in backward from a seed, the one number drawn from torch's default
    generator, and keeps the result only where there is a relu: 2 passes.

    Args:
        x: any floating dtype; fp32, bf16 or fp16 for ``"cpu"``.
        rate: share of the elements to drop, 0 to below 1; the others are multiplied by ``1 / (1 - rate)``.
        impl: backend, see :mod:`fastzs.kernels.dispatch`: ``"cpu"``, differentiable once; ``"torch"``, PyTorch's own,
            which auto takes on other devices, for other dtypes and for a rate of 0; or ``"reference"``, whose integers
            take 8 bytes an element. ``"cpu"`` and ``"reference"`` drop the same elements for one state of the
            generator, PyTorch's own drops others.

    Raises:
        TypeError: x is not floating.
        ValueError: x has no dimension, ``rate`` is out of range.
        RuntimeError: ``impl`` cannot run here.
    """
    if not x.is_floating_point():
        raise TypeError(f"dropout: x is {x.dtype}; expected a floating dtype")
    if x.ndim == 0:
        raise ValueError("dropout: x has no dimension; expected [..., C]")
    if not 0 <= rate < 1:
        raise ValueError(f"dropout: rate={rate}; expected 0 to below 1")
    reasons = {"cpu": why_not_cpu(x), "torch": None, "reference": None}
    if rate == 0:  # PyTorch gives x itself
        reasons = {"torch": None, **reasons}
    backend = choose("dropout", impl, reasons)
    if backend == "torch":
        return F.dropout(F.relu(x) if relu else x, rate)
    seed = torch.randint(1 << 62, ())
    if backend == "cpu":
        return torch.ops.fastzs.dropout(x.contiguous(), relu, float(rate), seed)
    return dropout_reference(x, relu, rate, seed)
