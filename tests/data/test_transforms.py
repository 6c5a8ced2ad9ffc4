import pytest
import torch
from torchvision import tv_tensors

from fastzs.data.datasets import ShapesDataset
from fastzs.data.transforms import PadTo, PhotometricDistortion, ScaleJitter, VariedCrop, training_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def sample(height=40, width=60, labels=None):
    image = tv_tensors.Image(torch.randint(256, (3, height, width), dtype=torch.uint8))
    if labels is None:
        labels = torch.randint(5, (height, width), dtype=torch.uint8)
    return image, tv_tensors.Mask(labels)


def test_scale_jitter_keeps_proportions_and_never_invents_labels():
    torch.manual_seed(0)
    shorter = set()
    for _ in range(30):
        image, labels = ScaleJitter(32)(*sample())
        assert image.shape[1:] == labels.shape
        assert abs(image.shape[2] / image.shape[1] - 1.5) < 0.1
        assert set(labels.unique().tolist()) <= set(range(5))
        shorter.add(image.shape[1])
    assert 16 <= min(shorter) < 24
    assert 48 < max(shorter) <= 64


def test_scale_jitter_bounds_the_longer_side():
    image, _ = ScaleJitter(10, (1.0, 1.0))(*sample(10, 200))
    assert image.shape[1:] == (2, 40)


def test_picture_and_labels_stay_together():
    # the image shows the labels: wherever the crop and the flip go, they must agree
    torch.manual_seed(1)
    labels = torch.randint(5, (50, 70), dtype=torch.uint8)
    image = tv_tensors.Image((labels * 40).expand(3, -1, -1))
    transform = training_transform(24, (0,) * 3, (1,) * 3, scale=(2.0, 2.0), distortion=False)
    for _ in range(10):
        pixels, target = transform(image, tv_tensors.Mask(labels))
        agrees = (pixels[0] * 255 - target * 40.0).abs() < 21
        assert agrees.float().mean() > 0.4  # borders between labels are blurred
        shuffled = target.flatten()[torch.randperm(target.numel())].view_as(target)
        assert ((pixels[0] * 255 - shuffled * 40.0).abs() < 21).float().mean() < 0.35


def test_crops_avoid_a_class_that_fills_them():
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 40:] = 1  # a random 16-crop is nearly always of one class
    torch.manual_seed(2)
    shares = {most: [] for most in (0.75, 1.0)}
    for most, found in shares.items():
        for _ in range(60):
            _, cut = VariedCrop(16, most)(*sample(64, 64, labels))
            assert cut.shape == (16, 16)
            found.append((cut == 0).float().mean().item())
    varied = {most: sum(0.25 < share < 0.75 for share in found) for most, found in shares.items()}
    assert varied[0.75] > 3 * varied[1.0]


def test_the_crop_rule_leaves_ignored_pixels_out():
    labels = torch.full((16, 16), 255, dtype=torch.uint8)
    labels[:2] = 3
    crop = VariedCrop(16)
    assert not crop._varied(labels)  # a single class, however few pixels
    labels[0, :8] = 4  # 24 against 8 of the labelled pixels: exactly 75 %, which is too much
    assert not crop._varied(labels)
    labels[0, 8] = 4
    assert crop._varied(labels)


def test_small_pictures_are_padded():
    image, labels = PadTo(32)(tv_tensors.Image(torch.ones(3, 20, 40)), tv_tensors.Mask(torch.zeros(20, 40)))
    assert image.shape == (3, 32, 40)
    assert (image[:, 20:] == 0).all()
    assert (labels[20:] == 255).all()
    assert (labels[:20] == 0).all()


def test_distortion_changes_colours_only():
    torch.manual_seed(3)
    image, labels = sample()
    changed = 0
    for _ in range(12):
        distorted, same = PhotometricDistortion()(image, labels)
        assert torch.equal(same, labels)
        assert isinstance(distorted, tv_tensors.Image)
        assert distorted.dtype == torch.uint8
        assert distorted.shape == image.shape
        changed += not torch.equal(distorted, image)
    assert changed >= 8


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"brightness": 32.0}, [42, 182, 255]),
        ({"brightness": -32.0}, [0, 118, 208]),
        ({"contrast": 1.5}, [15, 225, 255]),
        ({"contrast": 0.5}, [5, 75, 120]),
    ],
)
def test_brightness_is_added_and_contrast_multiplies(params, expected):
    nothing = dict.fromkeys(("brightness", "contrast", "saturation", "hue")) | {"contrast_first": True}
    image = tv_tensors.Image(torch.tensor([10, 150, 240], dtype=torch.uint8)[None, None].expand(3, 1, 3))
    assert PhotometricDistortion().transform(image, nothing | params)[0, 0].tolist() == expected


def test_the_whole_pipeline():
    picture, labels = ShapesDataset("train", length=1, size=96)[0]
    transform = training_transform(64, MEAN, STD)
    torch.manual_seed(4)
    image, target = transform(picture, labels)
    assert image.shape == (3, 64, 64)
    assert image.dtype == torch.float32
    assert target.shape == (64, 64)
    torch.manual_seed(4)
    assert torch.equal(image, transform(picture, labels)[0])
    plain = training_transform(96, MEAN, STD, scale=(1.0, 1.0), flip=0.0, distortion=False)(picture, labels)
    expected = (picture / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.allclose(plain[0], expected, atol=1e-5)
    assert torch.equal(plain[1], labels)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="scale"):
        ScaleJitter(8, (2.0, 0.5))
    with pytest.raises(ValueError, match="most"):
        VariedCrop(8, 0.0)
    with pytest.raises(ValueError, match="different sizes"):
        VariedCrop(8)(tv_tensors.Image(torch.zeros(3, 9, 9)), tv_tensors.Mask(torch.zeros(8, 9)))
