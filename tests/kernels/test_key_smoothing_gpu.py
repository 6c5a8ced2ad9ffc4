"""key_smoothing on a GPU: its backends there against the fp64 reference."""

import pytest
import torch

from fastzs.kernels.key_smoothing.api import key_smoothing

from .test_key_smoothing import OPTIONS, random_case
from .tolerances import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 1024, 768), (1, 171, 1000, 512), (1, 300, 50, 768), (1, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_agrees_with_fp64(shape, options, dtype, impl):
    keys, probs = (x.to("cuda", dtype) for x in random_case(*shape))
    exact = key_smoothing(keys.double(), probs.double(), impl="reference", **options)
    mine = key_smoothing(keys, probs, impl=impl, **options)
    assert mine.dtype == dtype
    assert_close("key_smoothing", mine, exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    keys, probs = (x.cuda() for x in random_case(2, 9, 200, 64))

    def gradients(impl, dtype):
        k, p = (x.to(dtype).requires_grad_() for x in (keys, probs))
        return torch.autograd.grad(key_smoothing(k, p, impl=impl, **options).square().sum(), (k, p))

    for mine, wanted in zip(gradients("triton", torch.float32), gradients("reference", torch.float64), strict=True):
        assert_close("key_smoothing.grad", mine, wanted)
