"""The one way to make a PyTorch operator of a backend: schema, implementation, fake implementation, gradient.

Operators of the compiled library have their schema and implementation already; those in Python :func:`define` them.
Every operator is opaque to torch.compile and torch.export and has a fake implementation, so both go through it.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def define(name: str, schema: str, run: Callable[..., Any]) -> None:
    """Declare ``fastzs::name`` of the given schema, ``"(Tensor x) -> Tensor"``, computed by ``run`` on any device."""
    torch.library.define(f"fastzs::{name}", schema)
    torch.library.impl(f"fastzs::{name}", "CompositeExplicitAutograd")(run)


def lazily(module: str, function: str) -> Callable[..., Any]:
    """``function`` of a module that is imported at the first call: Triton's, which not every machine has."""

    def run(*arguments):
        return getattr(importlib.import_module(module), function)(*arguments)

    return run


def register(
    name: str,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Give ``fastzs::name`` its fake implementation and, where it has one, its gradient."""
    torch.library.register_fake(f"fastzs::{name}", fake)
    if backward is not None:
        torch.library.register_autograd(f"fastzs::{name}", backward, setup_context=setup_context)


def register_backward(op: str, name: str, fake: Callable[..., Any]) -> None:
    """Give ``fastzs::name``, which computes the gradient of ``op``, its fake implementation and no second derivative.

    Without one, autograd would leave this part out of a second derivative and say nothing.
    """

    def refuse(ctx, *grads: Tensor):
        raise RuntimeError(f"{op} is differentiable once in this backend; its second derivative needs impl='reference'")

    register(name, fake, refuse)
