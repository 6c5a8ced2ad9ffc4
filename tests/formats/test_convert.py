"""``fastzs convert``: which label maps it takes, how it goes on, and what it refuses."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs.cli import main
from fastzs.result import Segmentation
from fastzs.runs import Attempt, Manifest

NAMES = ("road", "car", "background")


def label_map(path, names=NAMES, labels=((0, 1), (2, 0))):
    path.parent.mkdir(parents=True, exist_ok=True)
    Segmentation(torch.tensor(labels, dtype=torch.uint8), names).save(path)


def run(tmp_path, form, *more):
    return main(["convert", str(tmp_path / "maps"), "--format", form, "--output", str(tmp_path / "out"), *more])


def refused(capsys, code):
    assert code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("fastzs convert: ")
    return last


@pytest.mark.slow
def test_what_segment_wrote(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    Image.effect_noise((32, 24), 90).convert("RGB").save(tmp_path / "photos" / "a.jpg")
    arguments = ["--classes", "red,blue", "--weights", "shapes", "--overlay", "--scores", "--device", "cpu"]
    assert main(["segment", str(tmp_path / "photos"), "--output", str(tmp_path / "maps"), *arguments]) == 0
    assert run(tmp_path, "coco") == 0
    assert "1 label maps converted to coco" in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [(one["id"], one["file_name"]) for one in content["images"]] == [(1, "a.jpg")]


def test_the_manifest_tells_the_names_of_the_pictures(tmp_path, capsys):
    manifest = Manifest(tmp_path / "maps")
    for picture in ("a.jpg", "deep/b.webp"):
        name = picture.split(".")[0]
        label_map(tmp_path / "maps" / f"{name}.png")
        manifest.add(Attempt(tmp_path / "photos" / picture, [0, 0]), "", name, [f"{name}.png"])
    assert run(tmp_path, "coco") == 0
    content = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert [(one["id"], one["file_name"]) for one in content["images"]] == [(1, "a.jpg"), (2, "deep/b.webp")]
    again = ["convert", str(tmp_path / "maps"), "--format", "npy", "--output", str(tmp_path / "all")]
    assert main([*again, "--pictures", str(tmp_path)]) == 0
    assert (tmp_path / "all" / "photos" / "deep" / "b.npy").is_file()
    assert "lies outside of the folder" in refused(capsys, main([*again, "--pictures", str(tmp_path / "photos/deep")]))


def test_masks_without_names_need_them(tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    Image.fromarray(np.array([[0, 1, 255]], np.uint8)).save(tmp_path / "maps" / "a.png")
    assert "give them with --classes" in refused(capsys, run(tmp_path, "npy"))
    assert not (tmp_path / "out").exists()
    assert run(tmp_path, "npy", "--classes", "road,car") == 0
    assert np.load(tmp_path / "out" / "a.npy").tolist() == [[1, 2, 0]]  # 255 is ignored
    assert "expected labels 0 to 0 for 1 names, got 1" in refused(
        capsys,
        main(["convert", str(tmp_path / "maps"), "--format", "npy", "--classes", "x", "--output", f"{tmp_path}/o"]),
    )


def test_a_conversion_goes_on(tmp_path, monkeypatch):
    label_map(tmp_path / "maps" / "a.png")
    label_map(tmp_path / "maps" / "b.png")
    damaged = tmp_path / "maps" / "b.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-30])
    assert run(tmp_path, "npy") == 2
    assert sorted(os.listdir(tmp_path / "out")) == ["a.npy", "convert.json"]
    before = (tmp_path / "out" / "a.npy").stat().st_ino
    damaged.write_bytes(whole)
    assert run(tmp_path, "npy") == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["a.npy", "b.npy", "classes.json", "convert.json"]
    assert (tmp_path / "out" / "a.npy").stat().st_ino == before  # was not written again
    label_map(tmp_path / "maps" / "a.png", labels=((1, 1), (1, 1)))
    assert run(tmp_path, "npy") == 0
    assert np.load(tmp_path / "out" / "a.npy").tolist() == [[2, 2], [2, 2]]


def test_joined_files_are_written_whole_or_not_at_all(tmp_path, capsys):
    label_map(tmp_path / "maps" / "a.png")
    label_map(tmp_path / "maps" / "b.png")
    path = tmp_path / "maps" / "b.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert str(path) in refused(capsys, run(tmp_path, "coco"))
    assert os.listdir(tmp_path / "out") == ["convert.json"]


@pytest.mark.parametrize("there", ["photo.jpg", "convert.json"])
def test_other_files_in_the_output_are_refused(tmp_path, capsys, there):
    label_map(tmp_path / "maps" / "a.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / there).write_text("{}")
    assert "expected an empty folder" in refused(capsys, run(tmp_path, "coco"))
    assert os.listdir(tmp_path / "out") == [there]


def test_another_format_or_other_names_are_refused(tmp_path, capsys):
    label_map(tmp_path / "maps" / "a.png")
    assert run(tmp_path, "npy") == 0
    assert "it has npy files in it" in refused(capsys, run(tmp_path, "yolo"))
    assert "name another folder" in refused(capsys, run(tmp_path, "npy", "--classes", "a,b,background"))


def test_label_maps_of_two_vocabularies_are_refused(tmp_path, capsys):
    label_map(tmp_path / "maps" / "a.png")
    label_map(tmp_path / "maps" / "b.png", ("car", "road", "background"))
    said = refused(capsys, run(tmp_path, "coco"))
    assert "a.png has the names road, car, background" in said
    assert "b.png has car, road, background" in said
    (tmp_path / "maps" / "b.png").unlink()
    assert "expected 3 names" in refused(capsys, run(tmp_path, "coco", "--classes", "a,b"))


@pytest.mark.parametrize("name", ["a:b", "two\nlines", "#road", " road", "road\u2028car"])
def test_names_that_a_label_map_of_cvat_cannot_hold(tmp_path, capsys, name):
    label_map(tmp_path / "maps" / "a.png", (name, "car", "background"))
    assert "cannot stand in CVAT's labelmap.txt" in refused(capsys, run(tmp_path, "cvat"))
    assert run(tmp_path, "cvat", "--classes", "a/b,<b>,background") == 0  # nothing of the first try is in the way


def test_pictures_that_differ_in_the_suffix_only(tmp_path, capsys):
    (tmp_path / "maps").mkdir()
    for name in ("a.png", "A.tif"):
        Image.new("L", (4, 4)).save(tmp_path / "maps" / name)
    said = refused(capsys, run(tmp_path, "yolo", "--classes", "road"))
    assert "differs from another one only in its suffix" in said


@pytest.mark.parametrize(
    ("form", "message"),
    [("cocoa", "unknown format 'cocoa'; nearest known: coco"), ("x", "nearest known: coco, panoptic, cvat")],
)
def test_unknown_formats(tmp_path, capsys, form, message):
    assert message in refused(capsys, run(tmp_path, form))


def test_folders_without_label_maps(tmp_path, capsys):
    assert "expected a folder of label maps, got nothing" in refused(capsys, run(tmp_path, "coco"))
    (tmp_path / "maps").mkdir()
    assert "no label maps in it" in refused(capsys, run(tmp_path, "coco"))
    label_map(tmp_path / "maps" / "a.png", ("background",), ((0, 0), (0, 0)))
    assert "its only class is the background" in refused(capsys, run(tmp_path, "coco"))
    label_map(tmp_path / "maps" / "a.png")
    same = ["convert", str(tmp_path / "maps"), "--format", "npy", "--output", str(tmp_path / "maps" / ".")]
    assert "expected another folder than that of the label maps" in refused(capsys, main(same))


def test_a_missing_package_has_one_sentence(tmp_path, capsys, monkeypatch):
    label_map(tmp_path / "maps" / "a.png")
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "pip install 'fastzs[formats]'" in refused(capsys, run(tmp_path, "yolo"))
