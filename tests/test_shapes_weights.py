"""The weights that come with the package, as a user meets them."""

import pytest
import torch

import fastzs
from fastzs.clip.weights import SHAPES
from fastzs.data import shapes


@pytest.fixture(scope="module")
def segmenter():
    return fastzs.load("maskclip", weights="shapes", precision="fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))


def test_the_weights_are_small():
    assert sum(path.stat().st_size for path in SHAPES.iterdir()) < 10e6


def test_masks_a_person_would_accept(segmenter):
    scenes = shapes.draw(8, (192, 192), seed=31, objects=(3, 3), radius=(20, 32))
    right = found = 0
    for image, truth, objects in zip(scenes.images, scenes.instances, scenes.objects, strict=True):
        names = sorted({f"{colour} {shape}" for _, colour, shape in objects})
        result = segmenter(image, names, background="prompt")
        wanted = [0, *(1 + names.index(f"{colour} {shape}") for _, colour, shape in objects)]
        wanted = (torch.tensor(wanted)[truth.long()] - 1) % (len(names) + 1)  # the background is the last name
        right += (result.labels == wanted).sum().item()
        found += truth.numel()
    assert right / found > 0.9


def test_unknown_words_are_named(segmenter):
    with pytest.raises(ValueError, match=r"do not know the word 'cat'; they know only: .*ring"):
        segmenter(torch.zeros(3, 64, 64, dtype=torch.uint8), ["red ring", "cat"])


def test_a_name_may_be_an_attribute(segmenter):
    scenes = shapes.draw(1, (96, 96), seed=3, objects=(1, 1), radius=(26, 26), pairs=["red disc"])
    result = segmenter(scenes.images[0], ["red thing", "blue thing"], background="prompt")
    inside = scenes.instances[0] == 1
    assert (result.labels[inside] == 0).float().mean() > 0.8
    assert (result.labels == 1).float().mean() < 0.02
