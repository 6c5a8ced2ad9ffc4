"""pixel_text_logits, forward and backward, against normalising a copy of the features first.

    pytest bench/test_pixel_text_logits.py --benchmark-only                         # the CPU
    pytest bench/test_pixel_text_logits.py --benchmark-only -m "full and not gpu"   # the other shapes, and bf16
    pytest bench/test_pixel_text_logits.py --benchmark-only -m gpu                  # a GPU

Rivals are judged, timed in turn and measured for memory as :mod:`bench.rivals` says. "tokens" are features that lie
channel by channel, as a vision transformer gives them; "map" pixel by pixel.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.ops import pixel_text_logits

from .rivals import Contest, Rival, compete

# B, D, C, side, layout
HEADLINE = (1, 512, 156, 32, "map")
CPU = [pytest.param((1, 512, 15, 32, "map"), "fp32", marks=pytest.mark.quick), (HEADLINE, "fp32")]
CPU += [((B, 512, 156, side, "map"), "fp32") for B, side in ((1, 64), (4, 32))]
CPU += [((1, 512, 847, 32, "map"), "fp32"), ((1, 512, 156, 32, "tokens"), "fp32")]
CPU += [
    pytest.param(shape, dtype, marks=pytest.mark.full)
    for dtype in ("fp32", "bf16")
    for C, side, layout in itertools.product((15, 20, 156, 847), (32, 64), ("map", "tokens"))
    if ((shape := (1, 512, C, side, layout)), dtype) not in CPU and (C, side, layout, dtype) != (15, 32, "map", "fp32")
]
GPU_SHAPES = [(16, 512, 150, 32, "map"), (2, 512, 847, 32, "tokens"), (8, 768, 156, 40, "map")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCALE = 100.0


def published(features: Tensor, text: Tensor) -> Tensor:
    return SCALE * torch.einsum("bdhw,cd->bchw", F.normalize(features, dim=1), text)


def ours(impl: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda features, text: pixel_text_logits(features, text, SCALE, impl)


FUNCTIONS = {
    "cpu": {
        "published": published,
        "torch.compile": torch.compile(published),
        "fastzs reference": ours("reference"),
        "fastzs": ours("auto"),
    },
    "cuda": {
        "published": published,
        "torch.compile": torch.compile(published),
        "fastzs reference": ours("reference"),
        "fastzs Triton": ours("triton"),
        "fastzs CUDA": ours("cuda"),
    },
}


def step(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    def run(features: Tensor, text: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        out = function(features, text.detach())
        return out.detach(), *torch.autograd.grad(out, features, weight.detach())

    return run


def contest(shape: tuple, dtype: str, device: str) -> Contest:
    B, D, C, side, layout = shape

    def inputs(seed: int, of: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        features = torch.randn(B, D, side, side, generator=g)
        if layout == "tokens":
            features = features.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        text = F.normalize(torch.randn(C, D, generator=g), dim=1)
        weight = torch.randn(B, C, side, side, generator=g)
        return features.to(device, of).requires_grad_(), text.to(device, of), weight.to(device, of)

    size = DTYPES[dtype].itemsize
    return Contest(
        f"pixel_text_logits forward + backward, B {B}, D {D}, C {C}, {side}x{side}, {layout}, {dtype}, {device}",
        device,
        inputs,
        {name: Rival(step(function), DTYPES[dtype]) for name, function in FUNCTIONS[device].items()},
        step(published),
        nbytes=size * (3 * B * D + 2 * B * C) * side * side,
        operations=4 * B * C * D * side * side,
        info={
            "op": f"pixel_text_logits, {layout}",
            "classes": C,
            "height": side,
            "batch": B,
            "headline": shape == HEADLINE and dtype == "fp32",
        },
        seconds=2.0,
    )


@pytest.mark.parametrize("rival", FUNCTIONS["cpu"])
@pytest.mark.parametrize(("shape", "dtype"), CPU, ids=str)
def test_cpu(benchmark, shape, dtype, rival):
    compete(benchmark, rival, contest, shape, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", FUNCTIONS["cuda"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark, shape, dtype, rival):
    compete(benchmark, rival, contest, shape, dtype, "cuda")
