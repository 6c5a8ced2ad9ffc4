"""``packed_linear`` on the CPU: the operator ``fastzs::packed_linear`` (csrc/packed_linear.cpp), no gradient."""

import platform

import torch
from torch import Tensor

from .. import library
from ..extension import why_missing
from .weights import PackedNorm, PackedWeight

# At import, not in a call: torch.compile cannot trace the loading of a library.
MISSING = why_missing("packed_linear", "cpu") or why_missing("packed_linear_backward", "cpu")
NUMBERS = {"none": 0, "relu": 1, "quick_gelu": 2, "gelu": 3, "gelu_tanh": 4}  # as in csrc/packed_linear.cpp


def why_not_cpu(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> str | None:
    """None if it can take them and give a result in ``dtype``, else the reason."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    for what, kind in (("x is", x.dtype), ("the result is wanted in", dtype)):
        if kind not in (torch.float32, torch.bfloat16):
            return f"{what} {kind}; expected float32 or bfloat16"
    if torch.is_grad_enabled() and (x.requires_grad or (residual is not None and residual.requires_grad)):
        return "it has no gradient"
    return MISSING


def why_int8_is_slow() -> str | None:
    """None if this processor multiplies bytes faster than floats, else the reason."""
    if MISSING is not None:
        return MISSING
    can = torch.cpu.get_capabilities()
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"int8 products are written for x86 processors with VNNI, this one is {platform.machine()}"
    if not (can.get("avx512_vnni") or can.get("avx_vnni")):
        return "this processor has no VNNI instructions: int8 products would be slower than fp32's"
    return None


def run(
    x: Tensor,  # [rows, inputs], contiguous
    first: PackedWeight,
    second: PackedWeight | None,
    activation: str,
    before: PackedNorm | None,
    residual: Tensor | None,
    after: PackedNorm | None,
    dtype: torch.dtype,
) -> Tensor:
    return torch.ops.fastzs.packed_linear(
        x,
        before and before.table,
        before.eps if before else 0.0,
        first.panels,
        first.columns,
        first.outputs,
        NUMBERS[activation],
        second and second.panels,
        second and second.columns,
        second.outputs if second else 0,
        residual,
        after and after.table,
        after.eps if after else 0.0,
        dtype == torch.float32,
    )


def _fake(
    x, before, eps, weight, columns, outputs, activation, weight2, columns2, outputs2, residual, after, eps2, wide
):
    dtype = torch.float32 if wide else torch.bfloat16
    return x.new_empty(x.shape[0], outputs if weight2 is None else outputs2, dtype=dtype)


if MISSING is None:
    library.register("packed_linear", _fake)
