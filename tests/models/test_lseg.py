"""LSeg: training, any size and label set, published checkpoints, the four kinds of readout and spatial block."""

import argparse
import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import VisionTransformer

import fastzs
from fastzs.clip import WeightsError, packed
from fastzs.clip.state import read_state
from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.models import LSeg
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from tests.clip.test_towers import randomise
from tests.models.ask import ask
from tests.models.shapes import NAMES, scenes, train, trained_names, words

TIMM = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 4, "num_heads": 2, "mlp_ratio": 2.0}
SMALL = {"sizes": TIMM, "text_dim": 24, "reassemble": (8, 8, 16, 16), "features": 16, "crop": 64}


def model(**options) -> LSeg:
    return LSeg(**SMALL | options).eval()


def test_trains_every_parameter_and_nothing_else():
    net = model(block="bottleneck", block_depth=2).train()
    images, target = scenes(net)
    text = words(24).embeddings
    losses = train(net, lambda: net.losses(images, target, text)["total"], steps=12, rate=3e-3)
    assert losses[-1] < 0.8 * losses[0]
    assert trained_names(net) == {name for name, _ in net.named_parameters()}


def test_is_cross_entropy_at_the_labels_size():
    net = model()
    images, target = scenes(net)
    target[:, :9] = 255
    text = words(24).embeddings
    with torch.no_grad():
        out = net.losses(images, target, text)
        assert set(out) == {"cross_entropy", "total"}
        wanted = F.cross_entropy(net(images, text), target.long(), ignore_index=255)
        torch.testing.assert_close(out["total"], wanted)
        # only some classes: the others neither compete nor are trained
        seen = [0, 4, 6]
        kept = torch.where(torch.isin(target, torch.tensor(seen)), target, 255)
        renamed = sum(torch.where(kept == c, i, 0) for i, c in enumerate(seen)) + torch.where(kept == 255, 255, 0)
        wanted = F.cross_entropy(net(images, text[seen]), renamed.long(), ignore_index=255)
        torch.testing.assert_close(net.losses(images, target, text, seen=seen)["total"], wanted)
        assert net.losses(images, torch.full_like(target, 255), text)["total"] == 0


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (16, 48), (50, 71), (7, 200)])
def test_any_size(size):
    images = torch.randn(2, 3, *size)
    up = [-(-side // 32) * 32 for side in size]
    assert list(model()(images, torch.randn(3, 24)).shape) == [2, 3, *up]
    assert list(model(double_logits=False)(images, torch.randn(3, 24)).shape) == [2, 3, *(side // 2 for side in up)]


@torch.no_grad()
@pytest.mark.parametrize("block", [None, "depthwise", "bottleneck"])
def test_does_not_depend_on_the_number_of_classes(block):
    """A class's logits do not change with the number of classes beside it."""
    net = model(block=block, block_depth=2)
    images, text = torch.randn(1, 3, 64, 64), F.normalize(torch.randn(300, 24), dim=1)
    few = net(images, text[:5])
    # the bottleneck adds the largest score, which the same classes again do not change
    many = text[:5].repeat(60, 1) if block == "bottleneck" else text
    torch.testing.assert_close(net(images, many)[:, :5], few)


@torch.no_grad()
def test_depth_nought_is_the_identity_and_one_class_is_enough():
    images, text = torch.randn(1, 3, 32, 32), torch.randn(1, 24)
    net = model(block="depthwise", block_depth=0)
    plain = model()
    plain._load("itself", {n: t for n, t in net.state_dict().items() if "head_block" not in n})
    torch.testing.assert_close(net(images, text), plain(images, text))


@torch.no_grad()
def test_bf16():
    net, images, text = model(), torch.randn(1, 3, 64, 64), torch.randn(5, 24)
    wanted = net(images, text)
    got = net.bfloat16()(images, text)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_packs_timms_tower(precision, monkeypatch):
    """A token goes through four blocks; a rounding to bf16 errs by 0.2 %, to int8 by 1 % of a product's result."""
    monkeypatch.setattr(packed, "packed_pays", lambda dtype: True)
    plain = model()
    randomise(plain)
    small = copy.deepcopy(plain).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    packed.pack(small, int8=precision == "int8")
    tower: Any = small.pretrained.model
    assert all("forward" in block.__dict__ for block in tower.blocks)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}[precision]
    assert {block.mlp.first.panels.dtype for block in tower.blocks} == {kind}
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact, _ = copy.deepcopy(plain).double().pretrained.tokens(images.double(), (0, 1, 2, 3))
        found, _ = small.pretrained.tokens(images.to(next(small.parameters()).dtype), (0, 1, 2, 3))
    allowed = {"fp32": 1e-5, "bf16": 2e-3 * (3 * 4 * 4) ** 0.5, "int8": 1e-2 * (3 * 4 * 4) ** 0.5}[precision]
    for ours, judge in zip(found, exact, strict=True):
        assert (ours - judge).norm() < allowed * judge.norm()
    if precision == "int8":
        with pytest.raises(RuntimeError, match="computes in int8"):
            small.state_dict()


@pytest.mark.parametrize("image", ["vit_large_patch16_384", "clip"])
def test_saves_loads_and_segments(tmp_path, image):
    if image == "clip":
        options = {"weights": "shapes", "image": "clip", "crop": 64, "features": 16, "reassemble": (8, 8, 16, 16)}
        net = LSeg(**options).eval()
        assert all(parameter.requires_grad for parameter in net.parameters())
        names = list(NAMES)
    else:
        net, names = model(weights="random", block="depthwise"), words(24)
    net.save_pretrained(tmp_path)
    segmenter = fastzs.load("lseg", checkpoint=tmp_path, device="cpu", precision="fp32")
    assert isinstance(segmenter.model, LSeg)
    picture = np.random.default_rng(0).integers(0, 255, (90, 53, 3), dtype=np.uint8)
    result = segmenter(picture, names)
    assert result.labels.shape == (90, 53)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():  # the loaded tower's products are packed
        torch.testing.assert_close(ask(segmenter.model, images, names), ask(net, images, names))
    assert (segmenter.model.mean, segmenter.model.crop) == (net.mean, 64)


def lightning(net: LSeg) -> dict:
    """What the published training writes, reduced to this network."""
    tower = VisionTransformer(**TIMM, num_classes=5)
    dead = {f"pretrained.model.{n}": t for n, t in tower.state_dict().items() if n.startswith(("norm.", "head."))}
    unit = {
        n.replace("Unit2", "Unit1"): t.clone() for n, t in net.state_dict().items() if "refinenet4.resConfUnit2" in n
    }
    words = {"clip_pretrained.logit_scale": torch.ones(())}
    return {f"net.{name}": t for name, t in (net.state_dict() | dead | unit | words).items()}


def test_reads_published_checkpoints(tmp_path):
    net = model(block="bottleneck", block_depth=6)
    path = tmp_path / "lseg.ckpt"
    content = {
        "state_dict": lightning(net),
        "hyper_parameters": argparse.Namespace(data_path="x"),
        "best": np.float64(0.5),
    }
    torch.save(content, path)
    with pytest.raises(WeightsError, match="tell which; give block="):
        LSeg.from_checkpoint(path, heads=2)
    read = LSeg.from_checkpoint(path, heads=2, block="bottleneck", block_depth=6)
    images, text = torch.randn(1, 3, 64, 64), torch.randn(3, 24)
    with torch.no_grad():
        assert torch.equal(read(images, text), net(images, text))
    assert LSeg.from_checkpoint(path, heads=2, block=None).scratch.head_block is None
    with pytest.raises(WeightsError, match="no known CLIP"):
        ask(read, images, ["cat"])


def test_objects_beside_the_tensors_are_not_made(tmp_path):
    class Trap:
        def __reduce__(self):
            return argparse.Namespace.__init__.__globals__["_sys"].exit, (3,)

    torch.save({"state_dict": {"a": torch.zeros(1)}, "trap": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match="refused"):
        read_state(tmp_path / "trap.pth", LSeg.opaque)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "o": argparse.Namespace(a=1)}, tmp_path / "o.pth")
    assert read_state(tmp_path / "o.pth", LSeg.opaque).keys() == {"a"}
    with pytest.raises(WeightsError, match="refused"):
        read_state(tmp_path / "o.pth")


def test_the_text_tower_inside_a_checkpoint(tmp_path):
    from fastzs.clip.text import TextEncoder

    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    encoder = TextEncoder.of_config(text, 24, quick_gelu=True).eval()
    tower = {f"net.clip_pretrained.{n}": t.half().float() for n, t in encoder.tower.state_dict().items()}
    encoder.tower.load_state_dict({n.removeprefix("net.clip_pretrained."): t for n, t in tower.items()})
    save_file(lightning(model()) | tower, tmp_path / "a.safetensors")
    net = LSeg.from_checkpoint(tmp_path / "a.safetensors", heads=2)
    torch.testing.assert_close(Segmenter(net).question(["cat", "tree"]).text, encoder.encode(["cat", "tree"]))


def test_bad_checkpoints(tmp_path):
    state = lightning(model())
    save_file({"backbone.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="not an LSeg checkpoint"):
        LSeg.from_checkpoint(tmp_path / "other.safetensors")
    missing = {n: t for n, t in state.items() if n != "net.scratch.layer2_rn.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(WeightsError, match=r"missing: scratch\.layer2_rn"):
        LSeg.from_checkpoint(tmp_path / "missing.safetensors", heads=2)
    save_file({n: t for n, t in state.items() if "cls_token" not in n}, tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsError, match="not timm's ViT"):
        LSeg.from_checkpoint(tmp_path / "resnet.safetensors")
    save_file({n: t for n, t in state.items() if ".project." not in n}, tmp_path / "add.safetensors")
    with pytest.raises(WeightsError, match="do not tell"):
        LSeg.from_checkpoint(tmp_path / "add.safetensors", heads=2)


def test_bad_arguments():
    net = model()
    images, target = scenes(net)
    with pytest.raises(ValueError, match=r"expected text vectors \[classes, 24\], got \[3, 20\]"):
        net(images, torch.randn(3, 20))
    with pytest.raises(ValueError, match="20 wide"):
        ask(net, images, Vocabulary(["a", "b"], embeddings=torch.randn(2, 20)))
    with pytest.raises(ValueError, match="labels: expected 0 to"):
        net.losses(images, target, torch.randn(2, 24))
    with pytest.raises(ValueError, match="no transductive training"):
        net.losses(images, target, words(24).embeddings, seen=[0], transductive=True)
    with pytest.raises(ValueError, match="block_depth must be at least 0"):
        model(block="depthwise", block_depth=-1)
    with pytest.raises(ValueError, match="block must be"):
        model(block="deep")
    with pytest.raises(ValueError, match="readout must be"):
        model(readout="cls")
    with pytest.raises(ValueError, match="four hooks"):
        model(hooks=[0, 1, 2, 4])
    with pytest.raises(WeightsError, match="resnet18"):
        LSeg(image="resnet18", weights="random")
