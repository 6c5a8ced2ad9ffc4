"""Matching of proposals and their losses: against every assignment, and against the losses at full resolution."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastzs.models.matching import assign, matched_losses

f64 = torch.float64


def focal_and_dice(mask, wanted):
    """Of one mask's logits, by the equations, in fp64: [n] and {0, 1} [n]."""
    p, y = mask.double().sigmoid(), wanted.double()
    right = torch.where(y > 0, p, 1 - p)
    weight = torch.where(y > 0, 0.25, 0.75)
    focal = -(weight * (1 - right) ** 2 * right.log()).mean()
    dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    return focal, dice


def test_no_assignment_costs_less():
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 4), 3 * torch.randn(5, 6, 6)
    classes, here = torch.tensor([2, 0, 1]), torch.rand(3, 6, 6) < 0.4
    cost = torch.empty(5, 3, dtype=f64)
    for q, n in itertools.product(range(5), range(3)):
        focal, dice = focal_and_dice(masks[q].flatten(), here[n].flatten())
        cost[q, n] = 20 * focal + 2 * dice - logits[q].double().softmax(0)[classes[n]]
    ways = list(itertools.permutations(range(5), 3))
    best = min(ways, key=lambda way: sum(cost[q, n].item() for n, q in enumerate(way)))
    assert assign(logits, masks, classes, here, 20.0, 2.0).tolist() == list(best)


def test_losses_at_full_resolution():
    torch.manual_seed(1)
    layers, classes = 2, 4
    logits, masks = torch.randn(layers, 2, 6, classes + 1, dtype=f64), 2 * torch.randn(layers, 2, 6, 4, 4, dtype=f64)
    target = torch.randint(0, classes, (2, 16, 16))
    target[0][target[0] == 2] = 0  # three classes in one image, four in the other
    target[1, :4] = 255
    got = matched_losses(logits, masks, target, focal=3.0, dice=0.5)

    full = F.interpolate(masks.flatten(0, 1), (16, 16), mode="bilinear").unflatten(0, (layers, 2))
    focal = dice = of_class = torch.zeros((), dtype=f64)
    for layer in range(layers):
        each, weights = [], []
        for b in range(2):
            present = target[b][target[b] != 255].unique()
            small = F.interpolate(target[b][None, None].float(), (4, 4), mode="nearest")[0, 0]
            chosen = assign(logits[layer, b], masks[layer, b], present, small == present[:, None, None], 3.0, 0.5)
            wanted = torch.full((6,), classes)
            wanted[chosen] = present
            weights.append(torch.where(wanted == classes, 0.1, 1.0))
            each.append(-logits[layer, b].log_softmax(1)[torch.arange(6), wanted])
            for q, c in zip(chosen, present, strict=True):
                parts = focal_and_dice(full[layer, b, q].flatten(), (target[b] == c).flatten())
                focal, dice = focal + parts[0] / 7, dice + parts[1] / 7
        weight = torch.cat(weights)
        of_class = of_class + (weight * torch.cat(each)).sum() / weight.sum()
    assert got["class"].item() == pytest.approx(of_class.item(), rel=1e-5)
    assert got["focal"].item() == pytest.approx(3 * focal.item(), rel=1e-5)
    assert got["dice"].item() == pytest.approx(dice.item() / 2, rel=1e-5)


def test_a_picture_without_labels():
    logits, masks = torch.randn(1, 1, 3, 5, requires_grad=True), torch.randn(1, 1, 3, 4, 4, requires_grad=True)
    losses = matched_losses(logits, masks, torch.full((1, 16, 16), 255))
    sum(losses.values()).backward()
    assert losses["class"] > 0
    assert losses["focal"] == losses["dice"] == 0
    assert (masks.grad == 0).all()


def test_more_classes_than_proposals():
    """The largest ones are trained."""
    target = torch.zeros(1, 16, 16, dtype=torch.uint8)
    target[:, 8:], target[:, 15:, 8:], target[:, 15, 15] = 1, 2, 3
    masks = torch.zeros(1, 1, 2, 4, 4)
    masks[0, 0, 0, :2], masks[0, 0, 1, 2:] = 9.0, 9.0
    logits = torch.zeros(1, 1, 2, 5)
    wanted = torch.zeros(1, 1, 2, 5)
    wanted[..., 0, 0] = wanted[..., 1, 1] = 20
    assert matched_losses(wanted, masks, target)["class"] < 1e-3 < matched_losses(logits, masks, target)["class"]


def test_ignored_label_beyond_a_byte():
    target = torch.zeros(1, 16, 16, dtype=torch.int64)
    target[:, 8:] = -1
    masks = torch.zeros(1, 1, 2, 4, 4)
    masks[0, 0, 0, :2], masks[0, 0, 0, 2:] = 9.0, -9.0
    assert matched_losses(torch.zeros(1, 1, 2, 2), masks, target, ignore_index=-1)["focal"] < 0.1


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_reaches_the_loss(broken):
    given = [torch.randn(1, 1, 3, 5), torch.randn(1, 1, 3, 4, 4)]
    given[broken][0, 0, 1] = torch.nan
    given[broken][0, 0, 0] = torch.nan
    assert sum(matched_losses(*given, torch.randint(0, 4, (1, 16, 16))).values()).isnan()
