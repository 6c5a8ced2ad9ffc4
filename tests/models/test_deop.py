"""DeOP: one pass, its stages, what a proposal's name depends on."""

import numpy as np
import pytest
import torch

from fastzs.clip import WeightsError
from fastzs.models import DeOP
from fastzs.models.deop import severed, summed_losses
from fastzs.segmenter import Segmenter
from tests.models.shapes import scenes, train, trained_names, words

SIZES = {"width": 16, "layers": 3, "heads": 2, "patch_size": 8, "grid": 4, "output_dim": 8}
SMALL = {
    "weights": "random",
    "sizes": SIZES,
    "resnet": "resnet18",
    "pretrained": None,
    "proposals": {"width": 32, "queries": 6, "layers": 1, "hidden": 16, "dropout": 0.0},
    "added": (1,),
    "added_side": 3,
    "anchor_heads": 2,
    "anchor_hidden": 16,
    "size": 64,
}
SEEN = [0, 1, 3, 4, 5]


def model(**options) -> DeOP:
    return DeOP(**SMALL | options)


@pytest.mark.parametrize("severance", ["mask", "identity", "similarity"])
def test_training_names_moves_no_frozen_part(severance):
    net = model(severance=severance).train()
    images, target = scenes(net, count=1)
    text = words(8).embeddings
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = train(net, lambda: net.losses(images, target, text, seen=SEEN)["total"], steps=16, rate=1e-3)
    assert min(found[1:]) < found[0]
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    # attention among equal values has no gradient for what it is made of
    dead = {f"anchors.layers.0.among.{n}" for n in ("in_proj_weight", "in_proj_bias")}
    still = {n for n, p in net.named_parameters() if p.requires_grad} - moved
    assert still <= dead | {"no_object"}  # whose probability may round to 0 at this temperature
    assert {n.split(".")[0] for n in moved} - {"no_object"} == {"tower", "anchors"}
    assert not any(n.startswith("tower.tower.") for n in moved)


def test_training_proposals():
    pytest.importorskip("scipy")
    net = model(stage="proposals").train()
    images, target = scenes(net, count=1)
    net.losses(images, target, words(8).embeddings, seen=SEEN)["total"].backward()
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert {n.split(".")[0] for n in trained_names(net)} <= {"maskformer", "project", "no_object"}


def test_severed_values():
    v, masks = torch.randn(2, 2, 7, 4), torch.rand(2, 3, 2, 3)
    share = torch.cat([torch.full((2, 1), 100.0), masks.sum(1).flatten(1)], dim=1)
    torch.testing.assert_close(severed(v, masks, "mask"), v * share[:, None, :, None])
    assert severed(v, masks, "identity") is v
    flat = torch.cat([torch.ones(2, 3, 1), masks.flatten(2)], dim=2)
    weights = torch.einsum("bqi,bqj->bij", flat, flat).softmax(-1)
    torch.testing.assert_close(severed(v, masks, "similarity"), torch.einsum("bij,bhjd->bhid", weights, v))


def test_the_tower_sees_an_image_once(monkeypatch):
    net, calls = model().eval(), []
    monkeypatch.setattr(net.tower.tower, "embed", lambda x, real=net.tower.tower.embed: calls.append(len(x)) or real(x))
    net(torch.randn(2, 3, 50, 70), words(8).embeddings)
    assert calls == [2]


def test_sizes_and_padding():
    net = model().eval()
    out = net(torch.randn(1, 3, 50, 70), words(8).embeddings)
    assert out.shape == (1, 7, 13, 18)
    assert (out >= 0).all()
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    assert Segmenter(net)(picture, words(8)).labels.shape == (50, 70)


def test_ignored_pixels_belong_to_no_object():
    masks, share = torch.randn(1, 4, 6, 6), torch.rand(1, 4, 3).softmax(-1)
    target = torch.full((1, 12, 12), 255)
    none, _ = summed_losses(masks, share, target)
    more = share.clone()
    more[..., 2] += 0.5
    assert summed_losses(masks, more, target)[0] < none


def test_saves_and_loads(tmp_path):
    net = model(severance="similarity").eval()
    net.save_pretrained(tmp_path)
    again = DeOP.from_pretrained(str(tmp_path)).eval()
    images, text = torch.randn(1, 3, 64, 64), words(8).embeddings
    assert torch.equal(net(images, text), again(images, text))


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="severance must be"):
        model(severance="cut")
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        model(severed=[3])
    with pytest.raises(ValueError, match="stage"):
        model(stage="all")
    torch.save({"model": {"query_embedding.weight": torch.zeros(2, 2)}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError):
        DeOP.from_checkpoint(tmp_path / "a.pth")
