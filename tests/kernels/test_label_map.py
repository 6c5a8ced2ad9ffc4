from pathlib import Path

import pytest
import torch
from fastzs.kernels.label_map import reference
from fastzs.kernels.label_map.api import label_map
from safetensors.torch import load_file

from tests.kernels.published import published_scores, slide_windows

GOLDENS = Path(__file__).parents[1] / "goldens"

CASES = [  # picture, crop, stride, map, output: one reason each
    ((64, 64), 64, 48, (4, 4), None),  # one window, no second step
    ((96, 160), 64, 48, (4, 4), (120, 200)),  # overlaps both ways, the last windows shifted, larger output
    ((70, 101), 48, 31, (5, 3), (33, 47)),  # odd everything, smaller output
    ((40, 90), 48, 32, (6, 7), (1, 1)),  # picture lower than the crop, one pixel out
    ((50, 50), 32, 20, (40, 40), (50, 13)),  # maps finer than the window
    ((37, 41), 16, 16, (1, 1), (80, 90)),  # one node per window
]


def random_case(picture, crop, stride, size, classes=7, dtype=torch.float64):
    windows = slide_windows(picture, crop, stride)
    generator = torch.Generator().manual_seed(sum(picture) + classes)
    return 2 * torch.randn(len(windows), classes, *size, generator=generator, dtype=dtype), windows


@pytest.mark.parametrize("tile_bytes", [reference.TILE_BYTES, 4000])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output"), CASES)
def test_reference_is_published(picture, crop, stride, size, output, activation, tile_bytes, monkeypatch):
    monkeypatch.setattr(reference, "TILE_BYTES", tile_bytes)
    logits, windows = random_case(picture, crop, stride, size)
    want = published_scores(logits, windows, picture, output, activation, seen=[0, 2, 5])
    got = label_map(
        logits,
        windows,
        picture,
        output_size=output,
        activation=activation,
        seen=[0, 2, 5],
        return_scores=True,
        impl="reference",
    )
    value, label = want.max(0)
    assert got.labels.dtype == torch.uint8
    assert torch.equal(got.labels.long(), label)
    torch.testing.assert_close(got.scores, value, rtol=0, atol=1e-12)  # measured 9e-16


def test_golden_whole_inference():
    """MaskCLIP's published whole inference: resize to the input, then to the original size, then argmax."""
    golden = load_file(GOLDENS / "C_maskclip_vit.safetensors")
    logits = golden["out64.image1.refined_kspd"]
    got = label_map(
        logits, [(0, 0, 96, 80)], (96, 80), output_size=(113, 89), activation="none", return_scores=True
    )
    assert torch.equal(got.labels, golden["out64.image1.whole_labels"][0])
    want = golden["out64.image1.whole_scores_sub"][0].amax(0)
    torch.testing.assert_close(got.scores[::4, ::4], want, rtol=0, atol=1e-12)
