"""mask_loss, forward and backward, against what PyTorch can do.

    pytest bench/test_mask_loss.py            # the CPU; the table shows every variant's ratio to the fastest
    pytest bench/test_mask_loss.py -m gpu     # a GPU

``extra_info`` of the JSON (``--benchmark-json``) names device, versions, shape and dtype, and has the peak memory
beyond the inputs.
"""

import pytest
import torch

from fastzs.ops import mask_loss

from .baselines.mask_loss import chunked, one_graph, published
from .machine import describe, peak_megabytes

CPU_SHAPES = [(2, 156, 32, 512), (2, 15, 32, 512)]
GPU_SHAPES = [(16, 150, 32, 512), (2, 156, 32, 512), (8, 156, 40, 640), (16, 15, 32, 512), (2, 847, 32, 512)]


VARIANTS = {
    "published": published,
    "torch.compile": torch.compile(published),
    "torch.compile, one graph": torch.compile(one_graph, fullgraph=True),
    "chunked": chunked,
    "fastzs": mask_loss,
    "fastzs bf16": mask_loss,
}


def scene(shape, device, dtype):
    """Logits, and a target of rectangles (a few classes an image, as in real scenes) with an ignored border."""
    B, C, h, H = shape
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, C, h, h, generator=g) * 2 - 4
    target = torch.empty(B, H, H, dtype=torch.uint8 if C < 256 else torch.int16)
    for image in target:
        image.fill_(torch.randint(0, C, (), generator=g).item())
        for _ in range(8):
            y, x = torch.randint(0, H, (2,), generator=g).tolist()
            image[y : y + H // 3, x : x + H // 3] = torch.randint(0, C, (), generator=g).item()
        image[:, -H // 16 :] = 255
    return logits.to(device, dtype).requires_grad_(), target.to(device)


def bench(benchmark, variant, shape, device):
    dtype = torch.bfloat16 if "bf16" in variant else torch.float32
    logits, target = scene(shape, device, dtype)
    function = VARIANTS[variant]

    def step():
        focal, dice = function(logits, target)
        (100 * focal + dice).backward()
        logits.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    step()  # compiles
    benchmark.extra_info["peak MB"] = round(peak_megabytes(step, device), 1)
    benchmark.extra_info.update(describe(device), shape=shape, dtype=str(dtype), variant=variant)
    B, C, h, H = shape
    benchmark.group = f"mask_loss forward + backward, B {B}, C {C}, {h}x{h} -> {H}x{H}, {device}"
    benchmark.pedantic(step, rounds=20 if "fastzs" in variant else 2)
    print(f"\n{benchmark.group}, {variant}: peak {benchmark.extra_info['peak MB']} MB")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark, variant, shape):
    bench(benchmark, variant, shape, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark, variant, shape):
    bench(benchmark, variant, shape, "cuda")
