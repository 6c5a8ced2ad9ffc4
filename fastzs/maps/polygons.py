"""Polygons of a GeoTIFF of labels, as GeoJSON."""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from fastzs.files import replacing
from fastzs.maps.raster import MapError
from fastzs.outputs import OutputError

LONGITUDE_LATITUDE = "OGC:CRS84"  # what GeoJSON is written in (RFC 7946)


def check_shapely() -> None:
    """
    Raises:
        MapError: shapely is not installed.
    """
    if importlib.util.find_spec("shapely") is None:
        raise MapError("polygons need shapely, which is not installed: pip install 'fastzs[geo]'")


def write_polygons(raster: Path, path: Path, names: tuple[str, ...], background: int | None, tolerance: float) -> int:
    """Write a polygon for each connected region of one label; pixels that share an edge are connected.

    Neighbours are simplified together, so that their common borders stay common: no gaps, no overlaps. Longitudes and
    latitudes are written where the raster has a coordinate reference system, its own coordinates where it has none.

    Args:
        raster: as :class:`fastzs.maps.labels.Labels` writes it.
        path: of the GeoJSON file, written whole or not at all.
        names: of the labels, for the property ``class``.
        background: a label that is left out.
        tolerance: about how far, in units of the raster's coordinates, a border may move; 0 moves none. Regions whose
            area is below its square may vanish.

    Returns:
        The number of polygons.

    Raises:
        OutputError: it cannot be written.
    """
    import numpy as np
    import rasterio
    import shapely
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.features import shapes
    from rasterio.warp import transform_geom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(raster, driver="GTiff") as file:
            found: list[tuple[Any, int]] = [
                (shapely.geometry.shape(region), int(label))
                for region, label in shapes(rasterio.band(file, 1), connectivity=4, transform=file.transform)
                if label != file.nodata
            ]
            crs = file.crs
    labels = np.array([label for _, label in found], dtype=np.int64)
    regions = np.array([region for region, _ in found], dtype=object)
    if tolerance > 0 and len(regions):
        regions = shapely.coverage_simplify(regions, tolerance)
    count = 0
    try:
        with replacing(path) as stream:
            stream.write(b'{"type": "FeatureCollection", "features": [')
            for region, label in zip(regions, labels.tolist(), strict=True):
                if label == background or region.is_empty:
                    continue
                geometry = shapely.geometry.mapping(region)
                if crs is not None:
                    geometry = transform_geom(crs, LONGITUDE_LATITUDE, geometry)
                properties = {"class": names[label], "label": label}
                feature = {"type": "Feature", "properties": properties, "geometry": geometry}
                stream.write((",\n" * (count > 0) + json.dumps(feature)).encode())
                count += 1
            stream.write(b"]}\n")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return count
