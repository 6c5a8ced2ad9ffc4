"""Images in, labels out: resize, windows, features, class maps, labels. Names, windows and models meet only here.

An image is encoded once and can be labelled with any names: :meth:`Segmenter.encode`, :meth:`Segmenter.label`, or both
at once by calling the segmenter.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch import Tensor

from fastzs.answer import Answer, Pending, answer, in_turn
from fastzs.clip.packed import computes_int8, pack, unpack
from fastzs.errors import FastzsError
from fastzs.features import FeaturesError, ImageFeatures
from fastzs.graphs import Graphs
from fastzs.models.base import Features, SegmentationModel
from fastzs.pictures import ImageError, ImageLike, find_pictures, read_picture, split_batch
from fastzs.question import Background, Names, Question, Questions
from fastzs.regions import Regions, at_size, find
from fastzs.renamed import old_arguments
from fastzs.result import Segmentation
from fastzs.trace import span, traced
from fastzs.transfers import Sending
from fastzs.views import Crop, View, batches, check_crop
from fastzs.windows import resize_size, window_grid

OnError = Literal["raise", "skip"]
Windows = Literal["separate", "stitched"]
log = logging.getLogger(__name__)
LONG_SIDE = 4  # times the short side: published test pipelines resize to (2048, 512)
# That a CPU gets in one forward pass: activations of more do not stay in its caches. ``bench/test_folder.py`` measures;
# 8 windows of 683 x 512 at a time took 1.13 times as long as 2 on an EPYC, one at a time 1.03 times.
CPU_PIXELS = 2 * 683 * 512


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
        batch_size: windows per forward pass, also of several images; on a CPU fewer, if they are large.
        windows: "separate": the maps of windows are averaged; "stitched": their features are put together before the
            last step, a transformer's last block or a decoder, which then sees the whole image. No system is published
            with it.

    Attributes:
        long_side: bound on the longer side of resized images; four times ``short_side`` if None.
        antialias: resize with antialiasing; benchmarks of the training-free systems are published without.

    Raises:
        ValueError: a number out of range, a stride larger than the crop or without one, or a model whose windows cannot
            be stitched.
    """

    @old_arguments(batch="batch_size")
    def __init__(
        self,
        model: SegmentationModel,
        *,
        short_side: int | None = None,
        crop: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        batch_size: int = 8,
        windows: Windows = "separate",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if short_side is not None and short_side < 0:
            raise ValueError(f"short_side must not be negative, got {short_side}")
        if windows not in ("separate", "stitched"):
            raise ValueError(f"windows: expected 'separate' or 'stitched', got {windows!r}")
        if windows == "stitched" and (reason := model.why_not_stitched()):
            raise ValueError(f"windows='stitched' cannot be had: {reason}; use windows='separate'")
        self.windows: Windows = windows
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
        self._questions = Questions(model)
        self.optimized = False
        self._loaded = self._writes()
        self._identities: dict[tuple[int, str], str] = {}

    def _writes(self) -> int:
        """How often the weights were written to, to see whether they still are those of the model's fingerprint."""
        return sum(0 if p.is_inference() else p._version for p in self.model.parameters())

    @property
    def _identity(self) -> str:
        key = (self._writes(), self.precision)
        if key not in self._identities:
            self._identities = {key: f"{self.model.identity(key[0] != self._loaded)}:{self.precision}"}
        return self._identities[key]

    def optimize(self, *, int8: bool = False) -> None:
        """Rearrange weights for inference where that pays: on a CPU the tower's products are packed.

        On an NVIDIA GPU nothing is rearranged, but of many images batches whose size came before become CUDA graphs.

        The packed weights stand beside the plain ones and take as much memory again. The model is saved as it was.
        Training, moving or casting it brings it back, and so do :meth:`unoptimize` and a call where a gradient of its
        weights is wanted.

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
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return next(self.model.parameters()).dtype

    @property
    def precision(self) -> str:
        """What the model computes in: "float32", "bfloat16", "float16", or "int8"."""
        return "int8" if computes_int8(self.model) else str(self.dtype).removeprefix("torch.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": self._writes() == self._loaded}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._loaded = self._writes() if state["_loaded"] else -1  # a copy's tensors are counted anew
        if self.optimized:
            self.optimize()

    @overload
    def __call__(self, images: ImageLike, names: Names, **options: Any) -> Segmentation: ...

    @overload
    def __call__(self, images: Iterable[ImageLike], names: Names, **options: Any) -> Iterator[Segmentation]: ...

    @old_arguments(picture="images")
    def __call__(  # pyright: ignore[reportInconsistentOverload]
        self,
        images: ImageLike | Iterable[ImageLike],
        names: Names,
        *,
        background: Background = "none",
        threshold: float | None = None,
        background_names: Sequence[str] | None = None,
        scores: bool = False,
        probabilities: bool = False,
        batch_size: int | None = None,
        on_error: OnError = "raise",
        regions: Regions | None = None,
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
            regions: regions of the image from elsewhere, see :func:`fastzs.regions.find`: the pixels of one get the
                label that most of them have, and in the training-free systems but maskclip and resclip its patches
                attend to each other only.

        Raises:
            ImageError: an image cannot be read.
            RegionsError: regions cannot be read or have another size than the image.
            ValueError: names or settings that do not fit, no images, or a crop asked for that is larger than the
                resized image; the message says which.
        """
        given = images
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
            return next(self.answers([given], question, regions=regions)).result(question)  # pyright: ignore[reportArgumentType]
        options: dict[str, Any] = {"batch_size": batch_size, "on_error": on_error, "regions": regions}
        several = self.answers(given, question, **options)  # pyright: ignore[reportArgumentType]
        return (found.result(question) for found in several)

    @torch.no_grad()  # not inference_mode: kept features can take part in somebody's training
    def encode(self, image: ImageLike, *, regions: Regions | None = None) -> ImageFeatures:
        """What the model computes of an image without any names.

        Args:
            regions: as when the segmenter is called; :meth:`label` is to be given them, too.

        Raises:
            ImageError, RegionsError, ValueError: as when the segmenter is called.
        """
        view = self.view(image, regions).arrive()
        if self.windows == "stitched":
            windows = self._stitched(view, self.batch_size)
        else:
            pieces = view.windows.split(self.at_once(view.windows[0, 2:], self.batch_size))
            parts = [self._encode(*_stacked(list(view.crops(some)))) for some in pieces]
            windows = type(parts[0]).cat(parts)
        return ImageFeatures(windows, view.windows, view.size, view.image, self._identity)

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
        regions: Regions | None = None,
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
        parts, shared = self._decoded(features, question), None if regions is None else find(regions, features.image)
        image = features.image
        seen = image[:, :1, :1].expand(3, *features.size)  # of the image as the model saw it only the size is needed
        found = answer(self.model, View(image, image, seen, features.places, shared), parts, question)
        return found.wait().ordinary().result(question)

    @torch.no_grad()  # what leaves the package are ordinary tensors
    def logits(self, features: ImageFeatures, names: Names) -> Tensor:
        """What the model says of an encoded image's windows before labels are made of it, fp32 [W, C, h, w].

        Raises:
            ValueError: names that do not fit.
        """
        self._check(features)
        return torch.cat(list(self._decoded(features, self.question(names))))

    def question(self, names: Names, **settings: Any) -> Question:
        """Names and settings in the model's terms, for :meth:`answers`; see :meth:`fastzs.question.Questions.ask`."""
        return self._questions.ask(names, **settings)

    def answers(
        self,
        images: Iterable[ImageLike],
        question: Question,
        *,
        batch_size: int | None = None,
        on_error: OnError = "raise",
        regions: Regions | None = None,
    ) -> Iterator[Answer]:
        """The answers to one question for many images, in their order; see :meth:`__call__`."""
        return self.answer_views(self._views(images, on_error, regions), question, batch_size=batch_size)

    @torch.inference_mode()
    def answer_views(
        self,
        views: Iterable[View],
        question: Question,
        *,
        batch_size: int | None = None,
        through: Callable[[Iterable[Tensor]], Iterable[Tensor]] = lambda parts: parts,
    ) -> Iterator[Answer]:
        """The answers for images that :meth:`view` has read, in their order.

        Args:
            through: is called with the class maps of each image's windows before labels are made of them, such as
                :class:`fastzs.smoothing.Smoothing`.
        """
        batch_size = batch_size or self.batch_size
        late = batch_size if self.device.type == "cuda" else 0  # images: those of the batch before
        for found in in_turn(self._pending(views, question, batch_size, through), late):
            yield found.ordinary()

    def _pending(
        self,
        views: Iterable[View],
        question: Question,
        batch_size: int,
        through: Callable[[Iterable[Tensor]], Iterable[Tensor]],
    ) -> Iterator[Pending]:
        maps_of = self._asking(question)
        for some in batches(iter(views), batch_size):
            for view, parts in self._maps([view.arrive() for view in some], question, batch_size, maps_of):
                with span("predict.picture"):
                    found = answer(self.model, view, through(parts), question)
                yield found

    def _views(self, images: Iterable[ImageLike], on_error: OnError, regions: Regions | None) -> Iterator[View]:
        for i, image in enumerate(images):
            try:
                yield self.view(image, regions)
            except (FastzsError, ValueError) as error:
                problem = error if isinstance(image, str | PathLike) else ImageError(f"image {i}: {error}")
                if on_error == "raise":
                    raise problem from error
                log.warning("left out: %s", problem)

    def _maps(
        self,
        views: Sequence[View],
        question: Question,
        batch_size: int,
        maps_of: Callable[[Sequence[Crop]], Tensor],
    ) -> Iterator[tuple[View, Iterable[Tensor]]]:
        """Each image with the class maps of its windows, [W', C, h, w] in their order.

        Args:
            maps_of: the class maps of crops of one size, see :meth:`_asking`.
        """
        if self.windows == "stitched":
            for view in views:
                yield view, [self._decode(self._stitched(view, batch_size), question)]
            return
        if len(views) == 1:  # perhaps of thousands of windows: no more than a batch is held
            windows = views[0].windows.split(self.at_once(views[0].windows[0, 2:], batch_size))
            yield views[0], (maps_of(list(views[0].crops(some))) for some in windows)
            return
        crops = [(i, crop) for i, view in enumerate(views) for crop in view.crops(view.windows)]
        maps: list[list[Tensor]] = [[] for _ in views]
        for size in dict.fromkeys(crop.image.shape for _, crop in crops):
            same = [(i, crop) for i, crop in crops if crop.image.shape == size]
            together = self.at_once(size[1:], batch_size)
            for start in range(0, len(same), together):
                indices, some = zip(*same[start : start + together], strict=True)
                for i, logits in zip(indices, maps_of(some), strict=True):
                    maps[i].append(logits[None])
        yield from zip(views, maps, strict=True)

    @torch.inference_mode()
    def class_maps(self, crops: Sequence[Crop], question: Question) -> Tensor:
        """Class maps of windows of one size, fp32 [W, C, h, w]."""
        return self._decode(self._encode(*_stacked(crops)), question)

    def view(self, image: ImageLike, regions: Regions | None = None) -> View:
        """An image as the model sees it; in any thread.

        Raises:
            ImageError, RegionsError, ValueError: as when the segmenter is called.
        """
        with span("predict.preprocess"):
            original = read_picture(image)
            name = Path(image).stem if isinstance(image, str | PathLike) else None
            shared = None if regions is None else find(regions, original, name).cpu()
            with Sending(self.device) as sending:
                there = sending.send(original)
                resized = self._resize(there)
                size = (resized.shape[1], resized.shape[2])
                cells = None if shared is None else sending.send(at_size(shared, size))
        return View(original.cpu(), there, resized, self.grid(size), shared, cells, sending.arrived)

    def grid(self, size: tuple[int, int]) -> Tensor:
        """The windows int64 [W, 4] over an image of (height, width) as the model sees it.

        Raises:
            ImageError: the crop that was asked for is larger.
        """
        if self.crop and self.stride:  # a crop always has a stride
            if self._crop_is_given:
                check_crop(self.crop, size)
            if self.windows == "separate":
                return window_grid(size, self.crop, self.stride)
        return torch.tensor([[0, 0, *size]])

    def _resize(self, picture: Tensor) -> Tensor:
        size = (picture.shape[1], picture.shape[2])
        if not self.short_side:
            return picture
        wanted = resize_size(size, self.short_side, self.long_side or LONG_SIDE * self.short_side)
        # antialiasing changes nothing where images grow, as in the published pipelines on their data sets
        return picture if wanted == size else TF.resize(picture, list(wanted), antialias=self.antialias)

    def _asking(self, question: Question) -> Callable[[Sequence[Crop]], Tensor]:
        """A function that gives the class maps of crops of one size, for many batches and one question."""

        def whole(images: Tensor) -> Tensor:
            return self._decode(self._encode(images, []), question)

        def maps_of(crops: Sequence[Crop]) -> Tensor:
            return self.class_maps(crops, question) if crops[0].regions is not None else graphs(_stacked(crops)[0])

        if self.device.type != "cuda" or not self.optimized:
            return functools.partial(self.class_maps, question=question)
        graphs = Graphs(whole)
        return maps_of

    def at_once(self, size: Sequence[int] | Tensor, most: int) -> int:
        """How many windows of (height, width) go into one forward pass, at most ``most``."""
        if self.device.type != "cpu":
            return most
        return max(1, min(most, CPU_PIXELS // int(size[0] * size[1])))

    def _encode(self, images: Tensor, regions: Sequence[Tensor]) -> Features:
        """Features of images uint8 [B, 3, h, w]."""
        images = self._normalised(images)
        with span("predict.encode"):
            return self.model.encode(images, **self._shared(regions))

    def _stitched(self, view: View, batch_size: int) -> Features:
        """Features of a whole image, put together from windows."""
        image = self._normalised(view.resized[None])
        regions = [] if view.cells is None else [view.cells]
        with span("predict.encode"):
            sizes = (self.crop or 0, self.stride or 0, batch_size)
            return self.model.encode_stitched(image, *sizes, **self._shared(regions))

    def _shared(self, regions: Sequence[Tensor]) -> dict[str, Any]:
        """The regions as an argument of models that take them."""
        return {"regions": torch.stack(list(regions)).to(self.device)} if regions and self.model.takes_regions else {}

    def _normalised(self, images: Tensor) -> Tensor:
        mean, std = _on_levels(tuple(self.model.mean), tuple(self.model.std), self.device)
        return ((images.to(self.device, torch.float32) - mean) / std).to(self.dtype)

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


def _stacked(crops: Sequence[Crop]) -> tuple[Tensor, list[Tensor]]:
    """Images uint8 [B, 3, h, w] of crops of one size, and their regions."""
    return torch.stack([crop.image for crop in crops]), [crop.regions for crop in crops if crop.regions is not None]


@functools.lru_cache(16)
def _on_levels(mean: Sequence[float], std: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the channels on the scale 0 to 255, fp32 [3, 1, 1]; copied to the device once."""
    with torch.inference_mode(False):
        return tuple(torch.tensor(some, device=device)[:, None, None] * 255 for some in (mean, std))  # pyright: ignore[reportReturnType]
