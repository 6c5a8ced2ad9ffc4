"""Images in, labels out: resize, windows, features, class maps, labels. Names, windows and models meet only here.

An image is encoded once and can be labelled with any names: :meth:`Segmenter.encode`, :meth:`Segmenter.label`, or both
at once by calling the segmenter.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from fastzs.clip.packed import computes_int8, pack, unpack
from fastzs.errors import FastzsError
from fastzs.features import FeaturesError, ImageFeatures
from fastzs.models.base import Features, SegmentationModel
from fastzs.ops import label_map
from fastzs.pictures import Picture, PictureError, find_pictures, read_picture, split_batch
from fastzs.readout import read_image
from fastzs.result import Segmentation
from fastzs.trace import span, traced
from fastzs.vocabulary import Vocabulary, class_indices, normal_name, text_vectors
from fastzs.windows import resize_size, window_grid

Names = Vocabulary | Sequence[str | Mapping[str, Sequence[str]]]
Background = Literal["none", "threshold", "prompt"]
OnError = Literal["raise", "skip"]
log = logging.getLogger(__name__)
BACKGROUND = ("background", "wall", "floor", "ground", "sky")
# what SCLIP and its successors ask for in PASCAL VOC's background
STUFF = (
    "sky", "wall", "tree", "wood", "grass", "road", "sea", "river", "mountain", "sands", "desk", "bed", "building",
    "cloud", "lamp", "door", "window", "wardrobe", "ceiling", "shelf", "curtain", "stair", "floor", "hill", "rail",
    "fence",
)  # fmt: skip
MAPS_BYTES = 128 << 20  # of class maps held at a time, where an image keeps its size
LONG_SIDE = 4  # times the short side: published test pipelines resize to (2048, 512)
TEXTS = 8  # vocabularies whose text vectors a segmenter keeps on its device


class View(NamedTuple):
    """An image as the model sees it."""

    image: Tensor  # uint8 [3, H, W], as it was read
    resized: Tensor  # uint8 [3, h, w]
    windows: Tensor  # int64 [W, 4] over the resized image, all of one size

    @property
    def size(self) -> tuple[int, int]:
        return (self.resized.shape[1], self.resized.shape[2])

    def crops(self, windows: Tensor) -> Iterator[Tensor]:
        """The parts of the resized image under some windows, uint8 [3, height, width] each."""
        for top, left, height, width in windows.tolist():
            yield self.resized[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class Question:
    """What an image is asked for, in the model's terms.

    Attributes:
        names: of the labels, in their order; the background is the last, where there is one.
        text: text vectors [T, D] on the device.
        groups: int64 [T], the class of each row; None if each row is a class.
        seen: bool [C], classes that the model treats as seen in training; None if it was told none.
        calibrations: constants taken from the scores of the seen classes; there is one answer for each.
        options: of :func:`fastzs.ops.label_map`.
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


class Segmenter:
    """Segments images with one model.

    Args:
        model: from :mod:`fastzs.models`, on its device and in its dtype.
        short_side: images are resized so that their shorter side has this many pixels (the longer at most four
            times that, the bound of the published test pipelines); 0 leaves their size; the model's own choice if
            omitted.
        crop, stride: sliding windows over the resized image, a side or (height, width) in pixels; 0 takes the
            whole image at once; the model's own choice if omitted, which shrinks to images smaller than it, as
            published; ``stride`` two thirds of the crop.
        batch_size: windows per forward pass, also of several images; ``batch`` is its old name.

    Attributes:
        long_side: bound on the longer side of resized images; four times ``short_side`` if None.
        antialias: resize with antialiasing; benchmarks of the training-free systems are published without.

    Raises:
        ValueError: a number out of range, a stride larger than the crop or without one.
    """

    def __init__(
        self,
        model: SegmentationModel,
        *,
        short_side: int | None = None,
        crop: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        batch: int | None = None,
    ):
        batch_size = batch_size if batch is None else batch
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if short_side is not None and short_side < 0:
            raise ValueError(f"short_side must not be negative, got {short_side}")
        self.model = model.eval()
        self.short_side = model.short_side if short_side is None else short_side
        self.crop = model.crop if crop is None else crop
        self._crop_is_given = crop is not None
        self.stride = model.stride if stride is None and crop is None else stride
        if self.crop:
            if self.stride is None:
                height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
                self.stride = (max(1, 2 * height // 3), max(1, 2 * width // 3))
            window_grid((1, 1), self.crop, self.stride)  # refuses here what it would refuse for every image
        elif stride is not None:
            raise ValueError(
                f"stride {stride} is the distance of windows, but images are taken whole (crop is {self.crop}); "
                "give a crop, too, or no stride"
            )
        self.batch_size = batch_size
        self.long_side: int | None = None
        self.antialias = True
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        scale = torch.tensor(model.std, device=self.device) * 255
        self._mean = (torch.tensor(model.mean, device=self.device) * 255)[:, None, None]
        self._scale = scale[:, None, None]
        self._texts: OrderedDict[str, Tensor] = OrderedDict()
        self.optimized = False

    @cached_property
    def _identity(self) -> str:
        return self.model.identity()

    def optimize(self, *, int8: bool = False) -> None:
        """Rearrange weights for inference where that pays: on a CPU the tower's products are packed.

        The packed weights stand beside the plain ones and take as much memory again. The model is saved as it was;
        training, moving or casting it, and :meth:`unoptimize`, bring it back.

        Args:
            int8: products of bytes, weights with a scale per channel and activations with one per token. It is for
                good: the weights take a quarter of fp32's memory, and the model is neither trained nor saved.
        """
        if self.device.type == "cpu":
            pack(self.model, int8)
        self.optimized = True

    def unoptimize(self) -> None:
        """Undo :meth:`optimize`, for torch.compile for instance."""
        unpack(self.model)
        self.optimized = False

    @property
    def precision(self) -> str:
        """What the model computes in: "float32", "bfloat16", "float16", or "int8"."""
        return "int8" if computes_int8(self.model) else str(self.dtype).removeprefix("torch.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_texts": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.optimized:
            self.optimize()

    @overload
    def __call__(self, images: Picture, names: Names, **options: Any) -> Segmentation: ...

    @overload
    def __call__(self, images: Iterable[Picture], names: Names, **options: Any) -> Iterator[Segmentation]: ...

    def __call__(  # pyright: ignore[reportInconsistentOverload]
        self,
        images: Picture | Iterable[Picture] | None = None,
        names: Names = (),
        *,
        background: Background = "none",
        threshold: float | None = None,
        background_names: Sequence[str] | None = None,
        scores: bool = False,
        probabilities: bool = False,
        batch_size: int | None = None,
        on_error: OnError = "raise",
        picture: Picture | None = None,
    ) -> Segmentation | Iterator[Segmentation]:
        """Label every pixel of an image, or of many: :meth:`encode` and :meth:`label` without keeping the features.

        Args:
            images: a path, PIL image, uint8 array [H, W, 3] or uint8 tensor [3, H, W]; or a folder, a sequence or an
                iterator of images, which are read when it is their turn and whose results come one by one, in their
                order. At most about a batch of windows is held at a time.
            names: the classes, see :class:`fastzs.Vocabulary`.
            background: pixels of none of the names: there are none; those whose best score is below ``threshold``;
                or those that fit ``background_names`` better. "background" then is the last of the result's names.
            threshold: score in 0..1; 0.5 if omitted, but where scores shrink with the number of names (the
                training-free systems) :meth:`fastzs.readout.Readout.threshold`.
            background_names: what "prompt" looks for; a few general words if omitted.
            scores: also keep the winning score of each pixel.
            probabilities: also keep every class's score of each pixel, fp16 [C, H, W]: large.
            batch_size: windows per forward pass; the segmenter's own if omitted.
            on_error: of many images, one that cannot be used: "raise" after the results before it have come, or
                "skip" it with a warning that names it.
            picture: the old name of ``images``.

        Raises:
            PictureError: an image cannot be read.
            ValueError: names or settings that do not fit, no images, or a crop asked for that is larger than the
                resized image; the message says which.
        """
        given = picture if images is None else images
        if given is None:
            raise ValueError("images: expected an image, a folder, or several images, got None")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        question = self.question(
            names,
            background=background,
            threshold=threshold,
            background_names=background_names,
            scores=scores,
            probabilities=probabilities,
        )
        if isinstance(given, str | Path) and Path(given).is_dir():
            given = find_pictures([str(given)])
        given = split_batch(given) or given
        if isinstance(given, list | tuple) and not given:
            raise ValueError("images: expected at least one image, got an empty sequence")
        single = isinstance(given, str | bytes | PathLike | Image.Image | np.ndarray | Tensor) or hasattr(given, "read")
        if single or not isinstance(given, Iterable):
            return _result(question, next(self.answers([given], question)))  # pyright: ignore[reportArgumentType]
        several = self.answers(given, question, batch_size=batch_size, on_error=on_error)  # pyright: ignore[reportArgumentType]
        return (_result(question, answer) for answer in several)

    @torch.no_grad()  # not inference_mode: kept features can take part in somebody's training
    def encode(self, image: Picture) -> ImageFeatures:
        """What the model computes of an image without any names.

        Raises:
            PictureError, ValueError: as when the segmenter is called.
        """
        view = self._view(image)
        parts = [self._encode(list(view.crops(some))) for some in view.windows.split(self.batch_size)]
        windows = type(parts[0]).cat(parts)
        return ImageFeatures(windows, view.windows, view.size, view.image.cpu(), self._identity)

    @traced("predict.picture")
    @torch.inference_mode()
    def label(
        self,
        features: ImageFeatures,
        names: Names,
        *,
        background: Background = "none",
        threshold: float | None = None,
        background_names: Sequence[str] | None = None,
        scores: bool = False,
        probabilities: bool = False,
    ) -> Segmentation:
        """Label every pixel of an encoded image; arguments and errors as when the segmenter is called.

        Raises:
            FeaturesError: the features are of another model, or of other weights, settings or precision.
        """
        self._check(features)
        question = self.question(
            names,
            background=background,
            threshold=threshold,
            background_names=background_names,
            scores=scores,
            probabilities=probabilities,
        )
        parts = self._decoded(features, question)
        return _result(question, self._answer(features.image, features.size, features.places, parts, question))

    @torch.no_grad()  # what leaves the package are ordinary tensors
    def logits(self, features: ImageFeatures, names: Names) -> Tensor:
        """What the model says of an encoded image's windows before labels are made of it, fp32 [W, C, h, w].

        Raises:
            ValueError: names that do not fit.
        """
        self._check(features)
        return torch.cat(list(self._decoded(features, self.question(names))))

    def question(
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
        """Names and settings in the model's terms, for :meth:`answers`.

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
        if background == "prompt":
            usual = BACKGROUND if self.model.readout is None else STUFF
            words = background_names or getattr(self.model.clip, "background", None) or usual
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
        if threshold is None:
            readout = self.model.readout
            threshold = 0.5 if readout is None else readout.threshold(len(vocabulary.phrases))
        check_fixed_classes(self.model, vocabulary.names)
        trained, competing = seen_classes(self.model, vocabulary.names)
        return Question(
            names=(*vocabulary.names, "background") if background == "threshold" else vocabulary.names,
            text=self._text(vocabulary),
            groups=vocabulary.row_groups,
            seen=competing,
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

    @torch.inference_mode()
    def answers(
        self,
        images: Iterable[Picture],
        question: Question,
        *,
        batch_size: int | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[Answer]:
        """The answers to one question for many images, in their order; see :meth:`__call__`."""
        batch_size = batch_size or self.batch_size
        for views in _batches(self._views(images, on_error), batch_size):
            for view, parts in self._maps(views, question, batch_size):
                with span("predict.picture"):
                    answer = self._answer(view.image, view.size, view.windows, parts, question)
                yield answer.ordinary()

    def _views(self, images: Iterable[Picture], on_error: OnError) -> Iterator[View]:
        for i, image in enumerate(images):
            try:
                yield self._view(image)
            except (FastzsError, ValueError) as error:
                problem = error if isinstance(image, str | PathLike) else PictureError(f"image {i}: {error}")
                if on_error == "raise":
                    raise problem from error
                log.warning("left out: %s", problem)

    def _maps(
        self, views: Sequence[View], question: Question, batch_size: int
    ) -> Iterator[tuple[View, Iterable[Tensor]]]:
        """Each image with the class maps of its windows, [W', C, h, w] in their order."""
        if len(views) == 1:  # perhaps of thousands of windows: no more than a batch is held
            windows = views[0].windows.split(batch_size)
            yield views[0], (self._decode(self._encode(list(views[0].crops(some))), question) for some in windows)
            return
        crops = [(i, crop) for i, view in enumerate(views) for crop in view.crops(view.windows)]
        maps: list[list[Tensor]] = [[] for _ in views]
        for size in dict.fromkeys(crop.shape for _, crop in crops):
            same = [(i, crop) for i, crop in crops if crop.shape == size]
            for start in range(0, len(same), batch_size):
                indices, some = zip(*same[start : start + batch_size], strict=True)
                for i, logits in zip(indices, self._decode(self._encode(some), question), strict=True):
                    maps[i].append(logits[None])
        yield from zip(views, maps, strict=True)

    def _view(self, image: Picture) -> View:
        with span("predict.preprocess"):
            original = read_picture(image)
            resized = self._resize(original)
        size = (resized.shape[1], resized.shape[2])
        if self.crop and self.stride:  # a crop always has a stride
            if self._crop_is_given:
                _check_crop(self.crop, size)
            return View(original, resized, window_grid(size, self.crop, self.stride))
        return View(original, resized, torch.tensor([[0, 0, *size]]))

    def _resize(self, picture: Tensor) -> Tensor:
        size = (picture.shape[1], picture.shape[2])
        if not self.short_side:
            return picture
        wanted = resize_size(size, self.short_side, self.long_side or LONG_SIDE * self.short_side)
        # antialiasing changes nothing where images grow, as in the published pipelines on their data sets
        return picture if wanted == size else TF.resize(picture, list(wanted), antialias=self.antialias)

    def _encode(self, crops: Sequence[Tensor]) -> Features:
        """Features of crops of one size, uint8 [3, h, w] each."""
        images = (torch.stack(list(crops)).to(self.device, torch.float32) - self._mean) / self._scale
        with span("predict.encode"):
            return self.model.encode(images.to(self.dtype))

    def _decode(self, features: Features, question: Question) -> Tensor:
        """Class maps of windows, fp32 [W, C, h, w]."""
        with span("predict.decode"):
            groups = question.groups if self.model.readout is None else None  # names are joined at the very end
            return self.model.decode(features, question.text, groups=groups, seen=question.seen).float()

    def _check(self, features: ImageFeatures) -> None:
        """Refuse features that are not of this model."""
        if not isinstance(features, ImageFeatures):
            raise FeaturesError(f"expected features from Segmenter.encode, got {type(features).__name__}")
        if features.model != self._identity:
            raise FeaturesError(
                f"these features are of another model, weights, settings or precision: expected {self._identity}, got "
                f"{features.model}; encode the image with this model"
            )

    def _decoded(self, features: ImageFeatures, question: Question) -> Iterator[Tensor]:
        """Class maps of an encoded image's windows, ``batch_size`` at a time."""
        for start in range(0, len(features.windows), self.batch_size):
            yield self._decode(features.windows[start : start + self.batch_size].to(self.device), question)

    def _answer(
        self, image: Tensor, size: tuple[int, int], windows: Tensor, parts: Iterable[Tensor], question: Question
    ) -> Answer:
        """Labels from the class maps of the windows over an image that the model saw in ``size``."""
        if self.model.readout is not None:
            return self._read(image, size, windows, parts, question)
        labels: list[list[Tensor]] = [[] for _ in question.calibrations]
        scores: list[list[Tensor]] = [[] for _ in question.calibrations]
        every: list[Tensor] = []
        for band in _bands(size, (image.shape[1], image.shape[2]), windows, parts):
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
        self, image: Tensor, size: tuple[int, int], windows: Tensor, parts: Iterable[Tensor], question: Question
    ) -> Answer:
        """Labels from the windows' cosines of every name, see :mod:`fastzs.readout`."""
        assert self.model.readout is not None
        with span("predict.readout"):
            cosines = torch.cat(list(parts))
            found = read_image(
                self.model.readout,
                cosines,
                self.model.covered(windows),
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
    trained = class_indices(model.seen, names, among=True)
    competing = torch.zeros(len(names), dtype=torch.bool)
    competing[trained] = True
    competing[class_indices(model.train_unseen, names, among=True)] = False
    return trained, competing


def _batches(views: Iterator[View], size: int) -> Iterator[list[View]]:
    """Images that have about ``size`` windows together, at least one; before an error comes what was before it."""
    batch: list[View] = []
    problem, count = None, 0
    while problem is None:
        try:
            view = next(views)
        except StopIteration:
            break
        except Exception as error:
            problem = error
            break
        if batch and count + len(view.windows) > size:
            yield batch
            batch, count = [], 0
        batch.append(view)
        count += len(view.windows)
        if count >= size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch
    if problem is not None:
        raise problem


class Band(NamedTuple):
    """Class maps of a band of an image, as :func:`fastzs.ops.label_map` takes them."""

    logits: Tensor  # fp32 [W, C, h, w]
    windows: Tensor  # int64 [W, 4]
    size: tuple[int, int]
    output_size: tuple[int, int]
    rows: slice  # of the band's labels, those that are wanted


def _bands(
    size: tuple[int, int], image_size: tuple[int, int], windows: Tensor, parts: Iterable[Tensor]
) -> Iterator[Band]:
    """Bands of an image from top to bottom.

    An image that keeps its size may have thousands of windows, whose maps would take gigabytes. What lies above
    the next row of windows is final, so no more than about ``MAPS_BYTES`` of maps are held. Where the labels are
    resized, rows mix, but the model's input is small: one band.

    Args:
        size: of the image as the model saw it.
        parts: class maps [W', C, h, w] of the windows, in their order.
    """
    if size != image_size:
        yield Band(torch.cat(list(parts)), windows, size, image_size, slice(None))
        return
    height, width = size
    held, kept, begin, stop = [], 0, 0, 0  # maps from window ``kept`` on; the rows above ``begin`` are done
    for part in parts:
        held.append(part)
        stop += len(part)
        end = height if stop == len(windows) else int(windows[stop, 0])
        if stop < len(windows) and (end == begin or sum(part.nbytes for part in held) < MAPS_BYTES):
            continue
        held = [torch.cat(held)]
        places = windows[kept:stop]
        places = places[places[:, 0] < end]
        top, bottom = int(places[0, 0]), int(places[-1, 0] + places[-1, 2])
        band = (bottom - top, width)
        moved = places - torch.tensor([top, 0, 0, 0])
        yield Band(held[0][: len(places)], moved, band, band, slice(begin - top, end - top))
        over = int((places[:, 0] + places[:, 2] <= end).sum())
        held, kept, begin = [held[0][over:].clone()], kept + over, end


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


def _result(question: Question, answer: Answer) -> Segmentation:
    scores = answer.scores[0] if answer.scores else None
    return Segmentation(answer.labels[0], question.names, scores, answer.image, answer.probabilities)


def _check_crop(crop: int | tuple[int, int], size: tuple[int, int]) -> None:
    height, width = (crop, crop) if isinstance(crop, int) else crop
    if height > size[0] or width > size[1]:
        raise PictureError(
            f"the crop, {height} x {width} pixels, is larger than the picture, {size[0]} x {size[1]} as the model sees "
            "it; give a smaller crop, a larger short side, or crop 0 for the whole picture at once"
        )
