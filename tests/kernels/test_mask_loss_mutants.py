"""The comparison of the CPU backend with the reference notices when the C++ code is broken on purpose."""

import pytest
import torch

from fastzs.kernels.mask_loss.reference import mask_sums_reference

from .mutants import NEEDS_COMPILER, compile_variants
from .test_mask_loss_backends import case

pytestmark = NEEDS_COMPILER

MUTATIONS = {
    "nothing": [],
    "ignored pixels are of their class": [("if (value != ignore_index) {", "if (true) {")],
    "two corners are swapped": [("row[j] += V::sum(all) - to_upper;", "row[j] += to_upper;")],
    "the padding is counted": [("if (x + LANES > a.W) {", "if (false) {")],
    "the last row of pixels goes nowhere": [("if (i == h - 1) contract", "if (false) contract")],
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    return compile_variants(tmp_path_factory.mktemp("mutants"), "mask_loss.cpp", list(MUTATIONS.values()))


def agrees(ops) -> bool:
    """Whether sums and gradients are those of the reference."""
    logits, target = case(C=4, h=3, w=5, H=23, W=39, ignored=0.3)
    target[target == 255] = 2  # a label that is also a class
    sums, nodes = ops.mask_sums(logits, target, 0.25, 2.0, 2, True)
    exact = logits.double().requires_grad_()
    wanted = mask_sums_reference(exact, target, 0.25, 2.0, 2)
    if not torch.allclose(sums.double(), wanted, rtol=1e-5, atol=1e-5):
        return False
    for field in range(3):
        (grad,) = torch.autograd.grad(wanted[..., field].sum(), exact, retain_graph=True)
        if not torch.allclose(nodes[:, :, field].double(), grad, rtol=1e-4, atol=1e-5):
            return False
    return True


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    assert agrees(mutants[number]) == (number == 0)
