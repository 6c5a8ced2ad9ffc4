"""The compiled CPU backend of bridged_attention: forward and every gradient against the dense mask in fp64."""

import platform

import pytest
import torch

from fastzs.kernels.bridged_attention import api
from fastzs.kernels.bridged_attention.compiled import MISSING
from fastzs.kernels.dispatch import watch
from fastzs.ops import TokenLayout, bridged_attention

from .attention_bounds import assert_within, attention_errors
from .test_bridged_attention import LAYOUTS, assert_within_bounds, bf16, bounds, f16, f32, inputs, run

pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

ISAS = ["avx512_bf16", "avx512", "avx2", "portable"] if platform.machine() == "x86_64" else ["portable"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "published"])
def test_layouts_on_every_instruction_set(name, isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    assert_within_bounds(*LAYOUTS[name], f32, impl="cpu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("name", ["wide", "left-over", "no-bridge"])
def test_low_precision_on_every_instruction_set(name, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    assert_within_bounds(*LAYOUTS[name], dtype, impl="cpu")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [8, 32, 40, 64, 80, 96, 128])
def test_head_sizes(dim, isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    assert_within_bounds(*LAYOUTS["wide"], f32, impl="cpu", dim=dim)


# Grids of the tower at every size, and of bridges that divide them or not.
GRIDS = {16: (4, 4), 49: (7, 7), 1024: (32, 32), 1376: (32, 43)}
BRIDGES = {0: None, 4: (2, 2), 9: (3, 3), 16: (4, 4)}


PROMPTS = (0, 3, 10, 100)
SMALL = [(patches, regions, prompts) for patches in (16, 49) for regions in BRIDGES for prompts in PROMPTS]
LARGE = [(1024, regions, prompts) for regions, prompts in zip(BRIDGES, PROMPTS, strict=True)]
LARGE += [(1376, regions, prompts) for regions, prompts in zip(BRIDGES, reversed(PROMPTS), strict=True)]


@pytest.mark.parametrize(
    ("patches", "regions", "prompts"), [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)]
)
def test_lengths(patches, regions, prompts):
    layout = TokenLayout(1, GRIDS[patches], BRIDGES[regions])
    assert_within_bounds(layout, prompts, f32, impl="cpu", batch=1, heads=1)


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
def test_published_layout(dtype):
    assert_within_bounds(*LAYOUTS["published"], dtype, impl="cpu", batch=1, heads=2)


def test_prompts_of_each_picture():
    assert_within_bounds(*LAYOUTS["divides"], f32, impl="cpu", prompt_batch=2)


@pytest.mark.parametrize("prompt_batch", [1, 2])
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("name", [name for name, (_, prompts) in LAYOUTS.items() if prompts and name != "published"])
def test_prompts_alone_are_trained(name, dtype, prompt_batch):
    """In the first layer of a frozen tower no other gradient is wanted, and none is computed."""
    layout, prompts = LAYOUTS[name]
    tensors = inputs(layout, prompts, dtype, prompt_batch=prompt_batch)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, k, v, *own = tensors
    own = [t.clone().requires_grad_() for t in own]
    out = bridged_attention(q, k, v, layout, prompt_kv=(own[0], own[1]), impl="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        alone = torch.autograd.grad(out, own, weights.to(dtype))
    assert not any(event.name == "fastzs::bridged_attention_backward" for event in seen.events())
    exact = run([t.double() for t in tensors], layout, "reference", weights.to(dtype).double())[-2:]
    allowed = bounds(tensors, layout, weights.to(dtype), dtype)
    for name, mine, right in zip(("dpk", "dpv"), alone, exact, strict=True):
        assert mine.dtype == dtype
        assert_within(name, mine, right, allowed[name])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("size", [0.0, 20.0])
def test_extreme_scores(size, dtype, isa, monkeypatch):
    """All scores equal; scores up to thousands, where a weight is 0 or 1 and the first ones tell little of the rest."""
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    assert_within_bounds(*LAYOUTS["wide"], dtype, impl="cpu", size=size)


def test_strided_inputs_and_scale():
    layout, _ = LAYOUTS["left-over"]
    base = torch.full((4, 2 * layout.length, 3, 16, 18), torch.nan)
    base[:2, ::2, :, :8, 1:9] = torch.randn(2, layout.length, 3, 8, 8)
    # [B, H, L, d] from: the towers' layout; every other token of a wider row; channels that are not neighbours
    views = {
        "tower": base[:2, ::2, :, :8, 1:9].permute(2, 0, 3, 1, 4),
        "channels apart": base[:2, ::2, :, :8, 1:9].permute(2, 0, 4, 1, 3),
        "one image for all": base[:1, ::2, :, :8, 1:9].permute(2, 0, 3, 1, 4).expand(-1, 3, -1, -1, -1),
    }
    for q, k, v in views.values():
        out = bridged_attention(q, k, v, layout, scale=0.3, impl="cpu")
        other = bridged_attention(*(t.double() for t in (q, k, v)), layout, scale=0.3, impl="reference")
        hidden = torch.zeros(layout.length, layout.length).masked_fill(~layout.dense_mask(), -torch.inf)
        wide = [t.double() for t in (q, k, v)]
        allowed = attention_errors(*wide, torch.zeros_like(wide[0]), f32, scale=0.3, bias=hidden)
        assert_within("out", out, other, allowed["out"])


def test_output_joins_heads_without_a_copy():
    layout, _ = LAYOUTS["left-over"]
    q, k, v = inputs(layout, 0, f32)
    out = bridged_attention(q, k, v, layout, impl="cpu")
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_repeats_to_the_bit(dtype):
    """Again, with any number of threads, and for an image whatever else is in the batch; gradients too."""
    layout, prompts = LAYOUTS["left-over"]
    tensors = inputs(layout, prompts, dtype, batch=3, prompt_batch=3)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    first = run(tensors, layout, "cpu", weights)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert all(map(torch.equal, run(tensors, layout, "cpu", weights), first))
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([2, 0, 1])
    permuted = run([t[order] for t in tensors], layout, "cpu", weights[order])
    assert all(torch.equal(mine, whole[order]) for mine, whole in zip(permuted, first, strict=True))


@pytest.mark.parametrize("dtype", [f32, bf16])
def test_threads_share_a_head_where_there_are_few(dtype):
    """Of 604 keys one thread takes all, and of 16 or 32 each takes some; the sums are the same to the bit."""
    layout, prompts = TokenLayout(1, (24, 25), (4, 5)), 3
    tensors = inputs(layout, prompts, dtype, batch=1)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(tensors, layout, "cpu", weights)
        for n in (16, 32):
            torch.set_num_threads(n)
            assert all(map(torch.equal, run(tensors, layout, "cpu", weights), alone))
        assert_within_bounds(layout, prompts, dtype, impl="cpu")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(bad):
    layout, _ = LAYOUTS["no-bridge"]
    q, k, v = inputs(layout, 0, f32)
    q[0, 1, 2, 3] = bad
    out = bridged_attention(q, k, v, layout, impl="cpu")
    assert out[0, 1, 2].isnan().all()
    out[0, 1, 2] = 0
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("prompts", [0, 3])
def test_operator_agrees_with_its_declaration(dtype, prompts):
    layout, _ = LAYOUTS["left-over"]
    assert layout.bridge
    tensors = [t.requires_grad_() for t in inputs(layout, prompts, dtype, batch=2)]
    q, k, v, *pair = tensors
    pk, pv = pair or (None, None)
    options = (layout.prefix, *layout.grid, *layout.bridge, 0.25)
    torch.library.opcheck(torch.ops.fastzs.bridged_attention.default, (q, k, v, pk, pv, *options))
    out, lse = torch.ops.fastzs.bridged_attention(q, k, v, pk, pv, *options)
    saved = [t if t is None else t.detach() for t in (out, q, k, v, pk, pv, out, lse)]
    torch.library.opcheck(torch.ops.fastzs.bridged_attention_backward.default, (*saved, *options))


@pytest.mark.parametrize("name", ["wide", "no-bridge"])
def test_compiles_without_a_break(name):
    layout, prompts = LAYOUTS[name]
    tensors = inputs(layout, prompts, f32)
    weights = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))

    def function(q, k, v, pk, pv):
        return bridged_attention(q, k, v, layout, prompt_kv=(pk, pv), impl="cpu")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = compiled(*leaves)
    grads = torch.autograd.grad(out, leaves, weights)
    for mine, eager in zip([out, *grads], run(tensors, layout, "cpu", weights), strict=True):
        assert torch.equal(mine, eager)


def test_exports():
    layout, _ = LAYOUTS["left-over"]

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return bridged_attention(q, k, v, layout, impl="cpu")

    tensors = tuple(inputs(layout, 0, f32))
    exported = torch.export.export(Attention(), tensors)
    assert torch.equal(exported.module()(*tensors), Attention()(*tensors))


def test_second_derivative_raises():
    layout, _ = LAYOUTS["divides"]
    q, k, v = inputs(layout, 0, f32)
    q.requires_grad_()
    (grad,) = torch.autograd.grad(bridged_attention(q, k, v, layout, impl="cpu").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("dtype", "dim", "reason"),
    [
        (torch.float64, 32, r"q is torch\.float64"),
        (f32, 36, "size 36"),
        (f32, 136, "size 136; expected a multiple of 8"),
    ],
)
def test_what_it_cannot_take_goes_elsewhere(dtype, dim, reason, monkeypatch):
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    layout, _ = LAYOUTS["divides"]
    q, k, v = inputs(layout, 0, dtype, dim=dim)
    with pytest.raises(RuntimeError, match=f"impl='cpu' cannot run: .*{reason}"):
        bridged_attention(q, k, v, layout, impl="cpu")
    with watch() as choices:
        out = bridged_attention(q, k, v, layout)
    assert choices[0].backend == "split"
    exact = bridged_attention(q.double(), k.double(), v.double(), layout, impl="reference")
    assert_within("out", out, exact, bounds([q, k, v], layout, torch.zeros_like(q), dtype)["out"])


@pytest.mark.parametrize(("wide", "taken"), [(True, "cpu"), (False, "split")])
def test_auto_takes_what_was_measured_best(wide, taken, monkeypatch):
    monkeypatch.setattr(api, "WIDE_VECTORS", wide)
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    layout, _ = LAYOUTS["divides"]
    with watch() as choices:
        bridged_attention(*inputs(layout, 0, f32), layout)
    (choice,) = choices
    assert choice.backend == taken
    assert set(choice.reasons) == {"cpu", "split", "reference", "triton", "xformers"}
    assert choice.reasons["xformers"] == "xformers has no attention for cpu; expected cuda"
