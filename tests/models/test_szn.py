"""SZN: both stages, the choice between seen and unseen classes, published checkpoints, the published slips."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import fastzs
from fastzs.clip import WeightsError
from fastzs.decoders.fcn import FCN, bilinear_kernel, upscore
from fastzs.models import SZN
from fastzs.models.szn import cosine_loss
from fastzs.vocabulary import Vocabulary, text_vectors
from tests.models.ask import ask
from tests.models.shapes import NAMES, scenes, train, trained_names, words

SEEN, HELD_OUT = NAMES[:5], NAMES[4:5]
SMALL = {"text_dim": 6, "pretrained": False, "widths": (4, 4, 8, 8, 8), "hidden": 16}


def model(**options) -> SZN:
    out = SZN(**SMALL | options)
    for name, parameter in out.named_parameters():  # so small a VGG is silent as torch makes it
        if parameter.ndim == 4 and "upscore" not in name:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return out.eval()


def test_a_new_network_tells_pictures_apart():
    net = FCN((16, 32, 48, 64, 64), 128).eval()
    features = net(torch.randn(2, 3, 64, 64))
    assert (features[0] - features[1]).std() > 0.05 * features.std()


def test_stage_one_trains_the_embedding_alone():
    for loss in ("cosine", "mse"):
        net = model(loss=loss)
        images, target = scenes(net)
        text = words(6).embeddings
        losses = train(net, lambda: net.losses(images, target, text)["total"], steps=4, rate=3e-3)  # noqa: B023
        assert losses[-1] < losses[0] - 0.02
        wanted = {name for name, _ in net.named_parameters() if not name.startswith("seenmask_")}
        assert trained_names(net) == wanted


def test_stage_two_trains_the_seenmask_alone():
    net, text = model(stage="seenmask"), words(6).embeddings
    images, target = scenes(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    losses = train(
        net, lambda: net.losses(images, target, text, seen=range(5), train_unseen=[4])["total"], steps=6, rate=3e-3
    )
    assert losses[-1] < losses[0] - 0.05
    assert trained_names(net) == {n for n, _ in net.named_parameters() if n.startswith("seenmask_")}
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("seenmask_"), name
    net.stage = "embedding"
    assert net.score_fr.weight.requires_grad
    assert not net.seenmask_score.weight.requires_grad


@torch.no_grad()
def test_labels_of_each_stage():
    """Stage 1 ignores held-out and unseen classes; stage 2 tells held-out from seen and ignores unseen ones."""
    net = model()
    images, text = torch.randn(1, 3, 40, 40), words(6).embeddings
    target = torch.randint(0, 7, (1, 40, 40))
    target[:, :3] = 255
    features = net.encode(images)
    embedded, mask = net.embedded(features), net.seenmask(features)

    def total(target):
        return net.losses(images, target, text, seen=range(5), train_unseen=[4])["total"]

    stage_one = torch.where(target < 4, target, 255)
    wanted = cosine_loss(embedded, text, stage_one)
    torch.testing.assert_close(total(target), wanted)
    net.stage = "seenmask"
    stage_two = torch.where(target < 4, 1, torch.where(target == 4, 0, 255))
    wanted = F.cross_entropy(mask, stage_two, ignore_index=255)
    torch.testing.assert_close(total(target), wanted)
    net.ignored_as_unseen = True
    slip = F.cross_entropy(mask, torch.where(target < 4, 1, 0), ignore_index=255)
    torch.testing.assert_close(total(target), slip)
    assert total(torch.full_like(target, 255)) > 0
    net.ignored_as_unseen = False
    assert total(torch.full_like(target, 255)) == 0


@torch.no_grad()
def test_the_broadcast_slip_shows_with_more_than_one_picture():
    torch.manual_seed(2)
    embedded, text, target = torch.randn(6, 6, 5, 5), torch.randn(4, 6), torch.randint(0, 4, (6, 5, 5))
    right = torch.stack([cosine_loss(embedded[i : i + 1], text, target[i : i + 1]) for i in range(6)]).mean()
    torch.testing.assert_close(cosine_loss(embedded, text, target), right)
    one = cosine_loss(embedded[:1], text, target[:1], broadcast_norm=True)
    torch.testing.assert_close(one, cosine_loss(embedded[:1], text, target[:1]))
    assert (cosine_loss(embedded, text, target, broadcast_norm=True) - right).abs() > 1e-3
    with pytest.raises(RuntimeError, match="must match"):
        cosine_loss(embedded[:2], text, target[:2], broadcast_norm=True)


@torch.no_grad()
def test_seen_and_unseen_pixels_get_their_own_classes():
    net = model(seen=SEEN, train_unseen=HELD_OUT)
    net.seenmask_upscore.weight.normal_()  # so that what it says changes over an image
    images, vocabulary = 3 * torch.randn(2, 3, 50, 70), words(6)
    features = net.encode(images)
    says_seen = net.seenmask(features).argmax(1) == 1
    assert 0.02 < says_seen.float().mean() < 0.98
    cosines = net.score(features, vocabulary.embeddings)
    free = cosines.argmax(1)
    labels = ask(net, images, vocabulary).argmax(1)
    assert torch.equal(labels < 4, says_seen)
    right = (free < 4) == says_seen
    assert torch.equal(labels[right], free[right])
    truth = torch.randint(0, 7, (2, 50, 70))
    truth[:, :5] = 255
    labels = net.finish(features, cosines, torch.arange(7) < 4, truth=truth).argmax(1)
    assert torch.equal(labels >= 4, (truth >= 4) & (truth != 255))
    # without being told which are seen, all compete
    assert torch.equal(ask(model_like(net, seen=None), images, vocabulary).argmax(1), free)
    # the slip: with all cosines negative, a class that cannot be chosen wins
    is_seen, pixels = torch.arange(7) < 4, torch.ones(1, 2, 2, dtype=torch.bool)
    below = -torch.rand(1, 7, 2, 2)
    assert (net.restrict(below, is_seen, pixels).argmax(1) < 4).all()
    net.zero_rows = True
    assert (net.restrict(below, is_seen, pixels).argmax(1) >= 4).all()


def model_like(net: SZN, **options) -> SZN:
    out = model(**options)
    out.load_state_dict(net.state_dict())
    return out


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (1, 1), (37, 210)])
def test_any_size_and_any_number_of_classes(size):
    net, images, text = model(), torch.randn(2, 3, *size), torch.randn(300, 6)
    many = net(images, text)
    assert many.shape == (2, 300, *size)
    torch.testing.assert_close(net(images, text[:1]), many[:, :1])


@torch.no_grad()
def test_enlargement_is_the_fixed_transposed_convolution():
    maps = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    kernel = torch.eye(3, dtype=torch.float64)[:, :, None, None] * bilinear_kernel().double()
    wanted = F.conv_transpose2d(maps, kernel, stride=32)[:, :, 19:109, 19:130]
    torch.testing.assert_close(upscore(maps, (90, 111)), wanted)
    net = model()
    assert torch.equal(net.seenmask_upscore.weight[0, 0], bilinear_kernel())


def test_starts_from_torchvision_s_vgg():
    class Small(nn.Module):
        """VGG-16's order of layers at other widths."""

        def __init__(self):
            super().__init__()
            widths, channels, layers = (4, 4, 8, 8, 8), 3, []
            for count, width in zip((2, 2, 3, 3, 3), widths, strict=True):
                for _ in range(count):
                    layers.append(nn.Conv2d(channels, width, 3, padding=1))
                    channels = width
            self.features = nn.Sequential(*layers)
            self.classifier = nn.Sequential(nn.Linear(8 * 49, 16), nn.Linear(16, 16), nn.Linear(16, 5))

    theirs, ours = Small(), FCN((4, 4, 8, 8, 8), 16)
    ours.start_from(theirs)
    assert torch.equal(ours.get_parameter("conv3_2.weight"), theirs.features[5].weight)
    x = torch.randn(1, 8, 7, 7)
    torch.testing.assert_close(ours.fc6(x).flatten(), theirs.classifier[0](x.flatten()))


def test_saves_loads_and_segments(tmp_path):
    net = model(weights="random", seen=SEEN, train_unseen=HELD_OUT, stage="seenmask")
    net.save_pretrained(tmp_path)
    segmenter = fastzs.load("szn", checkpoint=tmp_path, device="cpu", precision="fp32")
    assert isinstance(segmenter.model, SZN)
    assert (segmenter.model.stage, segmenter.model.train_unseen) == ("seenmask", list(HELD_OUT))
    picture = np.random.default_rng(0).integers(0, 255, (90, 53, 3), dtype=np.uint8)
    result = segmenter(picture, words(6))
    assert result.labels.shape == (90, 53)
    images = torch.randn(1, 3, 40, 60)
    assert torch.equal(ask(segmenter.model, images, words(6)), ask(net, images, words(6)))


def test_reads_published_checkpoints(tmp_path):
    net = model()
    state = {name.removeprefix("fcn."): tensor.clone() for name, tensor in net.state_dict().items()}
    state["conv1_1.weight"] = state["conv1_1.weight"].flip(1)  # of BGR
    state["upscore.weight"] = torch.eye(6)[:, :, None, None] * bilinear_kernel()
    content = {"epoch": 3, "best_mean_iu": np.float64(0.3), "optim_state_dict": {}, "model_state_dict": state}
    torch.save(content, tmp_path / "szn.pth.tar")
    read = SZN.from_checkpoint(tmp_path / "szn.pth.tar", seen=SEEN)
    images = torch.randn(1, 3, 40, 60)
    assert torch.equal(read.encode(images).coarse, net.encode(images).coarse)
    assert read.std[0] == 1 / 255
    with pytest.raises(WeightsError, match="no known CLIP"):
        text_vectors(read, Vocabulary(["cat"]))
    state["upscore.weight"] *= 2
    torch.save(content, tmp_path / "trained.pth")
    with pytest.raises(WeightsError, match="not bilinear"):
        SZN.from_checkpoint(tmp_path / "trained.pth")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="not an SZN checkpoint"):
        SZN.from_checkpoint(tmp_path / "a.safetensors")


def test_bad_arguments():
    net, text = model(stage="seenmask", seen=SEEN), words(6).embeddings
    images, target = torch.randn(1, 3, 40, 40), torch.zeros(1, 40, 40, dtype=torch.long)
    with pytest.raises(ValueError, match="train_unseen"):
        net.losses(images, target, text)
    with pytest.raises(ValueError, match="labels and images of one size"):
        net.losses(images, target[:, :20], text)
    with pytest.raises(ValueError, match="20 wide"):
        ask(net, images, words(20))
    with pytest.raises(ValueError, match=r"expected text vectors \[classes, 6\]"):
        net(images, torch.randn(3, 5))
    with pytest.raises(ValueError, match="stage must be"):
        model(stage="both")
    with pytest.raises(ValueError, match="loss must be"):
        model(loss="l1")
