"""Self-training as an option of the trainer: settings, teachers, what is told, training and going on with it."""

import pytest
import torch

from fastzs import checkpoints, pseudo
from fastzs.models import CaGNet, Joint, SPNet
from fastzs.recipe import Recipe
from fastzs.self_training import SelfTraining, Teacher
from fastzs.train import train
from tests.models.shapes import NAMES, scenes, words
from tests.training import SEEN as TRAINED
from tests.training import TEXT, Scenes, flipped

SEEN = [0, 1, 3, 4, 5]
UNSEEN = [2, 6]
SIZES = {"weights": "random", "text_dim": 6, "resnet": (1, 1, 1, 1), "width": 4, "frozen": False}
NUMBERS = {"best": {}, "rank": {"within": 3}, "share": {"percent": 50}, "annealed": {"temperature": 5.0}}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return SPNet(**SIZES, multi_scale=False)


def teacher(net, rule="best", **options):
    return Teacher(SelfTraining(rule, **options), net, words(6).embeddings, SEEN)


@pytest.mark.parametrize("rule", NUMBERS)
def test_labels_of_unseen_classes_are_not_read(net, rule):
    images, target = scenes(net)
    hidden = torch.where(torch.isin(target, torch.tensor(SEEN)), target, 255)
    assert (hidden != target).any()
    told, untold = (teacher(net, rule, **NUMBERS[rule]).label(images, labels) for labels in (target, hidden))
    assert torch.equal(told[0], untold[0])
    assert torch.equal(told[0][hidden != 255], hidden[hidden != 255].long())
    assert (told[1] is None) == (rule != "annealed")


def test_rules_see_the_teachers_enlarged_maps(net):
    images, target = scenes(net)
    with torch.no_grad():
        maps = net.eval()(images, words(6).embeddings)
    large = torch.nn.functional.interpolate(maps, target.shape[1:], mode="bilinear")
    hidden = torch.where(torch.isin(target, torch.tensor(SEEN)), target, 255)
    assert torch.equal(teacher(net).label(images, target)[0], pseudo.best(hidden, large, UNSEEN))
    views = teacher(net, "consistent", scales=[1.5]).label(images, target)[0]
    agreed = views != 255
    assert torch.equal(views[agreed], pseudo.best(hidden, large, UNSEEN)[agreed])
    assert not agreed.all()


def test_teachers(net):
    images, target = scenes(net)
    net.train()
    frozen, own = teacher(net), teacher(net, teacher="self")
    before = [each.label(images, target)[0] for each in (frozen, own)]
    assert net.training
    with torch.no_grad():
        for parameter in net.head.parameters():
            parameter.neg_()
    assert torch.equal(frozen.label(images, target)[0], before[0])
    assert not torch.equal(own.label(images, target)[0], before[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "bst"}, "rule must be one of best, rank"),
        ({"rule": "best", "teacher": "mean"}, "teacher must be one of self, frozen, ema"),
        ({"rule": "rank"}, "'rank' needs within, got within=None"),
        ({"rule": "best", "percent": 3}, "'best' takes no number, got percent=3"),
        ({"teacher": "self"}, "name the rule"),
        ({"rule": "best", "teachr": "self"}, "no setting 'teachr'; did you mean teacher"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SelfTraining.read(settings)


def test_what_a_teacher_needs(net):
    with pytest.raises(ValueError, match="every class is seen"):
        Teacher(SelfTraining("best"), net, words(6).embeddings, range(7))
    with pytest.raises(ValueError, match="needs a moving average"):
        Teacher(SelfTraining("best", "ema"), net, words(6).embeddings, SEEN)


def test_systems_with_fixed_classes_train_on_the_labels_they_get():
    torch.manual_seed(0)
    small = {"features": 8, "context": 4, "generator": (8,), "generator_dropout": (0.0,), "hidden": 8}
    net = CaGNet(NAMES, **SIZES, **small).train()
    images, target = scenes(net)
    text = words(6).embeddings
    labels, _ = Teacher(SelfTraining("best"), net, text, SEEN).label(images, target)
    torch.manual_seed(1)
    plain = net.losses(images, labels, text, seen=SEEN)["class_real"]
    torch.manual_seed(1)
    given = net.losses(images, labels, text, seen=SEEN, self_labelled=True)["class_real"]
    assert not torch.equal(plain, given)


def trained(output, steps, stop=None, **recipe):
    """A training of a tiny SPNet; with ``stop`` it is broken off there and gone on with."""
    for iterations in (stop, steps) if stop else (steps,):
        torch.manual_seed(3)
        net = SPNet(**SIZES | {"text_dim": 16}, multi_scale=False, crop=32)
        numbers = {"batch_size": 2, "lr": 1e-3, "workers": 0, "precision": "fp32", "save_every": 1, "evaluate_every": 0}
        done = Recipe(**numbers | recipe, max_steps=steps)
        if iterations != steps:
            monitor = _StopsAfter(iterations)
            with pytest.raises(KeyboardInterrupt):
                train(net, Scenes(), monitor, TEXT, done, output, seen=TRAINED)
        else:
            train(net, Scenes(), flipped, TEXT, done, output, seen=TRAINED)
    return net.state_dict()


class _StopsAfter:
    """The transform of a training whose process dies after some images."""

    def __init__(self, steps: int):
        self.left = 2 * steps

    def __call__(self, image, mask):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return flipped(image, mask)


@pytest.mark.parametrize(
    "recipe",
    [
        {"self_training": {"rule": "best"}},
        {"self_training": {"rule": "annealed", "temperature": 3.0, "teacher": "self"}},
        {"self_training": {"rule": "share", "percent": 50, "teacher": "ema"}, "ema": 0.5},
        {"self_training": {"rule": "consistent", "scales": [1.5]}},
        {"optimizer": "sgd", "lr": 0.01},
    ],
)
def test_going_on_gives_the_same_as_going_through(recipe, tmp_path):
    whole, parts = trained(tmp_path / "a", 5, **recipe), trained(tmp_path / "b", 5, stop=3, **recipe)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_pseudo_labels_change_what_is_learnt_and_the_record_names_what_was_told(tmp_path):
    plain, taught = trained(tmp_path / "a", 3), trained(tmp_path / "b", 3, self_training={"rule": "best"})
    assert not torch.equal(plain["head.convs.0.weight"], taught["head.convs.0.weight"])
    settings = checkpoints.read(tmp_path / "b" / "last")["settings"]
    assert settings["self_training"] == {"rule": "best"}
    assert settings["told of unseen pixels"].startswith("nothing")


def test_models_that_weigh_no_pixels(tmp_path):
    net = Joint(**SIZES | {"text_dim": 16}, features=8, fine=4)
    recipe = Recipe(max_steps=1, batch_size=2, self_training={"rule": "annealed", "temperature": 1.0})
    with pytest.raises(ValueError, match="needs a model that weighs pixels, and Joint does not"):
        train(net, Scenes(), flipped, TEXT, recipe, tmp_path, seen=TRAINED)
    with pytest.raises(ValueError, match="goes with setting 'inductive', got 'supervised'"):
        Recipe(setting="supervised", self_training={"rule": "best"})
    with pytest.raises(ValueError, match="optimizer: expected adamw or sgd, got lion"):
        Recipe(optimizer="lion")
