"""Where Triton's kernels run: on a GPU, or on the CPU in Triton's interpreter."""

import functools
import importlib.util
import os

import torch

from .checks import why_too_old

HAS_TRITON = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def architecture(device: torch.device) -> int:
    """Compute capability times ten of the GPU that a kernel is launched on; 0 in the interpreter."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor
    if interpreted():
        return 0
    from triton.runtime.driver import driver  # bench/aot.py: a GPU that is not here

    return driver.active.get_current_target().arch  # pyright: ignore[reportAttributeAccessIssue]


def why_not_triton(what: str, device: torch.device) -> str | None:
    """None if Triton's kernels run on ``device``, else the reason; ``what`` is there, as in "the keys are"."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if device.type == "cpu" and interpreted():
        return None
    if device.type != "cuda":
        return f"{what} on {device}; expected cuda, or cpu with TRITON_INTERPRET=1"
    return why_too_old(device) or _why_broken(device.index)


@torch.compiler.assume_constant_result  # nothing to trace: it runs a kernel
def _why_broken(index: int | None) -> str | None:
    return first_kernel(index)


@functools.cache
def first_kernel(index: int | None) -> str | None:
    """Compile and run a first kernel, once for each GPU of a process; None if that worked, else what it raised.

    Triton may be installed and still not work: it compiles a launcher with a C compiler at run time, which slim images
    lack, and needs a driver that knows its code.
    """
    try:
        from .probe import run

        run(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    except Exception as error:  # whatever it is, the next backend can go on
        message = (str(error).strip() or "no message").splitlines()[0]
        return f"a first kernel failed: {type(error).__name__}: {message}"
    return None
