"""A GeoTIFF as a source of windows, uint8 RGB, whatever its bands are."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastzs.files import check_file
from fastzs.pictures import ImageError

CACHE = 128 << 20  # bytes that GDAL keeps of files; it would take a twentieth of the machine
SAMPLE = 1024  # side of the reduced image by which values are scaled to 8 bits
PERCENT = (2, 98)  # of the sample's values, which become 0 and 255
log = logging.getLogger(__name__)


class MapError(ImageError):
    """A map that cannot be read, or whose result cannot be written; the message names it."""


class Raster:
    """A GeoTIFF, for ``with``. Only one thread may read at a time.

    Args:
        path: of the file.
        bands: three of its bands, from 1, for red, green and blue, or one for grey; its first three, or its first, if
            omitted.
        span: values of the bands that become 0 and 255. If omitted, uint8 is taken as it is, and other types from the
            2nd to the 98th percentile of a reduced image's values.
        scale: pixels of the windows for each pixel of the file.

    Attributes:
        size: (height, width) after scaling.
        transform, crs, gcps: of the scaled raster; ``crs`` is None where the file has none.

    Raises:
        MapError: the file is missing, no GeoTIFF, has no such bands, or a palette.
    """

    def __init__(
        self,
        path: Path,
        *,
        bands: Sequence[int] | None = None,
        span: tuple[float, float] | None = None,
        scale: float = 1.0,
    ):
        self.path = path
        self.file: Any = _open(path)
        try:
            self.bands = self._bands(bands)
            self.size = (max(1, round(self.file.height * scale)), max(1, round(self.file.width * scale)))
            self.steps = (self.file.height / self.size[0], self.file.width / self.size[1])  # file pixels to one
            down, across = self.steps
            a, b, c, d, e, f = self.file.transform[:6]
            self.transform = type(self.file.transform)(a * across, b * down, c, d * across, e * down, f)
            self.crs, self.gcps = self.file.crs, self._gcps()
            self.span = span or (None if self._is_plain() else self._sampled())
        except BaseException:
            self.file.close()
            raise
        if self.crs is None and not self.gcps[0]:
            log.warning("%s: has no coordinate reference system, and neither will its result", path)

    def _bands(self, bands: Sequence[int] | None) -> list[int]:
        from rasterio.enums import ColorInterp

        count = self.file.count
        chosen = list(bands) if bands else [1, 2, 3] if count >= 3 else [1]
        if len(chosen) not in (1, 3):
            raise MapError(f"{self.path}: expected three bands, or one for grey, got {len(chosen)}")
        if missing := [band for band in chosen if not 1 <= band <= count]:
            raise MapError(f"{self.path}: has bands 1 to {count}, so there is no band {missing[0]}")
        if self.file.colorinterp[chosen[0] - 1] == ColorInterp.palette:
            raise MapError(
                f"{self.path}: band {chosen[0]} holds numbers of a palette, not colours; expand it first, with "
                "gdal_translate -expand rgb"
            )
        if np.dtype(self.file.dtypes[chosen[0] - 1]).kind == "c":
            raise MapError(f"{self.path}: band {chosen[0]} holds complex numbers, which are no colours")
        return chosen

    def _gcps(self) -> tuple[list[Any], Any]:
        """Ground control points, which some files have in place of a transform, and their reference system."""
        from rasterio.control import GroundControlPoint

        points, crs = self.file.gcps
        down, across = self.steps
        return [GroundControlPoint(p.row / down, p.col / across, p.x, p.y, p.z, p.id, p.info) for p in points], crs

    def _is_plain(self) -> bool:
        return all(self.file.dtypes[band - 1] == "uint8" for band in self.bands)

    def _sampled(self) -> tuple[float, float]:
        down = max(1.0, max(self.file.height, self.file.width) / SAMPLE)
        shape = (max(1, int(self.file.height / down)), max(1, int(self.file.width / down)))
        with _told(self.path):
            values = self.file.read(self.bands, out_shape=(len(self.bands), *shape), masked=True)
        known = values.compressed().astype(np.float64)
        known = known[np.isfinite(known)]
        if not known.size:
            return (0.0, 1.0)
        low, high = np.percentile(known, PERCENT)
        return (float(low), float(high)) if low < high else (float(low), float(low) + 1)

    def __enter__(self) -> "Raster":
        return self

    def __exit__(self, *problem: object) -> None:
        self.file.close()

    def read(self, top: int, left: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """A window: uint8 [3, height, width], and where it has data, bool [height, width].

        Raises:
            MapError: the file is damaged there.
        """
        from rasterio.enums import Resampling
        from rasterio.errors import NodataShadowWarning
        from rasterio.windows import Window

        down, across = self.steps
        window = Window(left * across, top * down, width * across, height * down)  # pyright: ignore[reportCallIssue]
        where: dict[str, Any] = {"window": window, "out_shape": (len(self.bands), height, width)}
        smooth = {"resampling": Resampling.bilinear if max(self.steps) < 1 else Resampling.average}
        with _told(self.path), warnings.catch_warnings():
            warnings.simplefilter("ignore", NodataShadowWarning)  # of two marks of no data that of the value counts
            # all bands at once, since most files hold them together, pixel by pixel
            pixels = self.file.read(self.bands, **where, **smooth)
            # what no band has: a single one may be 0 where the others are not
            valid = (self.file.read_masks(self.bands, **where) > 0).any(0)
        if pixels.dtype.kind == "f":
            finite = np.isfinite(pixels)
            valid &= finite.any(0)
            pixels = np.where(finite, pixels, 0)
        if self.span is not None:
            low, high = self.span
            levels = pixels.astype(np.float32)
            levels -= low
            levels *= 255 / (high - low)
            pixels = np.rint(levels.clip(0, 255, out=levels), out=levels).astype(np.uint8)
        return torch.from_numpy(pixels).expand(3, -1, -1), torch.from_numpy(valid)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """GDAL's errors as one of this map."""
    from rasterio.errors import RasterioError

    try:
        yield
    except RasterioError as error:
        reason = error.__cause__ or error
        raise MapError(f"{path}: cannot be read: {' '.join(str(reason).split())}") from error


def _open(path: Path) -> Any:
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    try:
        check_file(path)
    except OSError as error:
        raise MapError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            # other drivers open what a file names: addresses, other files
            return rasterio.open(path.absolute(), driver="GTiff")
    except rasterio.RasterioIOError as error:
        raise MapError(f"{path}: cannot be opened as a GeoTIFF: {' '.join(str(error).split())}") from error
