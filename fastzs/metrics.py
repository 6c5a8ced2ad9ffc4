"""Scores of label maps: pAcc, mAcc, IoU per class, mIoU, mIoU over seen and unseen classes, hIoU.

Everything comes from one confusion matrix of the whole data set, in integers, as the published tables compute it
(mmsegmentation 0.24's ``intersect_and_union``): pixels whose truth is ignored count nowhere, and

    IoU_c = hits_c / (truth_c + predicted_c - hits_c)      Acc_c = hits_c / truth_c      pAcc = sum hits / sum truth

mIoU and mAcc are means over the classes that occur. mIoU(S) and mIoU(U) are means over the seen and the unseen
classes of the same prediction, so that a false positive counts wherever it lies; hIoU is their harmonic mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fastzs.data.protocols import Protocol, ignore_label


@dataclass(frozen=True)
class Scores:
    """Fractions of 1, or None where no pixel or class defines them.

    Attributes:
        pAcc: share of right pixels.
        mAcc: mean of ``accuracy`` over the classes that occur in the truth.
        mIoU: mean of ``iou`` over the classes that occur in the truth or the prediction.
        seen, unseen: mIoU(S) and mIoU(U), the mean of ``iou`` over these classes, as far as they occur.
        hIoU: harmonic mean of the two.
        iou, accuracy: for each class.
        absent: names of the classes that no truth holds; their accuracy is None, and if no prediction holds them
            either, their IoU.
        pixels: pixels scored.
    """

    pAcc: float | None
    mAcc: float | None
    mIoU: float | None
    seen: float | None
    unseen: float | None
    hIoU: float | None
    iou: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    absent: tuple[str, ...]
    pixels: int


Metric = Literal["standard", "zs3", "cagnet"]
METRICS: tuple[Metric, ...] = ("standard", "zs3", "cagnet")
REDUCED = 8  # pixels for a cell of CaGNet's label maps


def reduced(labels: Tensor) -> Tensor:
    """Labels [H, W] at an eighth of the size, each the nearest one (cell i takes row floor(i H / h))."""
    rows, columns = (
        torch.arange(-(-side // REDUCED), device=labels.device) * side // -(-side // REDUCED) for side in labels.shape
    )
    return labels[rows[:, None], columns]


class ConfusionMatrix:
    """Pixels by truth and prediction.

    Args:
        classes: how many.
        metric: how scores are made of it. "zs3": as ZS3 and Joint have it, classes that are in neither truth nor
            prediction count as 0 in every mean. "cagnet": as CaGNet and SIGN have it, truth and labels are compared
            at an eighth of their size. "standard": neither.

    Attributes:
        counts: int64 [C, C + 1] on the CPU; rows are the truth, the last column holds predictions that are none of
            the classes (background, 255).
    """

    def __init__(self, classes: int, metric: Metric = "standard"):
        if metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
        self.metric: Metric = metric
        if classes < 1:
            raise ValueError(f"a confusion matrix: expected at least 1 class, got {classes}")
        self.classes = classes
        self.counts = torch.zeros(classes, classes + 1, dtype=torch.int64)

    def add(self, truth: Tensor, labels: Tensor) -> None:
        """Count the pixels of a label map.

        Args:
            truth: integers of any shape, class indices or, above 255 classes, 65535, else 255 (ignored).
            labels: integers of the same shape and on the same device; a value that is no class index counts as a
                wrong answer.

        Raises:
            ValueError: the shapes differ, a tensor is not of integers, or the truth has a label out of range.
        """
        if truth.shape != labels.shape:
            raise ValueError(
                f"expected truth and labels of one shape, got {list(truth.shape)} and {list(labels.shape)}"
            )
        if truth.is_floating_point() or labels.is_floating_point():
            raise ValueError(f"expected integers, got a truth of {truth.dtype} and labels of {labels.dtype}")
        if self.metric == "cagnet":
            truth, labels = reduced(truth), reduced(labels)
        ignored = ignore_label(self.classes)
        truth, labels = truth.long(), labels.long()  # in a byte 65535 would be 255
        kept = truth != ignored
        rows, columns = truth[kept], labels[kept]
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.classes):
            raise ValueError(
                f"truth: expected labels from 0 to {self.classes - 1}, or {ignored} for ignored, "
                f"got {int(rows.min())} to {int(rows.max())}"
            )
        columns = torch.where((columns < 0) | (columns >= self.classes), self.classes, columns)
        wide = self.classes + 1
        counts = torch.bincount(rows * wide + columns, minlength=self.classes * wide)
        self.counts += counts.view(self.classes, wide).cpu()

    def reduce(self, device: torch.device | str = "cpu") -> None:
        """Add up the counts of all processes, exactly; each then holds the sum. Without a process group, nothing.

        Args:
            device: where the group's backend adds (nccl: the GPU).
        """
        if dist.is_available() and dist.is_initialized():
            counts = self.counts.to(device)
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def of_truth(self, classes: Sequence[int]) -> "ConfusionMatrix":
        """The pixels whose truth is one of ``classes``, whatever was predicted there.

        So SZN (2018) scores seen and unseen classes: false positives on pixels of the other kind do not count, and the
        result is no mIoU(S) or mIoU(U).
        """
        out = ConfusionMatrix(self.classes, self.metric)
        out.counts[list(classes)] = self.counts[list(classes)]
        return out

    def iou(self) -> Tensor:
        """fp64 [C], NaN where a class is in neither truth nor prediction (0 by the metric "zs3")."""
        hits, truth, predicted = self.areas()
        found = hits / (truth + predicted - hits)
        return found.nan_to_num(0.0) if self.metric == "zs3" else found

    def accuracy(self) -> Tensor:
        """Share of each class's pixels that are right, fp64 [C], NaN where a class is not in the truth."""
        hits, truth, _ = self.areas()
        return hits / truth

    def areas(self) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels of each class that are right, in the truth, in the prediction: fp64 [C], exact up to 2 ** 53."""
        square = self.counts[:, : self.classes].double()
        return square.diagonal(), self.counts.sum(1).double(), square.sum(0)

    def scores(self, names: Sequence[str], unseen: Sequence[int] = ()) -> Scores:
        """All scores, ``unseen`` being the indices of the unseen classes."""
        if len(names) != self.classes:
            raise ValueError(f"expected {self.classes} names, one for each class, got {len(names)}")
        iou, accuracy = self.iou(), self.accuracy()
        hits, truth, _ = self.areas()
        is_unseen = torch.zeros(self.classes, dtype=torch.bool)
        is_unseen[list(unseen)] = True
        s, u = _mean(iou[~is_unseen]), _mean(iou[is_unseen])
        return Scores(
            pAcc=_number(hits.sum() / truth.sum()),
            mAcc=_mean(accuracy),
            mIoU=_mean(iou),
            seen=s,
            unseen=u,
            hIoU=None if s is None or u is None else harmonic_mean(s, u),
            iou=tuple(map(_number, iou)),
            accuracy=tuple(map(_number, accuracy)),
            absent=tuple(name for name, pixels in zip(names, truth.tolist(), strict=True) if not pixels),
            pixels=int(truth.sum()),
        )

    def scores_of(self, protocol: Protocol) -> Scores:
        """All scores under a protocol."""
        return self.scores(protocol.classes, protocol.unseen)


def harmonic_mean(a: float, b: float) -> float:
    """2 a b / (a + b), 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def _mean(values: Tensor) -> float | None:
    return _number(values.nanmean())


def _number(value: Tensor) -> float | None:
    return None if value.isnan() else value.item()
