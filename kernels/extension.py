"""The compiled library of ``csrc/``: loads it, and says what it has or why it is not there."""

import functools
import json
from pathlib import Path

import torch

import fastzs

FOLDER = Path(fastzs.__file__).parent
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


@functools.cache
def why_not_loaded() -> str | None:
    """Load the library once; None if that worked, else the reason."""
    libraries = sorted(FOLDER.glob("_C.*"))
    if not libraries:
        return f"the extension is not built ({build_report().get('cpu', 'no build was tried')})"
    try:
        torch.ops.load_library(str(libraries[-1]))
    except OSError as error:
        return f"{libraries[-1].name} does not load: {error}"
    return None


@functools.cache
def build_report() -> dict:
    """What the build wrote down: ``torch`` (its version), ``cpu`` and ``cuda`` ("built", or why not); or empty."""
    path = FOLDER / "_build.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def why_missing(op: str, device: str) -> str | None:
    """None if the library computes ``fastzs::op`` on ``device`` ("cpu" or "cuda"), else the reason."""
    reason = why_not_loaded()
    if reason is not None:
        return reason
    name = f"fastzs::{op}"
    if not hasattr(torch.ops.fastzs, op):
        return f"the built extension has no {op}; build it again"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(name, DISPATCH_KEYS[device]):
        built = build_report().get(device, "unknown")
        return f"the built extension has no {device} part of {op} ({device} part: {built})"
    return None
