"""DeOP: one pass, its stages, what a proposal's name depends on."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastzs.clip import WeightsError
from fastzs.models import DeOP
from fastzs.models.deop import severed, summed_losses
from fastzs.segmenter import Segmenter
from tests.models.shapes import scenes, train, trained_names, words

SIZES = {"width": 16, "layers": 3, "heads": 2, "patch_size": 8, "grid": 4, "output_dim": 8}
SMALL = {
    "weights": "random",
    "sizes": SIZES,
    "resnet": "resnet18",
    "pretrained": None,
    "proposals": {"width": 32, "queries": 6, "layers": 1, "hidden": 16, "dropout": 0.0},
    "added": (1,),
    "added_side": 3,
    "anchor_heads": 2,
    "anchor_hidden": 16,
    "size": 64,
}
SEEN = [0, 1, 3, 4, 5]


def model(**options) -> DeOP:
    return DeOP(**SMALL | options)


@pytest.mark.parametrize("severance", ["mask", "identity", "similarity"])
def test_training_names_moves_no_frozen_part(severance):
    net = model(severance=severance).train()
    images, target = scenes(net, count=1)
    text = words(8).embeddings
    before = {n: t.clone() for n, t in net.state_dict().items()}
    found = train(net, lambda: net.losses(images, target, text, seen=SEEN)["total"], steps=16, rate=1e-3)
    assert min(found[1:]) < found[0]
    moved = {n for n, t in net.state_dict().items() if not torch.equal(t, before[n])}
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    # attention among equal values has no gradient for what it is made of
    dead = {f"anchors.layers.0.among.{n}" for n in ("in_proj_weight", "in_proj_bias")}
    still = {n for n, p in net.named_parameters() if p.requires_grad} - moved
    assert still <= dead | {"no_object"}  # whose probability may round to 0 at this temperature
    assert {n.split(".")[0] for n in moved} - {"no_object"} == {"tower", "anchors"}
    assert not any(n.startswith("tower.tower.") for n in moved)


def test_training_proposals():
    pytest.importorskip("scipy")
    net = model(stage="proposals").train()
    images, target = scenes(net, count=1)
    net.losses(images, target, words(8).embeddings, seen=SEEN)["total"].backward()
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert {n.split(".")[0] for n in trained_names(net)} <= {"maskformer", "project", "no_object"}


def test_severed_values():
    v, masks = torch.randn(2, 2, 7, 4), torch.rand(2, 3, 2, 3)
    share = torch.cat([torch.full((2, 1), 100.0), masks.sum(1).flatten(1)], dim=1)
    torch.testing.assert_close(severed(v, masks, "mask"), v * share[:, None, :, None])
    assert severed(v, masks, "identity") is v
    flat = torch.cat([torch.ones(2, 3, 1), masks.flatten(2)], dim=2)
    weights = torch.einsum("bqi,bqj->bij", flat, flat).softmax(-1)
    torch.testing.assert_close(severed(v, masks, "similarity"), torch.einsum("bij,bhjd->bhid", weights, v))


def test_the_tower_sees_an_image_once(monkeypatch):
    net, calls = model().eval(), []
    monkeypatch.setattr(net.tower.tower, "embed", lambda x, real=net.tower.tower.embed: calls.append(len(x)) or real(x))
    net(torch.randn(2, 3, 50, 70), words(8).embeddings)
    assert calls == [2]


def test_sizes_and_padding():
    net = model().eval()
    out = net(torch.randn(1, 3, 50, 70), words(8).embeddings)
    assert out.shape == (1, 7, 13, 18)
    assert (out >= 0).all()
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    assert Segmenter(net)(picture, words(8)).labels.shape == (50, 70)


def test_ignored_pixels_belong_to_no_object():
    masks, share = torch.randn(1, 4, 6, 6), torch.rand(1, 4, 3).softmax(-1)
    target = torch.full((1, 12, 12), 255)
    none, _ = summed_losses(masks, share, target)
    more = share.clone()
    more[..., 2] += 0.5
    assert summed_losses(masks, more, target)[0] < none


def test_saves_and_loads(tmp_path):
    net = model(severance="similarity").eval()
    net.save_pretrained(tmp_path)
    again = DeOP.from_pretrained(str(tmp_path)).eval()
    images, text = torch.randn(1, 3, 64, 64), words(8).embeddings
    assert torch.equal(net(images, text), again(images, text))
    state = load_file(tmp_path / "model.safetensors")
    del state["project.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"missing: project\.weight"):
        DeOP.from_pretrained(str(tmp_path))


# ours, and what detectron2 and CLIP call it
PUBLISHED = (
    (
        r"maskformer\.pyramid\.stem\.(\d)\.",
        lambda m: f"backbone.stem.conv1_{int(m[1]) // 3 + 1}.{_norm(int(m[1]) % 3)}",
    ),
    (r"maskformer\.pyramid\.stages\.(\d)\.(\d+)\.", lambda m: f"backbone.res{int(m[1]) + 2}.{m[2]}."),
    (r"maskformer\.pixels\.embed\.", "sem_seg_head.pixel_decoder.mask_features."),
    (r"maskformer\.pixels\.lateral\.(\d)\.(\d)\.", lambda m: f"{_pixels('adapter', m)}{_norm(int(m[2]))}"),
    (r"maskformer\.pixels\.output\.(\d)\.0\.(\d)\.", lambda m: f"{_pixels('layer', m)}{_norm(int(m[2]))}"),
    (r"maskformer\.pixels\.coarsest\.0\.(\d)\.", lambda m: f"sem_seg_head.pixel_decoder.layer_4.{_norm(int(m[1]))}"),
    (r"maskformer\.queries", "sem_seg_head.predictor.query_embed.weight"),
    (r"maskformer\.project\.", "sem_seg_head.predictor.input_proj."),
    (r"maskformer\.norm\.", "sem_seg_head.predictor.transformer.decoder.norm."),
    (r"maskformer\.to_mask\.(\d)\.", lambda m: f"sem_seg_head.predictor.mask_embed.layers.{int(m[1]) // 2}."),
    (r"maskformer\.layers\.(\d)\.", r"sem_seg_head.predictor.transformer.decoder.layers.\1."),
    (r"tower\.tower\.", "clip_adapter.clip_model.visual."),
    (r"tower\.first", "clip_adapter.clip_model.visual.learned_position"),
    (r"tower\.more\.0", "clip_adapter.clip_model.visual.transformer.resblocks.1.learned_position"),
    (r"anchors\.queries", "query_embedding.weight"),
    (r"anchors\.layers\.", "decoder.layers."),
    (r"anchors\.among\.", "decoder.outlayer.self_attn."),
    (r"anchors\.among_norm\.", "decoder.outlayer.norm1."),
    (r"no_object", "clip_adapter.non_object_embedding"),
)


def _norm(place: int) -> str:
    return "norm." if place else ""


def _pixels(part: str, match: re.Match) -> str:
    return f"sem_seg_head.pixel_decoder.{part}_{int(match[1]) + 1}."


def as_published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A DeOP's tensors by published names, with what is in such a file besides."""
    out = {
        "criterion.empty_weight": torch.ones(3),
        "sem_seg_head.predictor.class_embed.layers.0.weight": torch.ones(2, 2),
    }
    out["clip_adapter.prompt_learner.prefix_prompt"] = torch.zeros(16, 8)
    for leaf in ("weight", "bias"):
        q, k = state[f"anchors.query.{leaf}"], state[f"anchors.key.{leaf}"]
        out[f"decoder.outlayer.multihead_attn_my.in_proj_{leaf}"] = torch.cat([q, k, k])
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked") or name.startswith(("project.", "anchors.query.", "anchors.key.")):
            continue
        (pattern, new), *rest = [pair for pair in PUBLISHED if re.match(pair[0], name)]
        assert not rest
        name = re.sub(pattern, new, name, count=1)
        part = "multihead_attn_my." if name.startswith("decoder") else "multihead_attn."
        for old, found in (("among.", "self_attn."), ("to_picture.", part), ("downsample.0.", "shortcut.")):
            name = name.replace(old, found)
        name = name.replace("downsample.1.", "shortcut.norm.")
        out[re.sub(r"(res\d\.\d+\.)bn(\d)\.", r"\1conv\2.norm.", name)] = tensor
    return out


def test_reads_a_published_checkpoint(tmp_path):
    sizes = {"width": 64, "layers": 3, "heads": 1, "patch_size": 8, "grid": 4, "output_dim": 8}
    proposals = {"width": 32, "queries": 6, "layers": 2, "hidden": 16}
    net = model(sizes=sizes, resnet="resnet50c", proposals=proposals).eval()
    for name, buffer in net.named_buffers():  # statistics count, too
        if name.endswith("running_mean"):
            buffer.normal_()
    torch.save({"model": as_published(net.state_dict()), "iteration": 7}, tmp_path / "model.pth")
    again = DeOP.from_checkpoint(tmp_path / "model.pth", anchor_heads=2, size=64)
    images, text = torch.randn(1, 3, 64, 64), words(8).embeddings
    assert torch.equal(net(images, text), again(images, text))
    ours, theirs = ({k: v for k, v in m.settings.items() if k != "weights"} for m in (net, again))
    assert {k for k in ours if ours[k] != theirs[k]} <= {"sizes", "proposals", "severed", "backbone"}
    state = as_published(net.state_dict())
    del state["sem_seg_head.pixel_decoder.adapter_2.norm.weight"]
    torch.save({"model": state}, tmp_path / "model.pth")
    with pytest.raises(WeightsError, match=r"missing: maskformer\.pixels\.lateral\.1\.1\.weight"):
        DeOP.from_checkpoint(tmp_path / "model.pth", anchor_heads=2)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="severance must be"):
        model(severance="cut")
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        model(severed=[3])
    with pytest.raises(ValueError, match="stage"):
        model(stage="all")
    torch.save({"model": {"query_embedding.weight": torch.zeros(2, 2)}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError):
        DeOP.from_checkpoint(tmp_path / "a.pth")
