"""refine on a GPU: Triton there against the fp64 reference, without a wait for the GPU."""

import pytest
import torch

from fastzs.ops import refine

from .test_refine import CASES, assert_agrees, random_case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees(case):
    assert_agrees(case, "triton", device="cuda")


@pytest.mark.parametrize("classes", [1, 33, 171])
def test_any_number_of_classes(classes):
    assert_agrees(CASES[2], "triton", classes=classes, device="cuda")


def test_nothing_waits_for_it():
    logits, windows, image = random_case(*CASES[1][:5], classes=60, dtype=torch.float32)
    logits[:, ::3] -= 2.0
    text = torch.randn(60, 8).cuda()
    for method in ("pamr", "laplacian", "none"):
        options = {"windows": windows, "image_size": (48, 80), "method": method, "text": text}
        want = refine(logits, image, impl="reference", **options | {"text": text.cpu()})
        on_gpu = logits.cuda(), image.cuda()
        refine(*on_gpu, **options)  # tables and kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = refine(*on_gpu, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert (found.labels.cpu() != want.labels).float().mean() < 0.01


def test_a_class_that_is_not_finite_loses():
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    logits[0, 3, 0, 0] = torch.nan
    options = {"windows": windows, "image_size": (48, 80), "scale": 40.0, "return_maps": True}
    found = refine(logits.cuda(), image.cuda(), **options)
    assert not (found.labels == 3).any()
    assert found.maps[3].isnan().all()
    assert found.maps[4].isfinite().all()
