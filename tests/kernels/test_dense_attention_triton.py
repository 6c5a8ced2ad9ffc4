"""The Triton backend of dense_attention: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.ops import dense_attention

from .attention_bounds import assert_within, dense_attention_error
from .interpreter import INTERPRETED, interpreted, run_interpreted

pytest.importorskip("triton")

f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
KINDS = ["qk", "qq", "kk", "vv", "qq+kk", "kk+gaussian"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(kind, grid, prefix=1, dim=16, dtype=f32, std=5.0, size=1.0, device="cpu"):
    """As close to the reference in fp64 as the roundings allow."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, prefix + grid[0] * grid[1], 2, dim)
    q, k, v = ((size * torch.randn(shape, generator=generator)).to(device, dtype).transpose(1, 2) for _ in range(3))
    wide = [t.double() for t in (q, k, v)]
    exact = dense_attention(*wide, kind, grid, std=std, impl="reference")
    ours = dense_attention(q, k, v, kind, grid, std=std, impl="triton")
    assert ours.dtype == dtype
    assert_within(kind, ours, exact, dense_attention_error(*wide, kind, grid, dtype, std))


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_kinds(kind, dtype):
    check(kind, (5, 7), dtype=dtype)


@interpreted
@pytest.mark.parametrize(("grid", "prefix"), [((9, 9), 0), ((1, 1), 3), ((2, 40), 11)])
def test_shapes(grid, prefix):
    check("kk+gaussian", grid, prefix)


@interpreted
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_head_sizes(dim):
    check("kk+gaussian", (4, 5), dim=dim)


@interpreted
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(KINDS), st.integers(1, 6), st.integers(1, 6), st.integers(0, 2), st.integers(1, 128))
def test_any_size(kind, h, w, prefix, dim):
    check(kind, (h, w), prefix, dim)


@interpreted
def test_a_batch_that_is_one_image_again_and_again():
    """Its stride is 0, as ``expand`` makes it."""
    q, k, v = (torch.randn(1, 7, 2, 20).transpose(1, 2) for _ in range(3))
    several = dense_attention(*(t.expand(3, -1, -1, -1) for t in (q, k, v)), "kk+gaussian", (2, 3), impl="triton")
    assert torch.equal(several, dense_attention(q, k, v, "kk+gaussian", (2, 3), impl="triton").expand(3, -1, -1, -1))


@interpreted
@pytest.mark.parametrize("std", [0.3, 1.0, 50.0])
def test_widths_of_the_bias(std):
    check("kk+gaussian", (6, 5), std=std)


@interpreted
@pytest.mark.parametrize("size", [0.0, 5.0])
def test_extreme_scores(size):
    check("kk+gaussian", (5, 6), size=size)


@interpreted
def test_gradients_go_through_the_reference():
    q, k, v = (torch.randn(1, 1, 6, 16, requires_grad=True) for _ in range(3))
    with pytest.raises(RuntimeError, match="gradient"):
        dense_attention(q, k, v, "kk+gaussian", (2, 3), impl="triton")
    dense_attention(q, k, v, "kk+gaussian", (2, 3)).sum().backward()
    assert k.grad is not None


@interpreted
def test_operator():
    q, k, v = (torch.randn(1, 1, 7, 16) for _ in range(3))
    torch.library.opcheck(torch.ops.fastzs.dense_attention_triton, (q, k, v, 2, 3, 0.7))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, dtype, dim):
    check(kind, (32, 43), dtype=dtype, dim=dim, device="cuda")
