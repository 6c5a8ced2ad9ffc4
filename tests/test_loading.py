"""``fastzs.load``: which system a name, a file, a folder or a hub id is; options that a system does not have."""

import copy
import json
import pickle

import pytest
import torch
from PIL import Image

import fastzs
from fastzs.clip import WeightsError
from fastzs.data import shapes
from fastzs.loading import default_model
from fastzs.models import SZN, ClipRC, LSeg, ZegCLIP, saved
from tests.models.official import model, published_state, write
from tests.models.test_lseg import lightning
from tests.models.test_lseg import model as lseg
from tests.models.test_szn import model as szn

HEADS = {"heads": 3, "decoder_heads": 4}


def test_a_file_says_which_system_it_is_of(tmp_path):
    for kind in (ClipRC, ZegCLIP):
        path = write(tmp_path / f"{kind.__name__}.pth", published_state(model(kind)))
        assert type(fastzs.load(path, device="cpu", **HEADS).model) is kind
    torch.save({"state_dict": lightning(lseg())}, tmp_path / "lseg.ckpt")
    assert type(fastzs.load(tmp_path / "lseg.ckpt", heads=2, device="cpu").model) is LSeg
    state = {name.removeprefix("fcn."): tensor for name, tensor in szn().state_dict().items()}
    torch.save({"model_state_dict": state}, tmp_path / "szn.pth.tar")
    assert type(fastzs.load(str(tmp_path / "szn.pth.tar"), device="cpu").model) is SZN


def test_a_folder_says_which_system_it_is_of(tmp_path):
    model(ZegCLIP, seen=["dog"]).save_pretrained(tmp_path / "last")
    segmenter = fastzs.load(tmp_path / "last", device="cpu")
    assert type(segmenter.model) is ZegCLIP
    assert segmenter.model.seen == ["dog"]
    with pytest.raises(ValueError, match="it is a ZegCLIP, not a ClipRC"):
        fastzs.load("clip_rc", checkpoint=tmp_path / "last")
    settings = json.loads((tmp_path / "last" / "config.json").read_text())
    del settings["model"]  # as folders were that older versions wrote
    (tmp_path / "last" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"does not say which system .* checkpoint="):
        fastzs.load(tmp_path / "last")
    assert type(fastzs.load("zegclip", checkpoint=tmp_path / "last", device="cpu").model) is ZegCLIP


def test_a_checkpoint_without_a_systems_name(tmp_path, monkeypatch):
    model(ZegCLIP).save_pretrained(tmp_path / "last")
    write(tmp_path / "voc.pth", published_state(model(ClipRC)))
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (tmp_path / "last", "~/last"):
        assert default_model(checkpoint=place) == "zegclip"
        assert type(fastzs.load(checkpoint=place, device="cpu").model) is ZegCLIP
        assert type(fastzs.load(place, device="cpu").model) is ZegCLIP
    assert type(fastzs.load(checkpoint="~/voc.pth", device="cpu", **HEADS).model) is ClipRC


def test_a_hub_id_says_which_system_it_is_of(tmp_path, monkeypatch):
    model(ClipRC).save_pretrained(tmp_path)
    monkeypatch.setattr(saved, "find", lambda place, **hub: tmp_path if place == "org/name" else None)
    assert type(fastzs.load("org/name", device="cpu").model) is ClipRC


def test_a_class_of_ones_own_is_not_taken_for_its_parent(tmp_path):
    class Own(ZegCLIP):
        pass

    model(Own).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match=r"holds a Own, which is unknown; name the system"):
        fastzs.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("clip_rq", "unknown model 'clip_rq'; nearest known: clip_rc"),
        ("none.pth", "none.pth: there is no such file"),
        ("org/name", "as a hub id it is not in the cache and cannot be fetched"),
        ("out/best", "out/best: there is no such file or folder"),
        ("runs/step_0000040", "there is no such file or folder"),
        ("https://example.org/zs.pth", "https://example.org/zs.pth: this is a web address; download"),
    ],
)
def test_what_is_not_there(given, message, monkeypatch):
    monkeypatch.setattr(saved, "_online", lambda: False if given == "org/name" else pytest.fail("asks the hub"))
    with pytest.raises(ValueError, match=message):
        fastzs.load(given)
    for also in ({"checkpoint": given}, {"weights": given}):
        if "://" in given:
            with pytest.raises(ValueError, match="this is a web address"):
                fastzs.load(**also)


def test_files_of_no_system(tmp_path):
    torch.save({"visual.conv1.weight": torch.zeros(1)}, tmp_path / "clip.pt")
    with pytest.raises(WeightsError, match=r"of no known system's checkpoint; weights of CLIP itself .* weights="):
        fastzs.load(tmp_path / "clip.pt")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    with pytest.raises(WeightsError, match=r"bad\.pth"):
        fastzs.load(tmp_path / "bad.pth")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="expected a mapping"):
        fastzs.load(tmp_path)


def test_unknown_options_are_refused_with_the_nearest_known(tmp_path):
    with pytest.raises(ValueError, match=r"maskclip: there is no setting 'densee'; did you mean dense"):
        fastzs.load("maskclip", weights="shapes", densee="qq")
    path = write(tmp_path / "voc.pth", published_state(model(ClipRC)))
    with pytest.raises(ValueError, match=r"clip_rc: there is no setting 'head'; did you mean heads"):
        fastzs.load("clip_rc", checkpoint=path, head=3)


def test_a_named_clip_wins_over_the_checkpoints(tmp_path):
    """Also where it is the one that most others have."""
    net = lseg()
    torch.save({"state_dict": lightning(net)}, tmp_path / "lseg.ckpt")
    path, options = tmp_path / "lseg.ckpt", {"heads": 2, "device": "cpu"}
    assert fastzs.load("lseg", checkpoint=path, **options).model.backbone_name == ""
    assert fastzs.load("lseg", checkpoint=path, backbone="ViT-B-16", **options).model.backbone_name == "ViT-B-16"
    model(ZegCLIP).save_pretrained(tmp_path / "own")
    found = fastzs.load(tmp_path / "own", backbone="ViT-B-32", weights="random", device="cpu").model
    assert (found.backbone_name, found.weights) == ("ViT-B-32", "random")


def test_a_segmenter_can_be_copied_pickled_and_saved(tmp_path):
    model(ZegCLIP).save_pretrained(tmp_path / "own")
    segmenter = fastzs.load(tmp_path / "own", device="cpu", precision="fp32")
    image = torch.randint(256, (3, 64, 80), dtype=torch.uint8)
    names = fastzs.Vocabulary(["a", "b"], embeddings=torch.randn(2, 32))
    wanted = segmenter(image, names, scores=True)
    for other in (copy.deepcopy(segmenter), pickle.loads(pickle.dumps(segmenter))):
        assert other.optimized
        assert torch.equal(other(image, names, scores=True).scores, wanted.scores)
    segmenter.model.save_pretrained(tmp_path / "again")
    again = fastzs.load(tmp_path / "again", device="cpu", precision="fp32")
    assert torch.equal(again(image, names, scores=True).scores, wanted.scores)
    plain = fastzs.load(tmp_path / "own", device="cpu", precision="fp32", optimize=False)
    segmenter.unoptimize()
    assert torch.equal(segmenter(image, names, scores=True).scores, plain(image, names, scores=True).scores)


def test_the_calls_of_the_readme(tmp_path):
    """One image, many images, encoded once, as they are printed there."""
    names, image = ["red disc", "blue ring"], tmp_path / "street.png"
    drawn = shapes.draw(2, (64, 64), seed=3).images
    for path, pixels in zip((image, tmp_path / "b.png"), drawn, strict=True):
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    seg = fastzs.load("maskclip", weights="shapes")
    result = seg(image, names)
    results = seg([image, tmp_path / "b.png"], names, batch_size=8)
    assert torch.equal(next(results).labels, result.labels)
    assert len(list(results)) == 1
    assert len(list(seg(tmp_path, names, batch_size=8, on_error="skip"))) == 2
    features = seg.encode(image)
    a, b = seg.label(features, names), seg.label(features, ["green star", "slate", "wood"])
    assert torch.equal(a.labels, result.labels)
    assert b.names == ("green star", "slate", "wood")
    assert features.dense.ndim == 3
    features.save(tmp_path / "street.safetensors")
    assert torch.equal(seg.label(fastzs.ImageFeatures.load(tmp_path / "street.safetensors"), names).labels, a.labels)
