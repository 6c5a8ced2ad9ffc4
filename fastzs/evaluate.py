"""Score a model, or somebody's label maps, on a data set under a protocol.

The processes of ``torchrun`` share the images out, none twice, and add their confusion matrices, so that any number
of them gives exactly the same figures.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastzs import ranks
from fastzs.data.datasets import DataError, ShapesDataset
from fastzs.data.pairs import PairsDataset
from fastzs.data.protocols import Protocol
from fastzs.metrics import ConfusionMatrix, Metric, Scores
from fastzs.models.base import SegmentationModel
from fastzs.regions import check_source, find
from fastzs.result import Segmentation, read_labels
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary, class_indices, normal_name

AnyDataset = PairsDataset | ShapesDataset
TOLD = 5  # problems that a message names; the rest are counted


def own_calibration(model: SegmentationModel, protocol: Protocol) -> float:
    """The constant that is subtracted from the scores of the protocol's seen classes, unless another one is given.

    It is the model's own calibration if its recorded training classes are exactly the protocol's seen classes.
    Otherwise it is 0, because the model's scores are not biased towards those classes.
    """
    if model.seen is None or not protocol.unseen:
        return 0.0
    try:
        same = class_indices(model.seen, protocol.classes) == list(protocol.seen)
    except ValueError:  # classes that this protocol does not have
        same = False
    return model.calibration if same else 0.0


def evaluate(
    segmenter: Segmenter,
    dataset: AnyDataset,
    protocol: Protocol,
    vocabulary: Vocabulary | None = None,
    *,
    calibrations: Sequence[float] | None = None,
    metric: Metric = "standard",
    threshold: float = 0.0,
    regions: str | Path | None = None,
    workers: int = 0,
    step: Callable[[str, Tensor, Tensor], None] = lambda name, picture, labels: None,
) -> dict[float, ConfusionMatrix]:
    """Label a data set and compare with the truth.

    Args:
        dataset: with the protocol's classes.
        vocabulary: what the model is asked for, one entry for each class of the protocol; their names if omitted.
        calibrations: constants taken from the seen classes' scores; the model runs once for all of them.
            :func:`own_calibration` if omitted.
        metric: how the published tables to compare with were scored, see :class:`fastzs.metrics.ConfusionMatrix`.
        threshold: of a training-free system: pixels with a lower score get label 0, the background; 0: none do.
        regions: "slic", "felzenszwalb", or a folder with a PNG of regions for each name of the data set, see
            :func:`fastzs.regions.find`.
        workers: processes that read images ahead.
        step: called after each of this process's images with its name, the image uint8 [3, H, W] and the labels
            [H, W] under the first constant.

    Returns:
        For each constant the confusion matrix over the whole data set.

    Raises:
        ValueError: the data set's classes or the vocabulary are not the protocol's, ``workers`` is negative.
        DataError, ImageError, RegionsError: a file cannot be used.
    """
    protocol.check_classes(dataset.classes, "the data set")
    vocabulary = Vocabulary(protocol.classes) if vocabulary is None else vocabulary
    if len(vocabulary) != len(protocol.classes):
        raise ValueError(
            f"the vocabulary has {len(vocabulary)} classes, but protocol {protocol.name} has {len(protocol.classes)}"
        )
    constants = [own_calibration(segmenter.model, protocol)] if calibrations is None else list(calibrations)
    if not constants:
        raise ValueError("calibrations has no constant in it")
    if workers < 0:
        raise ValueError(f"workers: expected at least 0, got {workers}")
    if regions is not None:
        check_source(regions)
    matrices = {constant: ConfusionMatrix(len(protocol.classes), metric) for constant in constants}
    rejected = {"threshold": threshold, "below": 0} if threshold else {}
    question = segmenter.question(vocabulary, seen=protocol.seen, calibrations=list(matrices), **rejected)
    names, truths = dataset.names, deque()

    def pictures() -> Iterator[Tensor]:
        for index, (picture, truth) in _samples(dataset, workers):
            truths.append((index, truth))
            yield picture

    def regions_of(picture: Tensor) -> Tensor:  # asked for each image as soon as it is read
        assert regions is not None
        return find(regions, picture, names[truths[-1][0]])

    for answer in segmenter.answers(pictures(), question, regions=None if regions is None else regions_of):
        index, truth = truths.popleft()
        for matrix, labels in zip(matrices.values(), answer.labels, strict=True):
            matrix.add(truth, labels)
        step(names[index], answer.image, answer.labels[0])
    for matrix in matrices.values():
        matrix.reduce(segmenter.device)
    return matrices


def evaluate_predictions(
    folder: str | Path,
    dataset: AnyDataset,
    protocol: Protocol,
    *,
    metric: Metric = "standard",
    step: Callable[[str, Tensor, Tensor], None] = lambda name, picture, labels: None,
) -> ConfusionMatrix:
    """Score label maps that lie in a folder as ``NAME.png``.

    Those that fastzs wrote hold the names of their labels and are scored by them, in whatever order they are; in others
    the values are class indices, and other values count as no class.

    Raises:
        ValueError: the data set's classes are not the protocol's.
        DataError: label maps are missing, cannot be read, have another size than the truth or a name that is none of
            the protocol's (named and counted).
    """
    protocol.check_classes(dataset.classes, "the data set")
    folder = Path(os.path.expanduser(folder))
    missing = [f"{name}.png" for name in dataset.names if not (folder / f"{name}.png").is_file()]
    if missing:
        told = ", ".join(missing[:TOLD]) + (f" and {len(missing) - TOLD} more" if len(missing) > TOLD else "")
        raise DataError(f"predictions in {folder}: {len(missing)} of {len(dataset)} label maps are missing: {told}")
    matrix = ConfusionMatrix(len(protocol.classes), metric)
    names = dataset.names
    for index, (picture, truth) in _samples(dataset, 0):
        path = folder / f"{names[index]}.png"
        labels = _predicted(path, protocol)
        if labels.shape != truth.shape:
            raise DataError(
                f"{path} is {labels.shape[1]} x {labels.shape[0]} pixels, its truth {truth.shape[1]} x {truth.shape[0]}"
            )
        matrix.add(truth, labels)
        step(names[index], picture, labels)
    matrix.reduce()
    return matrix


def _predicted(path: Path, protocol: Protocol) -> Tensor:
    """The labels of a label map as indices of the protocol's classes; any other label becomes one past the last."""
    try:
        names, values = read_labels(path)
    except (OSError, ValueError) as error:
        raise DataError(str(error) if str(path) in str(error) else f"{path} cannot be read: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "biu":
        raise DataError(f"{path} is no label map: expected one number for each pixel, got {list(values.shape)}")
    labels = torch.from_numpy(values.astype(np.int64))
    if names is None:
        return labels
    entries = protocol.synonyms or ((),) * len(protocol.classes)
    place = {
        normal_name(phrase): i
        for i, (name, others) in enumerate(zip(protocol.classes, entries, strict=True))
        for phrase in (name, *others)
    }
    none = len(protocol.classes)
    table = [place.get(normal_name(name), none if name == "background" else -1) for name in names]
    if int(labels.max()) >= len(table):
        raise DataError(f"{path} has the label {int(labels.max())}, but {len(table)} names")
    indices = torch.tensor(table)[labels]
    if (indices < 0).any():
        unknown = names[int(labels[indices < 0][0])]
        raise DataError(
            f"{path} has pixels of {unknown!r}, which is no class of protocol {protocol.name}; segment with its names, "
            "or give the protocol's classes this name as a synonym"
        )
    return indices


def summary(scores: Scores) -> dict[str, float]:
    """The figures of a training's evaluation, as far as they exist."""
    found = asdict(scores)
    return {key: found[key] for key in ("pAcc", "mAcc", "mIoU", "seen", "unseen", "hIoU") if found[key] is not None}


def report(matrix: ConfusionMatrix, protocol: Protocol) -> dict[str, Any]:
    """Everything about one confusion matrix under a protocol, as plain values for JSON."""
    scores = matrix.scores_of(protocol)
    figures = asdict(scores) | {"absent": list(scores.absent)}
    iou, accuracy = figures.pop("iou"), figures.pop("accuracy")
    classes = {
        name: {"iou": iou[i], "accuracy": accuracy[i], "unseen": i in protocol.unseen}
        for i, name in enumerate(protocol.classes)
    }
    return {"scores": figures, "classes": classes, "confusion": matrix.counts.tolist()}


def save_overlay(folder: Path, name: str, picture: Tensor, labels: Tensor, protocol: Protocol) -> None:
    """Draw labels [H, W] over an image uint8 [3, H, W] into ``folder/NAME.jpg``.

    Raises:
        OSError: it cannot be written.
    """
    names = protocol.classes
    if (labels >= len(names)).any():  # predictions of no class
        labels, names = labels.clamp(max=len(names)), (*names, "background")
    path = folder / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    wide = torch.uint8 if len(names) <= 255 else torch.int16
    Segmentation(labels.to(wide), names, image=picture).overlay(path)


def _samples(dataset: AnyDataset, workers: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """This process's images and truths as plain tensors, with their indices."""
    indices = range(ranks.rank(), len(dataset), ranks.world())
    loader = DataLoader(dataset, batch_size=None, sampler=indices, num_workers=workers, generator=torch.Generator())
    for index, (picture, truth) in zip(indices, loader, strict=True):
        yield index, (picture.as_subclass(Tensor), truth.as_subclass(Tensor))
