"""What is said about backbones, against the modules."""

import json

import open_clip
import pytest

import fastzs
from bench import backbones as tables
from fastzs.cli import main
from fastzs.clip import backbones
from tests.clip import architectures


def test_every_passing_architecture_and_tag_is_listed():
    listed = {backbone.name: backbone for backbone in fastzs.list_backbones()}
    rows = architectures.TABLE.read_text().splitlines()
    assert list(listed) == [row.split(" | ")[0].strip("| ") for row in rows if "| passes |" in row]
    pretrained = fastzs.list_backbones(pretrained=True)
    assert [(b.name, tag) for b in pretrained for tag in b.tags] == [
        (name, tag) for name in listed for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    assert all(b.tags for b in pretrained)


def test_sizes_are_the_modules():
    for name in ("ViT-B-16", "RN50", "convnext_tiny", "ViT-B-32-SigLIP2-256"):
        kept = json.loads(backbones.KEPT.read_text())[name]
        assert backbones.measure(name) == kept
    model = open_clip.create_model("ViT-B-16")
    (known,) = (backbone for backbone in fastzs.list_backbones() if backbone.name == "ViT-B-16")
    assert known.vision_parameters == sum(p.numel() for p in model.visual.parameters())
    count = sum(p.numel() for p in model.parameters())
    assert known.vision_parameters + known.text_parameters == count - model.logit_scale.numel()
    assert (known.image_size, known.patch, known.width, known.text_dim) == (224, 16, 768, 512)


@pytest.mark.slow
def test_what_is_kept_is_what_modules_say():
    kept = json.loads(backbones.KEPT.read_text())
    assert {name: backbones.measure(name) for name in open_clip.list_models()} == kept


@pytest.mark.slow
def test_the_page_has_the_tables():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.renewed(page) == page


def test_an_architecture_that_is_not_kept_is_measured(tmp_path, monkeypatch):
    kept = json.loads(backbones.KEPT.read_text())
    wanted = [backbone for backbone in fastzs.list_backbones() if backbone.name == "ViT-S-32-alt"]
    del kept["ViT-S-32-alt"]
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    monkeypatch.setattr(backbones, "KEPT", tmp_path / "kept.json")
    assert [backbone for backbone in fastzs.list_backbones() if backbone.name == "ViT-S-32-alt"] == wanted


def test_multiplications_are_counted():
    """ViT-B/32 on 224 pixels by hand: patches, products of 12 blocks on 50 tokens, attention, the projection of 49."""
    tokens, width = 50, 768
    products = 12 * tokens * 12 * width**2
    attention = 12 * 2 * tokens**2 * width
    last = (products + attention) // 12 - (tokens - 49) * (9 * width**2) - 2 * (tokens - 49) * tokens * width
    whole = 49 * 3 * 32 * 32 * width + (products + attention) * 11 // 12 + last + 49 * width * 512
    assert backbones.multiply_adds("ViT-B-32", 224) == pytest.approx(whole, rel=1e-3)


def test_the_command_lists_weights_and_what_applies(capsys):
    assert main(["models", "--backbones"]) == 0
    printed = capsys.readouterr().out
    assert "ViT-B-16: 224 pixels, patch 16, width 768, text 512, 86 + 63 million parameters, dense: all" in printed
    assert "convnext_base_w: 256 pixels, patch 32" in printed
    assert "dense: identity\n" in printed
    assert "datacomp_xl_s13b_b90k" in printed
