"""What images are asked for: class names and settings, in the terms of a model.

Models know no names. Here names become text vectors, and a model's training classes and fixed classes become indices.
"""

import difflib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fastzs.models.base import SegmentationModel
from fastzs.vocabulary import Vocabulary, class_indices, normal_name, text_vectors

log = logging.getLogger(__name__)
Names = Vocabulary | Sequence[str | Mapping[str, Sequence[str]]]
Background = Literal["none", "threshold", "prompt"]
BACKGROUND = ("background", "wall", "floor", "ground", "sky")
# what SCLIP and its successors ask for in PASCAL VOC's background
STUFF = (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building",
    "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail",
    "fence",
)  # fmt: skip
TEXTS = 8  # vocabularies whose text vectors a segmenter keeps on its device


@dataclass(frozen=True)
class Question:
    """What an image is asked for, in the model's terms.

    Attributes:
        names: of the labels, in their order; the background is the last, where there is one.
        text: text vectors [T, D] on the device.
        groups: int64 [T], the class of each row; None if each row is a class.
        seen: bool [C] on the device, classes that the model treats as seen in training; None if it was told none.
        calibrations: constants taken from the scores of the seen classes; there is one answer for each.
        options: of :func:`fastzs.ops.label_map`.
        below: the class of pixels whose score is below the threshold, if it is not the background.
        probabilities: whether the answers hold every class's scores.
    """

    names: tuple[str, ...]
    text: Tensor
    groups: Tensor | None
    seen: Tensor | None
    calibrations: Sequence[float]
    options: Mapping[str, Any]
    below: int | None = None
    probabilities: bool = False


class Questions:
    """Makes questions for one model. The text vectors of the last vocabularies stay on its device."""

    def __init__(self, model: SegmentationModel):
        self.model = model
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_texts": OrderedDict()}

    def ask(
        self,
        names: Names,
        *,
        background: Background = "none",
        threshold: float | None = None,
        background_names: Sequence[str] | None = None,
        scores: bool = False,
        probabilities: bool = False,
        seen: Sequence[int] | None = None,
        calibrations: Sequence[float] | None = None,
        below: int | None = None,
    ) -> Question:
        """Names and settings in the model's terms, for :meth:`fastzs.Segmenter.answers`.

        Args:
            names, background, threshold, background_names, scores, probabilities: as when the segmenter is called.
            seen: indices of the classes that lose ``calibrations``; those that the model was trained on if omitted.
            calibrations: constants; the model's own if omitted.
            below: with background "none" and a training-free system: pixels whose score is below ``threshold`` get this
                class of ``names``.

        Raises:
            ValueError: names or settings that do not fit.
        """
        vocabulary = names if isinstance(names, Vocabulary) else Vocabulary(names)
        if background_names is not None and background != "prompt":
            raise ValueError(
                f"background_names is what background='prompt' looks for, but background is {background!r}"
            )
        if background == "prompt":
            words = background_words(self.model) if background_names is None else background_names
            vocabulary = vocabulary.with_class("background", words)
        elif background == "threshold":
            if self.model.activation in ("softmax", "cosine") and len(vocabulary.phrases) == 1:
                raise ValueError(
                    "background='threshold' compares the names with each other, so it needs at least two; "
                    "with one name use background='prompt'"
                )
            if "background" in vocabulary.names:
                raise ValueError(
                    "background='threshold' adds a class 'background', but it is among the names already; "
                    "leave it out, or use background='none'"
                )
        elif background != "none":
            raise ValueError(f"background must be 'none', 'threshold' or 'prompt', got {background!r}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"threshold is compared with scores: expected 0 to 1, got {threshold}")
        if threshold is not None and background != "threshold" and below is None:
            raise ValueError(
                f"threshold={threshold} is the score that background='threshold' asks for, but background is "
                f"{background!r}; give background='threshold', or no threshold"
            )
        if threshold is None:
            readout = self.model.readout
            threshold = 0.5 if readout is None else readout.threshold(len(vocabulary.phrases))
        check_fixed_classes(self.model, vocabulary.names)
        trained, competing = seen_classes(self.model, vocabulary.names)
        text = self._text(vocabulary)
        return Question(
            names=(*vocabulary.names, "background") if background == "threshold" else vocabulary.names,
            text=text,
            groups=vocabulary.row_groups,
            seen=None if competing is None else competing.to(text.device),
            calibrations=[self.model.calibration] if calibrations is None else calibrations,
            below=below,
            options={
                "activation": self.model.activation,
                "seen": trained if seen is None else seen,
                "threshold": threshold if background == "threshold" or below is not None else None,
                "return_scores": scores,
            },
            probabilities=probabilities,
        )

    def _text(self, vocabulary: Vocabulary) -> Tensor:
        """The vocabulary's text vectors as the model takes them; the same tensor while a vocabulary is among the last.

        The models keep what depends on the text alone by the tensor it was computed from.
        """
        key = vocabulary.hash
        if key in self._texts:
            self._texts.move_to_end(key)
        else:
            with torch.inference_mode(False), torch.no_grad():
                vectors = text_vectors(self.model, vocabulary)
                # a copy, since what came from a cache may belong to others
                self._texts[key] = self.model.prepare_text(vectors.clone())
            if len(self._texts) > TEXTS:
                self._texts.popitem(last=False)
        text, name = self._texts[key], self.model.learned_class
        if name not in vocabulary.names:
            return text
        groups = torch.arange(len(text)) if vocabulary.row_groups is None else vocabulary.row_groups
        rows = (groups == vocabulary.names.index(name)).to(text.device)
        return torch.where(rows[:, None], self.model.learned_vector().to(text), text)


def background_words(model: SegmentationModel) -> Sequence[str]:
    """What background "prompt" looks for unless told otherwise: the weights' own words, or a few general ones."""
    return getattr(model.clip, "background", None) or (BACKGROUND if model.readout is None else STUFF)


@lru_cache(maxsize=64)  # said once, not with every image
def _tell_near_misses(seen: Sequence[str | int], names: Sequence[str]) -> None:
    """Say which seen classes are none of the names but nearly one: they might be meant, and change nothing."""
    known = {normal_name(name): name for name in names}
    asked = [normal_name(name) for name in seen if isinstance(name, str)]
    for name in asked:
        near = [] if name in known else difflib.get_close_matches(name, known.keys() - set(asked), n=1, cutoff=0.8)
        if near:
            log.warning("seen class %r is not among the names and so not calibrated; is it %r?", name, known[near[0]])


def check_fixed_classes(model: SegmentationModel, names: Sequence[str]) -> None:
    """See that a model whose classes were fixed in training is asked for these.

    Raises:
        ValueError: it is asked for others, fewer or in another order; the first difference is named.
    """
    if model.fixed_classes is None:
        return
    known, asked = ([normal_name(name) for name in some] for some in (model.fixed_classes, names))
    if known == asked:
        return
    what = f"the classes of {type(model).__name__} were fixed in training"
    if missing := [name for name in known if name not in asked]:
        raise ValueError(f"{what}, and {missing[0]!r} of them is missing; give all {len(known)} in their order")
    if unknown := [name for name in asked if name not in known]:
        raise ValueError(f"{what}, and {unknown[0]!r} is none of them; they are {', '.join(known[:5])}, ...")
    raise ValueError(f"{what}, in another order; the first are {', '.join(known[:5])}, ...")


def seen_classes(model: SegmentationModel, names: Sequence[str]) -> tuple[list[int] | None, Tensor | None]:
    """Which of ``names`` a model was trained on: their indices, and bool [C] without those it has to treat as unseen.

    Training classes that are not among the names are not asked for, and are nobody's loss. None and None if the model
    was not told any.

    Raises:
        ValueError: an index is too large, a class is given twice.
    """
    if model.seen is None:
        return None, None
    _tell_near_misses(tuple(model.seen), tuple(names))
    trained = class_indices(model.seen, names, among=True)
    competing = torch.zeros(len(names), dtype=torch.bool)
    competing[trained] = True
    competing[class_indices(model.train_unseen, names, among=True)] = False
    return trained, competing
