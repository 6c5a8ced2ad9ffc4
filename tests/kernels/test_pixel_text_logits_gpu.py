"""pixel_text_logits on a GPU: both of its backends there, alone and under the loss, against the fp64 reference."""

import pytest
import torch

from fastzs.kernels.mask_loss import pixel_text_mask_loss
from fastzs.kernels.pixel_text_logits import pixel_text_logits
from fastzs.kernels.pixel_text_logits.operator import MISSING

from .test_pixel_text_logits import cosine, inputs, lay_out
from .tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
backends = pytest.mark.parametrize(
    "impl",
    [
        "triton",
        pytest.param("cuda", marks=pytest.mark.skipif(MISSING["cuda"] is not None, reason=str(MISSING["cuda"]))),
    ],
)


@backends
@pytest.mark.parametrize("layout", ["contiguous", "tokens", "framed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 512, 150, 32, 31), (2, 65, 130, 5, 13), (1, 1, 1, 1, 1)], ids=str)
def test_values_and_gradients(impl, shape, dtype, layout):
    B, D, C, h, w = shape
    features, text = inputs(B, D, C, h, w, dtype)
    features, text = lay_out(features.cuda(), layout), text.cuda()
    runs = []
    for name, cast in ((impl, dtype), ("reference", torch.float64)):
        f, t = (x.to(cast).detach().requires_grad_() for x in (features, text))
        out = pixel_text_logits(f, t, 100.0, name)
        runs.append((out, *torch.autograd.grad(out.double().square().sum(), (f, t))))
    ops = ("pixel_text_logits", "pixel_text_logits.grad", "pixel_text_logits.grad")
    for op, mine, wanted in zip(ops, *runs, strict=True):
        if wanted.abs().max() > 1e-6:  # with one channel nothing depends on the feature
            assert_close(op, mine, wanted)
    assert runs[1][0].double().sub(cosine(features, text, 100.0)).abs().max() < 1e-9


@backends
def test_bitwise_repeatable(impl):
    features, text = (x.cuda() for x in inputs(4, 512, 171, 32, 32, torch.bfloat16))
    first = pixel_text_logits(features, text, 100.0, impl)
    for _ in range(3):
        assert torch.equal(pixel_text_logits(features, text, 100.0, impl), first)


@backends
def test_zero_features_and_empty_batches(impl):
    features, text = (x.cuda() for x in inputs())
    features[0, :, 1, 1] = 0
    assert (pixel_text_logits(features, text, impl=impl)[0, :, 1, 1] == 0).all()
    assert pixel_text_logits(features[:0], text, impl=impl).shape == (0, 5, 3, 4)
    assert pixel_text_logits(features, text[:0], impl=impl).shape == (2, 0, 3, 4)


@backends
def test_with_the_loss(impl, monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", impl)
    target = torch.randint(0, 5, (2, 48, 64), generator=torch.Generator().manual_seed(0)).cuda()
    losses = []
    for cast in (torch.float32, torch.float64):
        features, text = (x.cuda().to(cast).requires_grad_() for x in inputs())
        loss = sum(pixel_text_mask_loss(features, text, target, 10.0))
        losses.append((loss.detach(), *torch.autograd.grad(loss, (features, text))))
    for mine, wanted in zip(*losses, strict=True):
        assert_close("pixel_text_mask_loss.grad", mine, wanted)
