"""bridged_attention: every backend against the dense mask, forward and every gradient, and the layout itself."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.kernels.bridged_attention import api
from fastzs.kernels.bridged_attention import split as split_module
from fastzs.ops import TokenLayout, bridged_attention

from .attention_bounds import assert_within, attention_errors

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

NAMES = ("out", "dq", "dk", "dv", "dpk", "dpv")

LAYOUTS = {
    # regions divide the grid; non-square; left-over patches; one region; without bridge; CLIP-RC's own; tiny
    "divides": (TokenLayout(1, (4, 4), (2, 2)), 3),
    "wide": (TokenLayout(1, (4, 10), (2, 5)), 10),
    "left-over": (TokenLayout(1, (7, 8), (3, 3)), 2),
    "left-over-one-side": (TokenLayout(4, (6, 9), (4, 3)), 0),
    "one-region": (TokenLayout(5, (3, 5), (1, 1)), 1),
    "every-patch": (TokenLayout(1, (2, 3), (2, 3)), 0),
    "no-bridge": (TokenLayout(1, (4, 5)), 3),
    "published": (TokenLayout(1, (32, 32), (4, 4)), 10),
    "tiny": (TokenLayout(1, (1, 1), (1, 1)), 0),
    "no-prefix": (TokenLayout(0, (4, 5), (2, 2)), 3),
}


def inputs(layout, prompts, dtype, batch=2, heads=3, dim=32, size=1.0, prompt_batch=1):
    generator = torch.Generator().manual_seed(layout.length + prompts)

    def tensor(batch, length):
        return (size * torch.randn(batch, heads, length, dim, generator=generator, dtype=f64)).to(dtype)

    qkv = [tensor(batch, layout.length) for _ in range(3)]
    return [*qkv, *([tensor(prompt_batch, prompts) for _ in range(2)] if prompts else [])]


def run(tensors, layout, impl, weights):
    """Output and the gradients of all inputs."""
    tensors = [t.clone().requires_grad_() for t in tensors]
    q, k, v, *prompts = tensors
    out = bridged_attention(q, k, v, layout, prompt_kv=(prompts[0], prompts[1]) if prompts else None, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, tensors, weights.to(out.dtype))]


def bounds(tensors, layout, upstream, dtype, scale=None, rounded_scores=False):
    """Allowed errors of the output and of every gradient, prompts being keys before the others."""
    q, k, v, *prompts = (t.double() for t in tensors)
    count = prompts[0].shape[2] if prompts else 0
    if prompts:
        k, v = (torch.cat([p.expand(len(q), -1, -1, -1), x], 2) for p, x in zip(prompts, (k, v), strict=True))
    hidden = torch.zeros(layout.length, count + layout.length, dtype=f64, device=q.device)
    hidden.masked_fill_(~layout.dense_mask(count, q.device), -torch.inf)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    found = attention_errors(q, k, v, upstream.double(), dtype, scale=scale, bias=hidden, rounded_scores=rounded_scores)
    for of in "kv":
        whole = found[f"d{of}"]
        found[f"d{of}"], of_prompts = whole[:, :, count:], whole[:, :, :count]
        if prompts and len(tensors[3]) < len(q):  # prompts of all images
            of_prompts = of_prompts.square().sum(0, keepdim=True).sqrt()
        found[f"dp{of}"] = of_prompts
    return found


def assert_within_bounds(layout, prompts, dtype, impl="split", device="cpu", **options):
    """``impl`` is as close to the dense mask in fp64 as its roundings allow, forward and every gradient."""
    tensors = [t.to(device) for t in inputs(layout, prompts, dtype, **options)]
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0), dtype=f64).to(device)
    weights = weights.to(dtype)
    exact = run([t.double() for t in tensors], layout, "reference", weights.double())
    ours = run(tensors, layout, impl, weights)
    allowed = bounds(tensors, layout, weights, dtype, rounded_scores=impl == "split")
    for name, mine, reference in zip(NAMES, ours, exact, strict=False):
        assert mine.dtype == dtype
        assert_within(name, mine, reference, allowed[name])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [f64, f32])
def test_split_equals_dense_mask(name, dtype):
    layout, prompts = LAYOUTS[name]
    assert_within_bounds(layout, prompts, dtype, batch=1 if name == "published" else 2)


@pytest.mark.parametrize("name", ["wide", "left-over", "no-bridge"])
@pytest.mark.parametrize("dtype", [bf16, f16])
def test_split_in_low_precision(name, dtype):
    assert_within_bounds(*LAYOUTS[name], dtype)


@pytest.mark.parametrize("dim", [32, 64, 128])
def test_head_sizes(dim):
    assert_within_bounds(*LAYOUTS["wide"], f32, dim=dim)


def test_prompts_of_each_picture():
    assert_within_bounds(*LAYOUTS["divides"], f64, prompt_batch=2)


@pytest.mark.parametrize("size", [0.0, 20.0])
def test_extreme_scores(size):
    """All scores equal; scores up to thousands, where a weight is 0 or 1."""
    assert_within_bounds(*LAYOUTS["wide"], f32, size=size)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4))
def test_any_layout(prefix, h, w, rh, rw, prompts):
    layout = TokenLayout(prefix, (h, w), (min(rh, h), min(rw, w)))
    assert_within_bounds(layout, prompts, f64, heads=1, dim=4)


def test_prompts_are_keys_like_other_prefix_tokens():
    """prompt_kv gives the rows that prompts as tokens give, whose own rows are not computed."""
    layout, prompts = LAYOUTS["wide"]
    tensors = inputs(layout, prompts, f64, prompt_batch=2)
    q, k, v, pk, pv = tensors
    whole = TokenLayout(layout.prefix + prompts, layout.grid, layout.bridge)

    def join(x, p):  # prompts after CLS, where the model has them
        return torch.cat([x[:, :, :1], p, x[:, :, 1:]], dim=2)

    for impl in ("reference", "split"):
        apart = bridged_attention(q, k, v, layout, prompt_kv=(pk, pv), impl=impl)
        as_tokens = bridged_attention(join(q, 0 * pk), join(k, pk), join(v, pv), whole, impl=impl)
        rest = torch.cat([as_tokens[:, :, :1], as_tokens[:, :, 1 + prompts :]], dim=2)
        assert (apart - rest).abs().max() < 1e-14  # measured 4.4e-16


def test_strided_inputs_and_scale():
    layout, _ = LAYOUTS["left-over"]
    base = torch.randn(2, layout.length, 3, 4, 8, dtype=f64)
    q, k, v = base.permute(2, 0, 3, 1, 4)
    one = bridged_attention(q, k, v, layout, scale=0.3, impl="split")
    other = bridged_attention(q.contiguous() * 0.3 * 8**0.5, k.contiguous(), v.contiguous(), layout, impl="reference")
    assert (one - other).abs().max() < 1e-14  # measured 1.3e-15


def test_gradcheck():
    layout, prompts = TokenLayout(2, (3, 2), (2, 1)), 2
    tensors = [t.requires_grad_() for t in inputs(layout, prompts, f64, batch=1, heads=1, dim=3)]

    def function(q, k, v, pk, pv):
        return bridged_attention(q, k, v, layout, prompt_kv=(pk, pv), impl="split")

    assert torch.autograd.gradcheck(function, tensors)


def test_forward_repeats_to_the_bit():
    layout, prompts = LAYOUTS["published"]
    q, k, v, pk, pv = inputs(layout, prompts, f32, batch=1)
    first = bridged_attention(q, k, v, layout, prompt_kv=(pk, pv))
    assert torch.equal(first, bridged_attention(q, k, v, layout, prompt_kv=(pk, pv)))


@pytest.mark.parametrize("name", ["wide", "no-bridge"])
def test_compiles_without_a_break(name):
    layout, prompts = LAYOUTS[name]
    tensors = inputs(layout, prompts, f32)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))

    def function(q, k, v, pk, pv):
        return bridged_attention(q, k, v, layout, prompt_kv=(pk, pv), impl="split")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = compiled(*leaves)
    grads = torch.autograd.grad(out, leaves, weights)
    for mine, eager in zip([out, *grads], run(tensors, layout, "split", weights), strict=True):
        assert torch.equal(mine, eager)


def test_wrong_backward_would_be_seen(monkeypatch):
    """The trap of the merge: the shared part's own log-sum-exp, instead of the merged one, in its backward."""

    def unmerged(grad, q, k, v, out, lse, *args, **kwargs):
        out, lse = split_module.flash(q, k, v, 0.0, False, attn_mask=None, scale=kwargs["scale"])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, *args, **kwargs
        )

    monkeypatch.setattr(split_module, "flash_backward", unmerged)
    with pytest.raises(AssertionError, match="dq"):
        assert_within_bounds(*LAYOUTS["wide"], f64)


@pytest.mark.parametrize(("bridge", "first"), [(None, "split"), ((2, 2), "triton")])
def test_on_gpus_pytorchs_attention_comes_first_where_there_is_no_bridge(bridge, first):
    there = SimpleNamespace(device=torch.device("cuda"))
    assert api._order(there, TokenLayout(1, (4, 4), bridge))[0] == first


def test_dense_mask_by_hand():
    """2 x 3 patches under a 1 x 2 bridge: the third column is left over."""
    mask = TokenLayout(1, (2, 3), (1, 2)).dense_mask().int().tolist()
    shared = [1] * 7
    assert mask == [
        [*shared, 0, 0],  # CLS
        [*shared, 1, 0],
        [*shared, 0, 1],
        [*shared, 0, 0],
        [*shared, 1, 0],
        [*shared, 0, 1],
        [*shared, 0, 0],
        [0, 1, 0, 0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, (2, 2), None), "a prefix of at least 0"),
        ((1, (0, 2), None), "every other count at least 1"),
        ((1, (2, 2), (0, 1)), "every other count at least 1"),
        ((1, (3, 5), (4, 4)), "leaves regions empty on a grid of 3 x 5"),
    ],
)
def test_bad_layouts(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(*arguments)


def test_bad_inputs():
    layout = TokenLayout(1, (2, 2), (1, 1))
    x, y, p = torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 7, 8), torch.zeros(3, 3, 4, 8)
    with pytest.raises(ValueError, match=r"7 tokens, but the layout has .*: 6"):
        bridged_attention(y, y, y, layout)
    with pytest.raises(ValueError, match="expected one shape"):
        bridged_attention(x, x, x[..., :4], layout)
    with pytest.raises(TypeError, match=r"v is torch\.float64; expected torch\.float32"):
        bridged_attention(x, x, x.double(), layout)
    with pytest.raises(ValueError, match="k is on meta"):
        bridged_attention(x, x.to("meta"), x, layout)
    with pytest.raises(ValueError, match=r"expected \[1 or 2, 3, P, 8\]"):
        bridged_attention(x, x, x, layout, prompt_kv=(p, p))
    with pytest.raises(RuntimeError, match="no such backend"):
        bridged_attention(x, x, x, layout, impl="cuda")
    with pytest.raises(RuntimeError, match=r"split.*log-sum-exp"):
        bridged_attention(x.to("meta"), x.to("meta"), x.to("meta"), layout, impl="split")


def test_what_is_asked_for_runs_or_raises():
    """No backend named by the caller is replaced by another."""
    layout, _ = LAYOUTS["left-over"]
    with pytest.raises(RuntimeError, match=r"impl='xformers' cannot run: .* for cpu"):
        bridged_attention(*inputs(layout, 0, f32), layout, impl="xformers")


def test_split_takes_any_attention_that_gives_its_log_sum_exp(monkeypatch):
    """xformers' place in the split, taken by PyTorch's attention: xformers has none for CPUs."""
    calls = []

    def attention(q, k, v, scale):
        calls.append("forward")
        return split_module.flash(q, k, v, 0.0, False, attn_mask=None, scale=scale)

    def attention_backward(grad, q, k, v, out, lse, scale):
        calls.append("backward")
        return split_module.flash_backward(grad, q, k, v, out, lse, 0.0, False, attn_mask=None, scale=scale)

    monkeypatch.setattr(split_module.xformers, "attention", attention)
    monkeypatch.setattr(split_module.xformers, "attention_backward", attention_backward)
    monkeypatch.setattr(api, "why_not_xformers", lambda q: None)
    assert_within_bounds(*LAYOUTS["left-over"], f32, impl="xformers")
    assert calls == ["forward", "backward"]


@pytest.mark.slow
def test_no_import_of_xformers_before_it_is_asked_for():
    code = "import sys, fastzs.ops; assert not any(name.split('.')[0] == 'xformers' for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
