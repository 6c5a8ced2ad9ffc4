import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fastzs.data.protocols import Protocol
from fastzs.metrics import ConfusionMatrix, harmonic_mean

PETS = Protocol("pets", ("cat", "dog", "bird"), (2,))


def matrix(truth, labels, classes=3) -> ConfusionMatrix:
    confusion = ConfusionMatrix(classes)
    confusion.add(torch.tensor(truth), torch.tensor(labels))
    return confusion


def test_by_hand():
    scores = matrix([0, 0, 0, 1, 1, 2, 255, 255], [0, 0, 1, 1, 2, 2, 0, 2]).scores_of(PETS)
    assert scores.pixels == 6
    assert scores.pAcc == pytest.approx(4 / 6)
    assert scores.iou == pytest.approx((2 / 3, 1 / 3, 1 / 2))
    assert scores.accuracy == pytest.approx((2 / 3, 1 / 2, 1))
    assert scores.mAcc == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.mIoU == pytest.approx(1 / 2)
    assert scores.seen == pytest.approx(1 / 2)
    assert scores.unseen == pytest.approx(1 / 2)
    assert scores.hIoU == pytest.approx(1 / 2)


def test_false_positives_on_seen_pixels_lower_the_unseen_mean():
    clean, dirty = matrix([0, 0, 2], [0, 0, 2]).scores_of(PETS), matrix([0, 0, 2], [0, 2, 2]).scores_of(PETS)
    assert clean.unseen == 1
    assert dirty.unseen == 0.5


def test_absent_classes_are_absent_not_zero():
    scores = matrix([0, 0], [0, 1]).scores_of(PETS)
    assert scores.absent == ("dog", "bird")
    assert scores.iou == (0.5, 0.0, None)  # dog was predicted, so it has an IoU
    assert scores.accuracy == (0.5, None, None)
    assert scores.mIoU == 0.25
    assert scores.mAcc == 0.5
    assert scores.unseen is None
    assert scores.hIoU is None


def test_predictions_of_no_class_are_wrong_answers():
    scores = matrix([0, 0, 1, 1], [0, 255, 3, 1]).scores_of(PETS)
    assert scores.pAcc == 0.5
    assert scores.iou[:2] == (0.5, 0.5)
    assert scores.iou[2] is None


def test_nothing_to_score():
    scores = matrix([255], [0]).scores_of(PETS)
    assert (scores.pAcc, scores.mIoU, scores.pixels) == (None, None, 0)


def test_without_unseen_classes_there_is_no_harmonic_mean():
    scores = matrix([0, 1], [0, 1]).scores(("a", "b", "c"))
    assert scores.seen == scores.mIoU == 1
    assert scores.unseen is None
    assert scores.hIoU is None


def test_harmonic_mean():
    assert harmonic_mean(0.928, 0.844) == pytest.approx(0.884, abs=5e-4)  # CLIP-RC's table, VOC
    assert harmonic_mean(0.0, 0.0) == 0.0
    assert harmonic_mean(0.5, 0.0) == 0.0


labels = arrays.arrays("int64", (4, 5), elements=st.sampled_from([0, 1, 2, 255]))


@settings(max_examples=60, deadline=None)
@given(labels, labels)
def test_agrees_with_sets_of_pixels(truth, predicted):
    confusion = matrix(truth, predicted)
    valid = truth != 255
    for c, (iou, accuracy) in enumerate(zip(confusion.iou().tolist(), confusion.accuracy().tolist(), strict=True)):
        here, there = (truth == c) & valid, (predicted == c) & valid
        if (here | there).any():
            assert iou == (here & there).sum() / (here | there).sum()
        else:
            assert math.isnan(iou)
        assert math.isnan(accuracy) if not here.any() else accuracy == (here & there).sum() / here.sum()


def test_counts_of_parts_add_up_to_those_of_the_whole():
    torch.manual_seed(0)
    truth, predicted = torch.randint(4, (50,)), torch.randint(3, (50,))
    truth[truth == 3] = 255
    parts = ConfusionMatrix(3)
    for i in range(0, 50, 7):
        parts.add(truth[i : i + 7].to(torch.uint8), predicted[i : i + 7].to(torch.int16))
    whole = ConfusionMatrix(3)
    whole.add(truth, predicted)
    assert torch.equal(parts.counts, whole.counts)
    assert parts.counts.dtype == torch.int64
    assert parts.counts.sum() == (truth != 255).sum()


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [
        ([0, 1], [0], "of one shape"),
        ([0.0], [0], "expected integers"),
        ([3], [0], "expected labels from 0 to 2, or 255 for ignored, got 3 to 3"),
        ([-1], [0], "got -1 to -1"),
    ],
)
def test_bad_label_maps_are_refused(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        matrix(truth, predicted)


def test_other_lengths_are_refused():
    with pytest.raises(ValueError, match="expected 3 names, one for each class, got 2"):
        matrix([0], [0]).scores(("a", "b"))
    with pytest.raises(ValueError, match="expected at least 1 class, got 0"):
        ConfusionMatrix(0)


def test_metrics_of_published_tables():
    truth = torch.randint(0, 3, (50, 41))
    labels = torch.where(torch.rand(50, 41) < 0.7, truth, 1)
    labels[truth == 2], truth[truth == 2] = 0, 0  # the third class is nowhere
    scores = {}
    for metric in ("standard", "zs3", "cagnet"):
        counts = ConfusionMatrix(3, metric)
        counts.add(truth, labels)
        scores[metric] = counts.scores_of(PETS)
    plain, zero = scores["standard"], scores["zs3"]
    assert plain.iou[2] is None
    assert zero.iou == (*plain.iou[:2], 0.0)
    assert zero.mIoU == pytest.approx(sum(plain.iou[:2]) / 3)
    assert (plain.unseen, zero.unseen, zero.hIoU) == (None, 0.0, 0.0)
    rows, columns = [i * 50 // 7 for i in range(7)], [i * 41 // 6 for i in range(6)]
    small = ConfusionMatrix(3)
    small.add(truth[rows][:, columns], labels[rows][:, columns])
    assert scores["cagnet"] == small.scores_of(PETS)
    with pytest.raises(ValueError, match="metric: expected one of standard, zs3, cagnet, got 'coco'"):
        ConfusionMatrix(3, "coco")
