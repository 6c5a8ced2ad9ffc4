"""From the class maps of an image's windows to its labels."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastzs.bands import Band, bands
from fastzs.models.base import SegmentationModel
from fastzs.ops import label_map
from fastzs.question import Question
from fastzs.readout import read_image
from fastzs.regions import share_labels
from fastzs.result import Segmentation
from fastzs.trace import span


class Answer(NamedTuple):
    """The labels of one image."""

    image: Tensor  # uint8 [3, H, W]
    labels: list[Tensor]  # [H, W] on the CPU, for each of the question's constants
    scores: list[Tensor]  # fp32 [H, W], for each of them; empty unless asked for
    probabilities: Tensor | None  # fp16 [C, H, W] under the first constant; None unless asked for

    def ordinary(self) -> "Answer":
        """The same in tensors that may be changed and take part in training, which those of inference mode may not."""

        def copied(tensor: Tensor) -> Tensor:
            return tensor.clone() if tensor.is_inference() else tensor

        with torch.inference_mode(False):
            every = None if self.probabilities is None else copied(self.probabilities)
            return Answer(copied(self.image), [*map(copied, self.labels)], [*map(copied, self.scores)], every)

    def result(self, question: Question) -> Segmentation:
        """What a caller is given, under the first of the question's constants."""
        scores = self.scores[0] if self.scores else None
        return Segmentation(self.labels[0], question.names, scores, self.image, self.probabilities)


def answer(
    model: SegmentationModel,
    image: Tensor,
    size: tuple[int, int],
    windows: Tensor,
    parts: Iterable[Tensor],
    question: Question,
    regions: Tensor | None = None,
) -> Answer:
    """The labels of one image.

    Args:
        regions: int64 [H, W]; each gets the label of most of its pixels.
        image: uint8 [3, H, W], as it was read.
        size: (height, width) of the image as the model saw it.
        windows: int64 [W, 4] over that.
        parts: class maps [W', C, h, w] of the windows, in their order.
    """
    make = _mapped if model.readout is None else _read
    found = make(model, image, size, windows, parts, question)
    if regions is None:
        return found
    pairs = zip(found.labels, found.scores or [None] * len(found.labels), strict=True)
    labels, scores = zip(*(share_labels(*pair, regions.cpu()) for pair in pairs), strict=True)
    return found._replace(labels=list(labels), scores=[one for one in scores if one is not None])


def _mapped(
    model: SegmentationModel,
    image: Tensor,
    size: tuple[int, int],
    windows: Tensor,
    parts: Iterable[Tensor],
    question: Question,
) -> Answer:
    """Labels from class maps, see :func:`fastzs.ops.label_map`."""
    labels: list[list[Tensor]] = [[] for _ in question.calibrations]
    scores: list[list[Tensor]] = [[] for _ in question.calibrations]
    every: list[Tensor] = []
    for band in bands(size, (image.shape[1], image.shape[2]), windows, parts):
        for i, constant in enumerate(question.calibrations):
            with span("predict.label_map"):
                mapped = label_map(
                    band.logits,
                    band.windows,
                    band.size,
                    output_size=band.output_size,
                    calibration=constant,
                    **question.options,
                )
            labels[i].append(mapped.labels[band.rows].cpu())
            if mapped.scores is not None:
                scores[i].append(mapped.scores[band.rows].cpu())
        if question.probabilities:
            every.append(_every_score(band, question)[:, band.rows].half().cpu())
    return Answer(
        image.cpu(),
        [torch.cat(rows) for rows in labels],
        [torch.cat(rows) for rows in scores if rows],
        torch.cat(every, 1) if every else None,
    )


def _read(
    model: SegmentationModel,
    image: Tensor,
    size: tuple[int, int],
    windows: Tensor,
    parts: Iterable[Tensor],
    question: Question,
) -> Answer:
    """Labels from the windows' cosines of every name, see :mod:`fastzs.readout`."""
    assert model.readout is not None
    with span("predict.readout"):
        cosines = torch.cat(list(parts))
        found = read_image(
            model.readout,
            cosines,
            model.covered(windows),
            size,
            image.to(cosines.device),
            question.text,
            classes=question.groups,
            threshold=question.options["threshold"],
            below=len(question.names) - 1 if question.below is None else question.below,
            scores=question.options["return_scores"],
            probabilities=question.probabilities,
        )
    labels = found.labels.to("cpu", torch.uint8 if len(question.names) <= 255 else torch.int16)
    scores = [] if found.scores is None else [found.scores.cpu()] * len(question.calibrations)
    every = None if found.probabilities is None else found.probabilities.half().cpu()
    return Answer(image.cpu(), [labels] * len(question.calibrations), scores, every)


def _every_score(band: Band, question: Question) -> Tensor:
    """The scores of all classes, fp32 [C, H, W]."""
    classes = band.logits.shape[1]
    options = {**question.options, "threshold": None, "return_scores": True, "top_k": classes}
    mapped = label_map(
        band.logits,
        band.windows,
        band.size,
        output_size=band.output_size,
        calibration=question.calibrations[0],
        **options,
    )
    assert mapped.scores is not None
    labels, scores = mapped.labels.long(), mapped.scores
    return torch.zeros_like(scores).scatter_(0, labels, scores) if classes > 1 else scores[None]
