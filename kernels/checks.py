"""Checks of arguments that several ops share."""

from collections.abc import Mapping

from torch import Tensor


def check_alike(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors, by their names in messages, have the floating dtype and the device of the first, q."""
    q = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; wanted {q.dtype} as q, a floating dtype")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, q on {q.device}")
