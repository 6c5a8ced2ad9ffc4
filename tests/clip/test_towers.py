"""The towers against open_clip's own, for every architecture, with random weights."""

import open_clip
import pytest
import torch
from torch import nn

from fastzs.clip.state import WeightsError
from fastzs.clip.weights import build_vision, load

# (model, layers kept; None keeps all). The giants are cut in depth only: width, heads and sizes stay theirs.
ARCHITECTURES = [
    ("ViT-B-32-quickgelu", None),
    ("ViT-B-16-quickgelu", None),
    ("ViT-L-14-quickgelu", None),
    ("ViT-L-14-336-quickgelu", None),
    ("ViT-B-32", None),
    ("ViT-B-16", 4),
    ("ViT-B-16-plus-240", 4),
    ("ViT-L-14", 4),
    ("ViT-H-14", 2),
    ("ViT-g-14", 2),
    ("ViT-bigG-14", 1),
    ("RN50-quickgelu", None),
    ("RN101-quickgelu", None),
    ("RN50x4-quickgelu", None),
    ("RN50x16-quickgelu", None),
    ("RN50x64-quickgelu", None),
]


def randomise(module: nn.Module) -> None:
    """Leave nothing at a value that hides an error: normalisations, biases and running statistics included."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise.abs() if "var" in name or "weight" in name else 0.1 * noise)


@pytest.mark.parametrize(("model", "layers"), ARCHITECTURES, ids=[name for name, _ in ARCHITECTURES])
def test_picture_embedding_is_open_clips(model, layers):
    config = open_clip.get_model_config(model)
    if layers is not None:
        config["vision_cfg"]["layers"] = layers
    quick_gelu = config.get("quick_gelu", False)
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    theirs = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text, quick_gelu=quick_gelu).eval()
    randomise(theirs.visual)
    options = {"quick_gelu": quick_gelu} if model.startswith("ViT") else {}
    ours = build_vision(model, config, **options).eval()
    ours.load_state_dict(theirs.visual.state_dict())
    side = config["vision_cfg"]["image_size"]
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, got = theirs.encode_image(images), ours(images)
    assert (got - wanted).abs().max() <= 2e-5 * wanted.abs().max()  # measured: 2e-6 at most


@pytest.mark.parametrize("backbone", ["ViT-B-32", "RN50"])
@pytest.mark.parametrize("size", [(1, 1), (97, 130), (224, 64)])
def test_any_size_gives_a_grid_of_features(backbone, size):
    clip = load(backbone, "random")
    tower = clip.vision()
    with torch.inference_mode():
        tokens, grid = tower.trunk(torch.randn(2, 3, *size))
        assert grid == tuple(-(-side // 32) for side in size)
        for kind in ("identity", "qk", "kk+gaussian"):
            features = tower.dense(tokens, grid, kind)
            assert features.shape == (2, clip.embed_dim, *grid)
            assert torch.isfinite(features).all()
        assert tower.keys(tokens).shape == (2, grid[0] * grid[1], tower.width)


def test_positions_of_another_grid_are_kept_and_follow_the_table():
    tower = load("ViT-B-32", "random").vision()
    first = tower.positions((3, 9))
    assert tower.positions((3, 9)) is first
    with torch.no_grad():
        tower.positional_embedding.mul_(2)
    torch.testing.assert_close(tower.positions((3, 9)), 2 * first)


def test_positions_pass_gradients_while_they_are_trained():
    tower = load("ViT-B-32", "random").vision()
    assert not tower.positions((3, 9)).requires_grad
    tower.requires_grad_(True)
    tower.positions((3, 9)).sum().backward()
    assert tower.positional_embedding.grad.abs().sum() > 0
    assert tower.positions((3, 9)).requires_grad


def test_last_block_switches_change_the_features():
    tower = load("ViT-B-32", "random").vision()
    with torch.inference_mode():
        tokens, grid = tower.trunk(torch.randn(1, 3, 96, 96))
        full = tower.dense(tokens, grid)
        assert not torch.allclose(full, tower.dense(tokens, grid, residual=False))
        assert not torch.allclose(full, tower.dense(tokens, grid, ffn=False))


def test_dilated_resnet_keeps_the_resolution():
    tower = load("RN50", "random").vision(output_stride=8)
    with torch.inference_mode():
        _, grid = tower.trunk(torch.randn(1, 3, 64, 96))
    assert grid == (8, 12)


@pytest.mark.parametrize("model", ["ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base"])
def test_other_families_are_refused_by_name(model):
    with pytest.raises((WeightsError, ValueError), match=model):
        load(model, "random").vision()
