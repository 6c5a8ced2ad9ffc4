"""The comparison of the C++ pixel_text_logits with the definition notices when the code is broken on purpose."""

import pytest
import torch

from fastzs.kernels.pixel_text_logits.reference import pixel_text_logits_reference

from .mutants import NEEDS_COMPILER, compile_variants
from .test_pixel_text_logits import inputs

pytestmark = NEEDS_COMPILER

# Each with what it must break: the values, the gradient, or nothing.
MUTATIONS = {
    "nothing": ([], ""),
    "the norm is dropped": ([("V::store(factor + x, squares);", "V::store(factor + x, V::splat(1));")], "values"),
    "a long sum keeps its last part": (
        [("first == 0 ? sums[r][0] : V::load(to) + sums[r][0]", "sums[r][0]")],
        "values",
    ),
    "every image is the first": ([("const int64_t start = image * map.image;", "const int64_t start = 0;")], "values"),
    "the feature's direction stays in": ([("along[k] / norm / norm", "0.0f")], "gradient"),
    "the gradient's scale is dropped": ([("factor[k] = job.scale / (tiny", "factor[k] = 1.0f / (tiny")], "gradient"),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    variants = [changes for changes, _ in MUTATIONS.values()]
    return compile_variants(tmp_path_factory.mktemp("mutants"), "pixel_text_logits.cpp", variants)


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    features, text = inputs(B=2, D=300, C=14, h=5, w=14)
    weight = torch.randn(2, 14, 5, 14, generator=torch.Generator().manual_seed(1))
    exact = features.double().requires_grad_()
    wanted = pixel_text_logits_reference(exact, text.double(), 3.0)
    (grad_wanted,) = torch.autograd.grad(wanted, exact, weight.double())
    values = mutants[number].pixel_text_logits(features, text, 3.0).double()
    grad = mutants[number].pixel_text_logits_backward(weight, features, text, 3.0).double()
    breaks = list(MUTATIONS.values())[number][1]
    assert torch.allclose(values, wanted, rtol=1e-4, atol=1e-5) == (breaks != "values")
    if breaks != "values":  # what breaks the values may break both
        assert torch.allclose(grad, grad_wanted, rtol=1e-3, atol=1e-6) == (breaks != "gradient")
