"""A photograph's worth of work by the training-free systems, ViT-B/16 with random weights, 500 x 375 to labels.

    pytest bench/test_training_free.py --benchmark-only                         # 21 names
    pytest bench/test_training_free.py --benchmark-only -m "full and not gpu"   # 171

NACLIP with its refinement and without it, at 21 and 171 names: wanted are at most 1.35 times the time without. And its
windows stitched before the last block, which then runs once over 588 patches in place of six times over 196.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzs.loading import load
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary

from .rivals import Contest, Rival, compete

SIZE = (375, 500)
# what is compared -> settings of NACLIP
WAYS: dict[str, dict[str, Any]] = {
    "not refined": {"refine": "none"},
    "refined": {},
    "refined, stitched": {"windows": "stitched"},
}


@functools.cache
def segmenter(way: str, exact: bool = False) -> Segmenter:
    """With the same random weights each time; ``exact``: in fp64."""
    made = load("naclip", weights="random", precision="fp32", optimize=not exact, **WAYS[way])
    return Segmenter(made.model.double(), windows=made.windows) if exact else made


@functools.cache
def vocabulary(names: int) -> Vocabulary:
    rows = torch.randn(names, segmenter("refined").model.text_dim, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(rows, dim=1)
    return Vocabulary([f"class {i}" for i in range(names)], embeddings=embeddings)


def image(seed: int, dtype: torch.dtype) -> tuple[Tensor]:
    """Blocks of colour with noise, so that there are edges to follow."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, SIZE, mode="nearest")[0]
    return ((255 * (pixels + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)).to(torch.uint8),)


def scores(way: str, names: int, pixels: Tensor, exact: bool = False) -> list[Tensor]:
    """Of every pixel's label; labels alone would differ where two names tie within rounding."""
    found = segmenter(way, exact)(pixels, vocabulary(names), scores=True).scores
    assert found is not None
    return [found]


def contest(names: int) -> Contest:
    def rival(way: str) -> Rival:
        return Rival(
            lambda pixels: segmenter(way)(pixels, vocabulary(names)).labels,
            answer=lambda pixels: scores(way, names, pixels)[0],
            judge=lambda pixels: scores(way, names, pixels, exact=True),
        )

    return Contest(
        f"naclip, {names} names, {SIZE[1]} x {SIZE[0]} to labels, cpu",
        "cpu",
        image,
        {way: rival(way) for way in WAYS},
        lambda pixels: scores("refined", names, pixels, exact=True),
        pictures=1,
        info={"op": "naclip", "classes": names},
        seconds=15.0,
    )


@pytest.mark.parametrize("rival", WAYS)
@pytest.mark.parametrize("names", [21, pytest.param(171, marks=pytest.mark.full)])
def test_naclip(benchmark, names, rival):
    compete(benchmark, rival, contest, names)
