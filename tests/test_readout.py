"""From cosines to labels: the published order of work spelt out with all maps, against the one that makes none."""

import pytest
import torch
import torch.nn.functional as F

from fastzs.readout import Readout, read, read_image

SIZE, CLASSES = (20, 24), torch.tensor([0, 0, 1, 2, 2])


@pytest.fixture
def cosines():
    return 0.3 * torch.randn(1, 5, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def spelt_out(cosines, size, scale):
    """Probabilities of the classes, [3, H, W], and cosines of the names at full size."""
    maps = F.interpolate(cosines, size, mode="bilinear")[0]
    p = (scale * maps).softmax(0)
    return torch.stack([p[c == CLASSES].amax(0) for c in range(3)])


def run(readout, cosines, **options):
    windows = torch.tensor([[0, 0, *SIZE]])
    guide = torch.zeros(3, *SIZE, dtype=cosines.dtype)
    return read(readout, cosines, windows, SIZE, guide, torch.ones(5, 2), classes=CLASSES, **options)


def test_the_best_name_decides(cosines):
    found = run(Readout(scale=7.0), cosines, scores=True)
    p = spelt_out(cosines, SIZE, 7.0)
    assert torch.equal(found.labels, p.argmax(0))
    assert torch.allclose(found.scores.double(), p.amax(0), atol=1e-6)


def test_every_class_has_the_score_of_its_best_name(cosines):
    found = run(Readout(scale=7.0), cosines, probabilities=True)
    assert torch.allclose(found.probabilities.double(), spelt_out(cosines, SIZE, 7.0), atol=1e-6)
    assert torch.equal(found.probabilities.argmax(0), found.labels)


def test_pixels_below_the_threshold_get_its_label(cosines):
    p = spelt_out(cosines, SIZE, 7.0)
    threshold = p.amax(0).median().item()
    found = run(Readout(scale=7.0), cosines, threshold=threshold, below=9)
    assert torch.equal(found.labels, torch.where(p.amax(0) < threshold, 9, p.argmax(0)))
    assert found.scores is None


def test_small_classes_give_their_pixels_away(cosines):
    p = spelt_out(cosines, SIZE, 7.0)
    counts = torch.bincount(p.argmax(0).flatten(), minlength=3)
    smallest = 1 + int(counts[1:].argmin())
    area = (counts[smallest] / counts[1:].sum()).item()
    found = run(Readout(scale=7.0, area=area), cosines, scores=True)
    p[smallest] = 0
    assert torch.equal(found.labels, p.argmax(0))
    assert torch.allclose(found.scores.double(), p.amax(0), atol=1e-6)


def test_large_images_are_refined_at_a_smaller_size(cosines):
    """Labels are enlarged from the small image's to the image's own size."""
    image = torch.randint(0, 256, (3, 80, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    readout = Readout(refine="pamr", working_side=20)
    options = {"classes": CLASSES, "scores": True}
    large = read_image(readout, cosines, torch.tensor([[0, 0, 20, 24]]), SIZE, image, torch.ones(5, 2), **options)
    guide = F.interpolate(image[None] / 255, SIZE, mode="bilinear", antialias=True)[0]
    small = read(readout, cosines, torch.tensor([[0, 0, 20, 24]]), SIZE, guide, torch.ones(5, 2), **options)
    assert large.labels.shape == large.scores.shape == (80, 96)
    assert torch.equal(large.labels[::4, ::4], small.labels)
    assert torch.equal(large.labels[3::4, 3::4], small.labels)


@pytest.mark.parametrize(("names", "threshold"), [(2, 0.55), (1, 1.0), (113, 0.107965)])
def test_the_usual_threshold_follows_the_number_of_names(names, threshold):
    assert Readout().threshold(names) == pytest.approx(threshold, abs=1e-5)
