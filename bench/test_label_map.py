"""label_map against what PyTorch can do: two windows of 512 x 512 over a picture of 512 x 683, to labels.

    pytest bench/test_label_map.py --benchmark-only                         # the CPU
    pytest bench/test_label_map.py --benchmark-only -m "full and not gpu"   # the other sizes
    pytest bench/test_label_map.py --benchmark-only -m gpu                  # a GPU

Rivals are judged by the share of labels that fp64 would give otherwise, timed in turn and measured for memory as
:mod:`bench.rivals` says. "regions" are maps as segmenters give them, "noise" is the worst case. Wanted on a CPU: 8
times faster than published at 20 classes, 25 at 171, 40 at 847, all under 10 MB.
"""

import itertools

import pytest
import torch
from torch import Tensor

from fastzs.ops import label_map

from .baselines.label_map import published_labels, published_scores, scene, slide_windows
from .rivals import Contest, Rival, compete, share_of_labels

PICTURE = (512, 683)
WINDOWS = slide_windows(PICTURE, 512, 426)
DEFAULT = {(20, (512, 683), "regions"), (20, (512, 683), "noise"), (171, (512, 683), "regions")}
HEADLINE = (171, (512, 683), "regions")
QUICK = (20, (512, 683), "regions")
PROBLEMS = [
    pytest.param(*one, marks=pytest.mark.quick if one == QUICK else [] if one in DEFAULT else pytest.mark.full)
    for one in itertools.product((20, 171, 847), ((375, 500), (512, 683)), ("regions", "noise"))
]
GPU_PROBLEMS = [*sorted(DEFAULT), (847, (512, 683), "regions")]
# The least arithmetic of a pixel of the output, its winner's alone: four pixels of the picture, each 6 to interpolate
# and 4 for the sigmoid.
OPERATIONS = 40


def contest(classes: int, output: tuple[int, int], kind: str, device: str) -> Contest:
    known = torch.arange(classes * 3 // 4)

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return scene(classes, PICTURE, 512, WINDOWS, kind).to(device, dtype), known.to(device)

    def published(logits: Tensor, seen: Tensor) -> Tensor:
        return published_labels(logits, WINDOWS, PICTURE, output, seen=seen)

    minutes = None
    if device == "cpu" and classes > 20:
        minutes = "takes minutes with more than 20 classes; with those it is slower than published"

    def ours(impl: str) -> Rival:
        def run(logits: Tensor, seen: Tensor) -> Tensor:
            return label_map(logits, WINDOWS, PICTURE, output_size=output, seen=seen, impl=impl).labels

        return Rival(run)

    def right(logits: Tensor, seen: Tensor) -> Tensor:
        """As published, 64 classes at a time, since all of them in fp64 might not fit."""
        most = torch.full(output, -torch.inf, dtype=torch.float64)
        labels = torch.zeros(output, dtype=torch.int64)
        for first, part in zip(range(0, classes, 64), logits.split(64, 1), strict=True):
            some = seen[(seen >= first) & (seen < first + 64)] - first
            best, index = published_scores(part, WINDOWS, PICTURE, output, seen=some).max(0)
            labels = torch.where(best > most, first + index, labels)
            most = torch.maximum(best, most)
        return labels

    pixels = output[0] * output[1]
    nodes = len(WINDOWS) * classes * 32 * 32
    return Contest(
        f"label_map, {classes} classes, {kind}, to {output[1]} x {output[0]}, {device}",
        device,
        inputs,
        {
            "published": Rival(published),
            "torch.compile": Rival(torch.compile(published), unavailable=minutes),
            "chunked": ours("reference"),
            "fastzs": ours("auto"),
        },
        right,
        share_of_labels,
        nbytes=4 * nodes + pixels * (1 if classes < 256 else 2),
        operations=nodes + OPERATIONS * pixels,
        info={
            "op": f"label_map, {kind}",
            "classes": classes,
            "height": output[0],
            "headline": (classes, output, kind) == HEADLINE,
        },
    )


RIVALS = ["published", "torch.compile", "chunked", "fastzs"]


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("classes", "output", "kind"), PROBLEMS, ids=str)
def test_cpu(benchmark, classes, output, kind, rival):
    compete(benchmark, rival, contest, classes, output, kind, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(("classes", "output", "kind"), GPU_PROBLEMS, ids=str)
def test_gpu(benchmark, classes, output, kind, rival):
    compete(benchmark, rival, contest, classes, output, kind, "cuda")
