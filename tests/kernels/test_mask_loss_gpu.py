"""mask_loss on a GPU: both of its backends there against the fp64 reference, and their repeatability."""

import pytest
import torch

from fastzs.kernels.extension import why_missing
from fastzs.kernels.mask_loss import mask_loss

from .test_mask_loss_backends import TINY, case
from .tolerances import assert_close

no_cuda = why_missing("mask_sums", "cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
backends = pytest.mark.parametrize(
    "impl", ["triton", pytest.param("cuda", marks=pytest.mark.skipif(no_cuda is not None, reason=str(no_cuda)))]
)


def gpu_case(**changes):
    shape = {"B": 3, "C": 21, "h": 32, "w": 31, "H": 512, "W": 496}
    return tuple(tensor.cuda() for tensor in case(**{**shape, **changes}))


def check(logits, target, impl, **options):
    mine = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = mask_loss(mine, target, impl=impl, **options)
    reference = mask_loss(exact, target, impl="reference", **options)
    for name in ("focal", "dice"):
        value, wanted = getattr(loss, name), getattr(reference, name)
        assert_close("mask_loss", value, wanted, size=1 if name == "dice" else 1e-30)
        (grad,) = torch.autograd.grad(value, mine, retain_graph=True)
        (grad_wanted,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        assert_close("mask_loss.grad", grad, grad_wanted, size=TINY[grad.dtype])
    with torch.no_grad():
        torch.testing.assert_close(mask_loss(mine, target, impl=impl, **options), loss)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_the_reference(impl, dtype):
    check(*gpu_case(dtype=dtype), impl)
    check(*gpu_case(dtype=dtype, H=331, W=517), impl, gamma=1.5)
    logits, target = gpu_case(C=300, h=16, w=16, H=224, W=224)
    check(logits.to(memory_format=torch.channels_last), target.to(torch.int16), impl, ignore_index=7)


@backends
@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_dtypes(impl, labels):
    logits, target = gpu_case(B=1)
    check(logits, target.to(labels), impl)


@backends
def test_bitwise_repeatable(impl):
    logits, target = gpu_case()
    op = torch.ops.fastzs.mask_sums if impl == "cuda" else torch.ops.fastzs.mask_sums_triton
    first = op(logits, target, 0.25, 2.0, 255, True)
    for _ in range(3):
        again = op(logits, target, 0.25, 2.0, 255, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@backends
def test_more_than_two_billion_pixels_times_classes(impl):
    """Offsets beyond 32 bits: the last of 64 images must come out as it does alone."""
    logits, target = gpu_case(B=64, C=150, H=512, W=512, h=32, w=32)
    op = torch.ops.fastzs.mask_sums if impl == "cuda" else torch.ops.fastzs.mask_sums_triton
    sums, nodes = op(logits, target, 0.25, 2.0, 255, True)
    last = op(logits[-1:], target[-1:], 0.25, 2.0, 255, True)
    assert torch.equal(sums[-1:], last[0])
    assert torch.equal(nodes[-1:], last[1])
