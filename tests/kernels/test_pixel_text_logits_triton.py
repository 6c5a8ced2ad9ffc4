"""The Triton backend of pixel_text_logits: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastzs.kernels.mask_loss import pixel_text_mask_loss
from fastzs.kernels.pixel_text_logits import pixel_text_logits

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_pixel_text_logits import cosine, inputs, lay_out
from .tolerances import assert_close

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


@pytest.mark.skipif(INTERPRETED, reason="there is an interpreter")
def test_cpu_tensors_need_the_interpreter():
    with pytest.raises(RuntimeError, match="the features are on cpu; expected cuda"):
        pixel_text_logits(*inputs(), impl="triton")


def check(features, text, scale=100.0):
    out = pixel_text_logits(features, text, scale, impl="triton")
    assert out.dtype == features.dtype
    assert_close("pixel_text_logits", out, cosine(features, text, scale))


SHAPES = {  # B, D, C, h, w: tiles have 64 pixels, 16 (fp32) or 32 channels, up to 64 (fp32) or 128 classes
    "one": (1, 1, 1, 1, 1),
    "part of a tile": (2, 12, 5, 3, 4),
    "whole tiles": (1, 128, 16, 8, 8),
    "over the edges": (2, 65, 130, 5, 13),
    "one column": (1, 40, 3, 70, 1),
}


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "tokens", "framed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_normalised_copies(shape, dtype, layout):
    B, D, C, h, w = shape
    features, text = inputs(B, D, C, h, w, dtype)
    check(lay_out(features, layout), text.t().contiguous().t() if layout == "framed" else text)


@interpreted
def test_result_lies_inside_its_memory(monkeypatch):
    """The interpreter does not notice a write out of bounds."""
    from fastzs.kernels.pixel_text_logits import triton

    features, text = inputs(C=5, h=3, w=3)
    memory = torch.full((2 * 5 * 9 + 2000,), 7.0)
    new_empty = torch.Tensor.new_empty

    def inside(self, *args, **options):  # the interpreter calls it too, for other shapes
        return memory[1000:-1000].view(args[0]) if args[0] == (2, 5, 3, 3) else new_empty(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", inside)
    out = triton.pixel_text_logits(features, text, 1.0)
    monkeypatch.undo()
    assert_close("pixel_text_logits", out, cosine(features, text, 1.0))
    assert (memory[:1000] == 7).all()
    assert (memory[-1000:] == 7).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_agree_with_fp64(dtype):
    features, text = inputs(D=70, C=9, dtype=dtype)
    weight = torch.randn(2, 9, 3, 4, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(impl, cast):
        f, t = (x.to(cast).detach().requires_grad_() for x in (features, text))
        out = pixel_text_logits(f, t, 3.0, impl)
        return torch.autograd.grad(out, (f, t), weight.to(cast))

    for mine, wanted in zip(gradients("triton", dtype), gradients("reference", torch.float64), strict=True):
        assert mine.dtype == dtype
        assert_close("pixel_text_logits.grad", mine, wanted)


@interpreted
def test_second_derivative():
    def second(impl, cast):
        features, text = (x.to(cast).requires_grad_() for x in inputs(D=6))
        (grad,) = torch.autograd.grad(
            pixel_text_logits(features, text, 3.0, impl).square().sum(), features, create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), (features, text))

    for mine, wanted in zip(second("triton", torch.float32), second("reference", torch.float64), strict=True):
        assert_close("pixel_text_logits.grad", mine, wanted)


@interpreted
def test_zero_and_tiny_features():
    features, text = inputs()
    features[0, :, 1, 1] = 0
    features[0, :, 1, 2] *= 1e-15
    grads = []
    for impl in ("triton", "reference"):
        mine = features.clone().requires_grad_()
        out = pixel_text_logits(mine, text, 100.0, impl)
        assert (out[0, :, 1, 1] == 0).all()
        grads.append(torch.autograd.grad(out.square().sum(), mine)[0])
    assert grads[0].isfinite().all()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@interpreted
def test_nan_stays_in_its_pixel():
    features, text = inputs()
    features[0, 3, 1, 1] = torch.nan
    bad = pixel_text_logits(features, text, impl="triton").isnan()
    assert bad[0, :, 1, 1].all()
    assert bad.sum() == 5


@interpreted
def test_empty_batch_and_no_classes():
    features, text = inputs()
    assert pixel_text_logits(features[:0], text, impl="triton").shape == (0, 5, 3, 4)
    assert pixel_text_logits(features, text[:0], impl="triton").shape == (2, 0, 3, 4)


@interpreted
def test_autocast_multiplies_in_float16():
    """Not in bf16, which the interpreter cuts instead of rounding."""
    features, text = inputs(D=64)
    mine = features.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        out = pixel_text_logits(mine, text, impl="triton")
        wanted = pixel_text_logits(features, text, impl="reference")
    assert out.dtype == wanted.dtype == torch.float16
    assert_close("pixel_text_logits", out, cosine(features, text, 1.0))
    out.sum().backward()
    assert mine.grad is not None
    assert mine.grad.dtype == torch.float32


@interpreted
def test_double_features_are_refused():
    with pytest.raises(RuntimeError, match=r"the features are torch.float64; expected float32"):
        pixel_text_logits(*inputs(dtype=torch.float64), impl="triton")


@interpreted
def test_with_the_loss(monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", "triton")
    target = torch.randint(0, 5, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for cast in (torch.float32, torch.float64):
        features, text = (x.to(cast).requires_grad_() for x in inputs())
        loss = sum(pixel_text_mask_loss(features, text, target, 10.0))
        losses.append((loss.detach(), *torch.autograd.grad(loss, (features, text))))
    for mine, wanted in zip(*losses, strict=True):
        assert_close("pixel_text_logits.grad", mine, wanted)


@interpreted
def test_operator_agrees_with_its_declaration():
    features, text = inputs()
    args = (features.requires_grad_(), text.requires_grad_(), 2.0)
    torch.library.opcheck(torch.ops.fastzs.pixel_text_logits_triton.default, args)
    compiled = torch.compile(lambda f, t: pixel_text_logits(f, t, 2.0, "triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, text), pixel_text_logits(*args, impl="triton"))


MUTATIONS = {
    "the norm misses the last step": (
        "squares += f32 * f32",
        "squares += tl.where(start + CHANNELS < D, f32 * f32, 0)",
    ),
    "the norm is squared": ("tl.sqrt_rn(tl.sum(squares, 0))", "tl.sum(squares, 0)"),
    "the scale is dropped": ("(scale / norm)", "(1.0 / norm)"),
    "steps overlap": ("range(0, D, CHANNELS)", "range(0, D, CHANNELS // 2)"),
    "every image reads the first": ("b * features_stride_b", "0 * features_stride_b"),
    "the last pixel is dropped": (
        "mask=(c < C)[:, None] & (n < pixels)[None, :])\n\n\ndef",
        "mask=(c < C)[:, None] & (n < pixels - 1)[None, :])\n\n\ndef",
    ),
    "rows are taken for flat": ("FLAT=h == 1 or", "FLAT=True or"),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.pixel_text_logits import triton

    right, wrong = MUTATIONS[name]
    source = Path(triton.__file__).read_text()
    assert source.count(right) == 1
    mutant = tmp_path / "mutant.py"
    mutant.write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("fastzs.kernels.pixel_text_logits.mutant", mutant)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    features, text = inputs(D=40)
    features = lay_out(features, "framed")
    check(features, text)
    monkeypatch.setattr(triton, "pixel_text_logits", module.pixel_text_logits)
    with pytest.raises(AssertionError):
        check(features, text)
