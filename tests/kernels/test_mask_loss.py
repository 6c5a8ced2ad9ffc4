"""mask_loss against the official results, its definition and bad input. Backends: test_mask_loss_backends.py."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from fastzs.kernels.mask_loss import mask_loss
from fastzs.kernels.mask_loss.common import narrow
from fastzs.kernels.mask_loss.compiled import MISSING

from .tolerances import assert_close

GOLDEN = Path(__file__).parents[1] / "goldens" / "F_losses.safetensors"
CASES = ["random", "one_ignored", "all_ignored", "single_class", "single_class_ign", "last_class_only"]


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN, "pt") as f:
        meta = json.loads(f.metadata()["meta"])
        return meta["config"], {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118


@pytest.mark.parametrize("case", CASES)
def test_official_values_and_gradients(golden, case):
    config, tensors = golden
    logits = tensors["in.logits"].double().requires_grad_()
    loss = mask_loss(logits, tensors[f"{case}.in.labels"], impl="reference")
    for name, value, weight in (
        ("loss_mask", loss.focal, config["mask_weight"]),
        ("loss_dice", loss.dice, config["dice_weight"]),
    ):
        assert_close("mask_loss", weight * value, tensors[f"{case}.loss64.{name}"])
        (grad,) = torch.autograd.grad(weight * value, logits, retain_graph=True)
        assert_close("mask_loss.grad", grad, tensors[f"{case}.grad64.{name}"])


def case(B=2, C=4, h=3, w=4, s=4, ignored=0.2, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, C, h, w, generator=g, dtype=torch.float64).to(dtype) * 3
    target = torch.randint(0, C, (B, h * s, w * s), generator=g)
    target[torch.rand(target.shape, generator=g) < ignored] = 255
    return logits, target


@pytest.mark.parametrize(
    "options",
    [{}, {"gamma": 0.0, "alpha": 1.0}, {"gamma": 1.5}],
    ids=str,
)
def test_reference_gradcheck(options):
    logits, target = case(B=1, C=3, h=2, w=3, s=2)
    target[target == 1] = 0  # class 1 is absent
    torch.autograd.gradcheck(
        lambda z: tuple(mask_loss(z, target, impl="reference", **options)), logits.requires_grad_()
    )


def test_plain_cross_entropy_is_a_special_case():
    logits, target = case(s=1, ignored=0)
    loss = mask_loss(logits, target, gamma=0.0, alpha=0.5, impl="reference")
    onehot = F.one_hot(target, 4).permute(0, 3, 1, 2).double()
    expected = F.binary_cross_entropy_with_logits(logits, onehot, reduction="none").mean((2, 3)).sum() / 2
    pairs = onehot.amax((2, 3)).sum()  # of images and classes in them
    torch.testing.assert_close(loss.focal * pairs, expected, rtol=1e-12, atol=0)


def test_dice_is_over_the_pairs_present():
    """An absent class has no dice; both losses are means over the pairs of an image and a class in it."""
    logits, target = case()
    target[target == 2] = 255
    target[1] = 0
    loss = mask_loss(logits, target, impl="reference")
    z = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    dice = 0
    for image, c in ((0, 0), (0, 1), (0, 3), (1, 0)):
        p, y = z[image, c].sigmoid(), (target[image] == c).double()
        dice += 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    torch.testing.assert_close(loss.dice, dice / 4, rtol=1e-12, atol=0)


def test_everything_ignored():
    logits, target = case()
    target[:] = 255
    logits.requires_grad_()
    loss = mask_loss(logits, target, impl="reference")
    assert loss.dice == 0
    assert loss.focal > 0


def test_ignore_index_wins_over_a_class_of_that_number():
    logits, target = case(ignored=0)
    as_ignored = mask_loss(logits, target, ignore_index=3, impl="reference")
    target[target == 3] = 255
    torch.testing.assert_close(as_ignored, mask_loss(logits, target, impl="reference"))


def _rank(rank: int, store: str, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    logits, target = case(B=1, seed=rank)
    if rank:
        target[:] = 0
    results[rank] = mask_loss(logits, target, impl="reference").dice.item()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_normaliser_is_averaged_over_ranks(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), results), nprocs=2)
        seen = [results[0], results[1]]
    for rank, (logits, target) in enumerate([case(B=1, seed=0), case(B=1, seed=1)]):
        if rank:
            target[:] = 0
        pairs = len(target.unique()) - (255 in target)
        expected = mask_loss(logits, target, impl="reference").dice.item() * pairs / ((4 + 1) / 2)
        assert seen[rank] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda z, t: ((z[0], t), {}), ValueError, r"logits has shape \[4, 3, 4\]; expected \[B, C, h, w\]"),
        (lambda z, t: ((z, t[0]), {}), ValueError, r"target has shape \[12, 16\]; expected \[B, H, W\]"),
        (lambda z, t: ((z[:0], t[:0]), {}), ValueError, r"logits has shape \[0, 4, 3, 4\].*at least 1"),
        (lambda z, t: ((z[:, :0], t), {}), ValueError, r"logits has shape \[2, 0, 3, 4\].*at least 1"),
        (lambda z, t: ((z, t[:, :0]), {}), ValueError, r"target has shape \[2, 0, 16\].*at least 1"),
        (lambda z, t: ((z, t[:1]), {}), ValueError, "differ in batch size"),
        (lambda z, t: ((z.long(), t), {}), TypeError, "logits are torch.int64"),
        (lambda z, t: ((z, t.float()), {}), TypeError, "target is torch.float32"),
        (lambda z, t: ((z, t.to(torch.int8)), {}), TypeError, "target is torch.int8"),
        (lambda z, t: ((z, t.numpy()), {}), TypeError, "target is ndarray"),
        (lambda z, t: ((z.to("meta"), t), {}), ValueError, "logits are on meta, target is on cpu"),
        (lambda z, t: ((z, t), {"alpha": 1.5}), ValueError, "alpha is 1.5"),
        (lambda z, t: ((z, t), {"ignore_index": 2**31}), ValueError, "ignore_index is 2147483648"),
        (lambda z, t: ((z, t), {"gamma": -1.0}), ValueError, "gamma is -1.0"),
        (lambda z, t: ((z, t), {"gamma": float("nan")}), ValueError, "gamma is nan"),
        (lambda z, t: ((z, t), {"impl": "fast"}), ValueError, "impl='fast' is unknown"),
    ],
)
def test_bad_input(change, error, words):
    args, options = change(*case())
    with pytest.raises(error, match=words):
        mask_loss(*args, **options)


@pytest.mark.parametrize("label", [4, 254, 256, -1, -(2**31), 2**31 - 1])
def test_label_out_of_range(label):
    logits, target = case()
    target[1, 2, 3] = label
    with pytest.raises(RuntimeError, match=f"target holds label {label}; expected labels in"):
        mask_loss(logits, target, impl="reference")


@pytest.mark.parametrize(
    ("labels", "classes", "ignore_index", "narrowed"),
    [
        (torch.int64, 150, 255, torch.int16),
        (torch.int32, 32768, -100, torch.int16),
        (torch.int64, 32769, 255, torch.int32),
        (torch.int64, 20, 1 << 15, torch.int32),
        (torch.int64, 20, -(1 << 31), torch.int32),
        (torch.uint8, 20, -(1 << 31), torch.uint8),
    ],
)
def test_narrowed_labels_are_the_same(labels, classes, ignore_index, narrowed):
    target = torch.tensor([0, min(classes - 1, 250), *([] if labels == torch.uint8 else [ignore_index])]).to(labels)
    got = narrow(target, classes, ignore_index)
    assert got.dtype == narrowed
    assert torch.equal(got.long(), target.long())


@pytest.mark.parametrize("labels", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("classes", "ignore_index"), [(300, 255), (300, -100), (300, 299), (4, -100), (40000, 255)])
def test_labels_narrower_than_the_numbers_beside_them(labels, classes, ignore_index):
    """A Python number wraps around beside a tensor too narrow for it: 300 is 44 in uint8, -100 is 156."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, classes, 2, 2, generator=g, dtype=torch.float64)
    target = torch.randint(0, min(classes, 250), (1, 4, 4), generator=g)
    target[0, 0] = min(classes - 1, 156)
    want = mask_loss(logits, target, ignore_index=ignore_index, impl="reference")
    assert mask_loss(logits, target.to(labels), ignore_index=ignore_index, impl="reference") == want
    for impl in ["cpu"] if MISSING["cpu"] is None and classes < 32767 else []:
        got = mask_loss(logits.float(), target.to(labels), ignore_index=ignore_index, impl=impl)
        torch.testing.assert_close(torch.stack(got), torch.stack(want).float())
