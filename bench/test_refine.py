"""refine against the published order of work: six windows of 224 x 224 over a picture of 448 x 336, to 500 x 375.

    pytest bench/test_refine.py --benchmark-only                         # the CPU
    pytest bench/test_refine.py --benchmark-only -m "full and not gpu"   # with 171 names
    pytest bench/test_refine.py --benchmark-only -m gpu                  # a GPU

Rivals are judged by the labels' probabilities. Wanted on a CPU: 20 times faster than published with 21 names, 60 with
171, under 30 MB.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzs.ops import refine
from fastzs.windows import window_grid

from .baselines.refine import published_refined
from .rivals import Contest, Rival, compete

PICTURE, OUTPUT, SCALE = (336, 448), (375, 500), 40.0
WINDOWS = window_grid(PICTURE, 224, 112).tolist()
PROBLEMS = [21, pytest.param(171, marks=pytest.mark.full)]
STEPS, NEIGHBOURS = 10, 16


def contest(classes: int, device: str) -> Contest:
    options: dict[str, Any] = {"windows": WINDOWS, "image_size": PICTURE, "scale": SCALE}

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logits = 0.2 * torch.rand(len(WINDOWS), classes, 14, 14, generator=generator)
        image = F.interpolate(torch.randn(1, 3, 50, 60, generator=generator), OUTPUT, mode="bicubic")[0]
        return logits.to(device, dtype), image.to(device, dtype)

    def published(logits: Tensor, image: Tensor) -> Tensor:
        maps = published_refined(logits, WINDOWS, PICTURE, image)
        return (SCALE * maps).softmax(0).amax(0)

    def ours(logits: Tensor, image: Tensor) -> Tensor | None:
        return refine(logits, image, **options).probabilities

    def right(logits: Tensor, image: Tensor) -> list[Tensor]:
        """In fp64, some classes at a time."""
        found = refine(logits, image, impl="reference", **options).probabilities
        assert found is not None
        return [found]

    pixels = OUTPUT[0] * OUTPUT[1]
    return Contest(
        f"refine, {classes} names, to {OUTPUT[1]} x {OUTPUT[0]}, {device}",
        device,
        inputs,
        {"published": Rival(published), "fastzs": Rival(ours)},
        right,
        nbytes=4 * (len(WINDOWS) * classes * 14 * 14 + 3 * pixels) + 9 * pixels,
        operations=2 * STEPS * NEIGHBOURS * classes * pixels,
        info={"op": "refine", "classes": classes, "height": OUTPUT[0], "headline": classes == 21},
        fresh=classes > 21,  # published, it takes a minute
    )


RIVALS = ["published", "fastzs"]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("classes", PROBLEMS)
def test_cpu(benchmark, classes, rival):
    compete(benchmark, rival, contest, classes, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("classes", [21, 171])
def test_gpu(benchmark, classes, rival):
    compete(benchmark, rival, contest, classes, "cuda")
