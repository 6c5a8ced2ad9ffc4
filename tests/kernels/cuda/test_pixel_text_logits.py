"""csrc/pixel_text_logits_cuda.cu on the host, over the cases of test_pixel_text_logits_cpu.py."""

import pytest
import torch

from fastzs.kernels.pixel_text_logits import pixel_text_logits

from ..test_pixel_text_logits import cosine, inputs, lay_out
from ..test_pixel_text_logits_cpu import SHAPES, test_empty_batch_and_no_classes, test_rounds_to_nearest_even
from ..tolerances import assert_close, errors
from .host import installed
from .mutations import MUTATIONS

SOURCE = "pixel_text_logits_cuda.cu"
SHARED = [test_empty_batch_and_no_classes, test_rounds_to_nearest_even]


@pytest.fixture(scope="module", autouse=True)
def in_place_of_the_cpu(variants):
    with installed(variants(SOURCE)["nothing"], "pixel_text_logits"):
        yield


def check(features, text, scale=100.0):
    """Within ``2 sqrt(D)`` units in fp32, of the largest cosine, and one rounding to the dtype of the result.

    The sum of D products is taken in order, so its rounding errors are those of D steps of a random walk, in units of
    the largest sum on the way; the 2 is for that and for the five roundings of norm and scale.
    """
    mine = pixel_text_logits(features, text, scale, "cpu")
    wanted = pixel_text_logits(features.double(), text.double(), scale, "reference")
    assert mine.dtype == text.dtype
    bound = 2 * text.shape[1] ** 0.5 * torch.finfo(torch.float32).eps + torch.finfo(text.dtype).eps
    assert errors(mine, wanted)[0] <= bound


@pytest.mark.parametrize("layout", ["contiguous", "tokens", "framed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES.values(), (2, 17, 65, 9, 15)], ids=str)
def test_agrees_with_the_reference(shape, dtype, layout):
    features, text = inputs(*shape, dtype)
    check(lay_out(features, layout), text.t().contiguous().t() if layout == "framed" else text)


def test_text_of_another_dtype():
    features, text = inputs(D=40)
    out = torch.ops.fastzs.pixel_text_logits(features, text.half(), 2.0)
    assert_close("pixel_text_logits", out, cosine(features, text.half(), 2.0))


def test_zero_features_and_numbers_that_are_none():
    features, text = inputs()
    features[0, :, 1, 1] = 0
    features[0, 3, 2, 2] = torch.nan
    out = pixel_text_logits(features, text, 100.0, "cpu")
    assert (out[0, :, 1, 1] == 0).all()
    assert out[0, :, 2, 2].isnan().all()
    assert out.isnan().sum() == 5


def agrees(operator) -> bool:
    """Whether the operator passes tests that the source as it is passes."""
    with installed(operator, "pixel_text_logits"):
        try:
            features, text = inputs(2, 41, 66, 5, 14)
            check(features, text)
            check(lay_out(features, "tokens"), text)
        except (AssertionError, RuntimeError):
            return False
    return True


@pytest.mark.parametrize("name", MUTATIONS[SOURCE])
def test_only_the_unbroken_code_agrees(name, variants):
    assert agrees(variants(SOURCE)[name]) == (name == "nothing" or name.startswith("same:"))
