"""Packed towers against the towers they were made of."""

import copy
import pickle

import pytest
import torch

import fastzs
from fastzs.clip import packed
from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.clip.vision import Block, VisionTransformer
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


def packed_blocks(model):
    return ["attn" in block.__dict__ for block in model.modules() if isinstance(block, Block)]


def test_a_packed_model_is_saved_as_it_was(engine):
    plain = tower(True)
    small = copy.deepcopy(plain)
    packed.pack(small)
    state = small.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())


def test_unpacking_brings_back_every_bit(engine):
    plain = tower(True)
    small = copy.deepcopy(plain)
    images = torch.randn(2, 3, 40, 24)
    packed.pack(small)
    assert all(packed_blocks(small))
    packed.unpack(small)
    assert not any(packed_blocks(small))
    with torch.inference_mode():
        for a, b in zip(outputs(small, images), outputs(plain, images), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    "change",
    [lambda t: t.double(), lambda t: t.train(), lambda t: t.load_state_dict(t.state_dict()), copy.deepcopy],
    ids=["cast", "train", "load", "copy"],
)
def test_packed_weights_are_never_out_of_date(engine, change):
    small = tower()
    packed.pack(small)
    changed = change(small)
    assert not any(packed_blocks(changed if isinstance(changed, torch.nn.Module) else small))
    copied = pickle.loads(pickle.dumps(small))
    assert not any(packed_blocks(copied))


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
    assert all(packed_blocks(model))
    assert not any(packed_blocks(fastzs.load("maskclip", weights="shapes", device="cpu", optimize=False).model))
