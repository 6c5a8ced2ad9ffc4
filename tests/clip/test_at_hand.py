"""Models of open_clip and transformers that are at hand, against the same weights by name."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

import fastzs
from fastzs import clip
from fastzs.clip import WeightsError
from tests.clip import architectures
from tests.clip.test_architectures import REPRESENTATIVES, tokens
from tests.clip.test_of_transformers import kind, saved, tokenizer  # noqa: F401 - fixtures

# each family once: plain, QuickGELU, CoCa, timm with a sigmoid, convolutions, a text tower of transformers
FEW = {"ViT-M-16-alt", "RN50-quickgelu", "coca_ViT-B-32", "ViT-B-32-SigLIP2-256", "convnext_tiny", "roberta-ViT-B-32"}
TEXTS = ["a photo of a cat", "grey dog"]


@torch.inference_mode()
def assert_same(one: clip.Clip, other: clip.Clip, images: torch.Tensor) -> None:
    """Bit for bit, what the towers give, the preprocessing and what logits are made of."""
    towers = (one.vision(), other.vision())
    dense = [tower.dense(*tower.trunk(images)) for tower in towers]
    assert dense[0].std() > 0
    assert torch.equal(*dense)
    assert torch.equal(*(one.text().encode(TEXTS) for one in (one, other)))
    for name in ("embed_dim", "quick_gelu", "is_resnet", "sigmoid"):
        assert getattr(one, name) == getattr(other, name)
    assert (list(one.mean), list(one.std)) == (list(other.mean), list(other.std))
    assert one.config["vision_cfg"]["image_size"] == other.config["vision_cfg"].get("image_size", 224)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else pytest.mark.slow) for n in REPRESENTATIVES])
def test_open_clip(name, tmp_path):
    config = architectures.small_config(name, tmp_path)
    with architectures.fewer_blocks():
        model = architectures.open_clips_own(config)
        by_name = architectures.loaded(config, model, tmp_path)
        object.__setattr__(
            by_name, "tokenizer", lambda texts: tokens(config, config["text_cfg"].get("context_length", 77))
        )
        at_hand = clip.from_model(model, by_name.tokenizer)
        before = copy.deepcopy(model.state_dict())
        assert_same(at_hand, by_name, torch.randn(1, 3, *(2 * (architectures.side(config),))))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with torch.no_grad():
        next(p for p in model.parameters() if p.ndim == 1).add_(1)
    assert clip.from_model(model, by_name.tokenizer).fingerprint != at_hand.fingerprint


def test_transformers(saved):  # noqa: F811
    model, folder = saved
    assert_same(clip.from_model(model, tokenizer()), clip.load(weights=folder), torch.randn(2, 3, 40, 32))


@pytest.fixture(scope="module")
def model():
    """open_clip's, with CLIP's own vocabulary."""
    from open_clip.model import CLIP

    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    torch.manual_seed(0)
    return CLIP(24, vision, {"width": 32, "heads": 2, "layers": 1}).eval()


IMAGE = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def test_load_takes_a_model(model, tmp_path):
    from safetensors.torch import save_file

    options = {"device": "cpu", "precision": "fp32", "short_side": 32, "crop": 32, "stride": 16}
    got = fastzs.load("naclip", backbone=model, **options)(IMAGE, ["cat", "dog"], scores=True)
    vision = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 1}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    wanted = fastzs.load("naclip", weights=tmp_path, **options)(IMAGE, ["cat", "dog"], scores=True)
    assert torch.equal(got.scores, wanted.scores)
    assert torch.equal(got.labels, wanted.labels)
    half = copy.deepcopy(model).half()
    assert fastzs.load("maskclip", backbone=half, device="cpu", precision="fp32").dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": nn.Linear(2, 2)}, "an open_clip model, or a CLIPModel or SiglipModel .* got torch Linear"),
        ({"backbone": 7}, "expected the name of an architecture, .* got builtins int"),
        ({"model": nn.Linear(2, 2)}, "expected the name of a system, got Linear; pass it as backbone"),
        ({"backbone": "ViT-B-32", "weights": "random", "tokenizer": list}, "brings its own; leave out tokenizer"),
        ({"weights": "random"}, "CLIP brings its weights; leave out weights='random'"),
        ({"model": "clip_rc", "checkpoint": "a.pth"}, "clip_rc has towers of its own: .* got CLIP"),
    ],
)
def test_load_refuses(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        fastzs.load(**({"model": "naclip", "backbone": model, "device": "cpu"} | arguments))


def test_texts_need_the_models_own_tokenizer(model):
    other = copy.deepcopy(model)
    other.vocab_size = 500
    with pytest.raises(WeightsError, match=r"vocabulary of 500 tokens, which is not CLIP's own; pass .* tokenizer="):
        clip.from_model(other).text().encode(TEXTS)
    with pytest.raises(WeightsError, match=r"tokenizer: expected token ids int64 \[2, 77\], got torch.int64 \[2, 3\]"):
        clip.from_model(other, lambda texts: torch.ones(len(texts), 3, dtype=torch.int64)).text().encode(TEXTS)
    with pytest.raises(WeightsError, match="got list"):
        clip.from_model(other, list).text().encode(TEXTS)
