"""Numbers of a training: groups, learning rate, presets."""

import pytest

from fastzs.commands.train import PRESETS, presets
from fastzs.models import ClipRC, SPNet, ZegCLIP
from fastzs.optimizers import make_optimizer
from fastzs.recipe import Recipe, check_keys
from tests.training import SIZES, settings

PUBLISHED = [name for name in presets() if name.split("/")[0] in ("voc", "coco")]


def test_learning_rate():
    plan = Recipe(lr=1e-3, min_lr=1e-5, max_steps=100, warmup=10, warmup_ratio=0.1, power=2.0)
    assert plan.learning_rate(0) == pytest.approx(1e-3 * 0.1)
    assert plan.learning_rate(5) == pytest.approx((0.99e-3 * 0.95**2 + 1e-5) * 0.55)
    assert plan.learning_rate(50) == pytest.approx(0.99e-3 * 0.25 + 1e-5)
    assert plan.learning_rate(50, 10) == pytest.approx(9.99e-3 * 0.25 + 1e-5)
    assert plan.learning_rate(100) == pytest.approx(1e-5)


def test_longest_part_of_a_name_counts_alone():
    plan = Recipe(groups={"norm": {"decay": 0}, "backbone": {"lr": 10}, "head": {"lr": 5}, "ln": {"decay": 0}})
    assert plan.factors("backbone.prompt_norm.weight") == (10, 1)
    assert plan.factors("decode_head.decoder_1.layers.0.norm2.weight") == (5, 1)  # of two as long, the first
    assert plan.factors("neck.ln_1.weight") == (1, 0)
    assert plan.factors("neck.weight") == (1, 1)


@pytest.mark.parametrize("name", presets())
def test_preset_is_a_recipe(name):
    config = settings("--preset", name)
    assert config["preset"] == name
    assert {"inductive", "transductive", "supervised"} >= {config["setting"]} == {name.split("/")[2]}
    assert config["model"] == name.split("/")[1]
    if config["model"] not in ("clip_rc", "zegclip"):
        return
    kind = {"clip_rc": ClipRC, "zegclip": ZegCLIP}[config["model"]]
    recovery = {"recovery": False} if config["options"].get("recovery") is False else {}
    model = kind(sizes=SIZES, crop=32, prompts=2, **recovery)
    assert (getattr(model.decode_head, "recovery_decoder", None) is None) == (
        config["loss_weights"].get("recovery", 0) == 0
    )
    text = (PRESETS / f"{name}.yaml").read_text()
    assert ("--start" in text) == (config["setting"] == "transductive")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.split("/")[1] in ("clip_rc", "zegclip")])
def test_published_recipes_train_everything_alike(name):
    """Learning rate 2e-4 and decay 0.01 on all that is trained, norms included: what the published settings come to."""
    config = settings("--preset", name)
    plan = Recipe(**{key: config[key] for key in ("lr", "weight_decay", "groups", "warmup", "power", "min_lr")})
    model = ClipRC(sizes=SIZES, crop=32, prompts=2)
    (group,) = make_optimizer(model, plan).param_groups
    assert (plan.lr * group["factor"], group["weight_decay"]) == (pytest.approx(2e-4), 0.01)
    assert (plan.warmup, plan.power, plan.min_lr) == (1500, 0.9, 1e-6)


def test_spnets_published_groups():
    config = settings("--preset", "voc/spnet/inductive")
    plan = Recipe(
        **{key: config[key] for key in ("optimizer", "lr", "weight_decay", "groups", "warmup", "power", "min_lr")}
    )
    model = SPNet(weights="random", text_dim=6, resnet=(1, 1, 1, 1), width=4)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in make_optimizer(model, plan).param_groups:
        for p in group["params"]:
            found[names[id(p)]] = (plan.learning_rate(0, group["factor"]), group["weight_decay"])
    assert {v for n, v in found.items() if n.startswith("network.")} == {(2.5e-4, 5e-4)}
    assert {v for n, v in found.items() if n.startswith("head.") and n.endswith("weight")} == {(2.5e-3, 5e-4)}
    assert {v for n, v in found.items() if n.startswith("head.") and n.endswith("bias")} == {(5e-3, 0.0)}
    assert not any(".bn" in n or "downsample.1" in n for n in found)  # norms are not trained


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"max_steps": 0}, "max_steps: expected at least 1, got 0"),
        ({"ema": 1.0}, r"ema: expected in \[0, 1\), got 1\.0"),
        ({"lr": -1.0}, r"lr: expected at least 0, got -1\.0"),
        ({"groups": {"head": {"rate": 1}}}, "groups: head: expected the factors lr and decay, got 'rate'"),
    ],
)
def test_numbers_out_of_range(bad, said):
    with pytest.raises(ValueError, match=said):
        Recipe(**bad)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"there: there is no setting 'max_stps'; did you mean max_steps\?"):
        check_keys(["lr", "max_stps"], ["lr", "max_steps"], "there")
    with pytest.raises(ValueError, match="known are a, b"):
        check_keys(["zzz"], ["a", "b"], "there")
