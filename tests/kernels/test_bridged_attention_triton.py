"""The Triton backend of bridged_attention: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.ops import TokenLayout, bridged_attention

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_bridged_attention import LAYOUTS, assert_within_bounds, inputs, run

pytest.importorskip("triton")

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


def check(layout, prompts, dtype, device="cpu", **options):
    assert_within_bounds(layout, prompts, dtype, impl="triton", device=device, **options)


@interpreted
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "published"])
def test_layouts(name):
    check(*LAYOUTS[name], f32, heads=2, dim=16)


@interpreted
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_low_precision(dtype):
    check(*LAYOUTS["left-over"], dtype, heads=2)


@interpreted
@pytest.mark.parametrize("dim", [40, 64, 128])
def test_head_sizes(dim):
    check(*LAYOUTS["divides"], f32, heads=1, dim=dim)


@interpreted
def test_several_blocks_of_rows_keys_and_prompts():
    check(TokenLayout(1, (9, 9), (2, 3)), 70, f32, heads=1, batch=1)
    check(TokenLayout(1, (9, 16), (1, 2)), 70, bf16, heads=1, batch=1, dim=16)


@interpreted
def test_prompts_of_each_picture():
    check(*LAYOUTS["divides"], f32, heads=1, dim=16, prompt_batch=2)


@interpreted
@pytest.mark.parametrize("size", [0.0, 20.0])
def test_extreme_scores(size):
    """All scores equal; scores up to thousands, where a weight is 0 or 1 and its rounding is the score's."""
    check(*LAYOUTS["divides"], f32, heads=1, size=size)


@interpreted
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_any_layout(prefix, h, w, rh, rw, prompts):
    layout = TokenLayout(prefix, (h, w), (min(rh, h), min(rw, w)))
    check(layout, prompts, f32, heads=1, batch=1, dim=16)


@interpreted
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 128), st.integers(0, 2), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_any_head(dim, prefix, h, w, bridge, prompts):
    """Heads of any width, and grids down to one patch."""
    check(TokenLayout(prefix, (h, w), (1, 1) if bridge else None), prompts, f32, heads=1, batch=1, dim=dim)


@interpreted
def test_a_batch_that_is_one_image_again_and_again():
    """Its stride is 0, as ``expand`` makes it, and so is that of a gradient that comes from a sum."""
    layout, prompts = TokenLayout(1, (3, 2), (1, 2)), 2
    one = [t.requires_grad_() for t in inputs(layout, prompts, f32, batch=1, heads=2, dim=20)]

    def answer(batch_of):
        q, k, v = (batch_of(t) for t in one[:3])
        out = bridged_attention(q, k, v, layout, prompt_kv=(one[3], one[4]), impl="triton")
        return out, *torch.autograd.grad(out.sum(), one)

    ours = answer(lambda t: t.expand(3, -1, -1, -1))
    for mine, copied in zip(ours, answer(lambda t: t.repeat(3, 1, 1, 1)), strict=True):
        torch.testing.assert_close(mine, copied, rtol=1e-5, atol=1e-6)  # the sums over copies have another order
    assert torch.equal(ours[0][0], ours[0][2])


@interpreted
def test_strided_inputs_inside_frames_of_nan():
    """The interpreter does not notice a read out of bounds, but NaN would show."""
    layout, _ = LAYOUTS["left-over"]
    frame = torch.full((3, layout.length + 2, 3, 3, 18), torch.nan)
    inside = frame[1:2, 1:-1, :, 1:3, 1:17]  # [1, L, 3, 2, 16]
    inside.copy_(torch.randn(inside.shape))
    q, k, v = inside.permute(2, 0, 3, 1, 4)
    ours = bridged_attention(q, k, v, layout, impl="triton")
    assert torch.equal(ours, bridged_attention(*(t.contiguous() for t in (q, k, v)), layout, impl="triton"))
    other_end = q.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(ours, bridged_attention(other_end, k, v, layout, impl="triton"))


@interpreted
def test_twice_the_same():
    layout, prompts = LAYOUTS["wide"]
    tensors = inputs(layout, prompts, f32, heads=1, dim=16)
    weights = torch.randn(tensors[0].shape)
    for a, b in zip(*(run(tensors, layout, "triton", weights) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


@interpreted
def test_operator():
    layout = TokenLayout(1, (2, 3), (1, 2))
    tensors = [t.requires_grad_() for t in inputs(layout, 2, f32, heads=1, dim=16)]
    torch.library.opcheck(torch.ops.fastzs.bridged_attention_triton, (*tensors, 1, 2, 3, 1, 2, 0.25))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("name", ["published", "left-over", "no-bridge", "tiny"])
def test_on_a_gpu(name, dtype, dim):
    layout, prompts = LAYOUTS[name]
    check(layout, prompts, dtype, device="cuda", dim=dim)
    check(layout, max(prompts, 1), dtype, device="cuda", dim=dim, prompt_batch=2)


MUTATIONS = {
    "the bridge key is left out": ("acc = acc * shrink[:, None] + weight[:, None] * v\n", "acc = acc\n"),
    "patches take their neighbours' region": ("i, j = patch // w // cell_h", "i, j = (patch + 1) // w // cell_h"),
    "left-over patches have a region": (
        "i, j = patch // w // cell_h,",
        "i, j = tl.minimum(patch // w // cell_h, bridge_h - 1),",
    ),
    "a key past the end counts": (
        'scores, float("-inf"))\n        highest = tl.maximum(top, tl.max(scores, 1))',
        "scores, 0.0)\n        highest = tl.maximum(top, tl.max(scores, 1))",
    ),
    "the bridge row leaves itself out": ("acc1 = _row(v_ptr, own, v_stride_l, d, D)\n", "acc1 = tl.zeros_like(q1)\n"),
    "dq misses the bridge key": ("acc += (weight * (tl.sum(grad", "acc += 0 * (weight * (tl.sum(grad"),
    "dk misses the bridge row": ("dk += (weight * (tl.sum(v.to", "dk += 0 * (weight * (tl.sum(v.to"),
    "the scale is dropped": ("dk * scale_e, D)\n        _put(dv_ptr", "dk, D)\n        _put(dv_ptr"),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.bridged_attention import triton

    right, wrong = MUTATIONS[name]
    source = Path(triton.__file__).read_text()
    assert source.count(right) == 1, name
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastzs.kernels.bridged_attention.mutant", mutant)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layout = TokenLayout(1, (5, 4), (2, 2))
    check(layout, 2, f32, heads=1, batch=1, dim=16)
    monkeypatch.setattr(triton, "forward", module.forward)
    monkeypatch.setattr(triton, "backward", module.backward)
    with pytest.raises(AssertionError):
        check(layout, 2, f32, heads=1, batch=1, dim=16)
