"""A photograph's worth of work by the training-free systems, ViT-B/16 with random weights, 500 x 375 to labels.

    pytest bench/test_training_free.py --benchmark-only

NACLIP with its refinement and without it, at 21 and 171 names: wanted are at most 1.35 times the time without. And its
windows stitched before the last block, which then runs once over 588 patches in place of six times over 196.
"""

import functools

import pytest
import torch

import fastzs

SIZE = (375, 500)
# what is compared -> settings of NACLIP
WAYS = {"not refined": {"refine": "none"}, "refined": {}, "refined, stitched": {"windows": "stitched"}}


@functools.cache
def segmenter(way: str, precision: str = "fp32") -> fastzs.Segmenter:
    return fastzs.load("naclip", weights="random", precision=precision, **WAYS[way])


@functools.cache
def vocabulary(names: int) -> fastzs.Vocabulary:
    rows = torch.randn(names, segmenter("refined").model.text_dim, generator=torch.Generator().manual_seed(0))
    embeddings = torch.nn.functional.normalize(rows, dim=1)
    return fastzs.Vocabulary([f"class {i}" for i in range(names)], embeddings=embeddings)


@functools.cache
def image() -> torch.Tensor:
    """Blocks of colour with noise, so that there are edges to follow."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 12, 16, generator=generator)
    pixels = torch.nn.functional.interpolate(coarse, SIZE, mode="nearest")[0]
    return (255 * (pixels + 0.05 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)).to(torch.uint8)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("names", [21, 171])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
def test_naclip(benchmark, precision, names, way):
    benchmark.group = f"naclip, {names} names, {SIZE[1]} x {SIZE[0]} to labels, {precision}, cpu"
    benchmark.extra_info.update(op="naclip", rival=way, classes=names)
    seg, asked = segmenter(way, precision), vocabulary(names)
    benchmark.pedantic(lambda: seg(image(), asked), rounds=5, warmup_rounds=1)
