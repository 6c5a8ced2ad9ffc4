"""Where Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter."""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(what: str, device: torch.device) -> str | None:
    """None if Triton's kernels run on ``device``, else the reason; ``what`` is there, as in "the keys are"."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"{what} on {device}; wanted cuda, or cpu with TRITON_INTERPRET=1"
    return None
