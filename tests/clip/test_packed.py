"""Packed towers against the towers they were made of."""

import copy
import pickle

import pytest
import torch

import fastzs
from fastzs.clip import fused, packed
from fastzs.clip.prompted import PromptedVisionTransformer
from fastzs.clip.vision import Block, VisionTransformer
from fastzs.data import shapes
from fastzs.decoders.blocks import DecoderLayer
from fastzs.devices import choose_precision
from fastzs.kernels.packed_linear.compiled import MISSING
from tests.clip.test_frozen import Adapted
from tests.clip.test_towers import randomise

SIZES = {"width": 64, "layers": 3, "heads": 2, "patch_size": 8, "grid": 4, "output_dim": 32}


@pytest.fixture(params=["fused", "onednn", "default"])
def engine(request, monkeypatch):
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    if request.param == "fused" and MISSING is not None:
        pytest.skip(MISSING)
    monkeypatch.setattr(packed, "packed_pays", lambda dtype: request.param == "fused")
    monkeypatch.setattr(packed, "onednn_pays", lambda dtype: request.param == "onednn")
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


def test_adapters_in_a_layers_place_are_heard(engine):
    plain = tower()
    mlp = plain.blocks[1].mlp
    mlp.c_fc = Adapted(mlp.c_fc)
    small = copy.deepcopy(plain)
    packed.pack(small)
    assert packed_blocks(small) == [True, False, True]
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(small(images), plain(images), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("prompted", [False, True])
def test_what_is_trained_in_eval_mode_gets_its_gradient(engine, prompted):
    plain = tower(prompted)
    small = copy.deepcopy(plain)
    packed.pack(small)
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    for made in (plain, small):
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(not prompted or "prompt" in name)
        (made.encode(images).patches if prompted else made(images)).square().sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), small.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_decoder_layers_that_are_trained_in_eval_mode_get_their_gradient(monkeypatch):
    monkeypatch.setattr(packed, "packed_pays", lambda dtype: True)
    holder = torch.nn.ModuleList([DecoderLayer(32, 2, 64)]).eval()
    packed.pack(holder)
    holder[0](torch.randn(1, 3, 32), torch.randn(1, 5, 32)).sum().backward()
    assert all(parameter.grad is not None for parameter in holder.parameters())


def test_a_gradient_of_images_is_not_lost_in_packed_weights(engine):
    small = tower()
    packed.pack(small)
    images = torch.randn(1, 3, 32, 32, requires_grad=True)
    if engine == "onednn":
        with pytest.raises(RuntimeError, match="unpack the model first"):
            small(images)
        return
    small(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


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


# ---- int8 -----------------------------------------------------------------------------------------------------------

NEEDS_LIBRARY = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_int8_towers_are_near(prompted, dtype):
    """A product's rounding errs by about 1 %, and there are a dozen one after the other."""
    plain = tower(prompted)
    small = copy.deepcopy(plain).to(dtype)
    packed.pack(small, int8=True)
    images = torch.randn(2, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = outputs(small, images.to(dtype))
        for ours, judge in zip(found, outputs(copy.deepcopy(plain).double(), images.double()), strict=True):
            assert ours.dtype == dtype
            assert (ours - judge).norm() < 0.01 * 12**0.5 * 1.5 * judge.norm()
            assert not torch.equal(ours, judge.to(dtype))


@NEEDS_LIBRARY
def test_int8_decoder_layers_are_near():
    torch.manual_seed(0)
    layer = DecoderLayer(64, 2, 128).eval().requires_grad_(False)
    randomise(layer)
    holder = torch.nn.ModuleList([copy.deepcopy(layer)])
    packed.pack(holder, int8=True)
    x, memory = torch.randn(2, 9, 64), torch.randn(2, 30, 64)
    with torch.inference_mode():
        exact, ours = copy.deepcopy(layer).double()(x.double(), memory.double()), holder[0](x, memory)
    assert (ours - exact).norm() < 0.03 * exact.norm()


@NEEDS_LIBRARY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_decoder_layers_compute_the_same(dtype, monkeypatch):
    monkeypatch.setattr(packed, "packed_pays", lambda dtype: True)
    torch.manual_seed(0)
    layer = DecoderLayer(64, 2, 128).eval().requires_grad_(False).to(dtype)
    holder = torch.nn.ModuleList([copy.deepcopy(layer)])
    packed.pack(holder)
    x, memory = torch.randn(2, 9, 64).to(dtype), torch.randn(2, 30, 64).to(dtype)
    with torch.inference_mode():
        exact = copy.deepcopy(layer).double()(x.double(), memory.double())
        eager, ours = layer(x, memory), holder[0](x, memory)
    assert "forward" in holder[0].__dict__
    rms = [(y - exact).square().mean().sqrt() for y in (eager, ours)]
    assert rms[1] < 2 * rms[0] + 1e-6


@NEEDS_LIBRARY
def test_int8_weights_take_a_quarter_of_the_memory():
    small = tower()
    before = sum(p.nbytes for p in small.transformer.parameters() if p.ndim == 2)
    packed.pack(small, int8=True)
    after = sum(p.nbytes for p in small.transformer.parameters() if p.ndim == 2)
    for block in small.blocks:
        weights = (block.attn.in_proj.packed, block.attn.out, block.mlp.first, block.mlp.last)
        after += sum(w.panels.nbytes for w in weights)
    assert after == before / 4


@NEEDS_LIBRARY
def test_channels_that_stand_out_keep_their_precision():
    small = tower()
    block = small.blocks[1]
    assert fused.int8_noise(block.mlp.c_fc.weight, block.ln_2) < fused.INT8_NOISE
    block.ln_2.weight[5] = 60.0  # one channel of 64 is 60 times the others: their steps become coarse
    block.mlp.c_fc.weight[:, 5] = 0
    assert fused.int8_noise(block.mlp.c_fc.weight, block.ln_2) > fused.INT8_NOISE
    packed.pack(small, int8=True)
    kinds = [block.mlp.first.panels.dtype for block in small.blocks]
    assert kinds == [torch.int8, torch.float32, torch.int8]
    assert all(block.attn.out.panels.dtype == torch.int8 for block in small.blocks)


@NEEDS_LIBRARY
def test_int8_noise_is_what_rounding_does():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    norm = torch.nn.LayerNorm(300)
    x = norm(torch.randn(500, 300, generator=torch.Generator().manual_seed(1))).detach()
    out = fastzs.ops.packed_linear(x, fused.pack_weight(weight, None, torch.int8))
    exact = x.double() @ weight.double().T
    found = ((out - exact).norm() / exact.norm()).item()
    assert fused.int8_noise(weight, norm) == pytest.approx(found, rel=0.25)


@NEEDS_LIBRARY
def test_int8_refuses_strange_weights():
    small = tower()
    small.blocks[2].mlp.c_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="block 2 cannot be packed: expected finite weights"):
        packed.pack(small, int8=True)


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    "change",
    [lambda t: t.state_dict(), lambda t: t.train(), lambda t: t.float(), copy.deepcopy, pickle.dumps, packed.unpack],
    ids=["save", "train", "cast", "copy", "pickle", "unpack"],
)
def test_an_int8_model_stays_as_it_is(change):
    small = tower()
    packed.pack(small, int8=True)
    with pytest.raises(RuntimeError, match="this model computes in int8 on the CPU: it cannot be trained, moved, cast"):
        change(small)
    assert all(packed_blocks(small.eval()))


@NEEDS_LIBRARY
def test_int8_needs_a_transformer():
    with pytest.raises(ValueError, match="needs transformer blocks"):
        packed.pack(torch.nn.Sequential(torch.nn.Linear(4, 4)), int8=True)


def test_int8_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="runs on CPUs only, got meta"):
        choose_precision("int8", torch.device("meta"))
    monkeypatch.setattr("fastzs.devices.why_int8_is_slow", lambda: "this processor has no VNNI instructions")
    with pytest.raises(ValueError, match="int8 cannot be used: this processor has no VNNI instructions; use auto"):
        fastzs.load(weights="shapes", device="cpu", precision="int8")


def test_auto_never_takes_int8():
    model = fastzs.load(weights="shapes", device="cpu").model
    assert all(
        part.dtype != torch.int8 for x in model.modules() if isinstance(x, fused.FusedMLP) for part in x.first[:2]
    )


# Least shares of labels as in fp32. A dozen scenes have 10,000 labels at borders between classes, of which a share in
# a thousand may fall the other way on another processor.
AGREEMENT = {"int8": 0.997, "bf16": 0.999}


@NEEDS_LIBRARY
@pytest.mark.slow
@pytest.mark.parametrize("precision", AGREEMENT)
def test_labels_of_the_built_in_model(precision, monkeypatch):
    monkeypatch.setattr("fastzs.devices.why_int8_is_slow", lambda: None)  # computed alike where it does not pay
    scenes = shapes.draw(24, seed=3)
    exact, ours = (fastzs.load(weights="shapes", device="cpu", precision=p) for p in ("fp32", precision))
    names = [*shapes.PAIRS, *shapes.GROUNDS]
    same = [(exact(x, names).labels == ours(x, names).labels).double().mean().item() for x in scenes.images]
    assert sum(same) / len(same) >= AGREEMENT[precision]
    assert ours.precision == {"int8": "int8", "bf16": "bfloat16"}[precision]
