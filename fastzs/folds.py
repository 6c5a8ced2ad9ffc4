"""Zero-shot scores by folds: one unknown class at a time, against "others".

Source: PASCAL-5i (Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC 2017) as LSeg (Li et al., ICLR
2022) scores it without examples: VOC's 20 classes make four folds; a model trained without a fold's classes is asked,
for every picture and every class of the fold in it, for the two names "others" and that class. A class's IoU is taken
over all its pictures; mIoU is the mean over the fold's classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastzs.data.classes import VOC
from fastzs.data.protocols import IGNORE
from fastzs.metrics import ConfusionMatrix
from fastzs.vocabulary import Vocabulary

FOLDS = 4


@dataclass(frozen=True)
class FoldScores:
    """All fractions of 1; None where there is nothing to compute it from.

    Attributes:
        iou: of each class of the fold, None if no picture holds it.
        mIoU: their mean.
        FBIoU: mean of the IoU of the classes and that of "others", over all questions together.
        questions: pairs of a picture and a class that were asked.
    """

    iou: dict[str, float | None]
    mIoU: float | None
    FBIoU: float | None
    questions: int


def pascal_fold(fold: int) -> tuple[str, ...]:
    """The five classes of PASCAL-5i's fold 0 to 3, to be tested; the other fifteen are for training."""
    if not 0 <= fold < FOLDS:
        raise ValueError(f"PASCAL-5i has folds 0 to {FOLDS - 1}, got {fold}")
    return tuple(VOC[5 * fold : 5 * fold + 5])


def evaluate_fold(
    segment: Callable[[Tensor, Vocabulary], Any], dataset: Any, classes: Sequence[str], others: str = "others"
) -> FoldScores:
    """Scores of a model on the classes of a fold.

    Args:
        segment: a :class:`fastzs.predict.Segmenter`, or what gives labels [H, W] as its result's ``labels``.
        dataset: pictures and labels, see :mod:`fastzs.data.datasets`. Pixels of 255 are not scored, so the background
            has to be a class of its own, as in PASCAL-5i.
        classes: names among the data set's.
        others: name of all that is not the class.

    Raises:
        ValueError: a class is not among the data set's.
    """
    names = list(dataset.classes)
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise ValueError(f"the data set has no class {unknown[0]!r}; it has {', '.join(names)}")
    matrices = {name: ConfusionMatrix(2) for name in classes}
    questions, together = 0, ConfusionMatrix(2)
    for i in range(len(dataset)):
        picture, truth = dataset[i]
        for name, matrix in matrices.items():
            is_class = truth == names.index(name)
            if not is_class.any():
                continue
            labels = segment(picture, Vocabulary([others, name])).labels
            matrix.add(is_class.long().masked_fill(truth == IGNORE, IGNORE), labels)
            questions += 1
    iou: dict[str, float | None] = {}
    for name, matrix in matrices.items():
        together.counts += matrix.counts
        iou[name] = matrix.iou()[1].item() if matrix.counts.any() else None
    found = [value for value in iou.values() if value is not None]
    return FoldScores(
        iou=iou,
        mIoU=sum(found) / len(found) if found else None,
        FBIoU=together.iou().mean().item() if found else None,
        questions=questions,
    )
