"""From the class maps of an image's windows to its labels."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from fastzs.transfers import Fetched
from fastzs.views import View


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


@dataclass(frozen=True)
class Pending:
    """An answer that the device may still be at work on.

    Attributes:
        image: uint8 [3, H, W], as it was read.
        labels, scores: for each of the question's constants, the image's bands from top to bottom.
        probabilities: the same of every class's scores.
        regions: int64 [H, W]; each gets the label of most of its pixels.
    """

    image: Tensor
    labels: Sequence[Sequence[Fetched]]
    scores: Sequence[Sequence[Fetched]]
    probabilities: Sequence[Fetched]
    regions: Tensor | None

    def wait(self) -> Answer:
        """The answer, as soon as it is on the host."""
        labels = [_joined(parts, 0) for parts in self.labels]
        scores = [_joined(parts, 0) for parts in self.scores]
        if self.regions is not None:
            pairs = zip(labels, scores or [None] * len(labels), strict=True)
            shared = [share_labels(*pair, self.regions) for pair in pairs]
            labels, scores = [pair[0] for pair in shared], [pair[1] for pair in shared if pair[1] is not None]
        every = _joined(self.probabilities, 1) if self.probabilities else None
        return Answer(self.image, labels, scores, every)


def _joined(parts: Sequence[Fetched], dim: int) -> Tensor:
    return parts[0].get() if len(parts) == 1 else torch.cat([part.get() for part in parts], dim)


def in_turn(pending: Iterator[Pending], late: int) -> Iterator[Answer]:
    """Answers in their order, each taken when ``late`` more were asked for, so that the device is never idle meanwhile.

    Before an error come the answers to what was before it.
    """
    waiting: deque[Pending] = deque()
    problem = None
    while problem is None:
        try:
            waiting.append(next(pending))
        except StopIteration:
            break
        except Exception as error:
            problem = error
            break
        if len(waiting) > late:
            yield waiting.popleft().wait()
    while waiting:
        yield waiting.popleft().wait()
    if problem is not None:
        raise problem


def answer(model: SegmentationModel, view: View, parts: Iterable[Tensor], question: Question) -> Pending:
    """The labels of one image.

    Args:
        parts: class maps [W', C, h, w] of the view's windows, in their order.
    """
    return (_mapped if model.readout is None else _read)(model, view, parts, question)


def _mapped(model: SegmentationModel, view: View, parts: Iterable[Tensor], question: Question) -> Pending:
    """Labels from class maps, see :func:`fastzs.ops.label_map`."""
    labels: list[list[Fetched]] = [[] for _ in question.calibrations]
    scores: list[list[Fetched]] = [[] for _ in question.calibrations]
    every: list[Fetched] = []
    for band in bands(view.size, (view.image.shape[1], view.image.shape[2]), view.windows, parts):
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
                labels[i].append(Fetched(mapped.labels[band.rows]))
                if mapped.scores is not None:
                    scores[i].append(Fetched(mapped.scores[band.rows]))
        if question.probabilities:
            every.append(Fetched(_every_score(band, question)[:, band.rows].half()))
    return Pending(view.image, labels, [rows for rows in scores if rows], every, view.regions)


def _read(model: SegmentationModel, view: View, parts: Iterable[Tensor], question: Question) -> Pending:
    """Labels from the windows' cosines of every name, see :mod:`fastzs.readout`."""
    assert model.readout is not None
    with span("predict.readout"):
        cosines = torch.cat(list(parts))
        found = read_image(
            model.readout,
            cosines,
            model.covered(view.windows),
            view.size,
            view.there.to(cosines.device),
            question.text,
            classes=question.groups,
            threshold=question.options["threshold"],
            below=len(question.names) - 1 if question.below is None else question.below,
            scores=question.options["return_scores"],
            probabilities=question.probabilities,
        )
        labels = Fetched(found.labels.to(torch.uint8 if len(question.names) <= 255 else torch.int16))
        scores = [] if found.scores is None else [[Fetched(found.scores)]] * len(question.calibrations)
        every = [] if found.probabilities is None else [Fetched(found.probabilities.half())]
    return Pending(view.image, [[labels]] * len(question.calibrations), scores, every, view.regions)


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
