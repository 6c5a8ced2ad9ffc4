"""The result of a segmentation: a label map with its names, and ways to save and show it."""

import difflib
import io
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from fastzs.files import open_file, output_path, replacing, write_atomically
from fastzs.overlay import draw_overlay, label_colours, labels_present
from fastzs.pictures import NAMES_KEY, OVERLAY_MARK, ImageLike, read_picture
from fastzs.renamed import old_arguments

if TYPE_CHECKING:
    from supervision import Detections  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A label for every pixel of an image.

    Attributes:
        labels: ``[H, W]`` on the CPU, indices into ``names``; uint8 up to 255 names, int16 above.
        names: the classes in their order, then ``"background"`` where there is one.
        scores: fp32 ``[H, W]``, the score of the label each pixel got, or None when not asked for.
        image: uint8 RGB ``[3, H, W]``, the image the labels are of, for :meth:`overlay`; ``picture`` is its old name.
        probabilities: fp16 or fp32 ``[C, H, W]``, the score of every class (of the background, where it has one of its
            own), or None when not asked for.

    All are ordinary tensors, which may be changed and take part in training.

    Raises:
        ValueError: a shape, dtype or label does not fit.
    """

    labels: torch.Tensor = field(repr=False)
    names: tuple[str, ...]
    scores: torch.Tensor | None = field(default=None, repr=False)
    image: torch.Tensor | None = field(default=None, repr=False)
    probabilities: torch.Tensor | None = field(default=None, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "names", tuple(self.names))
        for name in ("labels", "scores", "image", "probabilities"):
            if (tensor := getattr(self, name)) is not None and tensor.is_inference():
                with torch.inference_mode(False):
                    object.__setattr__(self, name, tensor.clone())
        want = torch.uint8 if len(self.names) <= 255 else torch.int16
        if self.labels.ndim != 2 or self.labels.numel() == 0 or self.labels.dtype != want:
            raise ValueError(
                f"labels: expected {want} [H, W] for {len(self.names)} names, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        lowest, highest = self.labels.min().item(), self.labels.max().item()
        if lowest < 0 or highest >= len(self.names):
            raise ValueError(
                f"labels: expected 0 to {len(self.names) - 1} for {len(self.names)} names, got {lowest} to {highest}"
            )
        size = self.labels.shape
        if self.scores is not None and (self.scores.shape != size or self.scores.dtype != torch.float32):
            raise ValueError(
                f"scores: expected torch.float32 {list(size)} like the labels, "
                f"got {self.scores.dtype} {list(self.scores.shape)}"
            )
        if self.image is not None and self.image.shape != (3, *size):
            raise ValueError(f"image: expected shape {[3, *size]} like the labels, got {list(self.image.shape)}")
        if (every := self.probabilities) is not None and not (
            every.is_floating_point() and every.ndim == 3 and every.shape[1:] == size and len(every) <= len(self.names)
        ):
            raise ValueError(
                f"probabilities have shape {list(every.shape)} and dtype {every.dtype}; "
                f"expected floating point [{len(self.names)}, {size[0]}, {size[1]}]"
            )

    @property
    def picture(self) -> torch.Tensor | None:
        """The old name of ``image``."""
        return self.image

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = (self.labels, self.scores, self.image, self.probabilities)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def background(self) -> int | None:
        """The label of pixels that belong to no class: the last one, if it is named ``"background"``, else None."""
        return len(self.names) - 1 if self.names[-1] == "background" else None

    @property
    def segments(self) -> list[dict[str, Any]]:
        """One entry for each label that occurs, in the order of the labels, as Hugging Face's
        image-segmentation pipelines give it: ``label`` (the name), ``score`` (mean of the scores of its pixels;
        None without scores) and ``mask`` (PIL image, mode L, 255 where the label is and 0 elsewhere).
        """
        labels = self.labels.numpy()
        found = []
        for i in labels_present(labels, len(self.names)):
            mask = labels == i
            score = None if self.scores is None else float(self.scores.numpy()[mask].mean(dtype=np.float64))
            image = Image.fromarray(mask.view(np.uint8) * np.uint8(255))
            found.append({"label": self.names[i], "score": score, "mask": image})
        return found

    def save(self, path: str | os.PathLike) -> None:
        """Write the labels as a PNG whose pixel values are the labels, with the names in a text chunk.

        Up to 256 names it is an indexed PNG (mode P) with the colours of PASCAL VOC: black is the background,
        class ``i`` has VOC's colour ``i + 1``. More names make a grey PNG of 16 bits. :meth:`load` reads both.

        Raises:
            ValueError: ``path`` does not end in .png.
            OSError: it cannot be written; nothing half-written is left.
        """
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"{os.fspath(path)}: label maps are saved losslessly, as .png")
        if len(self.names) <= 256:
            image = Image.fromarray(self.labels.numpy().astype(np.uint8))
            image.putpalette(_palette(len(self.names), self.background))
        else:
            image = Image.fromarray(self.labels.numpy().astype(np.uint16))
        text = PngImagePlugin.PngInfo()
        text.add_text(NAMES_KEY, json.dumps(self.names))
        # Label maps are long runs of one value; the general search for repetitions takes several times as long.
        encoded = _encoded(image, format="PNG", pnginfo=text, compress_type=zlib.Z_RLE)
        write_atomically(output_path(path), encoded)

    def save_scores(self, path: str | os.PathLike) -> None:
        """Write :attr:`scores` as a grey PNG of 16 bits: 0 to 65535 for 0 to 1, rounded.

        Raises:
            ValueError: there are no scores, or ``path`` does not end in .png.
            OSError: it cannot be written; nothing half-written is left.
        """
        if self.scores is None:
            raise ValueError("this segmentation has no scores; segment with scores=True")
        if Path(path).suffix.lower() != ".png":
            raise ValueError(f"{os.fspath(path)}: score maps are saved as .png")
        levels = (self.scores.clamp(0, 1) * 65535).round().numpy().astype(np.uint16)
        text = PngImagePlugin.PngInfo()
        text.add_text(OVERLAY_MARK, "scores")
        write_atomically(output_path(path), _encoded(Image.fromarray(levels), format="PNG", pnginfo=text))

    def save_probabilities(self, path: str | os.PathLike) -> None:
        """Write :attr:`probabilities` as a compressed NumPy file: float16 ``[C, H, W]``, with the ``names``.

        ``numpy.load(path)["probabilities"]`` gives them back.

        Raises:
            ValueError: there are no probabilities, or ``path`` does not end in .npz.
            OSError: it cannot be written; nothing half-written is left.
        """
        if self.probabilities is None:
            raise ValueError("this segmentation has no probabilities; segment with probabilities=True")
        if Path(path).suffix.lower() != ".npz":
            raise ValueError(f"{os.fspath(path)}: probabilities are saved as .npz")
        names = np.array(self.names[: len(self.probabilities)])
        with replacing(output_path(path)) as stream:
            np.savez_compressed(stream, probabilities=self.probabilities.half().numpy(), names=names)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Segmentation":
        """Read what :meth:`save` wrote: the same labels and names (scores and image are not in the file).

        Raises:
            ValueError: the file was not written by :meth:`save`, or is damaged.
            OSError: it cannot be read.
        """
        names, values = read_labels(os.path.expanduser(path))
        if names is None or values.ndim != 2:
            raise ValueError(f"{os.fspath(path)}: has no names in it, so Segmentation.save did not write it")
        try:
            return cls(torch.from_numpy(values.astype(np.uint8 if len(names) <= 255 else np.int16)), names)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    @old_arguments(picture="image")
    def overlay(
        self,
        path: str | os.PathLike | None = None,
        *,
        image: ImageLike | None = None,
        opacity: float = 0.55,
    ) -> Image.Image:
        """Draw the labels over the image, with a legend below it of the names that occur.

        Args:
            path: where to write it, in the format its suffix names; None writes nothing.
            image: an image of the same size to draw on instead of the one the segmentation was made from.
            opacity: of the colours, 0 to 1. The background is not coloured.

        Returns:
            RGB image, as much higher than the original as the legend is.

        Raises:
            ValueError: there is no image or it has another size, the suffix is unknown, or ``opacity`` is out of range.
            OSError: it cannot be written; nothing half-written is left.
        """
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity: expected a number from 0 to 1, got {opacity}")
        kind = None if path is None else Image.registered_extensions().get(Path(path).suffix.lower())
        if path is not None and kind is None:
            raise ValueError(f"{os.fspath(path)}: expected the suffix of an image format, such as .jpg or .png")
        pixels = self.image if image is None else read_picture(image)
        if pixels is None:
            raise ValueError("this segmentation has no image; pass overlay(image=...)")
        if pixels.shape[1:] != self.labels.shape:
            raise ValueError(
                f"image: expected {self.labels.shape[1]} x {self.labels.shape[0]} pixels like the labels, "
                f"got {pixels.shape[2]} x {pixels.shape[1]}"
            )
        drawn = draw_overlay(
            pixels.cpu().numpy(),
            self.labels.numpy(),
            self.names,
            self.background,
            opacity,
        )
        if path is not None:
            text = PngImagePlugin.PngInfo()
            text.add_text(OVERLAY_MARK, "overlay")
            write_atomically(
                output_path(path), _encoded(drawn, format=kind, quality=92, comment=OVERLAY_MARK, pnginfo=text)
            )
        return drawn

    def to_coco(self, image_id: int = 1) -> list[dict[str, Any]]:
        """COCO annotations with run-length masks, one for each label that occurs.

        ``category_id`` is the label plus one, since COCO counts from 1; the background is no category.
        ``pycocotools.mask.decode(annotation["segmentation"])`` gives the mask back.

        Raises:
            ModuleNotFoundError: pycocotools is not installed.
        """
        from fastzs.formats.coco import annotations

        ids = self.labels.numpy().astype(np.int32) + 1
        if self.background is not None:
            ids[ids == len(self.names)] = 0
        return [{"id": i, "image_id": image_id, **one} for i, one in enumerate(annotations(ids), start=1)]

    def to_detections(self) -> "Detections":
        """``supervision.Detections``: one mask for each class that occurs, in their order; the background is none.

        ``class_id`` is the label, ``data["class_name"]`` the name, and ``confidence`` the mean score of the class's
        pixels, where there are scores.

        Raises:
            ModuleNotFoundError: supervision is not installed.
        """
        from fastzs.formats.detections import detections

        return detections(self)

    def mask(self, name: str) -> torch.Tensor:
        """Where a class is: bool ``[H, W]``.

        Raises:
            ValueError: it is none of :attr:`names`; the nearest are given.
        """
        if name not in self.names:
            near = difflib.get_close_matches(name, self.names, n=3, cutoff=0.4) or self.names[:5]
            raise ValueError(f"mask: expected one of the names, got {name!r}; nearest are {', '.join(map(repr, near))}")
        return self.labels == self.names.index(name)


Segmentation.__init__ = old_arguments(picture="image")(Segmentation.__init__)


def read_labels(path: str | os.PathLike) -> tuple[tuple[str, ...] | None, np.ndarray]:
    """Read a label map: the names that :meth:`Segmentation.save` stored, or None, and the labels ``[H, W]``.

    Raises:
        ValueError: it is damaged, or its names are no list of texts.
        OSError: it cannot be read.
    """
    what = os.fspath(path)
    try:
        with open_file(path) as stream, Image.open(stream) as image:
            image.load()
            text, values = image.info.get(NAMES_KEY), np.array(image)
    except (OSError, MemoryError) as error:
        if isinstance(error, Image.UnidentifiedImageError):
            raise ValueError(f"{what}: is no image") from None
        raise
    except Exception as error:  # decoders raise whatever comes to them on broken files
        raise ValueError(f"{what}: cannot be read: {error}") from error
    return None if text is None else _names(text, what), values


def read_names(path: str | os.PathLike) -> tuple[str, ...] | None:
    """The names that :meth:`Segmentation.save` stored in a label map, without reading its pixels; None if there are
    none, or if it is no image.

    Raises:
        ValueError: its names are no list of texts.
        OSError: it cannot be read.
    """
    try:
        with open_file(path) as stream, Image.open(stream) as image:
            text = image.info.get(NAMES_KEY)
    except OSError as error:
        if isinstance(error, Image.UnidentifiedImageError):
            return None
        raise
    except Exception:  # whatever a broken file makes a decoder raise
        return None
    return None if text is None else _names(text, os.fspath(path))


def _names(text: str, what: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{what}: the names in it are damaged")
    return tuple(names)


def _encoded(image: Image.Image, **options) -> bytes:
    # In memory first: an encoder that writes to the file itself hides why it could not.
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def _palette(count: int, background: int | None) -> bytes:
    """256 entries, so that a pixel takes one byte whatever the number of labels."""
    colours = np.zeros((256, 3), np.uint8)
    colours[:count] = label_colours(count, background)
    return colours.tobytes()
