"""key_smoothing on a GPU: its backends there against the fp64 reference."""

import pytest
import torch

from fastzs.kernels.key_smoothing.api import key_smoothing

from .test_key_smoothing import OPTIONS, random_case
from .tolerances import errors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 1024, 768), (1, 171, 1000, 512), (1, 300, 50, 768), (1, 3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_good_as_eager(shape, options, dtype, impl):
    keys, probs = (x.to("cuda", dtype) for x in random_case(*shape))
    exact = key_smoothing(keys.double(), probs.double(), impl="reference", **options)
    # the published order of work in the same dtype, normalised copy and all
    unit = torch.nn.functional.normalize(keys, dim=1 if "mode" in options else 2)
    similarity = unit @ unit.mT
    if options.get("weights") == "relu":
        similarity = similarity.relu()
    elif options.get("weights") == "softmax":
        similarity = (similarity / options["temperature"]).softmax(2)
    eager = probs @ similarity.mT
    if "mode" in options:
        eager = eager.where(probs.amax(1, keepdim=True) < options["threshold"], probs)
    mine = key_smoothing(keys, probs, impl=impl, **options)
    assert mine.dtype == dtype
    for seen, allowed in zip(errors(mine, exact), errors(eager, exact), strict=True):
        assert seen <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options):
    keys, probs = (x.cuda() for x in random_case(2, 9, 200, 64))

    def gradients(impl, dtype):
        k, p = (x.to(dtype).requires_grad_() for x in (keys, probs))
        return torch.autograd.grad(key_smoothing(k, p, impl=impl, **options).square().sum(), (k, p))

    eager = gradients("reference", torch.float32)
    for mine, same, wanted in zip(
        gradients("triton", torch.float32), eager, gradients("reference", torch.float64), strict=True
    ):
        for seen, allowed in zip(errors(mine, wanted), errors(same, wanted), strict=True):
            assert seen <= 2 * allowed + 1e-6
