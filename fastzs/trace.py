"""Named ranges for NVIDIA's profilers: on with ``FASTZS_NVTX=1``, otherwise they cost a function call."""

import contextlib
import os
from contextlib import AbstractContextManager

_NOTHING = contextlib.nullcontext()


def _annotate():
    """``nvtx.annotate`` where ranges are asked for, else None.

    The nvtx package is used because ``torch.cuda.nvtx`` raises where torch was built without CUDA.
    """
    if os.environ.get("FASTZS_NVTX") != "1":
        return None
    try:
        import nvtx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("FASTZS_NVTX=1 needs the nvtx package: pip install nvtx") from error
    return nvtx.annotate


_ANNOTATE = _annotate()


def span(name: str) -> AbstractContextManager:
    """A range called ``name`` in the domain "fastzs", for ``with``; without ``FASTZS_NVTX=1`` a no-op.

    The variable is read once, when this module is imported.
    """
    return _NOTHING if _ANNOTATE is None else _ANNOTATE(name, domain="fastzs")
