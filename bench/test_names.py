"""Image once, names many: a second vocabulary on an encoded image, and many images in one call against one by one.

MaskCLIP, ViT-B/16, random weights. Wanted: the second vocabulary at least 30 times faster than the first, whose call
runs the tower; 16 images in one call at least as fast as 16 calls.
"""

import functools

import pytest
import torch

import fastzs
from fastzs.segmenter import Segmenter

SIZE, MANY = 512, 16


@functools.cache
def segmenter() -> Segmenter:
    return fastzs.load("maskclip", weights="random", precision="fp32")


def vocabulary(classes: int, seed: int) -> fastzs.Vocabulary:
    rows = torch.randn(classes, segmenter().model.text_dim, generator=torch.Generator().manual_seed(seed))
    embeddings = torch.nn.functional.normalize(rows, dim=1)
    return fastzs.Vocabulary([f"class {i}" for i in range(classes)], embeddings=embeddings)


def images(count: int, side: int = SIZE) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, side, side), dtype=torch.uint8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("what", ["first", "second"])
@pytest.mark.parametrize("classes", [20, 171])
def test_vocabulary(benchmark, classes, what):
    benchmark.group = f"vocabulary of {classes} names, MaskCLIP ViT-B/16, {SIZE} x {SIZE}"
    benchmark.extra_info.update(op="vocabulary", rival=what, classes=classes)
    (image,), seg = images(1), segmenter()
    features, names = seg.encode(image), [vocabulary(classes, seed) for seed in range(2)]
    call = (lambda: seg(image, names[0])) if what == "first" else (lambda: seg.label(features, names[1]))
    benchmark.pedantic(call, rounds=3 if what == "first" else 10, warmup_rounds=1)


@pytest.mark.parametrize("what", ["one by one", "one call"])
def test_images(benchmark, what):
    benchmark.group = f"{MANY} images, MaskCLIP ViT-B/16, 224 x 224"
    benchmark.extra_info.update(op="images", rival=what)
    given, names = images(MANY, 224), vocabulary(20, 0)
    seg = Segmenter(segmenter().model, short_side=0)

    def call():
        return [seg(image, names) for image in given] if what == "one by one" else list(seg(given, names))

    benchmark.pedantic(call, rounds=2, warmup_rounds=1)
