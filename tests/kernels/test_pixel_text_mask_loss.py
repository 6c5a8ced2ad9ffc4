"""pixel_text_mask_loss: one node of autograd, against the two functions in fp64; what it keeps; how it fails.

In Triton: test_pixel_text_logits_triton.py.
"""

import pytest
import torch
import torch.nn.functional as F

from fastzs.kernels.mask_loss import mask_loss, pixel_text_mask_loss
from fastzs.kernels.mask_loss.compiled import MISSING

from .tolerances import assert_close, errors, stored

needs_cpu = pytest.mark.skipif(MISSING["cpu"] is not None, reason=str(MISSING["cpu"]))
B, D, C, h, w, H, W = 2, 16, 5, 3, 4, 24, 28


def case(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    features = torch.randn(B, D, h, w, generator=g).to(dtype).requires_grad_()
    text = F.normalize(torch.randn(C, D, generator=g), dim=1).to(dtype).requires_grad_()
    target = torch.randint(0, C, (B, H, W), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.2] = 255
    return features, text, target


def in_fp64(features, text, target, **options):
    """The two losses by their definition, and each one's gradients."""
    exact = features.detach().double().requires_grad_(), text.detach().double().requires_grad_()
    logits = 10 * torch.einsum("bdhw,cd->bchw", F.normalize(exact[0], dim=1), exact[1])
    wanted = mask_loss(logits, target, impl="reference", **options)
    return wanted, [torch.autograd.grad(value, exact, retain_graph=True) for value in wanted]


def check(impl, **options):
    features, text, target = case()
    loss = pixel_text_mask_loss(features, text, target, 10.0, impl=impl, **options)
    wanted, grads_wanted = in_fp64(features, text, target, **options)
    for value, reference, grads in zip(loss, wanted, grads_wanted, strict=True):
        assert_close("mask_loss", value, reference, size=1)
        mine = torch.autograd.grad(value, (features, text), retain_graph=True)
        for grad, grad_wanted in zip(mine, grads, strict=True):
            assert_close("mask_loss.grad", grad, grad_wanted)


OPTIONS = [{}, {"gamma": 1.5, "alpha": 0.6}]


@needs_cpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("logits_impl", ["cpu", "reference"])
def test_cpu(options, logits_impl, monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", logits_impl)  # of the logits; the loss's is explicit
    check("cpu", **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_reference(options):
    check("reference", **options)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_agrees_with_fp64(dtype):
    features, text, target = case(dtype)
    _, wanted = in_fp64(features, text, target)
    one = pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")
    for value, grads in zip(one, wanted, strict=True):
        for grad, exact in zip(torch.autograd.grad(value, (features, text), retain_graph=True), grads, strict=True):
            assert grad.dtype == dtype
            assert_close("pixel_text_mask_loss.grad", grad, exact)


@needs_cpu
def test_what_is_kept_for_backward():
    """The two inputs and three gradients per logit; the rest are numbers per image and class. No logits."""
    features, text, target = case()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss = pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")
    large = sorted(list(t.shape) for t in saved if t.numel() > 4 * B * C)
    assert large == sorted([[B, D, h, w], [C, D], [B, C, 3, h, w]])
    assert {t.data_ptr() for t in saved} >= {features.data_ptr(), text.data_ptr()}  # not copies
    del loss


@needs_cpu
@pytest.mark.parametrize("wanted", ["features", "text"])
def test_only_the_gradient_that_is_asked_for(wanted):
    features, text, target = case()
    both = torch.autograd.grad(sum(pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")), (features, text))
    (text if wanted == "features" else features).requires_grad_(False)
    one = features if wanted == "features" else text
    (grad,) = torch.autograd.grad(sum(pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")), one)
    assert torch.equal(grad, both[wanted == "text"])
    with torch.no_grad():
        loss = pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")
    assert not loss.focal.requires_grad


@needs_cpu
def test_operator_agrees_with_its_declaration():
    features, text, target = case()
    options = (10.0, 0.25, 2.0, 255)
    op = torch.ops.fastzs.pixel_text_mask_sums
    torch.library.opcheck(op.default, (features, text, target, *options, True, "cpu", "cpu"))
    plain = features.detach(), text.detach()
    torch.library.opcheck(op.default, (*plain, target, *options, False, "reference", "cpu"))
    sums, nodes = op(*plain, target, *options, True, "cpu", "cpu")
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.fastzs.pixel_text_mask_sums_backward.default, (sums, nodes, *plain, 10.0, *needs, "cpu")
        )


@needs_cpu
def test_compiles_as_one_graph():
    features, text, target = case()
    objective = lambda f, t: sum(pixel_text_mask_loss(f, t, target, 10.0, impl="cpu"))  # noqa: E731
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features, text), objective(features, text))
    grads = torch.autograd.grad(compiled(features, text), (features, text))
    torch.testing.assert_close(grads, torch.autograd.grad(objective(features, text), (features, text)))


@needs_cpu
@pytest.mark.parametrize("logits_impl", ["cpu", "reference"])
def test_autocast(logits_impl, monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", logits_impl)
    features, text, target = case()
    _, wanted = in_fp64(features, text, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")
        grads = torch.autograd.grad(loss.focal, (features, text))
    assert loss.focal.dtype == torch.float32
    for grad, exact in zip(grads, wanted[0], strict=True):
        assert grad.dtype == torch.float32
        # a logit of size 10 is off by 10 half steps of bf16, and a loss's slope changes by at most as much as its logit
        assert errors(grad, exact)[1] < 10 * stored(torch.bfloat16)


@needs_cpu
def test_second_derivative_raises():
    features, text, target = case()
    loss = pixel_text_mask_loss(features, text, target, 10.0, impl="cpu")
    (grad,) = torch.autograd.grad(loss.focal, features, create_graph=True)
    with pytest.raises(RuntimeError, match="pixel_text_mask_loss is differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f, t, y: (f[0], t, y), ValueError, r"features has shape \[16, 3, 4\]; expected \[B, D, h, w\]"),
        (lambda f, t, y: (f, t[:, :7], y), ValueError, r"16 channels and text \[5, 7\] has 7"),
        (lambda f, t, y: (f, t[:0], y), ValueError, r"logits has shape \[2, 0, 3, 4\].*at least 1"),
        (lambda f, t, y: (f[:0], t, y[:0]), ValueError, r"logits has shape \[0, 5, 3, 4\].*at least 1"),
        (lambda f, t, y: (f, t, y[:1]), ValueError, "differ in batch size"),
        (lambda f, t, y: (f, t, y.float()), TypeError, "target is torch.float32"),
        (lambda f, t, y: (f, t, torch.full_like(y, 7)), RuntimeError, "target holds label 7"),
    ],
)
def test_bad_input(change, error, words):
    with pytest.raises(error, match=words):
        pixel_text_mask_loss(*change(*case()), 10.0)
