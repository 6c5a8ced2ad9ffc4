"""CLIP-RC: shortcuts against the published order of work in fp64, any grid and bridge, training."""

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.prompt_tuned import Published
from fastzs.models import ClipRC
from fastzs.models.prompt_tuned import PromptFeatures
from tests.models.official import model, published_state

f64 = torch.float64


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture
def double() -> ClipRC:
    return model(ClipRC, dropout=0.0).to(f64)


@pytest.fixture
def encoded() -> PromptFeatures:
    generator = torch.Generator().manual_seed(1)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, 32, generator=generator, dtype=f64), dim=-1)

    return PromptFeatures(unit(2, 6, 10), unit(2), unit(2, 4))


@torch.no_grad()
@pytest.mark.parametrize("classes", [1, 7, 300])
def test_equals_the_published_order_of_work(double, classes):
    long = Published("clip_rc", double.state_dict(), 3, 4, 64).to(f64).eval()
    images, text = torch.randn(2, 3, 64, 64, dtype=f64), F.normalize(torch.randn(classes, 32, dtype=f64), dim=1)
    assert relative(double(images, text), long.low_resolution(images, text)) < 1e-13  # measured 1.4e-15


@torch.no_grad()
def test_mean_over_regions_before_the_product(double, encoded):
    text = torch.randn(5, 32, dtype=f64)
    streams = double.streams(encoded, text)
    maps = torch.einsum("bqd,bnd->bqn", streams.queries, streams.features)  # [B, L * C, N]
    long = maps.unflatten(1, (4, 5)).mean(1).unflatten(2, (6, 10))
    assert relative(double.logits(streams, encoded.grid), long) < 1e-13  # measured 4.6e-16


@torch.no_grad()
def test_lateral_projection_before_the_enlargement(double, encoded):
    assert encoded.bridge is not None
    enlarged = encoded.bridge.transpose(1, 2).unflatten(2, (2, 2))
    enlarged = F.interpolate(enlarged, (6, 10), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    whole = encoded.cls[:, None].expand_as(encoded.tokens)
    long = double.decode_head.lateral_proj(torch.cat([enlarged, whole, encoded.tokens], dim=-1))
    assert relative(double.lateral(encoded), long) < 1e-13  # measured 3.5e-16


@torch.no_grad()
@pytest.mark.parametrize(
    ("size", "bridge"), [((64, 96), (2, 2)), ((40, 72), (3, 2)), ((24, 24), (3, 3)), ((8, 16), (1, 2))]
)
def test_any_grid_and_bridge(size, bridge):
    net = model(ClipRC, bridge=bridge)
    logits = net(torch.randn(2, 3, *size), torch.randn(4, 32))
    assert logits.shape == (2, 4, size[0] // 8, size[1] // 8)
    assert logits.isfinite().all()


@torch.no_grad()
def test_sides_that_are_no_multiples_of_the_patch_are_enlarged():
    net = model(ClipRC)
    images, text = torch.randn(1, 3, 50, 61), torch.randn(4, 32)
    enlarged = F.interpolate(images, (56, 64), mode="bilinear", align_corners=False)
    assert torch.equal(net(images, text), net(enlarged, text))


def test_too_small_a_picture_for_the_bridge():
    with pytest.raises(ValueError, match="bridge of 4 x 4 leaves regions empty on a grid of 3 x 8"):
        model(ClipRC, bridge=(4, 4))(torch.zeros(1, 3, 24, 64), torch.randn(2, 32))


@torch.no_grad()
def test_prompts_as_keys_equal_prompts_as_tokens(double):
    """Through all layers: rows of prompts that nobody reads may be left out (here against the published tower)."""
    images = torch.randn(2, 3, 64, 64, dtype=f64)
    cls, patches, bridge = Published("clip_rc", double.state_dict(), 3, 4, 64).to(f64).eval().backbone(images)
    ours = double.backbone.encode(images)
    assert ours.bridge is not None
    for mine, theirs in ((ours.cls, cls), (ours.patches, patches), (ours.bridge, bridge)):
        theirs = theirs if theirs.ndim == 2 else theirs.flatten(2).transpose(1, 2)
        assert relative(mine, theirs) < 1e-13  # measured 7.9e-16


@torch.no_grad()
def test_prompt_keys_are_computed_once_in_evaluation():
    net = model(ClipRC)
    images, text = torch.randn(1, 3, 64, 64), torch.randn(3, 32)
    first = net(images, text)
    calls = []
    net.backbone.prompt_proj.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(net(images, text), first)
    assert calls == []
    net.backbone.prompt_embeddings += 1
    assert not torch.equal(net(images, text), first)
    assert calls == [1]
    net.train()
    net(images, text)
    assert calls == [1, 1]


def test_recovery_only_in_training_and_only_if_wanted():
    net = model(ClipRC)
    ran = []
    net.decode_head.recovery_decoder.register_forward_hook(lambda *_: ran.append(1))
    net(torch.randn(1, 3, 64, 64), torch.randn(3, 32))
    assert ran == []
    images, target, text = torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64)), torch.randn(3, 32)
    with_recovery = net.losses(images, target, text)
    assert set(with_recovery) == {"focal", "dice", "recovery_queries", "recovery_features", "total"}
    assert ran == [1]
    assert set(net.losses(images, target, text, recovery=0)) == {"focal", "dice", "total"}
    lean = model(ClipRC, recovery=False)
    assert not any("recovery" in name for name in lean.state_dict())
    with pytest.raises(ValueError, match="made without its recovery decoder"):
        lean.losses(images, target, text)


def test_total_is_the_sum():
    net = model(ClipRC, dropout=0.0)
    losses = net.losses(torch.randn(1, 3, 64, 64), torch.randint(0, 3, (1, 64, 64)), torch.randn(3, 32))
    total = losses.pop("total")
    assert torch.allclose(total, sum(losses.values()))


def test_bridge_is_frozen_unless_told_otherwise():
    trained = {name for name, p in model(ClipRC).named_parameters() if p.requires_grad and name.startswith("backbone.")}
    assert trained == {
        "backbone.prompt_embeddings",
        "backbone.deep_prompt_embeddings",
        "backbone.prompt_proj.weight",
        "backbone.prompt_proj.bias",
        "backbone.prompt_norm.weight",
        "backbone.prompt_norm.bias",
    }
    assert model(ClipRC, train_bridge=True).backbone.region_level_bridge.requires_grad


def test_one_training_step_lowers_the_loss():
    net = model(ClipRC, dropout=0.0).train()
    images, target, text = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64)), torch.randn(3, 32)
    optimiser = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4)
    before = net.losses(images, target, text)["total"]
    before.backward()
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    optimiser.step()
    assert net.losses(images, target, text)["total"] < before


def test_starts_from_clip():
    """From a CLIP: its weights, positions at the crop's grid, equal region tokens."""
    net = ClipRC("ViT-B-32", "random", crop=96, prompts=2, bridge=(2, 3))
    tower = net.backbone
    assert tower.positional_embedding.shape[0] == 1 + (96 // net.patch_size) ** 2
    expected = tower.class_embedding + tower.positional_embedding[0]
    assert torch.equal(tower.region_level_bridge, expected.expand(6, -1))
    plain = net.clip.vision()
    assert torch.equal(
        tower.transformer.resblocks[3].attn.in_proj_weight, plain.transformer.resblocks[3].attn.in_proj_weight
    )
    assert torch.equal(tower.positional_embedding, plain.positions((3, 3)))
    # as published: the decoder's layers start equal
    layers = net.decode_head.decoder_q.layers
    assert torch.equal(layers[0].linear1.weight, layers[2].linear1.weight)


def test_published_state_is_what_the_paper_counts():
    """Trainable parameters of CLIP-RC on VOC: 36.9 M with what influences nothing (systems.md 1.2)."""
    sizes = {"width": 768, "layers": 12, "heads": 12, "patch_size": 16, "grid": 32, "output_dim": 512}
    with torch.device("meta"):
        net = ClipRC(sizes=sizes)
        state = published_state(net)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    trained = sum(t.numel() for name, t in state.items() if name not in frozen and "loss_decode" not in name)
    assert round(trained / 1e6, 1) == 36.9


@torch.no_grad()
def test_autocast():
    net, images, text = model(ClipRC), torch.randn(1, 3, 64, 64), torch.randn(3, 32)
    eager = net(images, text)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(images, text)
    assert low.dtype == torch.float32
    assert relative(low, eager) < 0.1  # measured 0.013


@torch.no_grad()
def test_compiles_without_a_break():
    net, images, text = model(ClipRC), torch.randn(1, 3, 64, 64), torch.randn(3, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert relative(compiled(images, text), net(images, text)) < 1e-5  # measured 4.7e-7
