"""Zero-shot scores one class at a time: each unseen class alone against "others".

Source: PASCAL-5i (Shaban et al., "One-Shot Learning for Semantic Segmentation", BMVC 2017) as LSeg (Li et al., ICLR
2022) scores it without examples: a model trained without a fold's classes is asked, for every image and every class
of the fold in it, for the two names "others" and that class. A class's IoU is taken over all its images; mIoU is the
mean over the fold's classes. The folds are the protocols ``pascal5i-0`` to ``pascal5i-3``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastzs import ranks
from fastzs.data.protocols import IGNORE, ignore_label
from fastzs.metrics import ConfusionMatrix
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary


@dataclass(frozen=True)
class FoldScores:
    """Fractions of 1, or None where no pixel or class defines them.

    Attributes:
        iou: of each class of the fold, None if no image holds it.
        mIoU: their mean.
        FBIoU: mean of the IoU of the classes and that of "others", over all questions together.
    """

    iou: dict[str, float | None]
    mIoU: float | None
    FBIoU: float | None


def evaluate_fold(
    segmenter: Segmenter,
    dataset: Any,
    classes: Sequence[str],
    *,
    others: str = "others",
    templates: str | None = None,
    step: Callable[[], None] = lambda: None,
) -> FoldScores:
    """Scores of a model on the classes of a fold.

    Args:
        segmenter: the model; each image is encoded once and asked for each of its classes.
        dataset: images and labels, see :mod:`fastzs.data.datasets`. Pixels of 255 are not scored, so the background
            has to be a class of its own, as in PASCAL-5i. Processes of ``torchrun`` share the images out.
        classes: names among the data set's.
        others: the name of everything that is not the class.
        templates: named prompt templates of both names; the model's own if omitted.
        step: called after each of this process's images.

    Raises:
        ValueError: a class is not among the data set's.
    """
    names = list(dataset.classes)
    unknown = [name for name in classes if name not in names]
    if unknown:
        raise ValueError(f"the data set has no class {unknown[0]!r}; it has {', '.join(names)}")
    matrices = {name: ConfusionMatrix(2) for name in classes}
    vocabularies = {name: Vocabulary([others, name], templates=templates) for name in classes}
    ignored = ignore_label(len(names))
    for i in range(ranks.rank(), len(dataset), ranks.world()):
        picture, truth = dataset[i]
        truth = torch.as_tensor(truth).long()
        features = segmenter.encode(torch.as_tensor(picture))
        for name, matrix in matrices.items():
            is_class = truth == names.index(name)
            if is_class.any():
                labels = segmenter.label(features, vocabularies[name]).labels
                matrix.add(is_class.long().masked_fill(truth == ignored, IGNORE), labels)
        step()
    iou: dict[str, float | None] = {}
    together = ConfusionMatrix(2)
    for name, matrix in matrices.items():
        matrix.reduce(segmenter.device)
        together.counts += matrix.counts
        iou[name] = matrix.iou()[1].item() if matrix.counts.any() else None
    found = [value for value in iou.values() if value is not None]
    return FoldScores(
        iou=iou,
        mIoU=sum(found) / len(found) if found else None,
        FBIoU=together.iou().mean().item() if found else None,
    )
