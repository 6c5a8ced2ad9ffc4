"""A GeoTIFF of labels, written from top to bottom, whole or not at all."""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from fastzs.files import temporary_beside
from fastzs.maps.raster import Raster
from fastzs.outputs import OutputError
from fastzs.overlay import label_colours
from fastzs.pictures import NAMES_KEY

BLOCK = 512  # a side of the file's tiles, and of the smallest overview


class Labels:
    """The labels of a raster: one band, tiled, compressed, with colours, names and overviews; for ``with``.

    It is at its path once :meth:`close` has come back, and absent before.

    Args:
        path: of the file, which does not exist.
        raster: whose place and size it takes.
        names: of the labels.
        background: the label of no class, which is black.
        tags: other than the names.

    Attributes:
        nodata: the label of pixels without data: 255, or 65535 for more than 255 names.
    """

    def __init__(
        self, path: Path, raster: Raster, names: tuple[str, ...], background: int | None, tags: Mapping[str, str]
    ):
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        self.path, self.size, self.temporary = path, raster.size, temporary_beside(path)
        self.dtype: Any = np.uint8 if len(names) <= 255 else np.uint16
        self.nodata = int(np.iinfo(self.dtype).max)
        self.waiting: list[np.ndarray] = []
        self.done = 0  # rows
        options = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate"}
        options |= {"BIGTIFF": "IF_SAFER", "SPARSE_OK": "TRUE"}
        where = {"crs": raster.crs, "transform": raster.transform}
        points, crs = raster.gcps
        if points:
            where = {"crs": crs, "gcps": points}
        with _told(path), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            height, width = raster.size
            shape: dict[str, Any] = {"height": height, "width": width, "count": 1, "dtype": self.dtype}
            self.file: Any = rasterio.open(
                self.temporary, "w", driver="GTiff", nodata=self.nodata, **shape, **where, **options
            )
            self.file.set_band_description(1, "label")
            self.file.update_tags(**{NAMES_KEY: json.dumps(names), **tags})
            if self.dtype == np.uint8:
                colours = label_colours(len(names), background).tolist()
                self.file.write_colormap(1, {i: (*colour, 255) for i, colour in enumerate(colours)})

    def __enter__(self) -> "Labels":
        return self

    def __exit__(self, *problem: object) -> None:
        with suppress(Exception):  # of a full disk
            self.file.close()
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)

    def add(self, labels: np.ndarray, valid: np.ndarray) -> None:
        """The next rows, integers [h, W], and where there is data, bool [h, W].

        Raises:
            OutputError: they cannot be written.
        """
        self.waiting.append(np.where(valid, labels.astype(self.dtype), self.nodata).astype(self.dtype))
        rows = sum(len(part) for part in self.waiting)
        # whole tiles, since a tile that is compressed twice leaves its first form in the file
        if rows >= BLOCK or self.done + rows == self.size[0]:
            strip = np.concatenate(self.waiting)
            last = self.done + rows == self.size[0]
            ready = rows if last else rows // BLOCK * BLOCK
            self._write(strip[:ready])
            self.waiting = [strip[ready:]]

    def _write(self, strip: np.ndarray) -> None:
        from rasterio.windows import Window

        with _told(self.path):
            window = Window(0, self.done, self.size[1], len(strip))  # pyright: ignore[reportCallIssue]
            self.file.write(strip, 1, window=window)
        self.done += len(strip)

    def close(self) -> None:
        """Add the overviews and put the file where it belongs.

        Raises:
            OutputError: it cannot be written.
        """
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.errors import NotGeoreferencedWarning

        with _told(self.path), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self.file.close()
            factors = [2**n for n in range(1, 20) if max(self.size) > BLOCK * 2 ** (n - 1)]
            if factors:
                with rasterio.open(self.temporary, "r+", driver="GTiff") as file:
                    file.build_overviews(factors, Resampling.nearest)
            self.temporary.replace(self.path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, OSError) as error:
        reason = error.__cause__ or error
        raise OutputError(f"cannot write {path}: {' '.join(str(reason).split())}") from error
