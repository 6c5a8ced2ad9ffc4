import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastzs
from fastzs import bands
from fastzs.cli import main
from fastzs.data.shapes import draw
from fastzs.maps import run as maps
from fastzs.maps.raster import MapError
from fastzs.maps.run import Wanted, segment_map
from fastzs.needed import MissingPackage
from fastzs.outputs import OutputError
from fastzs.question import Question
from fastzs.windows import window_grid
from tests.maps.test_raster import PLACE, noise, write

rasterio = pytest.importorskip("rasterio", reason="needs the extra 'geo'")
NAMES = ["disc", "star", "square", "moon", "gravel"]


class Brightness:
    """A segmenter whose classes are ``count`` levels of brightness; remembers how many windows it saw."""

    def __init__(self, crop=32, stride=24, count=4):
        self.crop, self.stride, self.count = crop, stride, count
        self.batch_size, self.windows, self.device, self.seen = 4, "separate", torch.device("cpu"), 0
        self.model = SimpleNamespace(readout=None)

    def grid(self, size):
        return window_grid(size, self.crop, self.stride)

    def question(self):
        names = tuple(f"level {i}" for i in range(self.count))
        options = {"activation": "none", "seen": None, "threshold": None, "return_scores": False}
        return Question(names, torch.zeros(self.count, 1), None, None, [0.0], options)

    def at_once(self, size, most):
        return most

    def class_maps(self, crops, question):
        self.seen += len(crops)
        images = torch.stack([crop.image for crop in crops]).float().mean(1)
        levels = torch.nn.functional.adaptive_avg_pool2d(images, 8)[:, None] / 256 * self.count - 0.5
        return -(levels - torch.arange(self.count)[None, :, None, None]).abs()


@pytest.fixture(scope="module")
def scene():
    """Drawn scenes side by side, uint8 [3, 300, 420]."""
    images = draw(12, (100, 105), seed=3).images
    return torch.cat([torch.cat(list(row), 2) for row in images.split(4)], 1)


def run(path, target, segmenter, step=lambda windows: None, **wanted):
    segment_map(path, target, segmenter, segmenter.question(), Wanted(**wanted), step=step)


def labels(path):
    with rasterio.open(path) as file:
        return file.read(1)


@pytest.mark.parametrize("model", ["maskclip", "naclip"])
def test_tiles_equal_the_whole(tmp_path, scene, monkeypatch, model):
    """A map in many bands, read piece by piece, is labelled as the image in memory is: there is no seam.

    What looks further than a window, a refinement and the rule of small areas, is left out.
    """
    monkeypatch.setattr(bands, "PIXELS", 1)
    monkeypatch.setattr(maps, "PIECE", 150)
    options = {"short_side": 0, "crop": 92, "stride": 60}  # no multiple of the patches, so maps reach beyond
    segmenter = local = fastzs.load(model, weights="shapes", **options)
    if model == "naclip":
        local = fastzs.load(model, weights="shapes", refine="none", **options)
        segmenter.model.readout = replace(segmenter.model.readout, area=0.2)
        assert segmenter.model.readout.refine == "pamr"
    path = write(tmp_path / "a.tif", scene.numpy())
    for settings in ({}, {"background": "threshold"}):
        question = segmenter.question(NAMES, **settings)
        target = tmp_path / f"labels{len(settings)}"
        segment_map(path, target, segmenter, question, Wanted())
        whole = local(scene, NAMES, **settings)
        found = labels(f"{target}.tif")
        assert len(np.unique(found)) >= 3
        assert np.array_equal(found, whole.labels.numpy())


def test_place_and_form_of_the_result(tmp_path):
    segmenter = Brightness()
    path = write(tmp_path / "a.tif", noise(4, 700, 1100), nodata=7)
    run(path, tmp_path / "out", segmenter)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.crs, file.transform, file.shape) == (PLACE["crs"], PLACE["transform"], (700, 1100))
        assert (file.nodata, file.dtypes, file.count) == (255, ("uint8",), 1)
        assert (file.block_shapes, file.compression.name) == ([(512, 512)], "deflate")
        assert file.overviews(1) == [2, 4]
        assert json.loads(file.tags()["fastzs.names"]) == list(segmenter.question().names)
        assert file.colormap(1)[0] == (128, 0, 0, 255)
        assert 0.9 < file.read_masks(1).astype(bool).mean() <= 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tif", "out.tif"]


def test_windows_without_data_do_not_run(tmp_path):
    image = noise(3, 320, 320)
    image[image == 0] = 1
    image[:, 100:, 100:] = 0
    segmenter, all_of_them = Brightness(), Brightness()
    run(write(tmp_path / "b.tif", image), tmp_path / "all", all_of_them)
    run(write(tmp_path / "a.tif", image, nodata=0), tmp_path / "some", segmenter)
    assert all_of_them.seen == 13 * 13
    assert segmenter.seen == 13 * 13 - 8 * 8
    found, complete = labels(tmp_path / "some.tif"), labels(tmp_path / "all.tif")
    assert (found[100:, 100:] == 255).all()
    known = np.ones_like(found, bool)
    known[100:, 100:] = False
    assert np.array_equal(found[known], complete[known])


def test_scaled_and_without_a_reference_system(tmp_path):
    segmenter = Brightness()
    path = write(tmp_path / "a.tif", noise(1, 200, 300, dtype=np.uint16, high=4000), place={})
    for scale, size in ((0.5, (100, 150)), (1.0, (200, 300))):
        target = tmp_path / f"out{scale}"
        run(path, target, segmenter, scale=scale, tolerance=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(f"{target}.tif") as file:
                assert (file.crs, file.shape) == (None, size)
                assert file.transform.a == 1 / scale
        features = json.loads(Path(f"{target}.geojson").read_text())["features"]
        assert max(x for f in features for x, _ in f["geometry"]["coordinates"][0]) == 300  # pixels of the map


def test_polygons_cover_the_map_without_gaps(tmp_path):
    shapely = pytest.importorskip("shapely", reason="needs the extra 'geo'")
    from rasterio.warp import transform_geom

    segmenter = Brightness()
    steps = np.add.outer(np.arange(200) // 2, np.arange(240) // 3) % 200
    path = write(tmp_path / "a.tif", np.stack([steps.astype(np.uint8)] * 3))
    for tolerance in (0.0, 30.0):
        target = tmp_path / f"out{tolerance:.0f}"
        run(path, target, segmenter, tolerance=tolerance)
        features = json.loads(Path(f"{target}.geojson").read_text())["features"]
        shapes = [
            shapely.geometry.shape(transform_geom("OGC:CRS84", PLACE["crs"], feature["geometry"]))
            for feature in features
        ]
        area = sum(shape.area for shape in shapes)
        found = labels(f"{target}.tif")
        corners = sum(len(shapely.get_coordinates(shape)) for shape in shapes)
        if tolerance == 0:
            exact = corners
            assert area == pytest.approx(found.size * 100, rel=1e-6)
            for label in np.unique(found):
                mine = [s.area for s, f in zip(shapes, features, strict=True) if f["properties"]["label"] == label]
                assert sum(mine) == pytest.approx((found == label).sum() * 100, rel=1e-6)
                assert all(f["properties"]["class"] == f"level {f['properties']['label']}" for f in features)
        else:
            assert corners < exact / 3
            union = shapely.union_all(shapes)
            assert area == pytest.approx(union.area, rel=1e-6)  # no overlaps
            assert len(shapely.get_coordinates(union)) < 40  # and no holes along the borders


@pytest.mark.parametrize("place", [PLACE, {}], ids=["georeferenced", "not georeferenced"])
def test_polygons_as_a_geopackage(tmp_path, place):
    """In the map's own coordinates, and with its reference system, if it has one."""
    shapely = pytest.importorskip("shapely", reason="needs the extra 'geo'")
    pyogrio = pytest.importorskip("pyogrio", reason="needs the extra 'geo'")
    path = write(tmp_path / "a.tif", noise(3, 200, 240), place=place)
    run(path, tmp_path / "out", Brightness(), tolerance=0, form="gpkg")
    meta, _, shapes, (classes, numbers) = pyogrio.raw.read(tmp_path / "out.gpkg")
    assert (meta["fields"].tolist(), meta["crs"]) == (["class", "label"], place.get("crs"))
    assert pyogrio.list_layers(tmp_path / "out.gpkg").tolist() == [["out", "Polygon"]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        found = labels(tmp_path / "out.tif")
    areas, pixel = shapely.area(shapely.from_wkb(shapes)), 100 if place else 1
    for label in np.unique(found):
        assert areas[numbers == label].sum() == (found == label).sum() * pixel
    assert classes.tolist() == [f"level {label}" for label in numbers]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tif", "out.gpkg", "out.tif"]


def test_polygons_that_have_no_longitudes(tmp_path):
    """A plan in metres of a building, say: its label map is there, and the message says what went wrong."""
    place = {"crs": 'LOCAL_CS["plan",UNIT["metre",1]]', "transform": PLACE["transform"]}
    path = write(tmp_path / "a.tif", noise(3, 40, 40), place=place)
    with pytest.raises(MapError, match=r"out\.geojson: its polygons cannot be written as GeoJSON"):
        run(path, tmp_path / "out", Brightness(), tolerance=0)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tif", "out.tif"]


def test_a_result_that_exists_is_kept(tmp_path):
    segmenter = Brightness()
    path = write(tmp_path / "a.tif", noise(3, 40, 40))
    (tmp_path / "out.geojson").write_text("mine")
    with pytest.raises(MapError, match=r"a\.tif: .*out\.geojson exists already; remove it"):
        run(path, tmp_path / "out", segmenter, tolerance=1)
    run(path, tmp_path / "out", segmenter)
    with pytest.raises(MapError, match=r"a\.tif: .*out\.tif exists already; remove it"):
        run(path, tmp_path / "out", segmenter)


def test_damage_and_interrupts_leave_nothing(tmp_path):
    path = write(tmp_path / "a.tif", noise(3, 400, 400), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    segmenter = Brightness()

    def step(windows):
        if segmenter.seen > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, tmp_path / "out", segmenter, step=step)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    with pytest.raises(MapError, match=r"a\.tif: cannot be read"):
        run(path, tmp_path / "out", segmenter)
    with pytest.raises(OutputError, match=r"cannot write .*gone"):
        run(write(tmp_path / "b.tif", noise(3, 40, 40)), tmp_path / "gone" / "b", segmenter)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.tif", "b.tif"]


def test_gdal_keeps_what_neighbouring_windows_share(tmp_path):
    """rasterio takes the bound in bytes, GDAL itself in megabytes. Nothing kept is ten times the work."""
    from rasterio._env import get_gdal_config

    before, kept = get_gdal_config("GDAL_CACHEMAX"), []
    path = write(tmp_path / "a.tif", noise(3, 40, 40))
    run(path, tmp_path / "out", Brightness(), step=lambda windows: kept.append(get_gdal_config("GDAL_CACHEMAX")))
    assert 64e6 < kept[0] < 256e6
    assert get_gdal_config("GDAL_CACHEMAX") == before


def test_more_than_255_names(tmp_path):
    segmenter = Brightness(count=300)
    path = write(tmp_path / "a.tif", noise(3, 40, 40))
    run(path, tmp_path / "out", segmenter)
    with rasterio.open(tmp_path / "out.tif") as file:
        assert (file.dtypes, file.nodata) == (("uint16",), 65535)


def test_stitched_windows_are_refused(tmp_path):
    segmenter = Brightness()
    segmenter.windows = "stitched"
    with pytest.raises(ValueError, match="looks at the whole image at once"):
        run(write(tmp_path / "a.tif", noise(3, 40, 40)), tmp_path / "out", segmenter)


def test_without_packages(tmp_path, monkeypatch):
    segmenter = Brightness()
    path = write(tmp_path / "a.tif", noise(3, 40, 40))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"^maps need rasterio, which is not installed: pip"):
        run(path, tmp_path / "out", segmenter)
    for package in ("shapely", "pyogrio"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, package=package: name if name != package else None)
        with pytest.raises(MissingPackage, match=f"polygons of maps need {package}"):
            run(path, tmp_path / "out", segmenter, tolerance=1)


def test_the_command(tmp_path, scene, capsys):
    path = write(tmp_path / "a.tif", np.concatenate([scene.numpy(), scene.numpy()[:1]]))
    command = ["map", str(path), "--weights", "shapes", "--classes", ",".join(NAMES), "--output", str(tmp_path / "out")]
    assert main([*command, "--bands", "3,2,1", "--polygons", "20"]) == 0
    assert "1 of 1 maps segmented" in capsys.readouterr().out
    segmenter = fastzs.load(weights="shapes", short_side=0)
    assert np.array_equal(labels(tmp_path / "out" / "a.tif"), segmenter(scene.flip(0), NAMES).labels.numpy())
    assert json.loads((tmp_path / "out" / "a.geojson").read_text())["features"]
    with rasterio.open(tmp_path / "out" / "a.tif") as file:
        assert json.loads(file.tags()["fastzs.settings"])["model"] == "MaskCLIP"
    assert main(command) == 1
    assert "a.tif exists already; remove it, or give another --output" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "no maps given"),
        (["a.tif", "sub/a.tif"], "another map is called a"),
        (["a.tif", "--bands", "red"], "--bands: expected numbers separated by commas, got red"),
        (["a.tif", "--range", "9"], "--range: expected a lower and an upper value, as 0,3000, got 9"),
        (["a.tif", "--range", "9,2"], "--range: expected a lower and an upper value, got 9 and 2"),
        (["a.tif", "--scale", "0"], "--scale: expected a number above 0"),
        (["a.tif", "--polygons", "-1"], "--polygons: expected a tolerance of 0 or more"),
        (["a.tif", "--refine", "pamr"], "--refine pamr follows the edges of whole images"),
    ],
)
def test_arguments_that_will_not_do(tmp_path, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(tmp_path)
    assert main(["map", *arguments, "--classes", "disc,star", "--output", "out"]) == 2
    assert match in capsys.readouterr().err
    assert not os.path.exists("out")


def growth(path, target):
    """Segment a map of 20 names and give by how much the process grew, in MB, and the number of windows.

    GDAL keeps little here, so that it has done so soon.
    """

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    maps.CACHE = 8 << 20
    segmenter, sizes = Brightness(crop=512, stride=340, count=20), [resident()]
    run(Path(path), Path(target), segmenter, step=lambda _: sizes.append(resident()))
    return max(sizes) - sizes[0], segmenter.seen


@pytest.mark.slow
def test_memory_does_not_grow_with_the_height(tmp_path):
    """What the second has more has 162 MB as 8-bit pixels; 20 names at its size would have 5.8 GB.

    In processes of their own, whose memory nothing else has used before.
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    program = "import sys; from tests.maps.test_run import growth; print(*growth(*sys.argv[1:]))"
    width, grew = 6000, []
    strip = noise(3, 256, width // 8, dtype=np.uint16, high=4000).repeat(8, 2)
    options = {"driver": "GTiff", "count": 3, "width": width, "dtype": "uint16", "compress": "deflate"}
    for height in (3000, 12000):
        path = tmp_path / f"{height}.tif"
        with rasterio.open(
            path, "w", height=height, tiled=True, blockxsize=256, blockysize=256, **options, **PLACE
        ) as file:
            for top in range(0, height, 256):
                rows = min(256, height - top)
                file.write(strip[:, :rows], window=rasterio.windows.Window(0, top, width, rows))
        command = [sys.executable, "-c", program, str(path), str(tmp_path / f"out{height}")]
        ran = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        megabytes, windows = map(float, ran.stdout.split())
        assert windows == 18 * (-(-(height - 512) // 340) + 1)
        grew.append(megabytes)
    assert grew[1] - grew[0] < 100
