"""PASCAL-5i's folds and their scores, by hand."""

from types import SimpleNamespace

import pytest
import torch

from fastzs.folds import evaluate_fold


class Two:
    classes = ("ground", "cat", "dog", "cow")
    truth = (torch.tensor([[1, 1, 0, 255]]), torch.tensor([[1, 2, 2, 0]]))

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return torch.full((3, 1, 4), i, dtype=torch.uint8), self.truth[i]


def test_scores_by_hand():
    asked, encoded = [], []

    class Fake:
        device = "cpu"

        def encode(self, image):
            encoded.append(int(image[0, 0, 0]))
            return encoded[-1]

        def label(self, features, vocabulary):
            asked.append((features, vocabulary.names))
            return SimpleNamespace(labels=torch.tensor([[1, 0, 1, 1]], dtype=torch.uint8))

    scores = evaluate_fold(Fake(), Two(), ["cat", "dog", "cow"])
    assert encoded == [0, 1]
    assert asked == [(0, ("others", "cat")), (1, ("others", "cat")), (1, ("others", "dog"))]
    # cat: hits 1 + 1; union (1, 1, 1, not scored) 3 + (1, 0, 1, 1) 3. dog: hit 1, union 4
    assert scores.iou == {"cat": pytest.approx(2 / 6), "dog": pytest.approx(1 / 4), "cow": None}
    assert scores.mIoU == pytest.approx((2 / 6 + 1 / 4) / 2)
    # others: hits 0 + 1 + 0, union 2 + 3 + 3
    assert scores.FBIoU == pytest.approx((3 / 10 + 1 / 8) / 2)


def test_a_class_that_is_not_there():
    with pytest.raises(ValueError, match="no class 'pig'"):
        evaluate_fold(lambda *_: None, Two(), ["pig"])
