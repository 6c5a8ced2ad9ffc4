"""packed_linear: the MLP of ViT-B/16 with its layer norm and residual, in fp32, bf16 and int8.

    pytest bench/test_packed_linear.py --benchmark-only                         # the CPU, where it is used
    pytest bench/test_packed_linear.py --benchmark-only -m "full and not gpu"   # the widths of ViT-L/14

Tokens are those of CLIP-RC's two windows of 512. "oneDNN" has the products packed there, and the norm, the activation
and the residual as passes of their own; in int8 "bytes alone" is torch's product of bytes without scales, norms or
activation: less work, and the ceiling.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzs.kernels.packed_linear.compiled import why_int8_is_slow
from fastzs.kernels.packed_linear.weights import pack_norm, pack_weight
from fastzs.ops import packed_linear

from .machine import why_no_bf16
from .rivals import Contest, Rival, compete

ROWS = 2 * 1041
BF16, INT8 = torch.bfloat16, torch.int8
RIVALS = ("published", "published bf16", "oneDNN", "oneDNN bf16", "fastzs", "fastzs bf16", "fastzs int8", "bytes alone")
BOUNDS = {BF16: 3e-2, INT8: 6e-2}


class Mlp:
    """Weights of the MLP, fp32, drawn as CLIP starts."""

    def __init__(self, width: int):
        generator = torch.Generator().manual_seed(width)
        self.norm = nn.LayerNorm(width).requires_grad_(False)
        sizes = ((4 * width, width), (width, 4 * width))
        self.weights = [torch.randn(size, generator=generator) * size[1] ** -0.5 for size in sizes]
        self.biases = [torch.randn(size[0], generator=generator) * 0.1 for size in sizes]

    def formula(self, x: Tensor) -> Tensor:
        (w1, w2), (b1, b2) = ([t.to(x.dtype) for t in some] for some in (self.weights, self.biases))
        y = F.linear(F.layer_norm(x, x.shape[-1:]), w1, b1)
        return x + F.linear(y * torch.sigmoid(1.702 * y), w2, b2)

    def published(self, dtype: torch.dtype):
        weights = [t.to(dtype) for t in (self.weights[0], self.biases[0], self.weights[1], self.biases[1])]

        def run(x):
            y = F.linear(F.layer_norm(x, x.shape[-1:]), weights[0], weights[1])
            return x + F.linear(y * torch.sigmoid(1.702 * y), weights[2], weights[3])

        return run

    def onednn(self, dtype: torch.dtype):
        first, last = (torch.ops.mkldnn._reorder_linear_weight(w.to(dtype)) for w in self.weights)
        b1, b2 = (b.to(dtype) for b in self.biases)
        product = torch.ops.mkldnn._linear_pointwise

        def run(x):
            y = product(F.layer_norm(x, x.shape[-1:]), first, b1, "none", [], None)
            return product(y * torch.sigmoid(1.702 * y), last, b2, "none", [], None).add_(x)

        return run

    def fastzs(self, dtype: torch.dtype):
        first, last = (pack_weight(*pair, dtype) for pair in zip(self.weights, self.biases, strict=True))
        norm = pack_norm(self.norm)
        return lambda x: packed_linear(x, first, last, activation="quick_gelu", before=norm, residual=x, impl="cpu")

    def bytes_alone(self):
        generator = torch.Generator().manual_seed(0)
        first, last = (torch.randint(-127, 128, w.shape, dtype=INT8, generator=generator).t() for w in self.weights)
        tokens, hidden = (torch.ones(ROWS, w.shape[0], dtype=INT8) for w in (first, last))
        return lambda x: (torch.ops.aten._int_mm(tokens, first), torch.ops.aten._int_mm(hidden, last))


def contest(width):
    mlp = Mlp(width)
    no_bf16, no_int8 = why_no_bf16("cpu"), why_int8_is_slow()
    inside = torch.float32 if no_bf16 else BF16
    fp32 = torch.float32
    rivals = {
        "published": Rival(mlp.published(fp32)),
        "published bf16": Rival(mlp.published(BF16), BF16, bound=BOUNDS[BF16], unavailable=no_bf16),
        "oneDNN": Rival(mlp.onednn(fp32)),
        "oneDNN bf16": Rival(mlp.onednn(BF16), BF16, bound=BOUNDS[BF16], unavailable=no_bf16),
        "fastzs": Rival(mlp.fastzs(fp32)),
        "fastzs bf16": Rival(mlp.fastzs(BF16), BF16, bound=BOUNDS[BF16], unavailable=no_bf16),
        "fastzs int8": Rival(mlp.fastzs(INT8), inside, INT8, BOUNDS[INT8], unavailable=no_int8),
        "bytes alone": Rival(
            mlp.bytes_alone(), inside, INT8, answer=lambda x: x, judge=lambda x: x, unavailable=no_int8
        ),
    }
    return Contest(
        f"packed_linear, MLP of width {width} with norm and residual, {ROWS} tokens, cpu",
        "cpu",
        lambda seed, dtype: (torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)).to(dtype),),
        rivals,
        mlp.formula,
        nbytes=2 * 2 * ROWS * width + 8 * width**2,
        operations=16 * ROWS * width**2,
        info={"op": "packed_linear", "headline": width == 768},
    )


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize(
    "width", [pytest.param(768, marks=pytest.mark.quick), pytest.param(1024, marks=pytest.mark.full)]
)
def test_cpu(benchmark, width, rival):
    compete(benchmark, rival, contest, width)
