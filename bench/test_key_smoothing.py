"""key_smoothing against the published form, which builds the matrix of all pairs of positions.

    pytest bench/test_key_smoothing.py --benchmark-only                         # the CPU
    pytest bench/test_key_smoothing.py --benchmark-only -m "full and not gpu"   # the other shapes
    pytest bench/test_key_smoothing.py --benchmark-only -m gpu                  # a GPU

Rivals are judged, timed in turn and measured for memory as :mod:`bench.rivals` says. The curve over N shows what is
linear in it; at N 16384 the published form takes over 1 GB. Wanted on a CPU: 3 times faster than published at N 1024.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.ops import key_smoothing

from .rivals import Contest, Rival, compete

SHAPES = [  # positions, classes
    pytest.param(1024, 20, marks=pytest.mark.quick),
    (4096, 20),
    pytest.param(16384, 20, marks=pytest.mark.full),
    (1024, 171),
    pytest.param(4096, 171, marks=pytest.mark.full),
    pytest.param(16384, 171, marks=pytest.mark.full),
]
HEADLINE = (1024, 171)
WIDTH = 768


def published(keys: Tensor, probs: Tensor) -> Tensor:
    """Normalise, all pairs, weigh; over the paper's axis."""
    keys = F.normalize(keys, dim=2)
    weights = keys @ keys.transpose(1, 2)  # [B, N, N]
    return (weights @ probs.transpose(1, 2)).transpose(1, 2)


def right(keys: Tensor, probs: Tensor) -> Tensor:
    """The same product from the other end, for which fp64 needs no matrix of all pairs."""
    keys = F.normalize(keys, dim=2)
    return (keys @ (keys.transpose(1, 2) @ probs.transpose(1, 2))).transpose(1, 2)


FUNCTIONS = {"published": published, "torch.compile": torch.compile(published), "fastzs": key_smoothing}


def contest(positions: int, classes: int, device: str) -> Contest:
    def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randn(1, positions, WIDTH, generator=generator)
        probs = torch.randn(1, classes, positions, generator=generator).softmax(1)
        return keys.to(device, dtype), probs.to(device, dtype)

    linear, pairs = 4 * positions * classes * WIDTH, 2 * positions**2 * (WIDTH + classes)
    return Contest(
        f"key_smoothing, {classes} classes, N {positions}, D {WIDTH}, {device}",
        device,
        inputs,
        {name: Rival(function) for name, function in FUNCTIONS.items()},
        right,
        nbytes=4 * positions * (WIDTH + 2 * classes),
        operations=min(linear, pairs),
        info={
            "op": "key_smoothing",
            "classes": classes,
            "height": round(positions**0.5),  # of the map
            "headline": (positions, classes) == HEADLINE,
        },
    )


@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize(("positions", "classes"), SHAPES)
def test_cpu(benchmark, positions, classes, rival):
    compete(benchmark, rival, contest, positions, classes, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", FUNCTIONS)
@pytest.mark.parametrize(("positions", "classes"), SHAPES)
def test_gpu(benchmark, positions, classes, rival):
    compete(benchmark, rival, contest, positions, classes, "cuda")
