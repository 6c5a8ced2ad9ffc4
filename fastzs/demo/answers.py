"""Images and names in, labels out, with what was computed kept: the page asks about the same images again and again."""

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

import fastzs
from fastzs.data.shapes import COLOURS, GROUNDS, PATTERNS, SHAPES
from fastzs.demo.names import read_names
from fastzs.devices import choose_device, choose_precision, native_bf16
from fastzs.features import ImageFeatures
from fastzs.loading import default_model
from fastzs.models.trained import TrainedModel
from fastzs.pictures import read_picture
from fastzs.question import Background
from fastzs.registry import systems
from fastzs.result import Segmentation
from fastzs.segmenter import Segmenter

Kept = TypeVar("Kept")
LOADED = 2  # segmenters at a time
COUNT, BYTES = 32, 1 << 29  # of what is kept of each kind


@dataclass(frozen=True)
class Answer:
    """The labels of one image.

    Attributes:
        id: by which :meth:`Answers.find` gives it again; it cannot be guessed.
        title: the image's name, as it came.
        image_id: the same for the same file.
        result: labels, names, scores and the image.
        encode_seconds: how long the network ran; None if it did not run, because the image was encoded before.
        label_seconds: from the encoded image to the labels.
    """

    id: str
    title: str
    image_id: str
    result: Segmentation
    encode_seconds: float | None
    label_seconds: float


class Shelf(Generic[Kept]):
    """Things by key. What was not asked for longest goes first where there are too many, or too many bytes."""

    def __init__(self, count: int = COUNT, size: int = BYTES):
        self.count, self.size = count, size
        self._kept: OrderedDict[Any, tuple[Kept, int]] = OrderedDict()

    def get(self, key: object) -> Kept | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: object, thing: Kept, size: int = 0) -> Kept:
        self._kept[key] = (thing, size)
        while len(self._kept) > self.count or (
            len(self._kept) > 1 and sum(s for _, s in self._kept.values()) > self.size
        ):
            self._kept.popitem(last=False)
        return thing


class Answers:
    """Answers one question at a time. Every image is encoded once for each system and precision.

    Args:
        system: the first choice; the weights' default if omitted.
        backbone, weights, checkpoint, device: see :func:`fastzs.load`; the built-in model if no weights are named.
        precision: the first choice.

    Attributes:
        systems, precisions: what there is to choose from, the first choice first.
        knows: what the model can be asked for, in words.
        draws: whether the model knows the images that the package draws.
        classes: those of a model that knows no others, as names are typed; else empty.

    Raises:
        ValueError, WeightsError: as :func:`fastzs.load`.
    """

    def __init__(
        self,
        system: str | None = None,
        *,
        backbone: str | None = None,
        weights: str | None = None,
        checkpoint: str | None = None,
        device: str = "auto",
        precision: str = "auto",
    ):
        if weights is None and backbone is None and checkpoint is None:
            weights = "shapes"
        first = system or default_model(weights, checkpoint)
        self._load = {"backbone": backbone, "weights": weights, "checkpoint": checkpoint, "device": device}
        self._lock = threading.Lock()
        self._segmenters: Shelf[Segmenter] = Shelf(LOADED)
        self._images: Shelf[Tensor] = Shelf()
        self._features: Shelf[ImageFeatures] = Shelf()
        self._answers: Shelf[Answer] = Shelf()
        model = self._segmenter(first, precision).model
        others = [] if isinstance(model, TrainedModel) else training_free()
        self.systems = list(dict.fromkeys([first, *others]))
        self.precisions = list(dict.fromkeys([precision, *precisions(device)]))
        self.draws = model.fixed_classes is None and model.clip.source == "shapes"
        self.knows = _knows(model)
        self.classes = ", ".join(model.fixed_classes or ())

    def ask(
        self,
        data: bytes,
        title: str,
        names: str,
        *,
        system: str | None = None,
        precision: str | None = None,
        background: Background = "none",
        threshold: float = 0.0,
    ) -> Answer:
        """Label an image.

        Args:
            data: the image's file.
            title: what messages call it.
            names: see :func:`fastzs.demo.names.read_names`.
            system, precision: of :attr:`systems` and :attr:`precisions`; the first of each if omitted.
            background: see :class:`fastzs.Segmenter`.
            threshold: of background "threshold", in 0..1; 0 takes the system's own.

        Raises:
            ValueError: no image, too many pixels, names or settings that do not fit; the message says which.
        """
        system, precision = system or self.systems[0], precision or self.precisions[0]
        for what, asked, known in (("system", system, self.systems), ("precision", precision, self.precisions)):
            if asked not in known:
                raise ValueError(f"{what}: expected one of {', '.join(known)}, got {asked!r}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: expected a number from 0 to 1, got {threshold}")
        entries = read_names(names)
        with self._lock:
            image_id = hashlib.sha256(data).hexdigest()[:32]
            segmenter = self._segmenter(system, precision)
            features, encode_seconds = self._encoded(segmenter, (system, precision, image_id), data, title)
            begun = time.perf_counter()
            result = segmenter.label(
                features,
                entries,
                background=background,
                threshold=threshold or None if background == "threshold" else None,
                scores=True,
            )
            seconds = time.perf_counter() - begun
            answer = Answer(secrets.token_urlsafe(12), title, image_id, result, encode_seconds, seconds)
            return self._answers.put(answer.id, answer, 4 * features.image.nbytes)

    def find(self, answer_id: str) -> Answer | None:
        """An answer that is still kept."""
        with self._lock:
            return self._answers.get(answer_id)

    def image(self, image_id: str) -> Tensor | None:
        """An image that is still kept, uint8 [3, H, W]."""
        with self._lock:
            return self._images.get(image_id)

    def _segmenter(self, system: str, precision: str) -> Segmenter:
        kept = self._segmenters.get((system, precision))
        if kept is not None:
            return kept
        return self._segmenters.put((system, precision), fastzs.load(system, precision=precision, **self._load))  # type: ignore[arg-type]

    def _encoded(
        self, segmenter: Segmenter, key: tuple[str, str, str], data: bytes, title: str
    ) -> tuple[ImageFeatures, float | None]:
        """The encoded image, and how long encoding took if it was done now."""
        image = self._images.get(key[2])
        if image is None:
            image = read_picture(data, name=title)
            self._images.put(key[2], image, image.nbytes)
        features = self._features.get(key)
        if features is not None:
            return features, None
        begun = time.perf_counter()
        features = segmenter.encode(image)
        seconds = time.perf_counter() - begun
        size = image.nbytes + sum(tensor.nbytes for tensor in features.windows.tensors().values())
        return self._features.put(key, features, size), seconds


def training_free() -> list[str]:
    """Systems that need nothing but a CLIP: no training, and no second network to download."""
    return [
        name
        for name, entry in systems().items()
        if not issubclass(entry.kind, TrainedModel) and "timm" not in entry.needs
    ]


def precisions(device: str) -> list[str]:
    """Precisions that the device computes at full speed."""
    chosen = choose_device(device)
    found = ["auto", "fp32"] + ["bf16"] * native_bf16(chosen) + ["fp16"] * (chosen.type == "cuda")
    try:
        choose_precision("int8", chosen)
    except ValueError:
        return found
    return [*found, "int8"]


def _knows(model: Any) -> str:
    if model.fixed_classes is not None:
        return f"The classes of this model were fixed in training: {', '.join(model.fixed_classes)}."
    if model.clip.source == "shapes":
        kinds: dict[str, Sequence[str]] = {
            "colour": list(COLOURS), "shape": SHAPES, "pattern": PATTERNS[1:], "ground": GROUNDS
        }  # fmt: skip
        words = "; ".join(f"{kind}s: {', '.join(some)}" for kind, some in kinds.items())
        return (
            "The built-in model knows drawn shapes, not photographs. Ask it for a colour and a shape, such as "
            f"'striped blue square', or for a ground. {words[0].upper()}{words[1:]}. For photographs, start "
            "'fastzs demo --backbone ViT-B-16 --weights openai'."
        )
    return f"{model.clip.backbone} with the weights {model.clip.source} takes any names."
