"""The one switch between backends.

An op offers some of :data:`BACKENDS`; for given inputs each of them either runs or has a reason why it cannot.
``impl="auto"`` takes the first that runs, an explicit ``impl`` runs or raises with the reason, and the
environment variable ``FASTZS_IMPL`` sets a preference for the whole program: what it names is taken by every op
that has it and can run it, all other calls go on as ``auto``.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# reference: the specification; torch: PyTorch's own operators; split, xformers: attention by groups of rows; cpu, cuda:
# the compiled library; triton.
BACKENDS = ("reference", "torch", "split", "xformers", "cpu", "triton", "cuda")


class Choice(NamedTuple):
    """What :func:`choose` decided for one call with ``impl="auto"``."""

    op: str
    backend: str
    reasons: dict[str, str | None]


_watchers: list[list[Choice]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Choice]]:
    """Collect the choices made meanwhile, for ``fastzs doctor`` and tests."""
    choices: list[Choice] = []
    _watchers.append(choices)
    try:
        yield choices
    finally:
        _watchers.remove(choices)


def choose(op: str, impl: str, reasons: Mapping[str, str | None]) -> str:
    """Name the backend that computes one call of ``op``.

    Args:
        op: name of the op, for messages.
        impl: ``"auto"`` or one of :data:`BACKENDS`.
        reasons: for each backend of the op, best first, ``None`` if it can run on the inputs at hand, else why not.

    Raises:
        ValueError: ``impl`` (or ``FASTZS_IMPL``) is not a known name.
        RuntimeError: the backend asked for is not offered by the op or cannot run on the inputs.
    """
    if impl not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: impl={impl!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    if impl != "auto":
        reason = reasons.get(impl, "the op has no such backend")
        if reason is not None:
            raise RuntimeError(f"{op}: impl={impl!r} cannot run: {reason}")
        return impl
    preferred = os.environ.get("FASTZS_IMPL", "auto")
    if preferred not in ("auto", *BACKENDS):
        raise ValueError(f"FASTZS_IMPL={preferred!r} is unknown; use 'auto' or one of {', '.join(BACKENDS)}")
    for backend in (preferred, *reasons):
        if backend in reasons and reasons[backend] is None:
            for choices in _watchers:
                choices.append(Choice(op, backend, dict(reasons)))
            return backend
    raise RuntimeError(f"{op}: no backend can run: " + "; ".join(f"{name}: {why}" for name, why in reasons.items()))
