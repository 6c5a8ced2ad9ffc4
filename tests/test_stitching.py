"""Windows that are put together before the last step, against slow computations in fp64 of one's own."""

import pytest
import torch
import torch.nn.functional as F

from fastzs.models import NACLIP, ClipRC, MaskCLIP, ProxyCLIP, ResCLIP, ZegCLIP
from fastzs.models.training_free import ClearCLIP
from fastzs.operators import operator
from fastzs.segmenter import Segmenter
from fastzs.stitching import stitch
from fastzs.windows import window_grid
from tests.models.official import model as official
from tests.tiny import VISION, tiny_clip

NAMES = ["cat", "dog", "tree"]
KINDS = {
    "naclip": lambda: NACLIP(tiny_clip()),
    "clearclip": lambda: ClearCLIP(tiny_clip(), multiple=16),
    "proxyclip": lambda: ProxyCLIP(tiny_clip(), affinity=lambda images: F.avg_pool2d(images, 4)),
    "maskclip": lambda: MaskCLIP(tiny_clip(), smoothing="paper"),
    "zegclip": lambda: official(ZegCLIP),
    "clip_rc": lambda: official(ClipRC, bridge=(2, 3)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image():
    return torch.randn(1, 3, 43, 58, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_cells_count_by_the_area_they_share():
    """Every pixel of the image gets the mean of the windows' cells over it, and a cell the mean of its pixels."""
    size, grid = (20, 24), (5, 4)
    windows = window_grid(size, (10, 12), (7, 8))
    maps = torch.randn(len(windows), 2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total, visits = torch.zeros(2, *size, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64)
    for one, (top, left, height, width) in zip(maps, windows.tolist(), strict=True):
        for y in range(top, top + height):
            for x in range(left, left + width):
                total[:, y, x] += one[:, (y - top) // 2, (x - left) // 4]
                visits[y // 4, x // 6] += 1
    wanted = total.unflatten(2, (4, 6)).unflatten(1, (5, 4)).sum((2, 4)) / visits
    assert torch.allclose(stitch(maps, windows, size, grid), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_one_window_over_everything_is_the_whole_image(kind, image):
    model = KINDS[kind]().double().eval()
    whole, stitched = model.encode(image), model.encode_stitched(image, 64, 48, 2)
    for name, wanted in whole.tensors().items():
        found = stitched.tensors()[name]
        assert found.shape == wanted.shape
        assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    several = model.encode_stitched(image, 32, 16, 3)
    assert several.tensors().keys() == whole.tensors().keys()
    assert any((several.tensors()[name] - wanted).abs().max() > 1e-3 for name, wanted in whole.tensors().items())


def mean_tokens(model, image, crop, stride):
    """Tokens before the last block of an image that is cut to whole patches: for every patch the mean, one by one."""
    patch = model.visual.patch_size
    rows, columns = image.shape[2] // patch, image.shape[3] // patch
    windows = window_grid((rows * patch, columns * patch), crop, stride)
    kept = [model.visual.trunk(image[:, :, t : t + h, x : x + w])[0][0] for t, x, h, w in windows.tolist()]
    tokens = [torch.stack([one[0] for one in kept]).mean(0)]
    for row in range(rows):
        for column in range(columns):
            over = []
            for one, (top, left, height, width) in zip(kept, (windows // patch).tolist(), strict=True):
                if top <= row < top + height and left <= column < left + width:
                    over.append(one[1 + (row - top) * width + column - left])
            tokens.append(torch.stack(over).mean(0))
    return torch.stack(tokens), rows, columns


def test_the_last_block_sees_the_whole_image(image):
    """NACLIP's equations written down for every pair of patches."""
    model = NACLIP(tiny_clip()).double().eval()
    tokens, rows, columns = mean_tokens(model, image, 24, 16)
    block, heads = model.visual.blocks[-1], model.visual.blocks[-1].attn.heads
    y = block.ln_1(tokens)
    weight, bias = (x.chunk(3) for x in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    k, v = (F.linear(y, weight[i], bias[i]).unflatten(1, (heads, -1)) for i in (1, 2))
    out = torch.zeros_like(v[1:])
    for i in range(rows * columns):
        for head in range(heads):
            scores = k[:, head] @ k[1 + i, head] / k.shape[2] ** 0.5
            for j in range(rows * columns):
                apart = (i // columns - j // columns) ** 2 + (i % columns - j % columns) ** 2
                scores[1 + j] = scores[1 + j] + torch.exp(torch.tensor(-apart / 50.0))
            out[i, head] = scores.softmax(0) @ v[:, head]
    wanted = model.visual.ln_post(block.attn.out_proj(out.flatten(1))) @ model.visual.proj
    found = model.encode_stitched(image, 24, 16, 2).patches[0].flatten(1).T
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # the Gaussian above is fp32


def test_labels_of_a_stitched_image():
    image = torch.randint(256, (3, 43, 58), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    model = NACLIP(tiny_clip())
    options = {"short_side": 43, "crop": 24, "stride": 16}
    segmenter = Segmenter(model, **options, windows="stitched")
    result = segmenter(image, NAMES)
    assert result.labels.shape == (43, 58)
    again = segmenter.label(segmenter.encode(image), NAMES)
    assert torch.equal(again.labels, result.labels)
    small = Segmenter(model, **options, batch_size=1, windows="stitched")
    both = list(small([image, image.flip(2)], NAMES, probabilities=True))
    assert torch.equal(both[0].labels, result.labels)
    separate = Segmenter(model, **options)(image, NAMES, probabilities=True)
    assert (separate.probabilities - both[0].probabilities).abs().max() > 1e-3


def test_what_cannot_be_stitched_says_why():
    @operator("test-stitched", blocks=(0,))
    def earlier(block):
        return block.v

    tower = VISION | {"layers": 11}
    with pytest.raises(ValueError, match="ResCLIP wants attention of earlier blocks"):
        Segmenter(ResCLIP(tiny_clip(tower)), windows="stitched")
    with pytest.raises(ValueError, match="its operator wants attention of earlier blocks"):
        Segmenter(NACLIP(tiny_clip(), dense=earlier), windows="stitched")
    with pytest.raises(ValueError, match="expected 'separate' or 'stitched', got 'glued'"):
        Segmenter(NACLIP(tiny_clip()), windows="glued")
