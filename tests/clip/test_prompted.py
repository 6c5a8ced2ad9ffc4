"""Prompts and bridge in towers that are not CLIP's own."""

import copy

import pytest
import torch
import torch.nn.functional as F

from fastzs.clip import packed
from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.clip.vision import VisionTransformer, vit_sizes

SIZES = {"width": 32, "layers": 3, "heads": 2, "patch_size": 4, "grid": 4, "output_dim": 24, "quick_gelu": False}
POOL = {"pool": "attention", "pool_heads": 2, "pool_width": 32, "pool_mlp": 48}
VARIANTS = {
    "SigLIP": {"stem_bias": True, "prefix": 0, "norm_input": False, "tanh_gelu": True, "projection": False, **POOL},
    "EVA-02": {
        "gate": "silu",
        "mlp_norm": "hidden",
        "attention_norm": True,
        "rotary": {"ref_feat_shape": [4, 4]},
        "projection_bias": True,
    },
    "EVA-02-E": {"norm_last": True},
    "PE-Core": {"rotary": {"grid_indexing": "xy", "grid_offset": 1.0}, "projection_bias": True, **POOL},
    "MobileCLIP-B": {"prefix_position": False, "norm_input": False},
    "ViTamin": {"prefix": 0, "gate": "gelu", "mlp_norm": "input", "pool": "mean", "norm_after_pool": True},
}


def sizes(name):
    return SIZES | {"variant": VARIANTS[name]} | ({"output_dim": 32} if name == "SigLIP" else {})


@pytest.fixture(params=VARIANTS)
def name(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 17, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prompted(name, **options):
    torch.manual_seed(0)
    return PromptedVisionTransformer(**sizes(name), **options).double()


def test_without_prompts_it_is_the_tower(name, images):
    plain = VisionTransformer(**sizes(name)).double().eval()
    tower = prompted(name, prompts=0).eval()
    tower.start_from(plain)
    encoded = tower.encode(images)
    torch.testing.assert_close(encoded.cls, F.normalize(plain(images), dim=-1))
    dense = plain.dense(*plain.trunk(images), "qk").flatten(2).mT
    torch.testing.assert_close(encoded.patches, F.normalize(dense, dim=-1))
    assert encoded.patches.shape == (2, 5 * 6, tower.output_dim)


@pytest.mark.parametrize("deep_prompts", [0, None])
def test_prompts_and_bridge_learn(name, deep_prompts, images):
    tower = prompted(name, prompts=3, deep_prompts=deep_prompts, bridge=(2, 2)).train()
    for key, parameter in tower.named_parameters():
        parameter.requires_grad_("prompt" in key)
    encoded = tower.encode(images)
    assert encoded.bridge.shape == (2, 4, tower.output_dim)
    (encoded.patches.square().sum() * 0 + encoded.patches[..., 0].sum() + encoded.bridge[..., 1].sum()).backward()
    assert tower.prompt_embeddings.grad.abs().sum() > 0
    assert all(torch.isfinite(p.grad).all() for p in tower.parameters() if p.grad is not None)


def test_prompts_of_the_first_layer_are_tokens_without_position(name, images):
    """Carried prompts see and are seen by all: the plain tower over a longer row of tokens, nothing of it turned."""
    tower = prompted(name, prompts=2, deep_prompts=0, prompt_dropout=0.0).eval()
    tokens, grid = tower.embed(images)
    first = tower.prefix
    prompts = tower.prompt_tokens(2)[0].expand(2, -1, -1)
    tokens = tower.ln_pre(tokens)
    x = torch.cat([tokens[:, :first], prompts, tokens[:, first:]], dim=1)
    rotation = tower.rotation(grid)
    for block in tower.blocks:
        x = block(x, rotation and rotation._replace(first=first + 2))
    wanted = F.normalize(tower.to_text(x[:, first + 2 :]), dim=-1)
    torch.testing.assert_close(tower.encode(images).patches, wanted)


def test_sizes_build_it_again(name, images):
    plain = VisionTransformer(**sizes(name)).double().eval()
    again = VisionTransformer(**vit_sizes(plain)).double().eval()
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(images), plain(images))


def test_packed_they_compute_the_same(name):
    tower = prompted(name, prompts=3, bridge=(2, 2)).float().eval().requires_grad_(False)
    small = copy.deepcopy(tower)
    packed.pack(small)
    images = torch.randn(1, 3, 16, 24)
    with torch.inference_mode():
        for got, wanted in zip(small.encode(images)[:3], tower.encode(images)[:3], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(small(images), tower(images), rtol=1e-4, atol=1e-5)


def test_unknown_differences_are_named():
    with pytest.raises(ValueError, match="unknown variant color"):
        VisionTransformer(**SIZES, variant={"color": 1})
