"""mask_loss, forward and backward, against what PyTorch can do.

    pytest bench/test_mask_loss.py --benchmark-only                         # the CPU
    pytest bench/test_mask_loss.py --benchmark-only -m "full and not gpu"   # the other shapes, an hour
    pytest bench/test_mask_loss.py --benchmark-only -m gpu                  # a GPU

Rivals are judged, timed in turn and measured for memory as :mod:`bench.rivals` says; "faster" is relative to the first
one. Rivals whose full-resolution tensors would take over half the memory, or in parts too much time, are left out: the
largest shapes have ours only.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fastzs.ops import mask_loss

from .baselines.mask_loss import chunked, one_graph, published, some_classes
from .machine import total_memory
from .rivals import Contest, Rival, compete, largest_error

# B, C, side of the logits, side of the target
QUICK, HEADLINE = (1, 15, 32, 512), (2, 156, 32, 512)
ALL = itertools.product((2, 8, 16), (15, 156, 847), ((32, 512), (40, 640)))
CPU_SHAPES = [pytest.param(QUICK, marks=pytest.mark.quick)]
CPU_SHAPES += [pytest.param(shape, marks=pytest.mark.full) for B, C, sides in ALL if (shape := (B, C, *sides)) != QUICK]
GPU_SHAPES = [(16, 150, 32, 512), (2, 156, 32, 512), (8, 156, 40, 640), (16, 15, 32, 512), (2, 847, 32, 512)]
FULL_TENSORS = 12  # of fp32 that the published way holds at its peak
MOST_BYTES = {"cpu": total_memory() / 2, "cuda": 1e11}

# The least arithmetic of a pixel and class that is absent from the image, as csrc/mask_loss.cpp does it (a multiply-add
# is two): interpolate 2, magnitude and sign 2, exponential 18, sigmoid of both signs 5, logarithm 15, softplus 2,
# focal value 2, its slope 4, p (1 - p) 1, two sums 2, two gradients and their weighted sums 6.
OPERATIONS = 59
JUDGED = 2, 8  # images and classes whose gradient is compared with fp64

FUNCTIONS: dict[str, Callable] = {
    "published": published,
    "torch.compile": torch.compile(published),
    "torch.compile, one graph": torch.compile(one_graph, fullgraph=True),
    "chunked": chunked,
    "fastzs": mask_loss,
    "fastzs bf16": mask_loss,
}


def scene(seed: int, shape: tuple, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits, and a target of rectangles (a few classes an image, as in real scenes) with an ignored border."""
    B, C, h, H = shape
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, C, h, h, generator=g) * 2 - 4
    target = torch.empty(B, H, H, dtype=torch.uint8 if C < 256 else torch.int16)
    for image in target:
        image.fill_(int(torch.randint(0, C, (), generator=g)))
        for _ in range(8):
            y, x = torch.randint(0, H, (2,), generator=g).tolist()
            image[y : y + H // 3, x : x + H // 3] = torch.randint(0, C, (), generator=g)
        image[:, -H // 16 :] = 255
    return logits.to(device, dtype).requires_grad_(), target.to(device)


def gradient(function: Callable) -> Callable[[Tensor, Tensor], Tensor]:
    """The whole step as a function: loss, backward, the gradient of the logits."""

    def step(logits: Tensor, target: Tensor) -> Tensor:
        focal, dice = function(logits, target)
        (grad,) = torch.autograd.grad(100 * focal + dice, logits)
        return grad

    return step


def right(logits: Tensor, target: Tensor) -> Tensor:
    """The gradient of a few images and classes in fp64: a class depends on others through the number of masks only."""
    images, classes = JUDGED
    masks = sum(len(image[image != 255].unique()) for image in target)
    part = logits[:images, :classes].detach().requires_grad_()
    focal, dice, _ = some_classes(part, target[:images], 0)
    (grad,) = torch.autograd.grad((100 * focal + dice) / masks, part)
    return grad


def why_not(name: str, shape: tuple, device: str) -> str | None:
    """Why a rival is left out, or None."""
    B, C, _, H = shape
    needed, most = FULL_TENSORS * 4 * B * C * H * H, MOST_BYTES[device]
    if "fastzs" not in name and needed > most:
        return f"at full resolution that is {needed / 1e9:.0f} GB of tensors; {most / 1e9:.0f} at most"
    if (name, shape, device) == ("torch.compile", HEADLINE, "cpu"):
        return "slower than in one graph wherever both were timed; here it would take a minute"
    return None


def error(got: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    images, classes = JUDGED
    return largest_error([grad[:images, :classes] for grad in got], right)


def contest(shape: tuple, device: str) -> Contest:
    B, C, h, H = shape
    rivals = {
        name: Rival(
            gradient(function),
            torch.bfloat16 if "bf16" in name else torch.float32,
            unavailable=why_not(name, shape, device),
        )
        for name, function in FUNCTIONS.items()
    }
    nodes = B * C * h * h
    return Contest(
        f"mask_loss forward + backward, B {B}, C {C}, {h}x{h} -> {H}x{H}, {device}",
        device,
        lambda seed, dtype: scene(seed, shape, device, dtype),
        rivals,
        right,
        error,
        nbytes=2 * 4 * nodes + B * H * H,
        operations=OPERATIONS * B * C * H * H,
        info={"op": "mask_loss", "classes": C, "height": H, "batch": B, "headline": shape == HEADLINE},
    )


@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark, shape, rival):
    compete(benchmark, rival, contest, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark, shape, rival):
    compete(benchmark, rival, contest, shape, "cuda")
