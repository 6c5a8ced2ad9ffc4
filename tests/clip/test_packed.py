"""Packed towers against the towers they were made of."""

import copy

import pytest
import torch

import fastzs
from fastzs.clip import packed
from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.clip.vision import VisionTransformer
from tests.clip.test_towers import randomise

SIZES = {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "grid": 4, "output_dim": 32}


@pytest.fixture(params=[True, False], ids=["onednn", "default"])
def engine(request, monkeypatch):
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(packed, "onednn_pays", lambda dtype: request.param)
    return request.param


def tower(prompted=False, **options):
    torch.manual_seed(0)
    if prompted:
        made = PromptedVisionTransformer(prompts=3, bridge=(2, 2), **SIZES, **options)
    else:
        made = VisionTransformer(**SIZES, **options)
    randomise(made)
    return made.eval().requires_grad_(False)


def outputs(tower, images):
    if isinstance(tower, PromptedVisionTransformer):
        encoded = tower.encode(images)
        return [encoded.patches, encoded.cls, encoded.bridge]
    tokens, grid = tower.trunk(images)
    dense = [tower.dense(tokens, grid, kind) for kind in ("identity", "kk", "qq+kk")]
    return [tower(images), tower.keys(tokens), *dense]


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("prompted", [False, True])
def test_packed_towers_compute_the_same(engine, prompted, quick_gelu):
    plain = tower(prompted, quick_gelu=quick_gelu)
    exact = copy.deepcopy(plain).double()
    small = copy.deepcopy(plain)
    packed.pack(small)
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for a, b, judge in zip(
            outputs(plain, images), outputs(small, images), outputs(exact, images.double()), strict=True
        ):
            size = judge.abs().max()
            eager, ours = ((x.double() - judge).abs().max() / size for x in (a, b))
            assert ours < max(2 * eager, 1e-6)  # 6e-7 measured


def test_packed_bf16_is_as_exact_as_unpacked_bf16(engine):
    plain = tower(True)
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        judges = outputs(copy.deepcopy(plain).double(), images.double())
        half = copy.deepcopy(plain).bfloat16()
        eager = outputs(half, images.bfloat16())
        packed.pack(half)
        for a, b, judge in zip(eager, outputs(half, images.bfloat16()), judges, strict=True):
            rms = [(x.double() - judge).square().mean().sqrt() for x in (a, b)]
            assert rms[1] < 2 * rms[0]


def test_packing_keeps_one_copy_of_the_weights(engine):
    plain = tower(True)
    small = copy.deepcopy(plain)
    packed.pack(small)
    for block in small.transformer.resblocks:
        assert not any(parameter.ndim == 2 for parameter in block.parameters())
        linears = [module for module in block.modules() if isinstance(module, packed.PackedLinear)]
        before = sum(p.numel() for p in plain.transformer.resblocks[0].parameters() if p.ndim == 2)
        assert sum(linear.weight.numel() for linear in linears) == before


def test_packed_weights_do_not_hold_the_tensor_they_were_cut_from(engine):
    small = tower()
    packed.pack(small)
    for linear in small.modules():
        if isinstance(linear, packed.PackedLinear) and not linear.onednn:
            assert linear.weight.untyped_storage().nbytes() <= 3 * linear.weight.nbytes


def test_a_packed_model_is_not_saved(engine):
    small = tower()
    packed.pack(small)
    with pytest.raises(RuntimeError, match="packed for inference"):
        small.state_dict()


def test_prompts_are_computed_once(engine, monkeypatch):
    small = tower(True)
    packed.pack(small)
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        small.encode(images)
        kept = small.prompt_kv(1)
        assert small.prompt_kv(1) is kept


def test_load_packs_on_the_cpu():
    model = fastzs.load("maskclip", weights="shapes", device="cpu").model
    assert any(isinstance(module, packed.PackedLinear) for module in model.modules())
    assert not any(isinstance(module, packed.PackedLinear) for module in fastzs.models.MaskCLIP(model.clip).modules())
