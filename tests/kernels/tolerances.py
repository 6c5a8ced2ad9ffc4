"""The one table of tolerances: how far a result may lie from the fp64 reference, by formula.

A sum of ``n`` products in a dtype with step ``eps`` is off by at most ``c * sqrt(n) * eps`` of the largest magnitude
that enters it, for roundings are as good as independent; a result stored in bf16 or fp16 is off by half a step more
for each time that it, or a value it is made of, is stored. No bound depends on what a processor, a BLAS or a compiler
happened to reach. Attention, whose softmax amplifies errors of the scores, has a module of its own, attention_bounds.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Rule(NamedTuple):
    """What bounds one op's error.

    Attributes:
        c: steps for each square root of a term; products, exponentials and divisions that follow the sum included.
        terms: n, the longest sum in the tests.
        roundings: how often a value is stored in bf16 or fp16 on its way to the result.
    """

    c: float
    terms: int
    roundings: int = 1


TOLERANCES = {
    "pixel_text_logits": Rule(c=0.5, terms=768, roundings=2),  # unit features and the result
    "pixel_text_logits.grad": Rule(c=0.5, terms=768, roundings=3),  # the upstream gradient, unit features, the result
    "pixel_text_mask_loss.grad": Rule(c=1.0, terms=1024, roundings=4),
    "key_smoothing": Rule(c=0.5, terms=1024),
    "key_smoothing.grad": Rule(c=0.5, terms=1024),
    "mask_loss": Rule(c=0.5, terms=1024),
    "mask_loss.grad": Rule(c=0.5, terms=1024),
}


def allowed(op: str, dtype: torch.dtype) -> tuple[float, float]:
    """Largest and root-mean-square error, as shares of the reference's largest magnitude.

    Errors between -a and a that are all as likely have the root mean square a / sqrt(3).
    """
    rule = TOLERANCES[op]
    step = torch.finfo(f64 if dtype == f64 else f32).eps
    largest = rule.c * math.sqrt(rule.terms) * step + rule.roundings * stored(dtype)
    return largest, largest / math.sqrt(3)


def stored(dtype: torch.dtype) -> float:
    """Relative error of storing an fp32 result in ``dtype``."""
    return torch.finfo(dtype).eps / 2 if dtype in (bf16, f16) else 0.0


def errors(actual: Tensor, reference: Tensor, size: float = 0.0) -> tuple[float, float]:
    """Largest and root-mean-square error as shares of the reference's largest magnitude, at least ``size``.

    Where both are 0 the errors are taken as they are.
    """
    size = max(reference.abs().max().item(), size) or 1.0
    off = (actual.detach().double() - reference.detach().double()) / size
    return off.abs().max().item(), off.square().mean().sqrt().item()


def assert_close(op: str, actual: Tensor, reference: Tensor, size: float = 0.0) -> None:
    """Fail unless ``actual`` is finite, shaped as ``reference`` and within the table's entry for its dtype."""
    assert actual.shape == reference.shape, f"{op}: expected shape {list(reference.shape)}, got {list(actual.shape)}"
    assert actual.isfinite().all(), f"{op}: result is not finite"
    if reference.numel() == 0:
        return
    bounds = allowed(op, actual.dtype)
    seen = errors(actual, reference, size)
    assert all(a <= b for a, b in zip(seen, bounds, strict=True)), f"{op}: errors (max, rms) {seen}, allowed {bounds}"
