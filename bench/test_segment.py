"""Pictures per second from pixels to labels: MaskCLIP, ViT-B/16 with random weights (the work is the same).

    pytest bench/test_segment.py --benchmark-only

The text embeddings are drawn too, so that no text tower runs; everything else is the user's call. ``extra_info`` has
the pictures per second, the picture, the number of classes and the machine.
"""

import pytest
import torch

import fastzs
from fastzs.predict import choose_device, native_bf16

from .machine import describe

DEVICE = choose_device("auto")
SIZES = [(512, 512), (512, 683)]
CLASSES = [20, 171]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def segmenter(request):
    if request.param == "bf16" and not native_bf16(DEVICE):
        pytest.skip("this device has no bf16 matrix instructions")
    return fastzs.load("maskclip", backbone="ViT-B-16", weights="random", precision=request.param)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_segment(benchmark, segmenter, size, classes):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(256, (3, *size), dtype=torch.uint8, generator=generator)
    embeddings = torch.nn.functional.normalize(torch.randn(classes, 512, generator=generator), dim=1)
    vocabulary = fastzs.Vocabulary([f"class {i}" for i in range(classes)], embeddings=embeddings)
    benchmark.group = f"segment {size[0]}x{size[1]}, {classes} classes"
    result = benchmark.pedantic(segmenter, (picture, vocabulary), rounds=5, warmup_rounds=1)
    assert result.labels.shape == size
    benchmark.extra_info.update(
        describe(DEVICE.type),
        size=size,
        classes=classes,
        dtype=str(segmenter.dtype),
        pictures_per_second=round(1 / benchmark.stats.stats.median, 3),
    )
