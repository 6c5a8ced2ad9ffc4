"""label_map on a GPU: both of its backends there against the fp64 reference."""

import pytest
import torch

from fastzs.kernels.label_map import compiled
from fastzs.kernels.label_map.api import label_map

from .test_label_map import CASES, adversarial_logits, assert_agrees, random_case, slide_windows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
no_cuda = pytest.mark.skipif(compiled.MISSING_CUDA is not None, reason=str(compiled.MISSING_CUDA))
no_library = pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
backends = pytest.mark.parametrize(
    "impl", ["triton", pytest.param("cuda", marks=no_cuda), pytest.param("cpu", marks=no_library)]
)


@backends
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output"), CASES)
def test_agrees(picture, crop, stride, size, output, activation, impl):
    for classes, top_k in ((1, 1), (7, 3), (300, 1), (40, 8)):
        if top_k > 1 and impl == "triton":
            continue
        logits, windows = random_case(picture, crop, stride, size, classes, torch.float32)
        seen = range(0, classes, 3)
        assert_agrees(logits.cuda(), windows, picture, output, top_k, impl, activation=activation, seen=seen)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype, impl):
    logits, windows = random_case((96, 160), 64, 48, (4, 4), 30, torch.float32)
    assert_agrees(logits.to("cuda", dtype), windows, (96, 160), (120, 200), impl=impl)


@backends
@pytest.mark.parametrize("kind", ["noise", "hair", "spikes", "windows", "saturated", "tiny", "ramps", "smooth"])
def test_adversarial(kind, impl):
    windows = slide_windows((100, 150), 64, 43)
    logits = adversarial_logits(kind, len(windows), 60, 8, 8).cuda()
    assert_agrees(logits, windows, (100, 150), (83, 131), impl=impl, seen=range(0, 60, 2), calibration=0.2)


@backends
def test_not_finite(impl):
    logits = torch.zeros(1, 3, 4, 4, device="cuda")
    logits[0, 1] = 1.0
    logits[0, 1, 0, 0] = torch.nan
    labels = label_map(logits, [(0, 0, 16, 16)], (16, 16), impl=impl).labels
    assert labels[:6, :6].unique().tolist() == [0]
    assert labels[6:].unique().tolist() == [1]
    logits[:] = torch.nan
    assert label_map(logits, [(0, 0, 16, 16)], (16, 16), impl=impl).labels.unique().tolist() == [0]


@backends
def test_bitwise_repeatable(impl):
    logits, windows = random_case((96, 160), 64, 48, (4, 4), 30, torch.float32)
    first, *others = (label_map(logits.cuda(), windows, (96, 160), return_scores=True, impl=impl) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True) if a is not None and b is not None)


@pytest.mark.skipif(compiled.MISSING_CUDA is not None, reason=str(compiled.MISSING_CUDA))
def test_too_many_ranks():
    with pytest.raises(RuntimeError, match="top_k is 9; expected up to 8"):
        label_map(torch.zeros(1, 9, 2, 2, device="cuda"), [(0, 0, 4, 4)], (4, 4), top_k=9, impl="cuda")
