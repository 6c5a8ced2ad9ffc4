"""Named ranges for profilers: NVIDIA's with ``FASTZS_NVTX=1``, torch's inside :func:`torch_ranges`, otherwise none.

Names are dotted, from the general to the particular (a slash has a meaning of its own in ncu's filters);
docs/profiling.md lists them all, and they stay as they are. While a function is compiled or exported there are no
ranges, so that they never break a graph.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
_NOTHING = contextlib.nullcontext()


def _nvtx() -> Callable[[str], AbstractContextManager] | None:
    """What opens an NVTX range where these are asked for, else None.

    The nvtx package is used because ``torch.cuda.nvtx`` raises where torch was built without CUDA.
    """
    if os.environ.get("FASTZS_NVTX") != "1":
        return None
    try:
        import nvtx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("FASTZS_NVTX=1 needs the nvtx package: pip install nvtx") from error
    return functools.partial(nvtx.annotate, domain="fastzs")


def _torch_range(name: str) -> AbstractContextManager:
    return torch.profiler.record_function(f"fastzs.{name}")


_open: Callable[[str], AbstractContextManager] | None = _nvtx()


def span(name: str) -> AbstractContextManager[Any]:
    """A range called ``name``, for ``with``; a no-op unless ranges are on.

    The variable is read once, when this module is imported.
    """
    if _open is None or torch.compiler.is_compiling():
        return _NOTHING
    return _open(name)


def traced(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every call of the function is a range called ``name``."""

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            if _open is None:
                return function(*args, **kwargs)
            with span(name):
                return function(*args, **kwargs)

        return within

    return wrap


@contextlib.contextmanager
def torch_ranges() -> Iterator[None]:
    """Ranges are torch's meanwhile: ``torch.profiler`` shows them as ``fastzs.NAME``, on any device."""
    global _open
    before, _open = _open, _torch_range
    try:
        yield
    finally:
        _open = before
