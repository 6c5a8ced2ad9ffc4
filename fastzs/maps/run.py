"""Segment a map: windows of a GeoTIFF through the model, blended where they overlap, into a GeoTIFF of labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastzs.bands import Band, bands
from fastzs.maps.labels import Labels
from fastzs.maps.polygons import Form, write_polygons
from fastzs.maps.raster import CACHE, MapError, Raster
from fastzs.needed import check_installed
from fastzs.ops import label_map
from fastzs.pipeline import ahead
from fastzs.question import Question
from fastzs.readout import read
from fastzs.segmenter import Segmenter
from fastzs.views import Crop
from fastzs.windows import window_grid

WINDOW = 512  # a side of the windows of models that take images whole
PIECE = 2048  # pixels in a row that are read at a time, about


@dataclass(frozen=True)
class Wanted:
    """How a map is read and what is made of it; ``bands``, ``span`` and ``scale`` are as of :class:`Raster`.

    Attributes:
        tolerance: of polygons, which are written unless it is None; see :func:`fastzs.maps.polygons.write_polygons`.
        form: of the polygons' file.

    Raises:
        ValueError: a number is out of range.
    """

    bands: Sequence[int] | None = None
    span: tuple[float, float] | None = None
    scale: float = 1.0
    tolerance: float | None = None
    form: Form = "geojson"

    def __post_init__(self):
        if not 0 < self.scale <= 16:
            raise ValueError(f"--scale: expected a number above 0, at most 16, got {self.scale}")
        if self.span is not None and not self.span[0] < self.span[1]:
            raise ValueError(f"--range: expected a lower and an upper value, got {self.span[0]:g} and {self.span[1]:g}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"--polygons: expected a tolerance of 0 or more, got {self.tolerance}")


def check_packages(wanted: Wanted) -> None:
    """
    Raises:
        MissingPackage: a package is not installed that maps need, or their polygons if these are wanted.
    """
    check_installed("rasterio", "rasterio", "maps", "geo")
    if wanted.tolerance is not None:
        for package in ("shapely", "pyogrio"):
            check_installed(package, package, "polygons of maps", "geo")


def segment_map(
    path: Path,
    target: Path,
    segmenter: Segmenter,
    question: Question,
    wanted: Wanted,
    *,
    tags: Mapping[str, str] | None = None,
    start: Callable[[int], None] = lambda windows: None,
    step: Callable[[int], None] = lambda windows: None,
) -> None:
    """Segment a GeoTIFF of any height into ``TARGET.tif``, and polygons into ``TARGET.geojson`` or ``.gpkg``.

    Windows are read when it is their turn. What the model says of them is averaged where they overlap, as of an image
    that is held as a whole, so there are no seams. No refinement along edges takes place, since its reach is an image.
    What is held grows with the width of the map, not with its height.

    Args:
        target: without ending.
        tags: of the result, beside its names.
        start: called with the number of windows.
        step: called with the number of windows that are done since.

    Raises:
        MapError: the map cannot be read, or a result exists already.
        MissingPackage: see :func:`check_packages`.
        ImageError: the crop that was asked for is larger than the map.
        OutputError: a result cannot be written; the label map is whole or absent.
        ValueError: a setting does not fit.
    """
    check_packages(wanted)
    import rasterio

    labels_path, polygons_path = Path(f"{target}.tif"), Path(f"{target}.{wanted.form}")
    for made in (labels_path,) if wanted.tolerance is None else (labels_path, polygons_path):
        if made.exists():
            raise MapError(f"{path}: {made} exists already; remove it, or give another --output")
    background = len(question.names) - 1 if question.names[-1] == "background" else None
    with (
        rasterio.Env(GDAL_CACHEMAX=CACHE),
        Raster(path, bands=wanted.bands, span=wanted.span, scale=wanted.scale) as raster,
    ):
        windows = _windows(segmenter, raster.size)
        start(len(windows))
        pieces = ahead(_pieces(raster, windows))
        with Labels(labels_path, raster, question.names, background, tags or {}) as labels, closing(pieces):
            valid = _Valid(raster.size[1])
            maps = _maps(pieces, segmenter, question, valid, step)
            for band in bands(raster.size, raster.size, windows, maps):
                found = _labels(segmenter, band, question)[band.rows]
                labels.add(found.cpu().numpy(), valid.take(len(found)))
            labels.close()
        if wanted.tolerance is not None:
            write_polygons(labels_path, polygons_path, question.names, background, wanted.tolerance)


def _windows(segmenter: Segmenter, size: tuple[int, int]) -> Tensor:
    if segmenter.windows == "stitched":
        raise ValueError("windows='stitched' looks at the whole image at once, which a map is not; use 'separate'")
    return segmenter.grid(size) if segmenter.crop else window_grid(size, WINDOW, 2 * WINDOW // 3)


class _Piece(NamedTuple):
    """Neighbouring windows of one height, with what they cover together."""

    windows: Tensor  # int64 [W, 4]
    image: Tensor  # uint8 [3, h, w]
    valid: Tensor  # bool [h, w]

    def parts(self, of: Tensor) -> Iterator[Tensor]:
        """Of an image [..., h, w], the parts under the windows."""
        first = int(self.windows[0, 1])
        for _, left, _, width in self.windows.tolist():
            yield of[..., left - first : left - first + width]


def _pieces(raster: Raster, windows: Tensor) -> Iterator[_Piece]:
    """All windows in their order. Several are read together, since files hold whole rows or tiles compressed."""
    begin = 0
    while begin < len(windows):
        top, left, height, width = windows[begin].tolist()
        same = (windows[begin:, 0] == top) & (windows[begin:, 1] < left + PIECE)
        end = begin + int(same.long().cumprod(0).sum())
        right = int(windows[end - 1, 1]) + width
        yield _Piece(windows[begin:end], *raster.read(top, left, height, right - left))
        begin = end


def _maps(
    pieces: Iterator[_Piece], segmenter: Segmenter, question: Question, valid: "_Valid", step: Callable[[int], None]
) -> Iterator[Tensor]:
    """Class maps [W', C, h, w] of some windows at a time; those without data do not go through the model."""
    shape: torch.Size | None = None
    for piece in pieces:
        valid.put(int(piece.windows[0, 0]), int(piece.windows[0, 1]), piece.valid)
        crops = [Crop(image, None) for image in piece.parts(piece.image)]
        wanted = [bool(part.any()) for part in piece.parts(piece.valid)]
        if shape is None:
            wanted[0] = True  # to see how large maps are
        chosen = [crop for crop, one in zip(crops, wanted, strict=True) if one]
        size = segmenter.at_once(piece.windows[0, 2:], segmenter.batch_size)
        found = [segmenter.class_maps(chosen[i : i + size], question) for i in range(0, len(chosen), size)]
        shape = found[0].shape[1:] if found else shape
        assert shape is not None
        if len(chosen) == len(crops):
            yield torch.cat(found)
        else:
            maps = torch.zeros(len(crops), *shape, device=segmenter.device)
            if found:
                maps[torch.tensor(wanted, device=maps.device)] = torch.cat(found)
            yield maps
        step(len(crops))


def _labels(segmenter: Segmenter, band: Band, question: Question) -> Tensor:
    """Labels of a band, integers [h, W]."""
    model = segmenter.model
    if model.readout is None:
        constant = question.calibrations[0]
        options = {"output_size": band.output_size, "calibration": constant, **question.options}
        return label_map(band.logits, band.windows, band.size, **options).labels
    # nothing that looks further than a window: that would depend on where a band begins
    local = replace(model.readout, refine="none", area=0.0, direct=False)
    guide = torch.zeros(1, 1, 1, device=band.logits.device).expand(3, *band.output_size)
    return read(
        local,
        band.logits,
        model.covered(band.windows),
        band.size,
        guide,
        question.text,
        classes=question.groups,
        threshold=question.options["threshold"],
        below=len(question.names) - 1,
    ).labels


class _Valid:
    """Where rows that are not labelled yet have data."""

    def __init__(self, width: int):
        self.rows, self.taken = np.zeros((0, width), bool), 0

    def put(self, top: int, left: int, valid: Tensor) -> None:
        """What a piece says."""
        height, width = valid.shape
        top -= self.taken
        if (more := top + height - len(self.rows)) > 0:
            self.rows = np.concatenate([self.rows, np.zeros((more, self.rows.shape[1]), bool)])
        self.rows[top : top + height, left : left + width] |= valid.numpy()

    def take(self, count: int) -> np.ndarray:
        """The next rows."""
        taken, self.rows = self.rows[:count], self.rows[count:].copy()
        self.taken += count
        return taken
