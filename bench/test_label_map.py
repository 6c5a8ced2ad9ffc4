"""label_map against what PyTorch can do: two windows of 512 x 512 over a picture of 512 x 683, to labels.

    pytest bench/test_label_map.py            # the CPU; the table shows every variant's ratio to the fastest
    pytest bench/test_label_map.py -m gpu     # a GPU

``extra_info`` of the JSON (``--benchmark-json``) names device, versions, shape and dtype, and has the peak memory
beyond the inputs.
"""

import pytest
import torch

from fastzs.ops import label_map

from .baselines.label_map import published_labels, scene, slide_windows
from .machine import describe, peak_megabytes

PICTURE = (512, 683)
OUTPUTS = [(375, 500), (512, 683)]
CLASSES = [20, 171, 847]
WINDOWS = slide_windows(PICTURE, 512, 426)


def fastzs(logits, windows, picture_size, output_size, seen):
    return label_map(logits, windows, picture_size, output_size=output_size, seen=seen).labels


def chunked(logits, windows, picture_size, output_size, seen):
    args = {"output_size": output_size, "seen": seen, "impl": "reference"}
    return label_map(logits, windows, picture_size, **args).labels


VARIANTS = {
    "published": published_labels,
    "torch.compile": torch.compile(published_labels),
    "chunked": chunked,
    "fastzs": fastzs,
}


def bench(benchmark, variant, kind, classes, output, device):
    logits = scene(classes, PICTURE, 512, WINDOWS, kind).to(device)
    seen = torch.arange(classes * 3 // 4, device=device)
    function = VARIANTS[variant]

    def step():
        labels = function(logits, WINDOWS, PICTURE, output, seen=seen)
        if device == "cuda":
            torch.cuda.synchronize()
        return labels

    got = step()  # compiles
    if variant != "published":
        want = published_labels(logits, WINDOWS, PICTURE, output, seen=seen)
        assert (got.long() != want).float().mean() < 1e-4  # ties within rounding
    benchmark.extra_info["peak MB"] = round(peak_megabytes(step, device), 1)
    benchmark.extra_info.update(describe(device), classes=classes, output=output, variant=variant, logits=kind)
    benchmark.group = f"label_map, {classes} classes, {kind}, to {output[0]} x {output[1]}, {device}"
    benchmark.pedantic(step, rounds=20 if variant == "fastzs" else 3)
    print(f"\n{benchmark.group}, {variant}: peak {benchmark.extra_info['peak MB']} MB")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["regions", "noise"])
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_cpu(benchmark, variant, kind, classes, output):
    bench(benchmark, variant, kind, classes, output, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["regions", "noise"])
@pytest.mark.parametrize("output", OUTPUTS, ids=str)
@pytest.mark.parametrize("classes", CLASSES)
def test_gpu(benchmark, variant, kind, classes, output):
    bench(benchmark, variant, kind, classes, output, "cuda")
