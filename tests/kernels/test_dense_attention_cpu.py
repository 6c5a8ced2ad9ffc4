"""The compiled CPU backend of dense_attention: every kind against the reference in fp64."""

import platform

import pytest
import torch

from fastzs.kernels.dense_attention.compiled import MISSING
from fastzs.kernels.dispatch import watch
from fastzs.ops import dense_attention

from .attention_bounds import assert_within, dense_attention_error

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
ISAS = ["avx512_bf16", "avx512", "avx2", "portable"] if platform.machine() == "x86_64" else ["portable"]
KINDS = ["identity", "qk", "qq", "kk", "vv", "qq+kk", "kk+gaussian"]


def inputs(grid, prefix, dtype, batch=2, heads=3, dim=32):
    length = prefix + grid[0] * grid[1]
    generator = torch.Generator().manual_seed(length)
    base = torch.randn(batch, length, 3, heads, dim, generator=generator, dtype=torch.float64)
    return base.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)  # as a tower gives them


def check(tensors, kind, grid, **options):
    """As close to the reference in fp64 as the roundings allow."""
    wide = [t.double() for t in tensors]
    exact = dense_attention(*wide, kind, grid, impl="reference", **options)
    ours = dense_attention(*tensors, kind, grid, impl="cpu", **options)
    assert ours.dtype == tensors[0].dtype
    assert_within(kind, ours, exact, dense_attention_error(*wide, kind, grid, ours.dtype, **options))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "prefix"), [((3, 5), 1), ((7, 9), 4), ((1, 1), 0), ((2, 11), 0)])
def test_every_kind(grid, prefix, kind, isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    check(inputs(grid, prefix, f32), kind, grid)


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, dtype):
    check(inputs((6, 8), 1, dtype), kind, (6, 8))


@pytest.mark.parametrize("std", [0.1, 1.0, 50.0])
def test_width_of_the_gaussian(std):
    check(inputs((6, 8), 1, f32), "kk+gaussian", (6, 8), std=std)


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_more_keys_than_a_block(dtype):
    check(inputs((30, 40), 1, dtype, batch=1, heads=1), "kk+gaussian", (30, 40))


def test_operator_agrees_with_its_declaration():
    torch.library.opcheck(torch.ops.fastzs.dense_attention.default, (*inputs((3, 5), 1, f32), 3, 5, 0.25, 5.0))


def test_repeats_to_the_bit():
    tensors = inputs((9, 8), 1, f32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = dense_attention(*tensors, "kk+gaussian", (9, 8), impl="cpu")
        torch.set_num_threads(3)
        assert torch.equal(first, dense_attention(*tensors, "kk+gaussian", (9, 8), impl="cpu"))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [0.0, 20.0])
def test_extreme_scores(size):
    q, k, v = inputs((6, 8), 1, f32)
    check([size * q, size * k, v], "qk", (6, 8))


def test_gradients_go_through_the_reference():
    q, k, v = (t.requires_grad_() for t in inputs((3, 5), 1, f32))
    with pytest.raises(RuntimeError, match="no gradient"):
        dense_attention(q, k, v, "qq", (3, 5), impl="cpu")
    dense_attention(q, k, v, "qq", (3, 5)).sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("kind", ["qq+kk", "kk+gaussian"])
def test_compiles_without_a_break(kind):
    tensors = inputs((3, 5), 1, f32)
    compiled = torch.compile(
        lambda q, k, v: dense_attention(q, k, v, kind, (3, 5), impl="cpu"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*tensors), dense_attention(*tensors, kind, (3, 5), impl="cpu"))


def test_what_it_cannot_take_goes_elsewhere():
    tensors = [t.double() for t in inputs((3, 5), 1, f32)]
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot run: q is torch\.float64"):
        dense_attention(*tensors, "qq", (3, 5), impl="cpu")
    with watch() as choices:
        dense_attention(*tensors, "qq", (3, 5))
    assert choices[0].backend == "torch"
