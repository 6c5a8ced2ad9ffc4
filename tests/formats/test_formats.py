"""Every format is read back by a tool's own reader, or by its published layout, and gives the labels again."""

import json
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import supervision as sv
import torch
import yaml
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from fastzs.formats import FORMATS
from fastzs.formats.convert import convert
from fastzs.formats.label_studio import brush
from fastzs.formats.polygons import polygons
from fastzs.result import Segmentation

NAMES = ("road", "a/b <script>alert(1)</script>", 'two\nlines & "quotes"', "background")
PLAIN = ("road", "car", "sky", "background")
FILES = {"one.png": (24, 31), "sub/two.png": (9, 40)}


def ids(size, seed):
    """Blobs with holes, and single pixels: int [H, W], 0 for no class."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 4, (-(-size[0] // 5), -(-size[1] // 5)))
    out = coarse.repeat(5, 0).repeat(5, 1)[: size[0], : size[1]]
    some = rng.random(size) < 0.15
    return np.where(some, rng.integers(0, 4, size), out)


@pytest.fixture
def maps(tmp_path):
    """A folder of label maps, of images beside it, and the ids that are right, by file."""

    def write(names=NAMES):
        right = {}
        for i, (file, size) in enumerate(FILES.items()):
            right[file] = ids(size, i)
            labels = torch.from_numpy(((right[file] - 1) % 4).astype(np.uint8))
            for folder in ("maps", "pictures"):
                (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
            Segmentation(labels, names).save(tmp_path / "maps" / file)
            Image.new("RGB", size[::-1]).save(tmp_path / "pictures" / file)
        return right

    return write


def converted(tmp_path, form):
    assert convert(tmp_path / "maps", form, tmp_path / "out") == len(FILES)
    return tmp_path / "out"


def painted(detections, size, first=1):
    """The ids that masks of supervision stand for; no two masks may share a pixel."""
    out = np.zeros(size, int)
    for mask, label in zip(detections.mask, detections.class_id, strict=True):
        assert not out[mask].any()
        out[mask] = label + first
    return out


def test_coco(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "coco")
    data = COCO(out / "coco.json")
    assert [one["name"] for one in data.loadCats(data.getCatIds())] == list(NAMES[:3])
    assert sorted(data.getImgIds()) == [1, 2]
    assert sorted(data.getAnnIds()) == list(range(1, len(data.getAnnIds()) + 1))
    for image in data.loadImgs(data.getImgIds()):
        found = np.zeros((image["height"], image["width"]), int)
        for one in data.loadAnns(data.getAnnIds(image["id"])):
            found += data.annToMask(one).astype(int) * one["category_id"]
            assert one["area"] == coco_mask.area(one["segmentation"])
        assert np.array_equal(found, right[image["file_name"]])
    dataset = sv.DetectionDataset.from_coco(str(tmp_path / "pictures"), str(out / "coco.json"), force_masks=True)
    assert dataset.classes == list(NAMES[:3])
    for path, _, found in dataset:
        file = next(file for file in FILES if path.endswith(file))
        assert np.array_equal(painted(found, FILES[file]), right[file])


def test_panoptic(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "panoptic")
    content = json.loads((out / "panoptic.json").read_text())
    files = {image["id"]: image["file_name"] for image in content["images"]}
    assert [one["id"] for one in content["categories"]] == [1, 2, 3]
    for one in content["annotations"]:
        with Image.open(out / "panoptic" / one["file_name"]) as image:
            pixels = np.asarray(image).astype(int)
        found = pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]
        assert np.array_equal(found, right[files[one["image_id"]]])
        for segment in one["segments_info"]:
            rows, columns = np.nonzero(found == segment["id"])
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert (segment["area"], segment["bbox"]) == (len(rows), box)


def test_cvat(tmp_path, maps):
    right, out = maps(PLAIN), converted(tmp_path, "cvat")
    lines = [line for line in (out / "labelmap.txt").read_text().splitlines() if line[0] != "#"]
    colours = {tuple(map(int, line.split(":")[1].split(","))): line.split(":")[0] for line in lines}
    assert sorted(colours.values()) == sorted(PLAIN)
    assert (out / "ImageSets/Segmentation/default.txt").read_text().splitlines() == ["one", "sub/two"]
    for file, wanted in right.items():
        for folder in ("SegmentationClass", "SegmentationObject"):
            with Image.open(out / folder / file) as image:
                pixels = np.asarray(image)
            found = np.array([[PLAIN.index(colours[tuple(p)]) for p in row] for row in pixels.tolist()])
            assert np.array_equal((found + 1) % 4, wanted)


def bits_of(code):
    return "".join(f"{byte:08b}" for byte in code)


def decoded(code):
    """What rle-pack reads."""
    bits, at = bits_of(code), 0

    def read(width):
        nonlocal at
        at += width
        return int(bits[at - width : at], 2)

    count, width = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    out = []
    while len(out) < count:
        run = read(1)
        length = read(widths[read(2)]) + 1
        out += [read(width)] * length if run else [read(width) for _ in range(length)]
    assert len(bits) - at < 8
    return np.array(out)


@pytest.mark.parametrize("mask", [np.ones((1, 1), bool), np.zeros((160, 250), bool), ids((24, 31), 3) == 2])
def test_brush_of_label_studio(mask):
    """Runs beyond 65536 values are parted."""
    values = decoded(brush(mask)).reshape(*mask.shape, 4)
    assert np.array_equal(values, np.where(mask, 255, 0)[..., None].repeat(4, -1))


@pytest.mark.slow
def test_brush_as_label_studio_reads_it():
    brushes = pytest.importorskip("label_studio_sdk.converter.brush", reason="label-studio-sdk is not installed")
    mask = ids((160, 250), 3) == 2
    values = brushes.decode_rle(brush(mask)).reshape(*mask.shape, 4)
    assert np.array_equal(values, np.where(mask, 255, 0)[..., None].repeat(4, -1))


def test_label_studio(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "label-studio")
    for task in json.loads((out / "tasks.json").read_text()):
        wanted = right[task["data"]["image"].removeprefix("/data/local-files/?d=")]
        found = np.zeros_like(wanted)
        for result in task["predictions"][0]["result"]:
            size = (result["original_height"], result["original_width"])
            value = result["value"]
            mask = decoded(value["rle"]).reshape(*size, 4)[..., 3] > 0
            found[mask] = NAMES.index(value["brushlabels"][0]) + 1
        assert np.array_equal(found, wanted)
    view = ElementTree.parse(out / "labels.xml")
    assert [label.get("value") for label in view.iter("Label")] == list(NAMES[:3])
    assert "<script>" not in (out / "labels.xml").read_text()


def test_labelme(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "labelme")
    for file, wanted in right.items():
        content = json.loads((out / file).with_suffix(".json").read_text())
        assert (content["imageHeight"], content["imageWidth"]) == FILES[file]
        found = Image.new("L", FILES[file][::-1])
        for shape in content["shapes"]:  # labelme draws them so
            points = [tuple(point) for point in shape["points"]]
            colour = NAMES.index(shape["label"]) + 1
            ImageDraw.Draw(found).polygon(points, outline=colour, fill=colour)
        assert np.array_equal(np.asarray(found), wanted)
    where = (str(tmp_path / "pictures"), str(out))
    (out / "convert.json").unlink()  # supervision takes every JSON file for labelme's
    dataset = sv.DetectionDataset.from_labelme(*where, force_masks=True)
    for path, _, found in dataset:
        if path.endswith("one.png"):
            found.class_id = np.array([NAMES.index(dataset.classes[i]) for i in found.class_id])
            assert np.array_equal(painted(found, FILES["one.png"]), right["one.png"])


def test_yolo(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "yolo")
    assert yaml.safe_load((out / "data.yaml").read_text())["names"] == dict(enumerate(NAMES[:3]))
    for file, wanted in right.items():
        folders = [str((tmp_path / "pictures" / file).parent), str((out / "labels" / file).parent)]
        dataset = sv.DetectionDataset.from_yolo(*folders, str(out / "data.yaml"), force_masks=True)
        assert dataset.classes == list(NAMES[:3])
        found = next(found for path, _, found in dataset if path.endswith(file))
        assert np.array_equal(painted(found, FILES[file]), wanted)
        lines = (out / "labels" / file).with_suffix(".txt").read_text().splitlines()
        cut = np.zeros(FILES[file], int)  # as Ultralytics does: cut off, not rounded
        for line in lines:
            points = np.array(line.split()[1:], np.float32).reshape(-1, 2) * FILES[file][::-1]
            cv2.fillPoly(cut := cut.astype(np.int32), [points.astype(np.int32)], int(line.split()[0]) + 1)
        assert np.array_equal(cut, wanted)


def test_npy(tmp_path, maps):
    right, out = maps(), converted(tmp_path, "npy")
    assert json.loads((out / "classes.json").read_text()) == {str(i + 1): name for i, name in enumerate(NAMES[:3])}
    for file, wanted in right.items():
        found = np.load((out / file).with_suffix(".npy"))
        assert found.dtype == np.int32  # by which napari knows labels from images
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(8))
def test_polygons_cover_a_mask_exactly(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((17, 23)) < (0.3, 0.5, 0.7, 0.9)[seed % 4]  # specks, mazes, holes in islands in holes
    total = np.zeros(mask.shape, np.uint8)
    for points in polygons(mask):
        one = np.zeros_like(total)
        assert len(points) >= 3
        total += cv2.fillPoly(one, [points], 1)
    assert np.array_equal(total, mask)


def test_detections_of_supervision():
    wanted = ids((24, 31), 0)
    scores = torch.rand(24, 31, generator=torch.Generator().manual_seed(0))
    result = Segmentation(torch.from_numpy(((wanted - 1) % 4).astype(np.uint8)), NAMES, scores)
    found = result.to_detections()
    assert found.data["class_name"].tolist() == list(NAMES[:3])
    assert np.array_equal(painted(found, (24, 31)), wanted)
    assert found.confidence[1] == pytest.approx(scores.numpy()[wanted == 2].mean(), abs=1e-6)
    empty = Segmentation(torch.zeros(2, 2, dtype=torch.uint8), ("background",))
    assert len(empty.to_detections()) == 0


def test_every_format_is_tested_and_documented():
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for one in FORMATS.values():
        assert f"test_{one.name.replace('-', '_')}" in globals()
        assert f"| `{one.name}` | {one.files} | {one.reader} |" in page
