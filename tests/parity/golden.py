"""One golden file and the comparison with it."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = (torch.float32, torch.float64)  # every case is computed in both

# Relative errors allowed, of the largest magnitude in the reference.
FORWARD_FP32 = 1e-5
GRADIENT_FP32 = 1e-4
FP64 = 1e-10
FP64_STORED_AS_FP32 = 1e-6
# Scores closer than this may swap places in a label map: the rounding of fp32, and of reference scores near it.
TIE = 1e-5


@dataclass(frozen=True)
class Check:
    """One comparison. ``tensor`` is the reference's name in the file, ``run`` the dtype we computed in."""

    tensor: str
    run: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Golden:
    """A golden file.

    Attributes:
        case: its name, as the header gives it.
        config: sizes and settings of the official run.
        meaning: one sentence for each tensor.
        tensors: everything in the file.
    """

    path: Path
    case: str
    config: dict
    meaning: dict[str, str]
    tensors: dict[str, Tensor] = field(repr=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``prefix``, by the rest of the name."""
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def beside(self, prefix: str, mine: str) -> "Golden":
        """The file in the same folder of case ``prefix`` plus the suffix that follows ``mine`` in this case."""
        wanted = prefix + self.case.removeprefix(mine)
        for path in (self.path.with_name(f"{wanted}.safetensors"), *sorted(self.path.parent.glob("*.safetensors"))):
            if path.exists() and _meta(path)["case"] == wanted:
                return read(path)
        raise FileNotFoundError(f"{self.path}: needs the file of case {wanted} beside it")

    def subsample(self, name: str, value: Tensor) -> Tensor:
        """What was kept of a spatial map [..., H, W]: the slices are in the tensor's description."""
        found = re.search(r"subsample \[([^\]]*)\]", self.meaning[name])
        if found is None:
            return value
        rows, columns = (
            slice(*(int(n) if n.strip() else None for n in part.split(":"))) for part in found[1].split(",")
        )
        return value[..., rows, columns]

    def check(self, name: str, value: Tensor, *, gradient: bool = False, scale: float | None = None) -> Check:
        """Compare ``value``, which was computed in its own dtype, with the tensor ``name``.

        The error is max |value - reference| / max |reference|, or over ``scale`` where the reference's own
        magnitude means nothing (a gradient that is zero but for rounding). A map is subsampled as the reference
        was, and cut to its batch. Integers and booleans must be equal.
        """
        reference = self.tensors[name]
        value = self.subsample(name, value.detach())
        if value.ndim == reference.ndim and value.ndim > 1:
            value = value[: len(reference)]
        run = "fp64" if value.dtype == torch.float64 else "fp32" if value.dtype == torch.float32 else "exact"
        if value.shape != reference.shape:
            print(f"{self.case} {name}: ours is {list(value.shape)}, the reference {list(reference.shape)}")
            return Check(name, run, math.nan, 0.0)
        if run == "exact":
            return Check(name, run, (value.long() != reference.long()).double().mean().item(), 0.0)
        if run == "fp64":
            tolerance = FP64 if reference.dtype == torch.float64 else FP64_STORED_AS_FP32
        else:
            tolerance = GRADIENT_FP32 if gradient else FORWARD_FP32
        scale = scale or reference.abs().max().item() or 1.0
        return Check(name, run, (value.double() - reference.double()).abs().max().item() / scale, tolerance)

    def checks(self, name: str, value: Tensor, **options) -> Iterator[Check]:
        """:meth:`check` of the tensor ``name`` and of its subsample ``name_sub``, whichever the file holds."""
        for held in (name, f"{name}_sub"):
            if held in self:
                yield self.check(held, value, **options)

    def check_labels(self, name: str, scores: Tensor, labels: Tensor | None = None) -> Check:
        """Compare ``labels`` (the best of ``scores`` if omitted) with those under ``name``; ties may differ.

        The error is the share of pixels with another label although the two labels' ``scores`` (classes in
        dimension 1 of [B, C, ...]) are not within :data:`TIE` of each other.
        """
        labels = scores.argmax(1) if labels is None else labels
        reference, labels = self.tensors[name].long().unsqueeze(1), labels.long().unsqueeze(1)
        gap = (scores.gather(1, reference) - scores.gather(1, labels)).abs()
        wrong = (labels != reference) & (gap > TIE)
        return Check(name, "fp64" if scores.dtype == torch.float64 else "fp32", wrong.double().mean().item(), 0.0)


def _meta(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {})["meta"])


@cache
def read(path: Path) -> Golden:
    """Read one golden file.

    Raises:
        ValueError: the file is not one.
    """
    try:
        meta = _meta(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        return Golden(path, meta["case"], meta["config"], meta["tensors"], tensors)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path}: not a golden file: {error}") from error
