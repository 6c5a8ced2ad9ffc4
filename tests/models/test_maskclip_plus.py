"""MaskCLIP+: who labels which pixels, the settings, any network, what is trained."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastzs
from fastzs.clip import WeightsError
from fastzs.decoders.deeplab import DeepLab, DeepLabV2Head
from fastzs.models import MaskCLIPPlus
from fastzs.models.base import Labels
from fastzs.models.maskclip_plus import UNLABELLED
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary, text_vectors
from tests.models.ask import ask
from tests.models.shapes import NAMES, scenes, train, trained_names, words

NAMES_WITH_GROUND = (*NAMES[:6], "background")


def network(dim: int = 128) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.ReLU(), DeepLabV2Head(16, dim, (1, 2)))


def model(**options) -> MaskCLIPPlus:
    torch.manual_seed(0)
    return MaskCLIPPlus(**{"weights": "shapes", "network": network(), "crop": 64} | options).eval()


@pytest.mark.parametrize("setting", ["annotation-free", "zero-shot", "honest", "inductive", "supervised"])
def test_trains_the_network_and_nothing_else(setting):
    net = model(annotation_free=setting == "annotation-free", guided_steps=2).train()
    images, target = scenes(net)
    text = text_vectors(net, Vocabulary(NAMES))
    options = {} if setting in ("annotation-free", "supervised") else {"seen": range(2, 7)}
    options |= {"zero-shot": {"transductive": True}, "honest": {"transductive": "honest"}}.get(setting, {})
    losses = train(net, lambda: net.losses(images, target, text, **options)["total"], steps=6, rate=5e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert trained_names(net) == {name for name, _ in net.named_parameters()}
    assert net._iter_counter == 7
    assert all(parameter.grad is None for parameter in net.teacher.parameters())


@torch.no_grad()
def test_who_labels_what():
    net, text = model(guided_steps=3, own_from=2), F.normalize(torch.randn(4, 128), dim=1)
    images, features = torch.randn(1, 3, 64, 64), torch.randn(1, 128, 16, 16)
    labels = torch.randint(-1, 2, (1, 64, 64))
    labels[:, :5] = 255
    hidden = labels == UNLABELLED

    def at(step: int, trust_clip=(), **settings):
        net._iter_counter.fill_(step)
        for name, value in settings.items():
            setattr(net, name, value)
        return net.label(labels, images, features, text, [2, 3], None, trust_clip)

    guided = at(1)
    assert guided.own is None
    assert guided.merged is guided.clip
    scores = net.teacher(images, text)[:, 2:]
    best = 2 + F.interpolate(scores, (64, 64), mode="bilinear").argmax(1)
    assert torch.equal(guided.clip, torch.where(hidden, best, labels))
    own = at(5)
    assert own.clip is None
    scores = torch.einsum("bdhw,cd->bchw", features, text[2:])
    best = 2 + F.interpolate(scores, (64, 64), mode="bilinear").argmax(1)
    assert (own.merged == torch.where(hidden, best, labels)).float().mean() > 0.999
    both = at(2)
    assert torch.equal(both.merged, both.own)
    both = at(2, trust_clip=[3])
    assert torch.equal(both.merged, torch.where(both.clip == 3, 3, both.own))
    sure = at(5, confidence=0.7).merged
    assert torch.equal(sure[~hidden], labels[~hidden])
    assert 0 < (sure[hidden] == UNLABELLED).float().mean() < 1
    slip = at(5, threshold_on_all=True).merged
    assert (slip[~hidden] == UNLABELLED).any()
    assert torch.equal(slip[hidden], sure[hidden])


@torch.no_grad()
def test_zero_shot_and_honest_labels():
    net = model(guided_steps=None)
    images, target = scenes(net)
    target[:, :9] = 255
    text, seen = text_vectors(net, Vocabulary(NAMES)), [2, 3, 4, 5, 6]
    for transductive in (True, "honest"):
        labels, unlabelled = net._unlabelled(Labels(target, range(7), seen, transductive == "honest", 255))
        assert unlabelled == [0, 1]
        hidden = (target < 2) | (target == 255 if transductive == "honest" else False)
        assert torch.equal(labels == UNLABELLED, hidden)
        assert torch.equal(labels[~hidden], target.long()[~hidden])
    labels, unlabelled = net._unlabelled(Labels(target, range(7), None, False, 255))
    assert unlabelled == []
    assert torch.equal(labels, target.long())
    # the labels of unseen classes are not used: exchanging them changes nothing
    swapped = torch.where(target < 2, 1 - target, target)
    losses = [net.losses(images, t, text, seen=seen, transductive=True)["total"] for t in (target, swapped)]
    assert losses[0] == losses[1]


def test_background_vector():
    net = model(background="background", guided_steps=0)
    vocabulary = Vocabulary(NAMES_WITH_GROUND, embeddings=words(128, NAMES_WITH_GROUND).embeddings)
    text = Segmenter(net).question(vocabulary).text
    assert torch.equal(text[:6], vocabulary.embeddings[:6])
    torch.testing.assert_close(text[6:], F.normalize(net.bg_embeddings, dim=1))
    assert torch.equal(net.classifier(vocabulary.embeddings, 6), text)
    assert torch.equal(Segmenter(net).question(words(128)).text, words(128).embeddings)  # nothing has that name
    synonyms = Vocabulary([{"wood": ["paper", "slate"]}, "red disc"])
    with_synonyms = model(background="wood")
    rows = Segmenter(with_synonyms).question(synonyms).text
    torch.testing.assert_close(rows[:3], F.normalize(with_synonyms.bg_embeddings, dim=1).expand(3, -1))
    assert torch.equal(rows[3:], text_vectors(with_synonyms, synonyms)[3:])
    images, target = scenes(net)
    net.losses(images, torch.full_like(target, 6), vocabulary.embeddings, background=[6])["total"].backward()
    assert net.bg_embeddings.grad.any()
    # what the network calls background is not CLIP's to label
    both = model(background="background", guided_steps=None, own_from=0)
    labels, features = torch.full((1, 64, 64), UNLABELLED), text.detach()[6].view(1, -1, 1, 1).expand(1, 128, 4, 4)
    found = both.label(labels, images[:1], features, text.detach(), [5, 6], 6)
    assert (found.own == 6).all()
    assert (found.clip == 6).all()


def test_distillation():
    net = model(distill=1.0).train()
    images, target = scenes(net)
    out = net.losses(images, target, text_vectors(net, Vocabulary(NAMES)), seen=[2, 3, 4, 5, 6], transductive=True)
    assert set(out) == {"cross_entropy", "distillation", "total"}
    (gradient,) = torch.autograd.grad(out["distillation"], net.network[0].weight)
    assert gradient.any()
    features = net.teacher.encode(images).dense
    everywhere = torch.ones(2, 64, 64, dtype=torch.bool)
    assert net.distillation(features, images, everywhere) < 1e-6
    assert net.distillation(features, images, ~everywhere) == 0
    torch.testing.assert_close(net.distillation(features + 1, images, everywhere), torch.ones(()))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (17, 90), (3, 5)])
def test_any_size_and_number_of_classes(size):
    net, images, text = model(), torch.randn(2, 3, *size), torch.randn(300, 128)
    many = net(images, text)
    assert many.shape == (2, 300, -(-size[0] // 4), -(-size[1] // 4))
    torch.testing.assert_close(net(images, text[:1]), many[:, :1])


def test_saves_loads_and_segments(tmp_path):
    net = model()
    net._iter_counter.fill_(7)
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="network of its own"):
        fastzs.load("maskclip_plus", checkpoint=tmp_path)
    segmenter = fastzs.load("maskclip_plus", checkpoint=tmp_path, network=network(), device="cpu", precision="fp32")
    assert isinstance(segmenter.model, MaskCLIPPlus)
    assert segmenter.model._iter_counter == 7
    assert (segmenter.model.mean, segmenter.model.std) == (net.mean, net.std)
    picture = np.random.default_rng(0).integers(0, 255, (90, 53, 3), dtype=np.uint8)
    assert segmenter(picture, NAMES).labels.shape == (90, 53)
    images, text = torch.randn(1, 3, 64, 64), torch.randn(3, 128)
    assert torch.equal(segmenter.model(images, text), net(images, text))
    torch.save({"state_dict": {"backbone.stem.0.weight": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="deep stem"):
        MaskCLIPPlus.from_checkpoint(tmp_path / "a.pth")


@pytest.mark.slow
@pytest.mark.parametrize(("head", "stride"), [("deeplabv2", 8), ("deeplabv3+", 4)])
def test_deeplab(head, stride):
    net = DeepLab(24, "resnet50", head)
    features = net(torch.randn(2, 3, 32, 40))
    assert features.shape == (2, 24, 32 // stride, 40 // stride)
    features.square().mean().backward()
    assert trained_names(net) == {name for name, _ in net.named_parameters()}


def test_a_student_of_clips_own_tower(tmp_path):
    sizes = {"dpt": {"reassemble": [4, 4, 8, 8], "features": 8}}
    net = model(network="dpt", **sizes)
    tower, teachers = net.network.encoder.model, net.teacher.visual
    assert torch.equal(tower.blocks[0].attn.in_proj_weight, teachers.blocks[0].attn.in_proj_weight)
    assert tower.blocks[0] is not teachers.blocks[0]  # the teacher stays as it is
    images, target = scenes(net)
    text = text_vectors(net, Vocabulary(NAMES))
    net.train()
    losses = train(net, lambda: net.losses(images, target, text, seen=range(2, 7), transductive=True)["total"], 6, 5e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert trained_names(net) == {name for name, _ in net.named_parameters()}
    assert not torch.equal(tower.blocks[0].attn.in_proj_weight, teachers.blocks[0].attn.in_proj_weight)
    net.eval().save_pretrained(tmp_path)
    again = MaskCLIPPlus.from_pretrained(tmp_path)
    assert again._clip is None  # its weights are in the file
    odd = torch.randn(1, 3, 50, 70)
    assert torch.equal(again(odd, text), net(odd, text))
    assert net(odd, text).shape == (1, 7, 64, 80)  # patches of 8 pixels, 8 cells each
    with pytest.raises(WeightsError, match=r"MaskCLIP\+: RN50 is not CLIP's own vision transformer"):
        MaskCLIPPlus("RN50", "random", network="dpt")


def test_bad_arguments():
    net = model()
    images, target = scenes(net)
    with pytest.raises(ValueError, match="20 wide"):
        ask(net, images, words(20))
    with pytest.raises(ValueError, match="labels: expected 0 to"):
        net.losses(images, target, torch.randn(2, 128))
    with pytest.raises(ValueError, match="labels: expected 0 to"):
        net.losses(images, target, torch.randn(3, 128), seen=[0], transductive=True)
    with pytest.raises(ValueError, match="every class is seen"):
        net.losses(images, target, words(128).embeddings, seen=range(7), transductive=True)
    with pytest.raises(ValueError, match="network must be one of"):
        model(network="unet", text_dim=128, pretrained=False)
    with pytest.raises(ValueError, match="must not be negative"):
        model(confidence=-1.0)
