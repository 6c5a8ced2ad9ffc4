import pytest
import torch
import torch.nn.functional as F

import fastzs.clip
from fastzs.clip.vision import OPERATORS as KINDS
from fastzs.clip.vision import QuickGELU
from fastzs.models import MaskCLIP
from fastzs.models.maskclip import IMAGENET_MEAN
from fastzs.vocabulary import Vocabulary
from tests.models.ask import ask
from tests.tiny import RESNET, VISION, tiny_clip

TOWERS = pytest.mark.parametrize("vision", [VISION, RESNET], ids=["vit", "resnet"])


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text():
    return F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), dim=1)


@TOWERS
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_cosines_of_the_operators_features(images, text, vision, kind):
    model = MaskCLIP(tiny_clip(vision), dense=kind)
    logits = model(images, text)
    features = model.encode(images)
    assert logits.shape == (2, 5, 5, 7)
    wanted = 100 * torch.einsum("bdhw,cd->bchw", F.normalize(features.patches, dim=1), text)
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-3)


def test_every_operator_gives_other_features(images):
    model = MaskCLIP(tiny_clip())
    found = []
    for kind in KINDS:
        model.kind = kind
        found.append(model.encode(images).patches)
    for i, a in enumerate(found):
        assert all((a - b).abs().max() > 1e-4 * a.abs().max() for b in found[:i]), KINDS[i]


def test_a_batch_is_its_pictures(images, text):
    model = MaskCLIP(tiny_clip(), smoothing="paper", denoising=0.1)
    both = model(images, text)
    torch.testing.assert_close(both, torch.cat([model(image[None], text) for image in images]))


def test_denoising_leaves_out_weak_classes(images, text):
    plain = MaskCLIP(tiny_clip())(images, text)
    best = F.softmax(plain, dim=1).amax((2, 3))  # [B, C]
    threshold = best.flatten().median().item()
    denoised = MaskCLIP(tiny_clip(), denoising=threshold)(images, text)
    absent = best < threshold
    assert 0 < absent.sum() < 10
    assert (denoised[absent] == -10_000).all()
    assert torch.equal(denoised[~absent], plain[~absent])


def test_smoothing_spreads_probabilities_over_similar_keys(images, text):
    model = MaskCLIP(tiny_clip(), smoothing="paper")
    keys = F.normalize(model.encode(images).keys, dim=2)
    probabilities = F.softmax(MaskCLIP(tiny_clip())(images, text), dim=1).flatten(2)
    wanted = probabilities @ (keys @ keys.transpose(1, 2))
    torch.testing.assert_close(model(images, text).flatten(2), wanted, rtol=1e-4, atol=1e-4)
    assert model.activation == "none"
    assert MaskCLIP(tiny_clip()).activation == "softmax"


def test_names_and_their_embeddings_give_the_same(images, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path))
    clip = tiny_clip()
    model = MaskCLIP(clip)
    vocabulary = Vocabulary(["cat", {"sofa": ["couch"]}], "single")
    rows = model(images, vocabulary.embed(clip))
    torch.testing.assert_close(ask(model, images, vocabulary)[:, 1], rows[:, 1:].amax(1))


def test_published_settings_go_with_openais_weights_only():
    published, own = MaskCLIP(tiny_clip(published=True)), MaskCLIP(tiny_clip())
    assert published.mean == IMAGENET_MEAN
    assert own.mean == (0.5,) * 3
    for model, eps, quick in ((published, 1e-6, False), (own, 1e-5, True)):
        block = model.visual.transformer.resblocks[0]
        assert block.ln_1.eps == eps
        assert isinstance(block.mlp.gelu, QuickGELU) is quick
    named = MaskCLIP(tiny_clip(published=True), exact_gelu=False, norm_eps=1e-5, imagenet_normalization=False)
    assert named.mean == (0.5,) * 3
    assert isinstance(named.visual.transformer.resblocks[0].mlp.gelu, QuickGELU)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smoothing": "both"}, "'both'"),
        ({"denoising": 2.0}, r"2\.0"),
        ({"smoothing_threshold": 0.0}, r"0\.0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaskCLIP(tiny_clip(), **options)


def test_unknown_operator_names_the_known():
    with pytest.raises(ValueError, match=r"dense='qv' does not apply to tiny; expected dense to be one of .*qq"):
        MaskCLIP(tiny_clip(), dense="qv")


@pytest.mark.parametrize(
    ("options", "setting"), [({"dense": "qq"}, "dense='qq'"), ({"smoothing": "paper"}, "smoothing")]
)
def test_a_tower_without_attention_is_refused_at_once_with_the_reason(options, setting):
    clip = fastzs.clip.load("convnext_tiny", "random")
    with pytest.raises(ValueError, match=f"{setting}.* convnext_tiny; expected dense .*identity.*no attention"):
        MaskCLIP(clip, **options)
