"""The C++ backend of pixel_text_logits, with every instruction set this CPU has: values, gradients, bounds, bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastzs.kernels.pixel_text_logits import pixel_text_logits
from fastzs.kernels.pixel_text_logits.operator import MISSING

from .test_pixel_text_logits import cosine, inputs, lay_out
from .tolerances import assert_close

pytestmark = pytest.mark.skipif(MISSING["cpu"] is not None, reason=str(MISSING["cpu"]))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # B, D, C, h, w: a tile has 64 pixels, a block 12 rows of which 4, 8 or 12 are computed
    "one": (1, 1, 1, 1, 1),
    "part of a tile": (2, 12, 5, 3, 4),
    "whole tiles": (1, 24, 12, 8, 16),
    "over the edges": (2, 65, 21, 5, 13),
    "a long sum": (1, 513, 3, 2, 2),
    "one column": (1, 40, 3, 70, 1),
}


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def isa(request, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", request.param)


def computed(impl, cast, features, text, scale):
    """Values and gradients."""
    f, t = (x.to(cast).detach().requires_grad_() for x in (features, text))
    out = pixel_text_logits(f, t, scale, impl)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(features.dtype)
    return out.detach(), *torch.autograd.grad(out, (f, t), weight.to(cast))


def check(features, text, scale=100.0):
    """As close to the reference in fp64 as the roundings allow."""
    dtype = features.dtype
    # a gradient is a difference: what is subtracted is about this large, however small the rest
    sizes = (0.0, abs(scale) / features.double().norm(dim=1).max().item(), 0.0)
    runs = [computed(*run, features, text, scale) for run in (("cpu", dtype), ("reference", torch.float64))]
    ops = ("pixel_text_logits", "pixel_text_logits.grad", "pixel_text_logits.grad")
    for op, mine, wanted, size in zip(ops, *runs, sizes, strict=True):
        assert mine.dtype == dtype
        assert_close(op, mine, wanted, size)


@pytest.mark.parametrize("layout", ["contiguous", "tokens", "framed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_normalised_copies(shape, dtype, layout):
    B, D, C, h, w = shape
    features, text = inputs(B, D, C, h, w, dtype)
    check(lay_out(features, layout), text.t().contiguous().t() if layout == "framed" else text)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_anything(data):
    B, D, C, h, w = (data.draw(st.integers(1, most)) for most in (3, 40, 30, 12, 12))
    features, text = inputs(B, D, C, h, w, data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, 9)))
    check(lay_out(features, data.draw(st.sampled_from(["contiguous", "tokens", "framed"]))), text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_number_is_read_and_written_as_torch_does(dtype):
    """All 65536 of them, as text of one channel; those whose square is an fp32 number also as features."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.ones(1, 1, 1, 1)
    written = torch.ops.fastzs.pixel_text_logits(one, numbers.view(-1, 1), 1.0).flatten()
    assert torch.equal(written.isnan(), numbers.isnan())
    assert torch.equal(written[~numbers.isnan()], numbers[~numbers.isnan()])
    squares = numbers.float().square()
    features = numbers[(squares > 1e-20) & squares.isfinite()]
    read = torch.ops.fastzs.pixel_text_logits(features.view(1, 1, 1, -1), torch.ones(1, 1), 1.0).flatten()
    torch.testing.assert_close(read, features.float().sign(), rtol=2e-7, atol=0)
    # two channels, the second of known size, so that a wrong exponent or digit shows
    pairs = torch.stack([features, features.abs().clamp(1e-3, 1e3)]).view(1, 2, 1, -1)
    text = torch.tensor([[1.0, 2.0]])
    assert_close("pixel_text_logits", torch.ops.fastzs.pixel_text_logits(pairs, text, 1.0), cosine(pairs, text, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_nearest_even(dtype):
    g = torch.Generator().manual_seed(0)
    values = torch.randn(20000, generator=g) * torch.logspace(-9, 6, 20000)
    halfway = torch.tensor([65519.9, 65520.0, 65536.0, 2.0**-25, 3 * 2.0**-25, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    # the scale carries an fp32 number through; the text says what to write
    ones = torch.ones(1, 1, 1, 40), torch.ones(1, 1, dtype=dtype)
    for scale in [*values[::97].tolist(), *halfway.tolist()]:
        out = torch.ops.fastzs.pixel_text_logits(*ones, scale)
        assert (out == torch.tensor(scale).to(dtype)).all(), scale


def test_zero_and_tiny_features():
    features, text = inputs()
    features[0, :, 1, 1] = 0
    features[0, :, 1, 2] *= 1e-15
    grads = []
    for impl in ("cpu", "reference"):
        mine = features.clone().requires_grad_()
        out = pixel_text_logits(mine, text, 100.0, impl)
        assert (out[0, :, 1, 1] == 0).all()
        grads.append(torch.autograd.grad(out.square().sum(), mine)[0])
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_stays_in_its_pixel(bad):
    features, text = inputs()
    features[0, 3, 1, 1] = bad
    features.requires_grad_()
    out = pixel_text_logits(features, text, impl="cpu")
    assert out[0, :, 1, 1].isnan().any()
    assert out.isnan().sum() <= 5
    (grad,) = torch.autograd.grad(out.sum(), features)
    assert grad[0, :, 1, 1].isnan().any()
    assert grad.isnan().sum() <= 12


def test_bitwise_repeatable_with_any_number_of_threads():
    features, text = inputs(B=3, D=70, C=21, h=9, w=11)
    features.requires_grad_()
    run = lambda f: (out := pixel_text_logits(f, text, impl="cpu"), torch.autograd.grad(out.square().sum(), f)[0])  # noqa: E731
    first = run(features)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run(features), first, strict=True))
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([2, 0, 1])
    permuted = run(features.detach()[order].requires_grad_())
    assert all(torch.equal(a, b[order]) for a, b in zip(permuted, first, strict=True))


def test_broadcast_and_transposed_gradients():
    """What a sum sends back has strides of 0, what a permutation does has others."""
    features, text = inputs(D=20, C=7)
    grads = []
    for impl in ("cpu", "reference"):
        f = features.clone().requires_grad_()
        out = pixel_text_logits(f, text, 2.0, impl)
        weight = torch.randn(2, 4, 3, 7, generator=torch.Generator().manual_seed(2))
        grads.append(torch.autograd.grad((out.permute(0, 3, 2, 1) * weight).sum() + out.sum(), f)[0])
        grads.append(torch.autograd.grad(pixel_text_logits(f, text, 2.0, impl).sum(), f)[0])
    torch.testing.assert_close(grads[:2], grads[2:])


def test_autocast_multiplies_bfloat16_text():
    features, text = inputs(D=64)
    features.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = pixel_text_logits(features, text, impl="cpu")
    assert out.dtype == torch.bfloat16
    assert_close("pixel_text_logits", out, cosine(features, text, 1.0))
    (grad,) = torch.autograd.grad(out.sum(), features)
    assert grad.dtype == torch.float32


def test_empty_batch_and_no_classes():
    features, text = inputs()
    assert pixel_text_logits(features[:0], text, impl="cpu").shape == (0, 5, 3, 4)
    none = features.requires_grad_()
    out = pixel_text_logits(none, text[:0], impl="cpu")
    assert out.shape == (2, 0, 3, 4)
    assert (torch.autograd.grad(out.sum(), none)[0] == 0).all()


def test_operator_agrees_with_its_declaration():
    features, text = inputs()
    args = (features.requires_grad_(), text.requires_grad_(), 2.0)
    torch.library.opcheck(torch.ops.fastzs.pixel_text_logits.default, args)
    grad = torch.ones(2, 5, 3, 4)
    torch.library.opcheck(
        torch.ops.fastzs.pixel_text_logits_backward.default, (grad, features.detach(), text.detach(), 2.0)
    )
    compiled = torch.compile(lambda f, t: pixel_text_logits(f, t, 2.0, "cpu"), fullgraph=True, backend="aot_eager")
    out = compiled(features, text)
    torch.testing.assert_close(out, pixel_text_logits(*args, impl="cpu"))
    grads = torch.autograd.grad(out.sum(), (features, text))
    torch.testing.assert_close(grads, torch.autograd.grad(pixel_text_logits(*args, impl="cpu").sum(), (features, text)))


def test_second_derivative_raises():
    features, text = inputs()
    features.requires_grad_()
    out = pixel_text_logits(features, text, impl="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="pixel_text_logits is differentiable once"):
        grad.sum().backward()


def test_operator_refuses_what_does_not_fit():
    """Called past the checks of the Python function, it must still not read out of bounds."""
    features, text = inputs()
    op, backward = torch.ops.fastzs.pixel_text_logits, torch.ops.fastzs.pixel_text_logits_backward
    for f, t in ((features, text[:, :5]), (features[0], text), (features, text[0]), (features.double(), text)):
        with pytest.raises(RuntimeError, match=r"pixel_text_logits: expected .* got "):
            op(f, t, 1.0)
    with pytest.raises(RuntimeError, match=r"expected a gradient \[B, C, h, w\] .* got "):
        backward(torch.ones(2, 4, 3, 4), features, text, 1.0)
