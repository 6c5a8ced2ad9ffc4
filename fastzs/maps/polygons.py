"""Polygons of a GeoTIFF of labels, as GeoJSON or as a GeoPackage."""

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from fastzs.files import write_atomically
from fastzs.maps.raster import MapError
from fastzs.outputs import OutputError

Form = Literal["geojson", "gpkg"]  # the ending of the file, too
DRIVERS = {"geojson": "GeoJSON", "gpkg": "GPKG"}
DECIMALS = "9"  # of longitudes and latitudes in GeoJSON: about a tenth of a millimetre


def write_polygons(raster: Path, path: Path, names: tuple[str, ...], background: int | None, tolerance: float) -> int:
    """Write a polygon for each connected region of one label; pixels that share an edge are connected.

    Neighbours are simplified together, so that their common borders stay common: no gaps, no overlaps. A GeoPackage
    has the raster's coordinate reference system; GeoJSON has longitudes and latitudes, or the raster's coordinates
    where it has no such system.

    Args:
        raster: as :class:`fastzs.maps.labels.Labels` writes it.
        path: of the file, which is written whole or not at all; its ending is a :data:`Form`.
        names: of the labels, for the property ``class``.
        background: a label that is left out.
        tolerance: about how far, in units of the raster's coordinates, a border may move; 0 moves none. Regions whose
            area is below its square may vanish.

    Returns:
        The number of polygons.

    Raises:
        MapError: their coordinates cannot be turned into longitudes and latitudes.
        OutputError: the file cannot be written.
    """
    import numpy as np
    import rasterio
    import shapely
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.features import shapes

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(raster, driver="GTiff") as file:
            found: list[tuple[Any, int]] = [
                (shapely.geometry.shape(region), int(label))
                for region, label in shapes(rasterio.band(file, 1), connectivity=4, transform=file.transform)
                if label != file.nodata
            ]
            crs = file.crs
    labels = np.array([label for _, label in found], dtype=np.int32)
    regions = np.array([region for region, _ in found], dtype=object)
    if tolerance > 0 and len(regions):
        regions = shapely.coverage_simplify(regions, tolerance)
    kept = (labels != (-1 if background is None else background)) & ~shapely.is_empty(regions)
    data = _encoded(path, regions[kept], labels[kept], names, None if crs is None else crs.to_wkt())
    try:
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return int(kept.sum())


def _encoded(path: Path, regions: Any, labels: Any, names: tuple[str, ...], crs: str | None) -> bytes:
    """The content of the file, made in memory, since GDAL does not tell of every full disk."""
    import numpy as np
    import shapely
    from pyogrio import errors, raw

    form = path.suffix.removeprefix(".")
    classes = np.array([names[label] for label in labels], dtype=object)
    options = {}
    if form == "geojson":  # RFC 7946 has longitudes and latitudes
        options = {"RFC7946": "NO" if crs is None else "YES", "COORDINATE_PRECISION": DECIMALS}
    buffer = BytesIO()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "'crs' was not provided")
        try:
            raw.write(
                buffer,
                shapely.to_wkb(regions),
                [classes, labels],
                ["class", "label"],
                layer=path.stem,
                driver=DRIVERS[form],
                geometry_type="Polygon",
                crs=crs,
                layer_options=options,
            )
            reason = next((str(one.message) for one in told), None)  # it goes on where it cannot find longitudes
        except (errors.DataSourceError, errors.DataLayerError) as error:
            reason = str(error)
    if reason is not None:
        raise MapError(f"{path}: its polygons cannot be written as {DRIVERS[form]}: {' '.join(reason.split())}")
    return buffer.getvalue()
