"""One or two linear layers with what stands around them, for inference on CPUs, weights packed once."""

import torch
from torch import Tensor

from fastzs.trace import traced

from ..dispatch import choose
from . import compiled
from .reference import ACTIVATIONS, packed_linear_reference
from .weights import PackedNorm, PackedWeight


@traced("ops.packed_linear")
def packed_linear(
    x: Tensor,  # [..., inputs]
    first: PackedWeight,
    second: PackedWeight | None = None,
    *,
    activation: str = "none",
    before: PackedNorm | None = None,
    residual: Tensor | None = None,  # [..., outputs]
    after: PackedNorm | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:  # [..., outputs]
    """``after(residual + second(activation(first(before(x)))))``, each part but ``first`` being left out if not given.

    A block of rows goes through everything while it lies in the caches. With int8 weights the rows that enter a product
    are rounded to bytes: a row's largest magnitude is 127, so every row has a scale of its own, and sums are exact.
    A row of zeros stays one. With bf16 weights rows are rounded to bf16. A row with a number that is not finite gives
    NaN with int8, and what the formula gives otherwise.

    Args:
        x: fp32 or bf16.
        first, second: from :func:`fastzs.kernels.packed_linear.weights.pack_weight`, of one precision.
        activation: "none", "relu", "quick_gelu" (x sigmoid(1.702 x)), "gelu" (exact) or "gelu_tanh".
        before, after: layer norms, from ``pack_norm``.
        residual: in the dtype of the result.
        dtype: of the result, fp32 or bf16; that of x by default, and another with bf16 weights only.
        impl: backend, see :mod:`fastzs.kernels.dispatch`: ``"cpu"`` or ``"reference"``, which computes in fp64.

    Raises:
        ValueError: shapes, dtypes or precisions do not fit each other; unknown activation.
        RuntimeError: ``impl`` cannot run here.
    """
    last = second or first
    if x.ndim == 0 or x.shape[-1] != first.inputs:
        raise ValueError(f"packed_linear: expected x [..., {first.inputs}], got {list(x.shape)}")
    if second is not None and (second.inputs != first.outputs or second.panels.dtype != first.panels.dtype):
        raise ValueError(
            f"packed_linear: expected a second layer of {first.outputs} inputs in {first.panels.dtype}, "
            f"got {second.inputs} in {second.panels.dtype}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"packed_linear: activation={activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    for name, norm, channels in (("before", before, first.inputs), ("after", after, last.outputs)):
        if norm is not None and norm.table.shape != (2, channels):
            raise ValueError(f"packed_linear: expected {name} [2, {channels}], got {list(norm.table.shape)}")
    dtype = dtype or x.dtype
    if dtype != x.dtype and first.panels.dtype != torch.bfloat16:
        raise ValueError(f"packed_linear: weights in {first.panels.dtype} give {x.dtype} as x is, not {dtype}")
    shape = (*x.shape[:-1], last.outputs)
    if residual is not None and (residual.shape != shape or residual.dtype != dtype):
        raise ValueError(
            f"packed_linear: expected residual {list(shape)} in {dtype}, got {list(residual.shape)} in {residual.dtype}"
        )
    backend = choose("packed_linear", impl, {"cpu": compiled.why_not_cpu(x, residual, dtype), "reference": None})
    run = compiled.run if backend == "cpu" else packed_linear_reference
    rows = x.reshape(-1, first.inputs).contiguous()
    added = residual if residual is None else residual.reshape(-1, last.outputs).contiguous()
    out = run(rows, first, second, activation, before, added, after, dtype)
    # no view of it for autograd: inside a custom Function nobody could add to a view in place
    return torch.ops.aten._unsafe_view(out, shape)
