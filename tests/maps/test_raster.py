import warnings

import numpy as np
import pytest
import torch

from fastzs.maps.raster import MapError, Raster

rasterio = pytest.importorskip("rasterio", reason="needs the extra 'geo'")
from rasterio.transform import from_origin  # noqa: E402

PLACE = {"crs": "EPSG:32633", "transform": from_origin(400_000, 5_800_000, 10, 10)}


def write(path, bands, place=PLACE, **more):
    """A GeoTIFF of bands [C, H, W]."""
    bands = np.asarray(bands)
    options = {"driver": "GTiff", "count": len(bands), "height": bands.shape[1], "width": bands.shape[2]}
    options |= {"photometric": "minisblack"} | more  # else a fourth band of bytes is taken for opacity
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", dtype=bands.dtype, **options, **place) as file:
            file.write(bands)
    return path


def noise(*shape, dtype=np.uint8, high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


def test_eight_bits_are_taken_as_they_are(tmp_path):
    bands = noise(4, 30, 50)
    with Raster(write(tmp_path / "a.tif", bands)) as raster:
        assert (raster.size, raster.crs, raster.transform) == ((30, 50), "EPSG:32633", PLACE["transform"])
        image, valid = raster.read(3, 5, 20, 40)
        assert valid.all()
        assert torch.equal(image, torch.from_numpy(bands[:3, 3:23, 5:45]))
    with Raster(tmp_path / "a.tif", bands=[4, 2, 1]) as raster:
        assert torch.equal(raster.read(0, 0, 30, 50)[0], torch.from_numpy(bands[[3, 1, 0]]))
    with Raster(tmp_path / "a.tif", bands=[2]) as raster:
        assert torch.equal(raster.read(0, 0, 30, 50)[0], torch.from_numpy(bands[[1, 1, 1]]))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_types_are_scaled_to_eight_bits(tmp_path, dtype):
    bands = noise(3, 40, 40, dtype=np.int16, high=3000).astype(dtype)
    with Raster(write(tmp_path / "a.tif", bands), span=(500, 2500)) as raster:
        image, _ = raster.read(0, 0, 40, 40)
    exact = ((bands.astype(np.float64) - 500) / 2000 * 255).clip(0, 255)
    assert np.abs(image.numpy() - exact).max() <= 0.501  # rounded once, in fp32
    with Raster(tmp_path / "a.tif") as raster:
        assert raster.span == pytest.approx(np.percentile(bands.astype(np.float64), (2, 98)))


def test_what_has_no_data(tmp_path):
    bands = noise(3, 20, 20, dtype=np.int16, high=100)
    bands[:, :5] = -999
    bands[0, 10:] = -999  # one band of three
    with Raster(write(tmp_path / "a.tif", bands, nodata=-999)) as raster:
        image, valid = raster.read(0, 0, 20, 20)
        assert raster.span[0] >= 0
    assert torch.equal(valid, torch.arange(20)[:, None].expand(20, 20) >= 5)
    assert (image[:, :5] == 0).all()
    values = noise(1, 20, 20).astype(np.float32)
    values[0, :, 7] = np.nan
    with Raster(write(tmp_path / "b.tif", values)) as raster:
        image, valid = raster.read(0, 0, 20, 20)
        assert np.isfinite(raster.span).all()
    assert torch.equal(valid, (torch.arange(20) != 7).expand(20, 20))
    colours = np.concatenate([values, values, values])
    colours[:2, :, 7] = 1  # now one band of three lacks data there
    with Raster(write(tmp_path / "c.tif", colours)) as raster:
        assert raster.read(0, 0, 20, 20)[1].all()


def test_at_another_scale(tmp_path):
    bands = np.repeat(np.repeat(noise(3, 10, 15), 4, 1), 4, 2)
    with Raster(write(tmp_path / "a.tif", bands), scale=0.25) as raster:
        assert raster.size == (10, 15)
        assert raster.transform == from_origin(400_000, 5_800_000, 40, 40)
        assert torch.equal(raster.read(2, 3, 7, 9)[0], torch.from_numpy(bands[:, 8:36:4, 12:48:4]))
    with Raster(tmp_path / "a.tif", scale=2.0) as raster:
        assert raster.size == (80, 120)
        assert raster.transform == from_origin(400_000, 5_800_000, 5, 5)
        assert raster.read(0, 0, 80, 120)[0].shape == (3, 80, 120)


def test_ground_control_points_are_scaled(tmp_path):
    from rasterio.control import GroundControlPoint

    points = [GroundControlPoint(0, 0, 1, 2), GroundControlPoint(20, 0, 1, 3), GroundControlPoint(0, 40, 5, 2)]
    write(tmp_path / "a.tif", noise(3, 20, 40), place={"gcps": points, "crs": "EPSG:4326"})
    with Raster(tmp_path / "a.tif", scale=0.5) as raster:
        found, crs = raster.gcps
    assert crs == "EPSG:4326"
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(0, 0, 1, 2), (10, 0, 1, 3), (0, 20, 5, 2)]


def test_without_a_reference_system(tmp_path, caplog):
    with Raster(write(tmp_path / "a.tif", noise(3, 9, 9), place={})) as raster:
        assert raster.crs is None
    assert "has no coordinate reference system" in caplog.text


def test_files_that_will_not_do(tmp_path):
    path = write(tmp_path / "a.tif", noise(3, 9, 9))

    def refused(match, path=path, **options):
        with pytest.raises(MapError, match=match) as caught:
            Raster(path, **options)
        assert str(path) in str(caught.value)

    refused("has bands 1 to 3, so there is no band 7", bands=[1, 7, 2])
    refused("expected three bands, or one for grey, got 2", bands=[1, 2])
    refused("No such file", tmp_path / "gone.tif")
    (tmp_path / "words.tif").write_text("words")
    refused("cannot be opened as a GeoTIFF", tmp_path / "words.tif")
    (tmp_path / "list.tif").write_text(
        '<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f"<SourceFilename>{path}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    refused("cannot be opened as a GeoTIFF", tmp_path / "list.tif")
    refused("complex numbers", write(tmp_path / "c.tif", np.zeros((1, 4, 4), np.complex64)))
    palette = write(tmp_path / "p.tif", noise(1, 9, 9, high=2), photometric="palette")
    with rasterio.open(palette, "r+") as file:
        file.write_colormap(1, {0: (0, 0, 0, 255), 1: (255, 0, 0, 255)})
    refused("numbers of a palette", palette)


def test_damage_is_told(tmp_path):
    path = write(tmp_path / "a.tif", noise(3, 400, 400), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    path.write_bytes(path.read_bytes()[:-200_000])
    with pytest.raises(MapError, match=f"{path}: cannot be (read|opened)"), Raster(path) as raster:
        raster.read(300, 300, 100, 100)
