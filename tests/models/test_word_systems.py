"""SPNet, STRICT, Joint, ZS3, CaGNet, SIGN: what is trained, what labels are read, published checkpoints, bad input."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fastzs.clip import WeightsError
from fastzs.models import SIGN, STRICT, ZS3, CaGNet, Joint, SPNet
from fastzs.models.joint import calibrated, enlarged_norm
from fastzs.models.words import WordModel
from fastzs.models.zs3 import class_mmd, permuted
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from tests.models.shapes import NAMES, scenes, train, trained_names, words
from tests.parity.golden import read
from tests.test_parity import GOLDENS

SEEN = [0, 1, 3, 4, 5]  # of the 7
COMMON = {"weights": "random", "text_dim": 6, "resnet": (1, 1, 1, 1), "width": 4, "frozen": False}
PIXELS = {
    "features": 8,
    "context": 4,
    "generator": (8, 8),
    "generator_dropout": (0.0, 0.0),
    "hidden": 8,
    "dropout": 0.0,
}
SYSTEMS = {
    "spnet": (SPNet, {}),
    "strict": (STRICT, {}),
    "joint": (Joint, {"features": 8, "fine": 4, "dropout": (0.0,) * 3}),
    "joint caffe": (Joint, {"form": "caffe", "features": 8}),
    "zs3": (ZS3, {"classes": NAMES, "features": 8, "fine": 4, "hidden": 8, "noise": 4, "dropout": (0.0,) * 3}),
    "cagnet": (CaGNet, {"classes": NAMES} | PIXELS),
    "sign": (SIGN, {"classes": NAMES, "positions_hidden": 4} | PIXELS),
    "sign attention": (SIGN, {"classes": NAMES, "positions": "attention", "positions_hidden": 4} | PIXELS),
}


def model(name: str, **options) -> WordModel:
    kind, own = SYSTEMS[name]
    return kind(**COMMON | own | options)


def losses(net: WordModel, images, target, **options):
    torch.manual_seed(7)
    return net.losses(images, target, words(6).embeddings, **{"seen": SEEN} | options)


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_lowers_the_loss_and_moves_all_that_is_trained(name):
    net = model(name).train()
    images, target = scenes(net)
    losses(net, images, target)["total"].backward()
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    falling = "class_real" if isinstance(net, CaGNet) else "total"  # adversaries raise each other's losses
    before = losses(net, images, target)[falling]
    train(net, lambda: losses(net, images, target)["total"], steps=8, rate=3e-3)
    assert losses(net, images, target)[falling] < before


STAGES = [("zs3", {"stage": "generate"}), ("cagnet", {"stage": "mixed"}), ("sign", {"stage": "mixed"})]
GENERATIVE = {"generator", "classifier", "discriminator"}


@pytest.mark.parametrize(("name", "options"), STAGES)
def test_the_second_stage_trains_generator_and_classifier_alone(name, options):
    net = model(name, **options).train()
    images, target = scenes(net)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    losses(net, images, target)["total"].backward()
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert {n.split(".")[0] for n in trained_names(net)} <= GENERATIVE
    fixed = ("network.", "head.", "contextual.") if name != "zs3" else ("network.", "head.")
    after = net.state_dict()
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith(fixed)), "a frozen part moved"


def test_cagnets_kinds_of_steps_take_turns():
    net = model("cagnet", stage="mixed").train()
    images, target = scenes(net)
    kinds = []
    for step in (0, 99, 100, 199, 200):
        net._iter_counter.fill_(step)
        found = losses(net, images, target)
        kinds.append("content" in found)
        net.zero_grad()
        found["total"].backward()
        assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()
    assert kinds == [True, True, False, False, True]
    net.eval()
    losses(net, images, target)
    assert int(net._iter_counter) == 201


@pytest.mark.parametrize(("name", "options"), [(name, {}) for name in SYSTEMS] + [s for s in STAGES if s[0] != "sign"])
def test_labels_of_unseen_classes_change_nothing(name, options):
    net = model(name, **options).train()
    images, target = scenes(net)
    assert torch.isin(target, torch.tensor([2, 6])).any()
    hidden = torch.where(torch.isin(target, torch.tensor(SEEN)), target, 255)
    net.eval()  # no step is counted, no statistics move
    told, untold = (losses(net, images, labels) for labels in (target, hidden))
    for part in told:
        torch.testing.assert_close(told[part], untold[part])


def test_zs3_as_published_reads_where_unseen_classes_are():
    net = model("zs3", stage="generate", layout="as published").train()
    images, target = scenes(net)
    hidden = torch.where(torch.isin(target, torch.tensor(SEEN)), target, 255)
    told, untold = (losses(net, images, labels)["cross_entropy"] for labels in (target, hidden))
    assert not torch.allclose(told, untold)


def test_zs3s_weight_decides_how_much_unseen_classes_count():
    raised, start = {}, model("zs3")
    images, target = scenes(start)
    for weight in (0.0, 1.0, 100.0):
        net = model("zs3", stage="generate", unseen_weight=weight).train()
        net.load_state_dict(start.state_dict())
        losses(net, images, target)["cross_entropy"].backward()
        raised[weight] = -net.classifier.bias.grad[[2, 6]]
    assert (raised[0.0] < 0).all(), "without a weight no step makes unseen classes likelier"
    assert (raised[0.0] < raised[1.0]).all()
    assert (raised[1.0] < raised[100.0]).all()
    assert model("zs3").settings["unseen_weight"] == 100  # as published


def test_joints_prototypes_start_around_a_level():
    for level in (0.01, 1.0):
        net = model("joint", level=level)
        prototypes = net.semantic(words(6).embeddings)
        assert (prototypes.mean() - level).abs() < 0.3
    assert model("joint").semantic.bias.eq(0.01).all()  # as published


def test_joints_losses_have_their_weights():
    net = model("joint").eval()
    images, target = scenes(net)
    plain, weighed = losses(net, images, target), losses(net, images, target, alpha=0.5, beta=3.0)
    torch.testing.assert_close(weighed["cross_entropy"], plain["cross_entropy"])
    torch.testing.assert_close(weighed["regression"], 3 * plain["regression"])
    torch.testing.assert_close(weighed["consistency"], 5 * plain["consistency"])


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("fill", [255, 2])  # nothing labelled, an unseen class everywhere
def test_pictures_without_a_seen_pixel(name, fill):
    net = model(name).train()
    images, target = scenes(net)
    found = losses(net, images, torch.full_like(target, fill))
    found["total"].backward()
    assert all(value.isfinite() for value in found.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(("name", "options"), STAGES)
def test_generators_without_a_pixel_to_learn_from(name, options):
    net = model(name, **options).train()
    images, target = scenes(net)
    found = losses(net, images, torch.full_like(target, 255))
    found["total"].backward()
    assert all(value.isfinite() for value in found.values())


@pytest.mark.parametrize("name", SYSTEMS)
def test_saves_loads_and_segments(name, tmp_path):
    net = model(name).eval()
    net.save_pretrained(tmp_path)
    again = type(net).from_pretrained(str(tmp_path)).eval()
    picture = np.random.default_rng(0).integers(0, 255, (70, 53, 3), dtype=np.uint8)
    ours, theirs = (Segmenter(each)(picture, words(6)).labels for each in (net, again))
    assert ours.shape == (70, 53)
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("name", SYSTEMS)
def test_text_that_does_not_fit(name):
    net, image = model(name).eval(), torch.zeros(1, 3, 32, 32)
    with pytest.raises(ValueError, match=r"expected text vectors \[classes, 6\], got \[7, 5\]"):
        net(image, torch.zeros(7, 5))
    if net.fixed_classes:
        with pytest.raises(ValueError, match="7 classes were fixed in training, got 3 text vectors"):
            net(image, torch.zeros(3, 6))
    with pytest.raises(ValueError, match="got 9 to 9"):
        net.losses(image, torch.full((1, 32, 32), 9), words(6).embeddings, seen=SEEN)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (NAMES[:-1], "'gravel' of them is missing"),
        ((*NAMES, "sand"), "'sand' is none of them"),
        (NAMES[::-1], "in another order"),
    ],
)
def test_names_of_other_classes_than_were_trained(names, message):
    segmenter = Segmenter(model("zs3").eval())
    segmenter.question(words(6))
    with pytest.raises(ValueError, match=message):
        segmenter.question(words(6, names))


def test_word_vectors_of_another_width_name_theirs():
    vocabulary = Vocabulary(NAMES, embeddings=torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"SPNet: expected text vectors 6 wide.* 4 wide"):
        Segmenter(model("spnet").eval()).question(vocabulary)


# Joint's calibration and ZS3's draws


def test_calibration_is_its_definition():
    features, prototypes = torch.randn(2, 5, 6, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    seen, sigma, size = torch.tensor([True, False, True, False]), 0.6, (150, 9)
    scores = 2 * torch.einsum("cd,bdhw->bchw", prototypes, features) - prototypes.square().sum(1)[:, None, None]
    large = F.interpolate(features, size, mode="bilinear")
    torch.testing.assert_close(enlarged_norm(features, size), large.square().sum(1))
    distance = (large[:, None] - prototypes[None, :, :, None, None]).square().sum(2)
    (first, second), (one, two) = (x.unbind(1) for x in distance.topk(2, dim=1, largest=False))
    wanted = torch.where(seen[one] & ~seen[two] & (sigma * second < first), two, one)
    found = calibrated(features, scores, seen, sigma, size)
    assert torch.equal(found.argmax(1), wanted)
    assert (wanted != one).any()


def test_permuted_labels_hold_unseen_classes_in_place_of_whole_seen_ones():
    labels = torch.randint(3, (40, 8, 8))
    labels[:, 0] = 255
    found = permuted(labels, [0, 1, 2], 5, 255)
    assert torch.equal(found == 255, labels == 255)
    changed = found != labels
    assert torch.isin(found[changed], torch.tensor([3, 4])).all()
    assert 0.3 < changed.double().mean() < 0.6
    for picture, new in zip(labels, found, strict=True):
        for c in range(3):
            assert len(new[picture == c].unique()) <= 1
    with pytest.raises(ValueError, match="every class is seen"):
        permuted(labels, range(5), 5, 255)


def test_features_of_a_class_are_compared_with_its_own():
    labels = torch.tensor([[[0, 1], [1, 255]], [[2, 2], [255, 255]]])
    centres = torch.eye(4)[:, :, None, None] * 10
    features = centres[labels.clamp(max=3), :, 0, 0].movedim(-1, 1)
    assert class_mmd(features, features, labels, 255) < 1e-2
    assert class_mmd(features.roll(1, dims=3), features, labels, 255) > 0.5
    empty = class_mmd(features.requires_grad_(), features.detach(), torch.full_like(labels, 255), 255)
    assert empty == 0
    empty.backward()


# Published checkpoints: the golden files hold their tensors under the published names.

PUBLISHED = {
    "S_spnet": (SPNet, "w."),
    "S_strict": (STRICT, "w.student."),
    "S_zs3_deeplab": (ZS3, "w."),
    "S_cagnet": (CaGNet, "w."),
    "S_sign": (SIGN, "w."),
    "S_sign_attention": (SIGN, "w."),
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_reads_published_checkpoints(case, tmp_path):
    kind, prefix = PUBLISHED[case]
    state = read(GOLDENS / f"{case}.safetensors").under(prefix)
    wrapped = {f"module.{n}": t for n, t in state.items()} if kind in (SPNet, STRICT) else state
    torch.save({"iteration": 3, "state_dict": wrapped, "optimizer": {"state": {}}}, tmp_path / "a.pth.tar")
    net = kind.from_checkpoint(tmp_path / "a.pth.tar")
    used = kind._used(state)
    found = net.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in used.items())
    assert all(name.startswith("generator.") for name in found.keys() - used.keys())
    assert all(p.isfinite().all() for p in net.parameters())
    width = net.text_dim
    assert net(torch.randn(1, 3, 57, 65), torch.randn(getattr(net, "classes", 4), width)).isfinite().all()
    torn = dict(state)
    torn.pop(next(name for name in state if name.endswith("conv1.weight") or name.endswith("conv1.conv.weight")))
    save_file(torn, tmp_path / "torn.safetensors")
    with pytest.raises(WeightsError, match=r"missing|no checkpoint"):
        kind.from_checkpoint(tmp_path / "torn.safetensors")
    save_file({"some.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="no checkpoint of"):
        kind.from_checkpoint(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("name", "case"), [("spnet", "S_spnet"), ("zs3", "S_zs3_deeplab")])
def test_starts_from_a_classifier(name, case, tmp_path):
    """Caffe's and torchvision's names, with the classifier's last layer in the file."""
    state = read(GOLDENS / f"{case}.safetensors").under("w.")
    state = {n.removeprefix("backbone."): t for n, t in state.items() if re.search(r"(^|\.)(layer\d|conv1|bn1)\.", n)}
    state = {n: t for n, t in state.items() if not n.startswith(("aspp", "decoder"))}
    theirs = SYSTEMS[name][0].from_checkpoint(
        _saved(tmp_path / "whole.pth", read(GOLDENS / f"{case}.safetensors").under("w."))
    )
    sizes = {"resnet": theirs.settings["resnet"], "width": theirs.settings["width"]}
    path = _saved(tmp_path / "resnet.pth", state | {"fc.weight": torch.zeros(3, 3)})
    net = model(name, **sizes, pretrained=str(path))
    ours, wanted = net.network.state_dict(), theirs.network.state_dict()
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    assert net.settings["pretrained"] is None
    with pytest.raises(WeightsError, match=r"resnet\.pth: the weights do not fit"):
        model(name, **sizes | {"width": 8}, pretrained=path)


def _saved(path, state):
    torch.save(dict(state), path)
    return path


def test_reads_what_detectron2_wraps(tmp_path):
    state = read(GOLDENS / "S_spnet.safetensors").under("w.")
    torch.save({"model": state, "trainer": {"iteration": 3}, "iteration": 3}, tmp_path / "model_final.pth")
    found = SPNet.from_checkpoint(tmp_path / "model_final.pth").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in SPNet._used(state).items())


@pytest.mark.parametrize("form", ["torchvision", "caffe"])
def test_reads_joints_pair_of_files(form, tmp_path):
    net = model("joint", form=form).eval()
    state = read(GOLDENS / ("S_zs3_deeplab.safetensors" if form == "torchvision" else "S_strict.safetensors"))
    visual = state.under("w." if form == "torchvision" else "w.student.")
    if form == "caffe":
        visual = {n if n.startswith("aspp.") else f"backbone.{n}": t for n, t in visual.items()}
        visual |= {"pred_conv.weight": torch.randn(8, 12, 1, 1), "pred_conv.bias": torch.randn(8)}
    semantic = {"model.weight": torch.randn(12, 10), "model.bias": torch.randn(12)}
    for name, tensors in (("fe_10.pth", visual), ("gen_10.pth", semantic)):
        torch.save({"arch": "x", "epoch": 3, "state_dict": tensors, "monitor_best": 0.1}, tmp_path / name)
    net = Joint.from_checkpoint(tmp_path / "fe_10.pth", seen=[0])
    assert torch.equal(net.semantic.weight, semantic["model.weight"])
    assert net.form == form
    assert (net.text_dim, net.settings["features"]) == (10, 12)
    assert net(torch.randn(1, 3, 57, 65), torch.randn(4, 10)).isfinite().all()
    (tmp_path / "gen_10.pth").unlink()
    with pytest.raises(WeightsError, match=r"gen_10\.pth"):
        Joint.from_checkpoint(tmp_path / "fe_10.pth")
