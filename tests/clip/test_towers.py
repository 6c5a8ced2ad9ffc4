"""What towers do with images of any size; :mod:`tests.clip.test_architectures` compares them with open_clip's."""

import pytest
import torch
from torch import nn

from fastzs.clip.vision import GRIDS_KEPT, VisionTransformer
from fastzs.clip.weights import load


def randomise(module: nn.Module) -> None:
    """Leave nothing at a value that hides an error: normalisations, biases and running statistics included."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.ndim <= 1:
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(1 + 0.1 * noise.abs() if "var" in name or "weight" in name else 0.1 * noise)


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


def test_tables_of_many_sizes_do_not_pile_up():
    tower = VisionTransformer(
        width=16,
        layers=1,
        heads=2,
        patch_size=4,
        grid=2,
        output_dim=8,
        variant={"rotary": {"ref_feat_shape": [2, 2]}},
    ).requires_grad_(False)
    for columns in range(1, 2 * GRIDS_KEPT):
        with torch.inference_mode():
            tower(torch.randn(1, 3, 4, 4 * columns))
    assert len(tower._tables) == len(tower._rotations) == GRIDS_KEPT


@torch.inference_mode()
def test_trunk_shows_the_attention_of_each_block_before_the_last():
    tower = load("ViT-B-32", "random").vision()
    images = torch.randn(1, 3, 64, 96)
    seen = []
    tokens, _ = tower.trunk(images, lambda *given: seen.append(given))
    assert [index for index, *_ in seen] == list(range(11))
    index, before, q, k, v = seen[-1]
    block = tower.blocks[index]
    heads = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
    torch.testing.assert_close(block.add_mlp(block.add_attended(before, heads)), tokens)
    assert torch.equal(tower.trunk(images)[0], tokens)


@torch.inference_mode()
def test_an_attention_of_the_callers_own_takes_the_same_way_to_the_text_space():
    tower = load("ViT-B-32", "random").vision()
    tokens, grid = tower.trunk(torch.randn(1, 3, 64, 96))
    _, k, v = tower.projections(tokens, grid)
    own = torch.softmax(k @ k.transpose(-1, -2) * k.shape[-1] ** -0.5, -1) @ v
    for residual, ffn in ((True, True), (False, False)):
        mine = tower.read(tower.finish(tokens, own[:, :, 1:], residual, ffn), grid)
        torch.testing.assert_close(mine, tower.dense(tokens, grid, "kk", residual, ffn))


def test_a_convolutional_tower_refuses_what_needs_attention():
    tower = load("convnext_tiny", "random").vision()
    assert tower.operators == ("identity",)
    with torch.inference_mode():
        tokens, grid = tower.trunk(torch.randn(1, 3, 64, 64))
        with pytest.raises(ValueError, match="no attention in its last stage, so dense='qq' does not apply"):
            tower.dense(tokens, grid, "qq")
        with pytest.raises(ValueError, match="no keys, so key smoothing"):
            tower.keys(tokens)
