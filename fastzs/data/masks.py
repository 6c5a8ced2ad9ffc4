"""Label maps in files: 8 or 16 bits, indexed, grey or by colours, and what their values mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fastzs.data.protocols import IGNORE, WIDE_IGNORE, ignore_label
from fastzs.errors import FastzsError
from fastzs.files import check_file

SUFFIXES = frozenset((".png", ".tif", ".tiff", ".bmp", ".gif", ".webp"))
VALUES = 65536
Meaning = Mapping[int | tuple[int, int, int], int | None]


class DataError(FastzsError, ValueError):
    """A data set that cannot be used as it is; the message names the files and counts them."""


class Labels:
    """From what stands in masks to labels.

    Args:
        classes: how many; the value ``i`` is the label ``i``.
        reduce_zero_label: 0 is ignored and label ``i`` stands there as ``i + 1``.
        also_ignored: further values that are ignored, besides 65535 and, up to 255 classes, 255.
        remap: what values mean instead, see :func:`fastzs.yaml_files.read_remap`: labels, or None for ignored. If it
            has colours, masks are RGB images and other colours have no meaning.

    Attributes:
        ignored: the label of ignored pixels.
    """

    def __init__(
        self,
        classes: int,
        *,
        reduce_zero_label: bool = False,
        also_ignored: Sequence[int] = (),
        remap: Meaning | None = None,
    ):
        self.ignored = ignore_label(classes)
        self.dtype = np.uint8 if self.ignored == IGNORE else np.int32
        remap = dict(remap or {})
        colours = {what: label for what, label in remap.items() if isinstance(what, tuple)}
        self.codes = np.array(sorted(_code(colour) for colour in colours), np.int32)
        self.of_codes = np.array([self._label(colours[_colour(code)]) for code in self.codes.tolist()], np.int32)
        first = int(reduce_zero_label)
        self.table = np.full(VALUES, -1, np.int32)  # value in the file -> label, -1 where there is none
        self.table[first : first + classes] = np.arange(classes)
        self.table[[0] * first + [self.ignored, WIDE_IGNORE, *also_ignored]] = self.ignored
        for what, label in remap.items():
            if not isinstance(what, tuple):
                self.table[what] = self._label(label)
        self.told = {what for what in remap if not isinstance(what, tuple)}

    def _label(self, label: int | None) -> int:
        return self.ignored if label is None else label

    @property
    def content(self) -> list:
        """All that decides, as plain values."""
        return [self.table.tolist(), self.codes.tolist(), self.of_codes.tolist()]

    def of(self, values: np.ndarray, path: Path) -> np.ndarray:
        """The labels of a mask's values.

        Raises:
            DataError: there are values or colours without a meaning; the message names them.
        """
        if values.ndim == 3:
            if not len(self.codes):
                raise DataError(
                    f"{path} is a mask of mode RGB; expected labels, indexed or grey; if its colours stand for "
                    "classes, say which in a label file (--label-file)"
                )
            red, green, blue = values.astype(np.int32).transpose(2, 0, 1)
            codes = (red << 16) + (green << 8) + blue
            places = np.searchsorted(self.codes, codes).clip(max=len(self.codes) - 1)
            labels = np.where(self.codes[places] == codes, self.of_codes[places], -1)
            if (labels < 0).any():
                other = ", ".join(f"#{code:06x}" for code in np.unique(codes[labels < 0])[:5].tolist())
                raise DataError(f"{path} has the colours {other}, which the label file does not name")
        elif len(self.codes):
            raise DataError(f"{path} has no colours; the label file names colours")
        else:
            labels = self.table[values]
            if (labels < 0).any():
                outside = ", ".join(map(str, np.unique(values[labels < 0])[:5].tolist()))
                allowed = np.flatnonzero((self.table >= 0) & (self.table != self.ignored))
                raise DataError(
                    f"{path}: expected labels from {allowed[0]} to {allowed[-1]}, or {self.ignored} for ignored, "
                    f"got {outside}"
                )
        return labels.astype(self.dtype)

    def doubt(self, used: set[int]) -> str | None:
        """What speaks against the values of all masks of a data set together.

        Args:
            used: values that occur, of masks without colours.
        """
        if not used:
            return None
        if used == {0, IGNORE} and IGNORE not in self.told and self.table[IGNORE] == self.ignored:
            return (
                f"the masks hold only 0 and {IGNORE}, which is ignored, so nothing but class 0 would count; say in a "
                f"label file what {IGNORE} means ('255: 1' for the second class, '255: ignored' if that is so)"
            )
        if all(self.table[value] == self.ignored for value in used):
            return f"the masks hold only {', '.join(map(str, sorted(used)))}, which is ignored, so no pixel would count"
        return None


def read_mask(path: Path) -> np.ndarray:
    """The values of a label map, uint8 or uint16 [H, W]: of an indexed image the indices, else grey levels; of a
    coloured one uint8 [H, W, 3].

    Raises:
        DataError: missing, damaged, or of another kind.
    """
    try:
        check_file(path)
        with Image.open(path) as image:
            if image.mode in ("P", "L", "1"):
                return np.array(image, dtype=np.uint8)
            if image.mode in ("RGB", "RGBA"):
                if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
                    raise DataError(f"{path} is a mask with transparent pixels; expected labels or opaque colours")
                return np.array(image.convert("RGB"))
            values = np.array(image)
            if values.dtype.kind not in "iu" or values.ndim != 2:
                raise DataError(f"{path} is a mask of mode {image.mode}; expected 8- or 16-bit labels, or RGB colours")
            if values.size and (values.min() < 0 or values.max() >= VALUES):
                raise DataError(f"{path} has values from {values.min()} to {values.max()}; expected 0 to {VALUES - 1}")
            return values.astype(np.uint16)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever comes to them on broken files
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _code(colour: tuple[int, int, int]) -> int:
    return (colour[0] << 16) + (colour[1] << 8) + colour[2]


def _colour(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255
