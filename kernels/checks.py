"""Checks of arguments and devices that several ops share."""

from collections.abc import Mapping

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability: what Triton supports, and what csrc/*.cu is compiled for unless told otherwise


def why_too_old(device: torch.device) -> str | None:
    """Why none of the package's own kernels run on a CUDA device, or None; PyTorch's run on older ones too."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    return f"{device} has compute capability {capability[0]}.{capability[1]}; expected {OLDEST[0]}.{OLDEST[1]} or later"


def check_alike(op: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise unless all tensors, by their names in messages, have the floating dtype and the device of the first, q."""
    q = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; expected {q.dtype} as q, a floating dtype")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, q on {q.device}")
