"""dense_attention(kind="proxy") against the published order of work: a crop of 336, CLIP's 21 x 21 and DINO's 42 x 42.

    pytest bench/test_proxy_attention.py --benchmark-only             # the CPU
    pytest bench/test_proxy_attention.py --benchmark-only -m gpu      # a GPU, bf16

Wanted on a CPU: 3 times faster than published.
"""

import pytest
import torch
from torch import Tensor

from fastzs.ops import dense_attention

from .baselines.proxy import published_proxy
from .rivals import Contest, Rival, compete

GRID, SIZE, HEADS, DIM, CHANNELS = (21, 21), (42, 42), 12, 64, 768


def contest(device: str) -> Contest:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # where the Triton kernel is first
    patches, nodes, width = SIZE[0] * SIZE[1], GRID[0] * GRID[1], HEADS * DIM

    def inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(1, 1 + nodes, HEADS, DIM, generator=generator).transpose(1, 2)
        # Cosines within an area and between areas lie apart, and the mask between them: none is decided by rounding.
        common = 1.3 * torch.randn(1, CHANNELS, 1, 1, generator=generator)
        areas = torch.randn(1, CHANNELS, 7, 6, generator=generator).repeat_interleave(6, 2).repeat_interleave(7, 3)
        u = 0.3 * torch.randn(1, CHANNELS, *SIZE, generator=generator) + areas + common
        return v.to(device, dtype), u.to(device, dtype)

    def ours(impl: str) -> Rival:
        return Rival(lambda v, u: dense_attention(v, v, v, "proxy", GRID, affinity=u, impl=impl), dtype)

    return Contest(
        f"dense_attention proxy, {'bf16' if dtype == torch.bfloat16 else 'fp32'}, {device}",
        device,
        inputs,
        {
            "published": Rival(lambda v, u: published_proxy(v, u, GRID), dtype),
            "reference": ours("reference"),
            "fastzs": ours("auto"),
        },
        lambda v, u: [dense_attention(v, v, v, "proxy", GRID, affinity=u, impl="reference")],
        nbytes=dtype.itemsize * (width * nodes + CHANNELS * patches + width * patches),
        operations=2 * patches * (patches * CHANNELS + nodes * width),
        info={"op": "dense_attention proxy"},
    )


RIVALS = ["published", "reference", "fastzs"]


@pytest.mark.quick
@pytest.mark.parametrize("rival", RIVALS)
def test_cpu(benchmark, rival):
    compete(benchmark, rival, contest, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rival", RIVALS)
def test_gpu(benchmark, rival):
    compete(benchmark, rival, contest, "cuda")
