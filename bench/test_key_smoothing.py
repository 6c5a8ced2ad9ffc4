"""key_smoothing against the published form, which builds the matrix of all pairs of positions.

    pytest bench/test_key_smoothing.py            # the CPU; N 16384 of the published form takes over 1 GB
    pytest bench/test_key_smoothing.py -m gpu     # a GPU

The curve over N shows what is linear in it. ``extra_info`` of the JSON names device, versions and shape, and has the
peak memory beyond the inputs.
"""

import pytest
import torch
import torch.nn.functional as F

from fastzs.ops import key_smoothing

from .machine import describe, peak_megabytes

POSITIONS = [1024, 4096, 16384]
CLASSES = [20, 171]
WIDTH = 768


def published(keys, probs):
    """Normalise, all pairs, weigh; over the paper's axis."""
    keys = F.normalize(keys, dim=2)
    weights = keys @ keys.transpose(1, 2)  # [B, N, N]
    return (weights @ probs.transpose(1, 2)).transpose(1, 2)


VARIANTS = {"published": published, "torch.compile": torch.compile(published), "fastzs": key_smoothing}


def bench(benchmark, variant, classes, positions, device):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, positions, WIDTH, generator=generator).to(device)
    probs = torch.randn(1, classes, positions, generator=generator).softmax(1).to(device)
    function = VARIANTS[variant]

    def step():
        out = function(keys, probs)
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    out = step()  # compiles
    assert out.shape == probs.shape
    benchmark.extra_info["peak MB"] = round(peak_megabytes(step, device), 1)
    benchmark.extra_info.update(describe(device), classes=classes, positions=positions, width=WIDTH, variant=variant)
    benchmark.group = f"key_smoothing, {classes} classes, N {positions}, {device}"
    benchmark.pedantic(step, rounds=10 if variant == "fastzs" else 3)
    print(f"\n{benchmark.group}, {variant}: peak {benchmark.extra_info['peak MB']} MB")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("classes", CLASSES)
def test_cpu(benchmark, variant, positions, classes):
    bench(benchmark, variant, classes, positions, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("classes", CLASSES)
def test_gpu(benchmark, variant, positions, classes):
    bench(benchmark, variant, classes, positions, "cuda")
