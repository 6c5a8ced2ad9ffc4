"""pixel_text_logits, forward and backward, against normalising a copy of the features first.

    pytest bench/test_pixel_text_logits.py            # the CPU
    pytest bench/test_pixel_text_logits.py -m gpu     # a GPU

``extra_info`` of the JSON (``--benchmark-json``) names device, versions, shape and dtype, and has the peak memory
beyond the inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from fastzs.ops import pixel_text_logits

from .machine import describe, peak_megabytes

CPU_SHAPES = [(2, 512, 156, 32), (1, 512, 20, 64)]  # B, D, C, side
GPU_SHAPES = [(16, 512, 150, 32), (2, 512, 847, 32), (8, 768, 156, 40)]


def published(features, text, scale):
    return scale * torch.einsum("bdhw,cd->bchw", F.normalize(features, dim=1), text)


def triton(features, text, scale):
    return pixel_text_logits(features, text, scale, impl="triton")


def reference(features, text, scale):
    return pixel_text_logits(features, text, scale, impl="reference")


CPU_VARIANTS = {"published": published, "torch.compile": torch.compile(published), "fastzs": pixel_text_logits}
GPU_VARIANTS = {"published": published, "torch.compile": torch.compile(published)}
GPU_VARIANTS |= {"fastzs Triton": triton, "fastzs reference": reference}


def bench(benchmark, variant, function, shape, device, dtype):
    B, D, C, side = shape
    g = torch.Generator().manual_seed(0)
    features = torch.randn(B, D, side, side, generator=g).to(device, dtype).requires_grad_()
    text = F.normalize(torch.randn(C, D, generator=g), dim=1).to(device, dtype)
    weight = torch.randn(B, C, side, side, generator=g).to(device, dtype)

    def step():
        function(features, text, 100.0).backward(weight)
        features.grad = None
        if device == "cuda":
            torch.cuda.synchronize()

    step()  # compiles
    benchmark.extra_info["peak MB"] = round(peak_megabytes(step, device), 1)
    benchmark.extra_info.update(describe(device), shape=shape, dtype=str(dtype), variant=variant)
    benchmark.group = f"pixel_text_logits forward + backward, B {B}, D {D}, C {C}, {side}x{side}, {dtype}, {device}"
    benchmark.pedantic(step, rounds=20, warmup_rounds=2)
    print(f"\n{benchmark.group}, {variant}: peak {benchmark.extra_info['peak MB']} MB")


@pytest.mark.parametrize("variant", CPU_VARIANTS)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu(benchmark, variant, shape):
    bench(benchmark, variant, CPU_VARIANTS[variant], shape, "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", GPU_VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_gpu(benchmark, variant, shape, dtype):
    bench(benchmark, variant, GPU_VARIANTS[variant], shape, "cuda", dtype)
