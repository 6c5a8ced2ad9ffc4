"""Each family of towers through all that is built on towers: precisions, packing, prompts, graphs, key smoothing."""

import copy

import pytest
import torch
from torch import nn

from fastzs.clip import Clip, ConvTower, packed
from fastzs.clip.vision import vit_sizes
from fastzs.export.graphs import Whole, foreign_ops, program, sample
from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.models import NACLIP, ClipRC, MaskCLIP, ZegCLIP
from tests.clip import architectures
from tests.clip.test_packed import engine  # noqa: F401 - a fixture

CONVOLUTIONS = ("MobileCLIP-S1", "convnext_tiny")
VITS = ("ViT-B-32-SigLIP2-256", "EVA02-B-16", "PE-Core-T-16-384", "MobileCLIP-B", "coca_ViT-B-32", "ViTamin-S")
GATED = ("EVA02-B-16", "ViTamin-S")  # whose blocks have no int8 form
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A small CLIP of each family with random weights."""
    folder = tmp_path_factory.mktemp("families")

    def small(name):
        config = architectures.small_config(name, folder)
        return Clip(name, "random", config, config.get("quick_gelu", False), (0.5,) * 3, (0.5,) * 3, name)

    return {name: small(name) for name in VITS + CONVOLUTIONS}


def tower(clips, name):
    with architectures.fewer_blocks():
        made = clips[name].vision()
    with torch.no_grad():  # layer scales begin too small to see anything behind them
        for key, tensor in made.named_parameters():
            architectures.fill(key, tensor)
        if isinstance(made, ConvTower):  # statistics of batch norms as training leaves them
            for module in made.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1.0
            made.network.train()(torch.randn(4, 3, 256, 256, generator=torch.Generator().manual_seed(2)))
    return made.eval()


def system(kind, clips, name, **options):
    with architectures.fewer_blocks():
        return kind(clips[name], **options).eval()


def images(of, count=1):
    return torch.randn(count, 3, 2 * of.patch_size + 1, 3 * of.patch_size, generator=torch.Generator().manual_seed(1))


def dense(of, pixels):
    tokens, grid = of.trunk(pixels)
    return of.dense(tokens, grid, "identity" if isinstance(of, ConvTower) else "kk")


def bf16_error(of: nn.Module) -> float:
    """Root mean square of rounding to bf16, relative: each layer's inputs, weights and result are stored once.

    Errors of half a step at most, as good as independent, have the root mean square eps / 2 / sqrt(3), and a value
    passes all layers; norms between them keep sizes as they are. Twice that is allowed.
    """
    layers = sum(
        isinstance(m, nn.Linear | nn.Conv2d | nn.LayerNorm) or hasattr(m, "in_proj_bias") for m in of.modules()
    )
    return 2 * (3 * layers) ** 0.5 * torch.finfo(BF16).eps / 2 / 3**0.5


@pytest.mark.parametrize("name", VITS + CONVOLUTIONS)
@torch.inference_mode()
def test_precisions_and_packing(clips, name):
    plain = tower(clips, name)
    exact, pixels = copy.deepcopy(plain).double(), images(plain)
    right = dense(exact, pixels.double())
    low = copy.deepcopy(plain).to(BF16)
    for one in (low, packed_copy(low)):
        got = dense(one, pixels.to(BF16))
        assert got.dtype == BF16
        assert 0 < (got - right).norm() <= bf16_error(plain) * right.norm()
    small = packed_copy(plain)
    eager, ours = ((dense(one, pixels) - right).abs().max() for one in (plain, small))
    assert ours <= max(2 * eager, 1e-6 * right.abs().max())


def packed_copy(of):
    small = copy.deepcopy(of)
    packed.pack(small)
    return small


@pytest.mark.parametrize("name", ["ViT-B-32-SigLIP2-256", "coca_ViT-B-32"])
@torch.inference_mode()
def test_attention_pools_are_packed(engine, clips, name):  # noqa: F811
    pool = tower(clips, name).pool
    tokens = torch.randn(2, 9, pool.value.in_features, generator=torch.Generator().manual_seed(1))
    right, before = copy.deepcopy(pool).double().read(tokens.double()), pool.read(tokens)
    whole = nn.ModuleList([pool])
    packed.pack(whole)
    error = (pool.read(tokens) - right).abs().max()
    assert pool._stand_ins
    products = sum(layer.in_features for layer in pool.modules() if isinstance(layer, nn.Linear))
    assert error <= 0.5 * products**0.5 * torch.finfo(torch.float32).eps * right.abs().max()
    packed.unpack(whole)
    assert torch.equal(pool.read(tokens), before)


@torch.inference_mode()
def test_branches_of_convolutions_are_joined(clips):
    plain = tower(clips, "MobileCLIP-S1")
    pixels = images(plain)
    before, convolutions = plain(pixels), count_convolutions(plain.network)
    names = list(plain.state_dict())
    packed.pack(plain)
    assert count_convolutions(plain.network) < convolutions
    assert list(plain.state_dict()) == names
    packed.unpack(plain)
    assert torch.equal(plain(pixels), before)


def count_convolutions(network):
    return sum(isinstance(module, nn.Conv2d) for module in network.modules())


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("name", VITS + CONVOLUTIONS)
@torch.inference_mode()
def test_int8_or_why_not(clips, name):
    """A product's rounding errs by about 1 %, there are four in a block and a few behind the last."""
    plain = tower(clips, name)
    pixels = images(plain)
    right = dense(plain, pixels)
    if name in GATED + CONVOLUTIONS:
        with pytest.raises(ValueError, match="int8 needs transformer blocks of CLIP's form, got none"):
            packed.pack(plain, int8=True)
        assert torch.equal(dense(plain, pixels), right)
        return
    packed.pack(plain, int8=True)
    assert packed.computes_int8(plain)
    assert 0 < (dense(plain, pixels) - right).norm() < 0.01 * 12**0.5 * 1.5 * right.norm()


@pytest.mark.parametrize("name", VITS + CONVOLUTIONS)
@torch.inference_mode()
def test_key_smoothing_and_operators_or_why_not(clips, name):
    if name in CONVOLUTIONS:
        with pytest.raises(ValueError, match=r"smoothing='paper' does not apply .* last stage has no attention"):
            system(MaskCLIP, clips, name, smoothing="paper")
        with pytest.raises(ValueError, match=r"dense='kk\+gaussian' does not apply .* last stage has no attention"):
            system(NACLIP, clips, name)
        model = system(MaskCLIP, clips, name)
        assert model.why_not_stitched() == f"{name} has no transformer block at its end"
    else:
        model = system(MaskCLIP, clips, name, smoothing="paper", denoising=0.1)
    text = torch.randn(4, model.text_dim)
    maps = model(images(model.visual), text)
    assert maps.shape[1] == 4
    assert torch.isfinite(maps).all()


@pytest.mark.parametrize("name", VITS)
def test_prompts_and_bridge(clips, name, tmp_path):
    """The systems with prompts take one training step, and are the same when saved and read."""
    plain = tower(clips, name)
    sizes = vit_sizes(plain) | {"grid": 3}
    pixels, labels = images(plain, 2), torch.randint(0, 3, (2, 2 * plain.patch_size + 1, 3 * plain.patch_size))
    text = torch.randn(3, plain.output_dim)
    options = {"sizes": sizes, "prompts": 2, "crop": 3 * plain.patch_size, "decoder_layers": 1}
    for kind, extra in ((ZegCLIP, {}), (ClipRC, {"bridge": (2, 2)})):
        model = kind(name, "openai", **options, **extra)
        model.backbone.start_from(plain)
        model.losses(pixels, labels, text)["total"].backward()
        assert model.backbone.prompt_embeddings.grad.abs().sum() > 0
        model.eval().save_pretrained(tmp_path / kind.__name__)
        again = kind.open(tmp_path / kind.__name__).eval()
        with torch.inference_mode():
            assert torch.equal(again(pixels, text), model(pixels, text))


@pytest.mark.slow
@pytest.mark.parametrize("name", VITS + CONVOLUTIONS)
def test_graphs(clips, name):
    """One graph without breaks for torch.compile, one of plain operators for torch.export; sizes of images vary."""
    model = system(MaskCLIP, clips, name, dense="identity" if name in CONVOLUTIONS else "kk+gaussian")
    pixels, text = images(model.visual), torch.randn(4, model.text_dim)
    with torch.inference_mode():
        compiled = torch.compile(model.visual, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(pixels), model.visual(pixels))
    patch = model.visual.patch_size
    made = program(Whole(model), sample(model, (3 * patch + 5, 4 * patch + 3)), [{2, 3}, {0}], name)
    assert foreign_ops(made) == []
    with torch.no_grad():
        got, wanted = made.module(check_guards=False)(pixels, text), model(pixels, text)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
