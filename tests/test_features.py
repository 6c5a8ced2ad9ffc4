"""Encoded images: dense features, moving and keeping them, and whose they are."""

import copy
import pickle

import pytest
import safetensors.torch
import torch

import fastzs
from fastzs.features import KEY, FeaturesError, ImageFeatures
from fastzs.models import NACLIP, SZN, ClipRC, MaskCLIP, ProxyCLIP
from fastzs.segmenter import Segmenter
from tests.models.official import model
from tests.models.test_szn import SMALL
from tests.tiny import tiny_clip

NAMES = ["cat", "dog", "sky"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def image():
    return torch.randint(256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def segmenter(**options):
    return Segmenter(MaskCLIP(tiny_clip(), **options), short_side=32)


def test_dense_features_point_where_the_text_does(image):
    seg = segmenter()
    features = seg.encode(image)
    dense = features.dense
    assert dense.shape == (24, 4, 6)
    torch.testing.assert_close(dense.norm(dim=0), torch.ones(4, 6))
    text = seg.question(NAMES).text
    torch.testing.assert_close(100 * torch.einsum("dhw,cd->chw", dense, text), seg.logits(features, NAMES)[0])


def test_dense_features_of_windows_are_averaged(image):
    seg = Segmenter(MaskCLIP(tiny_clip()), short_side=0, crop=(24, 32), stride=(16, 24))
    features = seg.encode(image)
    dense = features.dense
    assert dense.shape == (24, round(50 / 8), round(70 / 8))
    torch.testing.assert_close(dense.norm(dim=0), torch.ones(dense.shape[1:]))
    torch.testing.assert_close(dense[:, :2, :3], features.windows.dense[0][:, :2, :3])  # where one window lies


def test_features_outside_the_text_space_say_so(image):
    features = Segmenter(SZN(**SMALL)).encode(image)
    assert not hasattr(features, "dense")
    with pytest.raises(AttributeError, match="SZNFeatures do not lie in the text space"):
        _ = features.dense


@pytest.mark.parametrize("make", [segmenter, lambda: Segmenter(model(ClipRC))], ids=["maskclip", "clip_rc"])
def test_features_can_be_moved_copied_pickled_and_saved(make, image, tmp_path):
    seg = make()
    names = fastzs.Vocabulary(NAMES, embeddings=torch.randn(3, seg.model.text_dim))
    features = seg.encode(image)
    wanted = seg(image, names, scores=True)
    features.save(tmp_path / "image.safetensors")
    others = [ImageFeatures.load(tmp_path / "image.safetensors"), pickle.loads(pickle.dumps(features))]
    for other in (features, *others, copy.deepcopy(features), features.to("cpu")):
        got = seg.label(other, names, scores=True)
        assert torch.equal(got.labels, wanted.labels)
        assert torch.equal(got.scores, wanted.scores)
        assert torch.equal(got.image, image)


def test_slices_and_joins():
    windows = Segmenter(model(ClipRC), short_side=0, crop=32, stride=16).encode(torch.zeros(3, 50, 70).byte()).windows
    assert len(windows) == 12
    again = type(windows).cat([windows[:2], windows[torch.arange(2, 12)]])
    assert all(torch.equal(a, b) for a, b in zip(again.tensors().values(), windows.tensors().values(), strict=True))
    half = windows.to(dtype=torch.float16)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.float16}


def test_features_of_another_model_are_refused(image):
    features = segmenter().encode(image)
    segmenter().label(features, NAMES)  # an equal model may
    others = [
        segmenter(dense="qq"),
        segmenter(residual=False),
        Segmenter(MaskCLIP(tiny_clip(fingerprint="other")), short_side=32),
        Segmenter(MaskCLIP(tiny_clip()).double(), short_side=32),
        segmenter(exact_gelu=True),
        segmenter(norm_eps=1e-3),
        Segmenter(model(ClipRC)),
    ]
    for other in others:
        with pytest.raises(FeaturesError, match="of another model, weights, settings or precision"):
            other.label(features, NAMES)
    trained, same = model(ClipRC), model(ClipRC)
    kept = Segmenter(trained).encode(image)
    names = fastzs.Vocabulary(NAMES, embeddings=torch.randn(3, 32))
    Segmenter(same).label(kept, names)
    with torch.no_grad():
        same.backbone.proj[0, 0] += 1
    with pytest.raises(FeaturesError, match="another model"):
        Segmenter(same).label(kept, names)
    with pytest.raises(FeaturesError, match=r"expected features from Segmenter\.encode, got Tensor"):
        segmenter().label(image, NAMES)


def test_weights_that_changed_since_are_other_weights(image):
    seg = segmenter()
    features = seg.encode(image)
    copy.deepcopy(seg).label(features, NAMES)
    with torch.no_grad():
        seg.model.visual.proj += 0.1
    for changed in (seg, copy.deepcopy(seg)):
        with pytest.raises(FeaturesError, match="another model"):
            changed.label(features, NAMES)
    seg.label(seg.encode(image), NAMES)


def test_operators_and_second_networks_tell_models_apart(image):
    def one(block):
        return block.v[:, :, block.prefix :]

    def two(block):
        return 2 * block.v[:, :, block.prefix :]

    def network(seed):
        torch.manual_seed(seed)
        return torch.nn.Conv2d(3, 4, 8, stride=8)

    first = [NACLIP(tiny_clip(), dense=one), ProxyCLIP(tiny_clip(), affinity=network(0))]
    others = [
        NACLIP(tiny_clip(), dense=two),
        ProxyCLIP(tiny_clip(), affinity=network(1)),
    ]
    for a, b in zip(first, others, strict=True):
        kept = Segmenter(a, short_side=32, crop=0).encode(image)
        Segmenter(a, short_side=32, crop=0).label(kept, NAMES)
        with pytest.raises(FeaturesError, match="another model"):
            Segmenter(b, short_side=32, crop=0).label(kept, NAMES)


def test_bad_files(image, tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"", b"rubbish", safetensors.torch.save({"a": torch.zeros(1)})):
        path.write_bytes(content)
        with pytest.raises(FeaturesError, match=r"a\.safetensors"):
            ImageFeatures.load(path)
    with pytest.raises(FeaturesError, match=r"nothing\.safetensors"):
        ImageFeatures.load(tmp_path / "nothing.safetensors")
    segmenter().encode(image).save(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()[KEY]
    for change, message in (
        (('"version": "1"', '"version": "9"'), "expected features of version 1, got 9"),
        (("DenseFeatures", "OtherFeatures"), "OtherFeatures, which this version of fastzs does not have"),
    ):
        safetensors.torch.save_file(tensors, path, {KEY: about.replace(*change)})
        with pytest.raises(FeaturesError, match=message):
            ImageFeatures.load(path)
    safetensors.torch.save_file({"image": tensors["image"]}, path, {KEY: about})
    with pytest.raises(FeaturesError, match="missing or unexpected"):
        ImageFeatures.load(path)
    with pytest.raises(OSError, match="no"):
        segmenter().encode(image).save(tmp_path / "no" / "a.safetensors")
