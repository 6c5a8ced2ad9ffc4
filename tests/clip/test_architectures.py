"""Every architecture of open_clip against open_clip's own, with random weights, through a weights folder."""

import open_clip
import pytest
import torch
from torch import nn

from fastzs.clip import ConvTower, ResNet, WeightsError
from fastzs.clip.vision import VisionTransformer
from tests.clip import architectures

ROWS = {row.split(" | ")[0].strip("| "): row for row in architectures.TABLE.read_text().splitlines() if "| " in row[:2]}
ROWS.pop("architecture")
PASSING = [name for name, row in ROWS.items() if "| passes |" in row]
REFUSED = [name for name, row in ROWS.items() if "| refused |" in row]
# one of each family, each within a second or two; the others are slow
REPRESENTATIVES = (
    "ViT-S-32-alt",
    "ViT-M-16-alt",
    "coca_ViT-B-32",
    "roberta-ViT-B-32",
    "ViT-B-32-SigLIP2-256",
    "EVA02-B-16",
    "PE-Core-T-16-384",
    "MobileCLIP-B",
    "MobileCLIP-S1",
    "ViTamin-S",
    "convnext_tiny",
    "vit_medium_patch16_gap_256",
    "RN50-quickgelu",
)
EPS = torch.finfo(torch.float32).eps


def bound(model: nn.Module) -> float:
    """What sums of fp32 may differ by, as a part of the largest value: 4 sqrt(n) eps.

    n counts the products of the longest row, and what adds up on the way through the layers.
    """
    longest = max(p[0].numel() for p in model.parameters() if p.ndim > 1)
    layers = sum(isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention) for module in model.modules())
    return 4 * (longest * layers) ** 0.5 * EPS


def close(got: torch.Tensor, wanted: torch.Tensor, model: nn.Module) -> None:
    assert got.shape == wanted.shape
    assert wanted.std() > 0
    assert (got - wanted).abs().max() <= bound(model) * wanted.abs().max()


def tokens(config: dict, context: int) -> torch.Tensor:
    """Two texts of ids, ended as each kind of text tower wants it, padded with zeros."""
    text = config["text_cfg"]
    end = text.get("eos_id", 2) if text.get("pool_type") == "eos" else architectures.WORDS - 1
    ids = torch.randint(3, architectures.WORDS - 1, (2, context), generator=torch.Generator().manual_seed(1))
    for row, length in zip(ids, (3, context // 2), strict=True):
        row[length], row[length + 1 :] = end, 0
    return ids


def alone(theirs: nn.Module, images: torch.Tensor, patch: int) -> torch.Tensor:
    """What open_clip's tower gives if its pool sees one patch alone."""
    trunk = getattr(theirs, "trunk", None)
    if trunk is None:
        x = theirs.transformer(theirs._embeds(images))[:, 1 + patch : 2 + patch]
        if theirs.attn_pool is None and theirs.pool_type == "avg":
            x = torch.cat([x, x], dim=1)  # the first one is left out of the mean
        return theirs._pool(x)[0] @ theirs.proj
    x = trunk.forward_features(images)
    if x.ndim == 4:
        return theirs.head(trunk.forward_head(x.flatten(2)[:, :, patch, None, None]))
    prefix = trunk.num_prefix_tokens
    x = x[:, prefix + patch : prefix + patch + 1]
    if prefix and trunk.attn_pool is not None and not hasattr(trunk, "rope"):
        x = torch.cat([x, x], dim=1)
    return theirs.head(trunk.forward_head(x))


def native(theirs: nn.Module, config: dict) -> tuple[int, int]:
    """Pixels of the image that open_clip's tower is made for; ViTamin-XL-384's configuration names another."""
    embed = getattr(getattr(theirs, "trunk", None), "patch_embed", None)
    return (architectures.side(config),) * 2 if embed is None else embed.img_size


def linear_pool(tower: nn.Module) -> bool:
    """Whether the embedding is the mean of the dense features."""
    if isinstance(tower, VisionTransformer):
        return tower.variant.pool == "mean" and not tower.variant.norm_after_pool
    return isinstance(tower, ConvTower) and type(tower.network).__name__ == "FastVit"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in REPRESENTATIVES else pytest.mark.slow) for n in PASSING]
)
@torch.inference_mode()
def test_is_open_clips_own(name, tmp_path):
    config = architectures.small_config(name, tmp_path)
    with architectures.fewer_blocks():
        theirs = architectures.open_clips_own(config)
        loaded = architectures.loaded(config, theirs, tmp_path)
        tower = loaded.vision()
    whole = torch.randn(1, 3, *native(theirs.visual, config), generator=torch.Generator().manual_seed(2))
    # of 384 pixels a tower with patches of 14 reads 378, here they would be filled up to 392
    side = tower.grid * tower.patch_size if isinstance(tower, VisionTransformer) else whole.shape[-1]
    images = whole[..., :side, :side]
    close(tower(images), theirs.encode_image(whole, normalize=False), theirs.visual)

    encoder = loaded.text()
    ids = tokens(config, config["text_cfg"].get("context_length", 77))
    close(encoder.tower(ids), theirs.encode_text(ids, normalize=False), encoder)

    features, grid = tower.trunk(images)
    full = tower.dense(features, grid, "identity" if isinstance(tower, ConvTower) else "qk")
    assert full.shape == (1, loaded.embed_dim, *grid)
    if not isinstance(tower, ResNet):
        patch = grid[1] + 1 if grid[0] > 1 else 0
        close(full.flatten(2)[..., patch], alone(theirs.visual, whole, patch), theirs.visual)
    if linear_pool(tower):
        close(full.mean((2, 3)), tower(images), tower)

    images = torch.randn(2, 3, 2 * tower.patch_size + 1, 3 * tower.patch_size)
    features, grid = tower.trunk(images)
    assert grid == (3, 3)
    for kind in tower.operators:
        assert torch.isfinite(tower.dense(features, grid, kind)).all()
    if "kk" in tower.operators:
        assert tower.keys(features).shape[:2] == (2, 9)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_the_reason(name):
    assert architectures.outcome(name) == ROWS[name]


def test_the_table_has_every_architecture():
    assert list(ROWS) == open_clip.list_models()
    assert len(PASSING) >= 130
    assert set(REPRESENTATIVES) <= set(PASSING)
    assert f"# {len(PASSING)} of open_clip's {len(ROWS)} " in architectures.TABLE.read_text()


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "EVA02-B-16", "convnext_tiny"])
def test_weights_of_another_architecture_name_the_keys(name, tmp_path):
    config = architectures.small_config("ViT-M-32", tmp_path)
    theirs = architectures.open_clips_own(config)
    wrong = architectures.small_config(name, tmp_path) | {"embed_dim": 512}
    loaded = architectures.loaded(wrong, theirs, tmp_path)
    with architectures.fewer_blocks(), pytest.raises(WeightsError, match=r"missing: .*unexpected: class_embedding"):
        loaded.vision()
