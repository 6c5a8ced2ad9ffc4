"""ZegCLIP: the short last layer against the published order of work in fp64, any grid, the three settings."""

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.prompt_tuned import Published
from fastzs.losses import inductive_target, transductive_target
from fastzs.models import ZegCLIP
from fastzs.ops import mask_loss
from tests.models.official import model, published_state

f64 = torch.float64


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
@pytest.mark.parametrize("classes", [1, 7, 300])
def test_equals_the_published_order_of_work(classes):
    net = model(ZegCLIP).to(f64)
    long = Published("zegclip", published_state(net), 3, 4, 64).to(f64).eval()
    images, text = torch.randn(2, 3, 64, 64, dtype=f64), F.normalize(torch.randn(classes, 32, dtype=f64), dim=1)
    assert relative(net(images, text), long.low_resolution(images, text)) < 1e-13  # measured 1.0e-15


def test_last_layer_is_its_query_and_key_alone():
    last = [name for name in model(ZegCLIP).state_dict() if ".decoder_1.layers.2." in name]
    assert sorted(name.split("layers.2.")[1] for name in last) == [
        f"multihead_attn.{part}.{what}" for part in "kq" for what in ("bias", "weight")
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (8, 8), (40, 72)])
def test_any_grid(size):
    logits = model(ZegCLIP)(torch.randn(2, 3, *size), torch.randn(4, 32))
    assert logits.shape == (2, 4, size[0] // 8, size[1] // 8)


@torch.no_grad()
@pytest.mark.parametrize("deep", [0, 1, 2])
def test_carried_prompts_are_left_out_of_the_last_layer(deep):
    """The published tower with fewer deep prompts, where prompts are tokens throughout, in plain PyTorch."""
    net = model(ZegCLIP, deep_prompts=deep).to(f64)
    tower = net.backbone
    images = torch.randn(1, 3, 64, 64, dtype=f64)
    tokens, _ = tower.embed(images)
    x = tower.ln_pre(tokens)
    prompts = tower.prompt_tokens(1)
    for i, block in enumerate(tower.blocks):
        if i < len(prompts):
            x = torch.cat([x[:, :1], prompts[i], x[:, -64:]], dim=1)
        elif deep:
            x = torch.cat([x[:, :1], x[:, -64:]], dim=1)
        x = block(x)
    if deep:
        x = tower.prompt_norm(x)
    x = F.normalize(tower.ln_post(x) @ tower.proj, dim=-1)
    encoded = tower.encode(images)
    assert relative(encoded.cls, x[:, 0]) < 1e-13  # measured 6.3e-16
    assert relative(encoded.patches, x[:, -64:]) < 1e-13  # measured 6.0e-16


def test_settings():
    """Supervised, inductive and transductive losses, from targets made by hand."""
    net = model(ZegCLIP, dropout=0.0)
    text, images = torch.randn(4, 32), torch.randn(1, 3, 64, 64)
    target = torch.randint(0, 4, (1, 64, 64))
    target[:, :5] = 255
    with torch.no_grad():
        supervised = net.losses(images, target, text)
        loss = mask_loss(net(images, text), target)
        assert torch.allclose(supervised["focal"], 100 * loss.focal)
        assert torch.allclose(supervised["total"], 100 * loss.focal + loss.dice)

        table = torch.full((256,), 255)
        table[0], table[3] = 0, 1  # cat and sky are seen
        loss = mask_loss(net(images, text[[0, 3]]), table[target])
        inductive = net.losses(images, target, text, seen=[3, 0], dice=2.0)
        assert torch.allclose(inductive["focal"], 100 * loss.focal)
        assert torch.allclose(inductive["dice"], 2 * loss.dice)

        logits = net(images, text)
        full = F.interpolate(logits, (64, 64), mode="bilinear", align_corners=False)
        best = torch.tensor([1, 2])[full[:, [1, 2]].argmax(1)]
        pseudo = torch.where((target == 1) | (target == 2), best, target)
        loss = mask_loss(logits, pseudo)
        transductive = net.losses(images, target, text, seen=[0, 3], transductive=True)
        assert torch.allclose(transductive["focal"], 100 * loss.focal)


def test_more_than_255_classes_in_training():
    net = model(ZegCLIP, dropout=0.0)
    target = torch.randint(0, 400, (1, 64, 64))
    target[:, :9] = -1
    losses = net.losses(torch.randn(1, 3, 64, 64), target, torch.randn(400, 32), ignore_index=-1, seen=range(300))
    losses["total"].backward()
    assert losses["total"].isfinite()


def test_targets():
    target = torch.tensor([[[0, 1, 2, 255]]], dtype=torch.uint8)
    assert inductive_target(target, [0, 2], 3).tolist() == [[[0, 255, 1, 255]]]
    logits = torch.tensor([0.0, 1.0, 5.0, 2.0]).view(1, 4, 1, 1).expand(1, 4, 1, 4)
    assert transductive_target(target, logits, [0, 2]).tolist() == [[[0, 3, 2, 255]]]
    with pytest.raises(ValueError, match=r"labels: expected 0 to 1 .*, got 0 to 2"):
        inductive_target(target, [0], 2)
    with pytest.raises(ValueError, match="every class is seen"):
        transductive_target(target, logits, range(4))


def test_bad_training_input():
    net = model(ZegCLIP)
    images, target = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long)
    text = torch.randn(4, 32)
    for seen in ([0, 4], [], [1, 1], [-1]):
        with pytest.raises(ValueError, match="seen: expected distinct indices of the 4 classes"):
            net.losses(images, target, text, seen=seen)
    with pytest.raises(ValueError, match="tell which classes are seen"):
        net.losses(images, target, text, transductive=True)
    with pytest.raises(ValueError, match="labels: expected 0 to"):
        net.losses(images, target + 9, text, seen=[0])
