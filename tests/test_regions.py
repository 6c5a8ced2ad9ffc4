"""Regions from elsewhere: where they come from, what they do to labels, which count as one."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs.cli import main
from fastzs.data.datasets import ShapesDataset
from fastzs.data.protocols import protocol
from fastzs.evaluate import evaluate
from fastzs.models import NACLIP, PEARL, ClearCLIP, MaskCLIP, ProxyCLIP
from fastzs.needed import MissingPackage
from fastzs.regions import RegionsError, find, merged, share_labels
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from tests.tiny import VISION, tiny_clip

NAMES = ["cat", "dog", "tree"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image():
    return torch.randint(256, (3, 40, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture
def halves():
    """0 on top, 1 and 2 to the left and right below."""
    regions = torch.ones(40, 56, dtype=torch.int32)
    regions[:, 32:] = 2
    regions[:8] = 0
    return regions


def test_a_read_only_array(image):
    """Such as numpy gives of a PIL image."""
    regions = np.ones(tuple(image.shape[1:]), np.uint8)
    regions.setflags(write=False)
    assert find(regions, image).sum() == regions.size


def test_most_pixels_decide_and_scores_follow():
    labels = torch.tensor([[0, 1, 1, 2], [0, 1, 2, 2], [2, 0, 1, 1]], dtype=torch.uint8)
    regions = torch.tensor([[7, 7, 7, 0], [7, 7, 7, 0], [-1, 3, 3, 9]])
    scores = torch.arange(12.0).reshape(3, 4) / 12
    found, means = share_labels(labels, scores, regions)
    # of region 7 three pixels have label 1; of region 3 one has 0 and one 1, and the smaller wins
    assert found.tolist() == [[1, 1, 1, 2], [1, 1, 1, 2], [2, 0, 0, 1]]
    assert found.dtype == torch.uint8
    of_seven = (1 + 2 + 5) / 3 / 12
    wanted = torch.tensor([[of_seven, 1 / 12, 2 / 12, 3 / 12], [of_seven, 5 / 12, of_seven, 7 / 12], [8, 9, 9, 11]])
    wanted[2] /= 12
    assert torch.allclose(means, wanted)


def test_regions_that_look_alike_are_one():
    """A chain of neighbours connects regions that are not neighbours themselves; 0 stays apart."""
    angle = torch.tensor([0.0, 0.0, 0.5, 1.0, 2.5, 0.0], dtype=torch.float64)  # of 0, 5, 6, 7, 8 and 0 again
    regions = torch.tensor([[[0, 5, 6, 7, 8, -3]]])
    features = torch.stack([angle.cos(), angle.sin()])[None, :, None]
    within = 1 - torch.tensor(0.6).cos().item()
    assert merged(regions, features, within).tolist() == [[[0, 5, 5, 5, 8, 0]]]
    assert merged(regions, features, 1 - torch.tensor(0.4).cos().item()).tolist() == [[[0, 5, 6, 7, 8, 0]]]
    assert merged(torch.zeros_like(regions), features, 1.0).eq(0).all()


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        (torch.zeros(40, 55, dtype=torch.int64), r"expected integers \[40, 56\].*got torch.int64 \[40, 55\]"),
        (np.zeros((40, 56)), r"expected integers \[40, 56\].*got torch.float64"),
        (lambda pixels: pixels, r"expected integers \[40, 56\].*got torch.uint8 \[3, 40, 56\]"),
        ("nowhere.png", "nowhere.png: there is no such file; expected a PNG, a folder of them, or slic"),
        ("folder", "go by the names of image files, but the image has none"),
        ("folder/text.png", "text.png: cannot be read"),
        ("folder/colour.png", r"colour.png: expected integers \[40, 56\].*\[40, 56, 3\]"),
    ],
)
def test_what_is_wrong_is_named(regions, message, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "text.png").write_text("no image")
    Image.new("RGB", (56, 40)).save(tmp_path / "folder" / "colour.png")
    with pytest.raises(RegionsError, match=message):
        find(regions, image)
    if isinstance(regions, str) and regions == "folder":
        with pytest.raises(RegionsError, match=r"folder/7.png: there is no such file"):
            find(regions, image, "7")


@pytest.mark.parametrize("method", ["slic", "felzenszwalb"])
def test_superpixels_follow_edges(method):
    image = torch.full((3, 40, 56), 30, dtype=torch.uint8)
    image[:, :, 20:] = 220
    found = find(method, image)
    assert found.shape == (40, 56)
    assert found.min() == 1
    assert not set(found[:, :20].unique().tolist()) & set(found[:, 20:].unique().tolist())


def test_superpixels_need_scikit_image(monkeypatch, image):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"need scikit-image.*pip install 'fastzs\[regions\]'"):
        find("slic", image)


@pytest.mark.parametrize(
    "model",
    [
        NACLIP,
        lambda clip: ClearCLIP(clip, multiple=8),
        PEARL,
        lambda clip: ProxyCLIP(clip, affinity=lambda images: images[:, :, ::4, ::4], merge=0.0),
    ],
)
def test_patches_attend_inside_their_region_only(model, image, halves):
    """Features of one region do not change with the others' pixels where one block, the last, is all that mixes."""
    made = model(tiny_clip(VISION | {"layers": 1})).double().eval()
    pixels = image[None].double() / 255
    other = pixels.clone()
    other[:, :, 8:, 32:] = 1 - other[:, :, 8:, 32:]
    own = made.encode(pixels, halves[None].long()).patches
    changed = made.encode(other, halves[None].long()).patches
    free = made.encode(other).patches
    rows, columns = own.shape[2] // 5, own.shape[3] // 7
    inside = slice(rows, None), slice(None, 4 * columns)
    if not isinstance(made, PEARL | ProxyCLIP):  # whose means are of the whole image
        assert (own - changed)[:, :, *inside].abs().max() <= 1e-12
    assert (own - free)[:, :, *inside].abs().max() > 1e-3
    assert (own - changed)[:, :, :rows].abs().max() > 1e-4  # no region: they see everything
    everything = torch.ones_like(halves)[None].long()
    assert (made.encode(pixels, everything).patches - made.encode(pixels).patches).abs().max() <= 1e-5


@pytest.mark.parametrize("windows", ["separate", "stitched"])
def test_labels_of_an_image_with_regions(windows, image, halves, tmp_path):
    options = {"short_side": 40, "crop": 24, "stride": 16, "windows": windows}
    segmenter = Segmenter(NACLIP(tiny_clip()), **options)
    found = segmenter(image, NAMES, regions=halves, scores=True)
    for region in (1, 2):
        assert len(found.labels[halves == region].unique()) == 1
    assert found.scores.isfinite().all()
    encoded = segmenter.encode(image, regions=halves)
    assert torch.equal(segmenter.label(encoded, NAMES, regions=halves).labels, found.labels)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "7.bmp")
    (tmp_path / "regions").mkdir()
    Image.fromarray(halves.to(torch.uint8).numpy()).save(tmp_path / "regions" / "7.png")
    files = segmenter([str(tmp_path / "7.bmp")] * 2, NAMES, regions=tmp_path / "regions")
    assert all(torch.equal(one.labels, found.labels) for one in files)
    plain = Segmenter(MaskCLIP(tiny_clip()), short_side=40)  # no attention to restrict: labels only
    assert len(plain(image, NAMES, regions=lambda pixels: halves).labels[halves == 2].unique()) == 1


def test_regions_of_a_data_set(tmp_path):
    """Files go by the data set's names; the region is the whole image, so it gets one label."""
    dataset, rules = ShapesDataset("val", 3, 32), protocol("shapes")
    for i, name in enumerate(dataset.names):
        Image.fromarray(np.full((32, 32), 0 if i == 1 else 9, np.uint8)).save(tmp_path / f"{name}.png")
    vectors = torch.randn(len(rules.classes), 24, generator=torch.Generator().manual_seed(0))
    asked = Vocabulary(rules.classes, embeddings=vectors)
    kinds = []
    segmenter = Segmenter(NACLIP(tiny_clip()), short_side=32, crop=0, batch_size=2)
    evaluate(segmenter, dataset, rules, asked, regions=tmp_path, step=lambda n, i, x: kinds.append(len(x.unique())))
    assert kinds[0] == kinds[2] == 1 < kinds[1]


def test_the_command(image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("in", "regions"):
        (tmp_path / folder).mkdir()
    image[:, :, 28:] = torch.tensor([200, 40, 40])[:, None, None]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save("in/7.png")
    Image.fromarray(np.ones((40, 56), np.uint8)).save("regions/7.png")
    ask = ["segment", "in", "--output", "out", "--weights", "shapes", "--model", "naclip", "--classes", "red disc,wood"]
    ask += ["--crop", "96", "--stride", "48", "--short-side", "96", "--windows", "stitched", "--regions", "regions"]
    assert main(ask) == 0
    assert len(np.unique(np.array(Image.open("out/7.png")))) == 1
    before = (tmp_path / "out" / "run.json").read_text()
    Image.fromarray(np.zeros((40, 56), np.uint8)).save("regions/7.png")
    assert main(ask) == 0
    assert len(np.unique(np.array(Image.open("out/7.png")))) == 2
    assert '"done": 1' in (tmp_path / "out" / "run.json").read_text()  # other regions, so it was done again
    assert before != (tmp_path / "out" / "run.json").read_text()
    assert main(["segment", "in", "--output", "other", "--classes", "wood,paper", "--regions", "nowhere"]) == 2
    assert "regions nowhere: there is no such file" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
