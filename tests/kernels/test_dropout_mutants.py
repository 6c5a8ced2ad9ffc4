"""The comparison of the C++ dropout with the definition notices when the code is broken on purpose."""

import pytest
import torch

from fastzs.kernels.dropout.reference import dropout_reference

from .mutants import NEEDS_COMPILER, compile_variants

pytestmark = NEEDS_COMPILER

# Each with what it must break: dropout after a relu, alone, the gradient of one of them, or nothing.
MUTATIONS = {
    "nothing": ([], set()),
    "all rows have one row's bits": ([("bits(a.dropout.seed, row)", "bits(a.dropout.seed, 0)")], {"relu", "alone"}),
    "all vectors have a row's first bits": ([("kept<LANES>(bits, at,", "kept<LANES>(bits, 0,")], {"relu", "alone"}),
    "nothing is enlarged": ([("* a.dropout.enlarged", "")], {"relu", "alone"}),
    "there is no relu": ([("relu ? &x : nullptr", "nullptr")], {"relu"}),
    "the last elements have no relu": (
        [("if (a.gate != nullptr)", "if (a.gate != nullptr && left >= LANES)")],
        {"relu"},
    ),
    "what the relu stopped counts as let through": ([("<= 0.0f)", "< 0.0f)")], {"its gradient"}),
    "the gradient passes where the relu did not": (
        [("out.has_value() ? &*out : nullptr", "nullptr")],
        {"its gradient"},
    ),
}
RATE, SEED = 0.3, torch.tensor(8)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    variants = [changes for changes, _ in MUTATIONS.values()]
    return compile_variants(tmp_path_factory.mktemp("mutants"), "dropout.cpp", variants)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    ops, broken = mutants[number], list(MUTATIONS.values())[number][1]
    x, upstream = torch.randn(2, 5, 75, generator=torch.Generator().manual_seed(1)).split(1)
    found = set()
    for relu in (False, True):
        leaf = x.double().requires_grad_()
        wanted = dropout_reference(leaf, relu, RATE, SEED)
        (gradient,) = torch.autograd.grad(wanted, leaf, upstream.double())
        out = ops.dropout(x, relu, RATE, SEED)
        grad = ops.dropout_backward(upstream, out if relu else None, RATE, SEED)
        if not torch.allclose(out.double(), wanted):
            found.add("relu" if relu else "alone")
        elif not torch.allclose(grad.double(), gradient):
            found.add("its gradient" if relu else "the gradient")
    assert found == broken
