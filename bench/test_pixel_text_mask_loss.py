"""pixel_text_mask_loss, forward and backward, against normalising, multiplying and a loss at full resolution.

    pytest bench/test_pixel_text_mask_loss.py --benchmark-only                         # the CPU
    pytest bench/test_pixel_text_mask_loss.py --benchmark-only -m "full and not gpu"   # a larger step
    pytest bench/test_pixel_text_mask_loss.py --benchmark-only -m gpu                  # a GPU

The step is what a head on frozen features and fixed text trains with: the gradients of features and text. Rivals are
judged, timed in turn and measured for memory as :mod:`bench.rivals` says; "faster" is relative to the first one.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.ops import mask_loss, pixel_text_logits, pixel_text_mask_loss

from .baselines import mask_loss as full
from .rivals import Contest, Rival, compete

SCALE = 10.0
SHAPES = [  # B, C, sides of map and target
    pytest.param((1, 15, 32, 512), marks=pytest.mark.quick),
    pytest.param((2, 60, 32, 512), marks=pytest.mark.full),
]
GPU_SHAPES = [(16, 150, 32, 512), (2, 156, 32, 512)]
WIDTH = 512
OPERATIONS = 59  # of mask_loss, for a pixel and class; see bench/test_mask_loss.py


def logits_of(features: Tensor, text: Tensor) -> Tensor:
    """Unit features, then the product, as published."""
    unit = F.normalize(features, dim=1)
    return SCALE * torch.einsum("bdhw,cd->bchw", unit, text)


def published(features: Tensor, text: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return full.published(logits_of(features, text), target)


def one_graph(features: Tensor, text: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return full.one_graph(logits_of(features, text), target)


def apart(features: Tensor, text: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The two ops one after the other: what doing both in one saves."""
    return mask_loss(pixel_text_logits(features, text, SCALE), target)


def ours(features: Tensor, text: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return pixel_text_mask_loss(features, text, target, SCALE)


FUNCTIONS: dict[str, Callable] = {
    "published": published,
    "torch.compile": torch.compile(one_graph, fullgraph=True),
    "fastzs, two ops": apart,
    "fastzs": ours,
}


def step(function: Callable) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """Loss and backward: the gradients of features and text."""

    def run(features: Tensor, text: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        focal, dice = function(features, text, target)
        return torch.autograd.grad(100 * focal + dice, (features, text))

    return run


def contest(shape: tuple[int, int, int, int], device: str) -> Contest:
    B, C, h, H = shape

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        features, text = (
            torch.randn(B, WIDTH, h, h, generator=g),
            F.normalize(torch.randn(C, WIDTH, generator=g), dim=1),
        )
        target = torch.randint(0, C, (B, 8, 8), generator=g).repeat_interleave(H // 8, 1).repeat_interleave(H // 8, 2)
        target[:, :, -H // 16 :] = 255
        return (
            features.to(device, dtype).requires_grad_(),
            text.to(device, dtype).requires_grad_(),
            target.to(torch.uint8).to(device),
        )

    return Contest(
        f"pixel_text_mask_loss forward + backward, B {B}, C {C}, {WIDTH}x{h}x{h} -> {H}x{H}, {device}",
        device,
        inputs,
        {name: Rival(step(function)) for name, function in FUNCTIONS.items()},
        step(one_graph),
        nbytes=2 * 4 * B * WIDTH * h * h + B * H * H,
        operations=6 * B * C * WIDTH * h * h + OPERATIONS * B * C * H * H,
        info={"op": "pixel_text_mask_loss", "classes": C, "height": H, "batch": B},
    )


@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu(benchmark, shape, rival):
    compete(benchmark, rival, contest, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark, shape, rival):
    compete(benchmark, rival, contest, shape, "cuda")
