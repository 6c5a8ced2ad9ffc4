"""A picture of 4096 x 4096 with 10,000 names, whose vectors are given, by the built-in model: memory and seconds.

    pytest bench/test_large_picture.py --benchmark-only -s -m "full and not gpu"

Each picture, a drawn scene, is labelled in a process of its own. The peak of one of 64 x 64 is the interpreter, the
libraries, the model and the names; wanted is less than 2 GB above it.
"""

import time

import pytest
import torch
import torchvision.transforms.v2.functional as TF

import fastzs
from fastzs.data.datasets import ShapesDataset

from .machine import FRESH_PROCESS_SECONDS, in_fresh_process, resident_peak

NAMES, SIDES, MOST_MEGABYTES = 10_000, (64, 4096), 2000


def labelled(side: int) -> tuple[float, float]:
    """Peak resident megabytes of the process, and the seconds from a drawn scene to its labels."""
    segmenter = fastzs.load(weights="shapes", device="cpu")
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(NAMES, segmenter.model.text_dim, generator=generator), dim=1)
    names = fastzs.Vocabulary([f"name {i}" for i in range(NAMES)], embeddings=vectors)
    picture = TF.resize(ShapesDataset("bench", 1, 128)[0][0], [side, side])
    began = time.perf_counter()
    labels = segmenter(picture, names).labels
    seconds = time.perf_counter() - began
    assert labels.shape == (side, side)
    return resident_peak() / 1e6, seconds


@pytest.mark.full
def test_large_picture(benchmark):
    found = []
    benchmark.group = f"{SIDES[1]} x {SIDES[1]}, {NAMES} names, built-in model"
    benchmark.pedantic(lambda: found.extend(in_fresh_process(labelled, side) for side in SIDES), rounds=1)
    assert None not in found, f"a process failed, or took more than {FRESH_PROCESS_SECONDS} s"
    (least, _), (peak, seconds) = found
    benchmark.extra_info.update(op="large picture", seconds=seconds, **{"peak MB above a small one": peak - least})
    print(f"\n{benchmark.group}: {seconds:.0f} s, {peak - least:.0f} MB above a picture of {SIDES[0]} x {SIDES[0]}")
    assert peak - least < MOST_MEGABYTES
