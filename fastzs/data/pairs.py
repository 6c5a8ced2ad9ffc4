"""Images with label maps in files: what every data set of files is, and what is checked when it is made."""

import copy
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from fastzs.cache import cache_folder
from fastzs.data.masks import DataError, Labels, Meaning, read_mask
from fastzs.data.protocols import WIDE_IGNORE
from fastzs.files import check_file, write_atomically
from fastzs.pictures import HEIF, ImageError, know_heif, read_picture
from fastzs.progress import ProgressBar

Sample = tuple[tv_tensors.Image, tv_tensors.Mask]
QUIET = 2000  # images that are checked without a progress bar
TOLD = 5  # problems that a message names; the rest are counted


class Pair(NamedTuple):
    """An image and its label map, under the image's id."""

    name: str
    image: Path
    mask: Path


class PairsDataset(Dataset[Sample]):
    """Images and label maps in files.

    Args:
        pairs: the files.
        classes: names; label ``i`` of a mask is ``classes[i]``, 255 is ignored.
        reduce_zero_label, also_ignored, remap: what the values of the masks mean, see
            :class:`fastzs.data.masks.Labels`.
        what: the data set's name in messages.

    Raises:
        DataError: it is empty; files are missing or cannot be read, masks have labels outside the list or another
            size than their image; no pixel of any mask would count.
    """

    def __init__(
        self,
        pairs: Iterable[Pair],
        classes: Sequence[str],
        *,
        reduce_zero_label: bool = False,
        also_ignored: Sequence[int] = (),
        remap: Meaning | None = None,
        what: str = "data set",
    ):
        self.pairs = tuple(pairs)
        self.classes = tuple(classes)
        self.what = what
        if not self.classes or len(self.classes) > WIDE_IGNORE:
            raise DataError(f"{what}: expected 1 to {WIDE_IGNORE} classes, got {len(self.classes)}")
        if not self.pairs:
            raise DataError(f"{what}: there are no images in it")
        self.labels = Labels(
            len(self.classes), reduce_zero_label=reduce_zero_label, also_ignored=also_ignored, remap=remap
        )
        self._check()

    def __len__(self) -> int:
        return len(self.pairs)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Ids of the images, no two the same."""
        return tuple(pair.name for pair in self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """One image and its labels.

        Raises:
            DataError, ImageError: a file changed since the data set was checked and is no longer good.
        """
        pair = self.pairs[index]
        picture = read_picture(pair.image)
        labels = self._labels(pair.mask)
        if picture.shape[1:] != labels.shape:
            raise DataError(f"{self.what}: {_sizes(pair, tuple(picture.shape[1:]), labels.shape)}")
        return tv_tensors.Image(picture), tv_tensors.Mask(torch.from_numpy(labels))

    def without(self, classes: Sequence[int]) -> Self:
        """The images that show none of ``classes``; every mask is read.

        Raises:
            DataError: no image is left, or a mask is no longer good.
        """
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            shown = pool.map(lambda pair: np.isin(self._labels(pair.mask), classes).any(), self.pairs)
            kept = tuple(pair for pair, hit in zip(self.pairs, shown, strict=True) if not hit)
        if not kept:
            names = ", ".join(self.classes[i] for i in classes)
            raise DataError(f"{self.what}: every image shows one of {names}; there is none to train on")
        out = copy.copy(self)
        out.pairs = kept
        out.__dict__.pop("names", None)
        return out

    def _labels(self, path: Path) -> np.ndarray:
        try:
            return self.labels.of(read_mask(path), path)
        except DataError as error:
            raise DataError(f"{self.what}: {error}") from None

    def _check(self) -> None:
        missing = [path for pair in self.pairs for path in (pair.image, pair.mask) if not path.is_file()]
        if missing:
            raise DataError(report(self.what, "files are missing", [str(path) for path in missing]))
        repeated = len(self.pairs) - len(set(self.names))
        if repeated:
            raise DataError(f"{self.what}: {repeated} images have a name that another has, too")
        used: set[int] = set()
        stamp = cache_folder() / "checked" / f"{self.stamp()}.json"
        if stamp.is_file():
            return
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            # one after the other in the order of the pairs, decoded at the same time
            results = pool.map(partial(self._problem, used=used), self.pairs)
            problems = []
            with ProgressBar(f"checking {self.what}", "image", shown=len(self.pairs) >= QUIET) as progress:
                progress.start(len(self.pairs))
                for problem in results:
                    problems += [problem] if problem else []
                    progress.advance()
        if problems:
            raise DataError(report(self.what, "images or masks cannot be used", problems))
        if doubt := self.labels.doubt(used):
            raise DataError(f"{self.what}: {doubt}")
        # a cache that cannot be written only means that the next start checks again
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(stamp, json.dumps({"dataset": self.what, "pictures": len(self.pairs)}).encode())
        except OSError:
            pass

    def _problem(self, pair: Pair, used: set[int]) -> str | None:
        """What is wrong with a pair, if anything; adds to ``used``. Of the image the header is read only."""
        try:
            values = read_mask(pair.mask)
            labels = self.labels.of(values, pair.mask)
            if values.ndim == 2:
                used.update(np.flatnonzero(np.bincount(values.reshape(-1))).tolist())
            size = _size_of(pair.image)
        except (DataError, ImageError) as error:
            return str(error)
        return _sizes(pair, size, labels.shape) if size != labels.shape else None

    def stamp(self) -> str:
        """Identifies the data: changes with any file's name, size or time of change, and with what the labels mean."""
        digest = hashlib.sha256(json.dumps([self.classes, self.labels.content]).encode())
        for pair in self.pairs:
            for path in (pair.image, pair.mask):
                status = path.stat()
                digest.update(os.fsencode(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}\n"))
        return digest.hexdigest()[:32]


def _size_of(path: Path) -> tuple[int, int]:
    """(height, width) as :func:`fastzs.pictures.read_picture` gives it, from the header."""
    try:
        check_file(path)
        if path.suffix.lower() in HEIF:
            know_heif(str(path))
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientation
    except ImageError:
        raise
    except Exception as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return (width, height) if turned else (height, width)


def _sizes(pair: Pair, picture: tuple[int, ...], mask: tuple[int, ...]) -> str:
    return f"{pair.image} is {picture[1]} x {picture[0]} pixels, its mask {pair.mask} {mask[1]} x {mask[0]}"


def report(what: str, kind: str, problems: list[str]) -> str:
    """A message that names the first problems and counts the others."""
    more = f"\n  and {len(problems) - TOLD} more" if len(problems) > TOLD else ""
    return f"{what}: {len(problems)} {kind}:\n  " + "\n  ".join(problems[:TOLD]) + more
