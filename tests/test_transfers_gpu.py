"""Many images on a GPU: nothing waits for it between an image and its labels, and graphs change no label."""

import pytest
import torch

import fastzs
from fastzs.data.shapes import draw

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
NAMES = ["red disc", "blue star", "green ring", "wood"]


@pytest.mark.parametrize("system", ["maskclip", "sclip"])
def test_batches_are_the_same_as_one_image_after_the_other(system):
    images = [draw(1, (96, 128), seed=seed).images[0] for seed in range(12)]
    options = {"weights": "shapes", "device": "cuda", "precision": "fp32", "batch_size": 4}
    plain, segmenter = (fastzs.load(system, optimize=optimize, **options) for optimize in (False, True))
    expected = [plain(image, NAMES).labels for image in images]
    for found, labels in zip(segmenter(images, NAMES), expected, strict=True):
        assert (found.labels != labels).float().mean() < 1e-3  # near ties: other sizes round otherwise


@pytest.mark.parametrize("system", ["maskclip", "sclip", "naclip", "pearl"])
def test_nothing_waits_for_the_gpu(system):
    segmenter = fastzs.load(system, weights="shapes", device="cuda", batch_size=4)
    views = [segmenter.view(draw(1, (96, 128), seed=seed).images[0]) for seed in range(8)]
    question = segmenter.question(NAMES)
    list(segmenter.answer_views(views, question))  # tables and kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(segmenter._pending(views, question, 4, lambda parts: parts))
    finally:
        torch.cuda.set_sync_debug_mode("default")
