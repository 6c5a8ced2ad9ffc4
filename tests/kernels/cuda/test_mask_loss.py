"""csrc/mask_loss_cuda.cu on the host, over the cases of test_mask_loss_backends.py."""

import pytest
import torch

from fastzs.kernels.mask_loss import mask_loss

from .. import test_mask_loss_backends as backends
from ..test_mask_loss_backends import TINY, case
from ..tolerances import errors
from .host import installed
from .mutations import MUTATIONS

SOURCE = "mask_loss_cuda.cu"

# The cases of the backends on the CPU, with the bounds below.
test_anything = backends.test_anything
test_dtypes = backends.test_dtypes
test_extreme_logits = backends.test_extreme_logits
test_focal_options = backends.test_focal_options
test_reads_and_writes_stay_inside = backends.test_reads_and_writes_stay_inside
test_shapes = backends.test_shapes


@pytest.fixture(scope="module", autouse=True)
def in_place_of_the_cpu(variants):
    with installed(variants(SOURCE)["nothing"], "mask_sums"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "check", check)
        yield


def check(logits, target, **options):
    """Losses and gradients against the fp64 reference.

    A term of the sums has a relative error of ``C + 2 |z|`` units: an exponential and a reciprocal of 2^-22, squared
    with gamma = 2, a logarithm of 4e-7 and a few roundings, C = 12; and the rounding of z, which the exponential turns
    into one of z units, also squared. All terms of focal, and of the other sums, have one sign. A larger gamma raises
    to a larger power than the square.
    """
    power = max(1.0, options.get("gamma", 2.0) / 2)
    largest = logits.double().abs().max().item()
    bound = (12 + 2 * largest) * power * torch.finfo(torch.float32).eps
    mine = logits.detach().requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = mask_loss(mine, target, impl="cpu", **options)
    reference = mask_loss(exact, target, impl="reference", **options)
    for name in ("focal", "dice"):
        value, wanted = getattr(loss, name), getattr(reference, name)
        assert value.dtype == torch.float32
        # Dice is 1 minus a ratio, so it is as exact as a number near 1, however small it is.
        assert errors(value, wanted, 1 if name == "dice" else 1e-30)[0] <= bound
        (grad,) = torch.autograd.grad(value, mine, retain_graph=True)
        (grad_wanted,) = torch.autograd.grad(wanted, exact, retain_graph=True)
        assert grad.dtype == logits.dtype
        assert errors(grad, grad_wanted, TINY[grad.dtype])[0] <= bound + torch.finfo(grad.dtype).eps / 2
    with torch.no_grad():
        torch.testing.assert_close(mask_loss(mine, target, impl="cpu", **options), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_show(bad):
    logits, target = case()
    logits[1, 2, 1, 1] = bad
    logits.requires_grad_()
    loss = mask_loss(logits, target, impl="cpu")
    assert loss.focal.isnan()
    assert loss.dice.isnan()
    (grad,) = torch.autograd.grad(loss.focal, logits)
    assert grad[1, 2, :, :3].isnan().all()  # the nodes that share a pixel with it
    assert grad.isnan().sum() == 9


@pytest.mark.parametrize("label", [4, 254, 256, -1, -(2**31), 2**31 - 1, 2**32])
def test_a_label_out_of_range_stops_the_program(label, capfd):
    logits, target = case()
    target[1, 2, 3] = label
    with pytest.raises(RuntimeError, match=r"mask_sums_labels_kernel.*stopped the program"):
        mask_loss(logits, target, impl="cpu")
    assert f"target holds label {label}; expected labels in [0, 4) or ignore_index=255" in capfd.readouterr().out


@pytest.mark.parametrize("labels", [torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize(("classes", "size"), [(255, 1), (256, 4)])
def test_labels_are_read_as_bytes(labels, classes, size, variants, capfd):
    """One byte for each pixel and class, four with more than 255 classes."""
    logits, target = case(B=2, C=classes, h=2, w=2, H=5, W=7, ignored=0.0)
    with installed(variants(SOURCE)["same: bytes of labels are counted"], "mask_sums"):
        check(logits, target.to(labels), ignore_index=3)
    assert int(capfd.readouterr().err.split()[0]) == size * logits.shape[0] * classes * target[0].numel()


def agrees(operator) -> bool:
    """Whether the operator passes tests that the source as it is passes."""
    with installed(operator, "mask_sums"):
        try:
            check(*case(B=3, C=5, h=3, w=6, H=23, W=39))
            logits, target = case(B=2, C=4, h=4, w=5, H=30, W=33, ignored=0.3)
            check(logits.to(memory_format=torch.channels_last), target.byte(), gamma=1.5)
            target[target == 255] = 2  # a label that is also a class
            check(logits, target, ignore_index=2)
            wide, labels = case(B=1, C=256, h=1, w=2, H=3, W=5, ignored=0.0)
            labels[0, 0], labels[0, 1] = 255, 7
            check(wide, labels, ignore_index=7)
            target[0, 0, 0] = 4
            with pytest.raises(RuntimeError, match="stopped the program"):
                mask_loss(logits, target, impl="cpu")
        except (AssertionError, RuntimeError, pytest.fail.Exception):
            return False
    return True


@pytest.mark.parametrize("name", MUTATIONS[SOURCE])
def test_only_the_unbroken_code_agrees(name, variants):
    assert agrees(variants(SOURCE)[name]) == (name == "nothing" or name.startswith("same:"))
