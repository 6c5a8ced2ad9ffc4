import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastzs.files import write_atomically
from fastzs.overlay import draw_overlay, label_colours, voc_colours
from fastzs.result import Segmentation


def example(count=3, size=(6, 9), seed=0, background=False, **more):
    rng = np.random.default_rng(seed)
    names = [f"class {i}" for i in range(count)]
    if background:
        names[-1] = "background"
    labels = rng.integers(0, count, size).astype(np.uint8 if count <= 255 else np.int16)
    return Segmentation(torch.from_numpy(labels), tuple(names), **more)


def grey(size=(6, 9), value=100):
    return torch.full((3, *size), value, dtype=torch.uint8)


def same(a, b):
    assert a.labels.dtype == b.labels.dtype
    assert torch.equal(a.labels, b.labels)
    assert a.names == b.names


@pytest.mark.parametrize(
    ("count", "mode"), [(1, "P"), (2, "P"), (16, "P"), (255, "P"), (256, "P"), (257, "I;16"), (4000, "I;16")]
)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (40, 33)])
def test_save_and_load(tmp_path, count, mode, size):
    result = example(count, size)
    result.save(tmp_path / "labels.png")
    same(Segmentation.load(tmp_path / "labels.png"), result)
    with Image.open(tmp_path / "labels.png") as image:
        assert image.mode == mode
        assert image.size == (size[1], size[0])
        assert np.array_equal(np.asarray(image), result.labels.numpy())  # any reader gets the labels
    assert os.listdir(tmp_path) == ["labels.png"]


def test_largest_labels_survive(tmp_path):
    for count, dtype in ((255, torch.uint8), (256, torch.int16), (32768, torch.int16)):
        names = tuple(map(str, range(count)))
        result = Segmentation(torch.tensor([[0, count - 1]], dtype=dtype), names)
        result.save(tmp_path / "labels.png")
        same(Segmentation.load(tmp_path / "labels.png"), result)


@given(names=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_names_survive(tmp_path, names):
    result = Segmentation(torch.zeros(2, 3, dtype=torch.uint8), tuple(names))
    result.save(tmp_path / "labels.png")
    same(Segmentation.load(tmp_path / "labels.png"), result)


def test_saved_file_has_the_names_where_others_find_them(tmp_path):
    example(2).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        assert json.loads(image.info["fastzs.names"]) == ["class 0", "class 1"]


def test_load_refuses_other_pictures(tmp_path):
    Image.new("P", (3, 3)).save(tmp_path / "other.png")
    Image.new("RGB", (3, 3)).save(tmp_path / "other.jpg")
    for name in ("other.png", "other.jpg"):
        with pytest.raises(ValueError, match=f"{name}: has no names in it"):
            Segmentation.load(tmp_path / name)


def test_save_wants_png(tmp_path):
    with pytest.raises(ValueError, match=r"labels\.jpg: label maps are saved losslessly"):
        example().save(tmp_path / "labels.jpg")
    assert os.listdir(tmp_path) == []


def test_colours_are_those_of_voc():
    # The first 21 as printed in the VOC development kit.
    wanted = [
        (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
        (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128),
        (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
    ]  # fmt: skip
    assert voc_colours(21).tolist() == [list(colour) for colour in wanted]
    assert voc_colours(256)[255].tolist() == [224, 224, 192]
    assert len({tuple(c) for c in voc_colours(5000).tolist()}) == 5000


def test_background_is_black_in_the_file_and_classes_follow(tmp_path):
    example(4, background=True).save(tmp_path / "labels.png")
    with Image.open(tmp_path / "labels.png") as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)
    assert palette[:4].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 0]]
    assert len(palette) == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(2, 3, dtype=torch.int16)},
            r"expected torch.uint8 \[H, W\] for 2 .*got torch.int16",
        ),
        ({"labels": torch.zeros(6, dtype=torch.uint8)}, r"got torch.uint8 \[6\]"),
        ({"labels": torch.zeros(0, 6, dtype=torch.uint8)}, r"got torch.uint8 \[0, 6\]"),
        ({"labels": torch.full((2, 3), 2, dtype=torch.uint8)}, "labels: expected 0 to 1 for 2 names, got 2 to 2"),
        ({"scores": torch.zeros(3, 2)}, r"scores: expected torch.float32 \[2, 3\].*got torch.float32 \[3, 2\]"),
        ({"scores": torch.zeros(2, 3, dtype=torch.float64)}, "got torch.float64"),
        ({"image": grey((3, 2))}, r"image: expected shape \[3, 2, 3\] like the labels, got \[3, 3, 2\]"),
        ({"names": ()}, "for 0 names"),
        (
            {"names": tuple(map(str, range(300))), "labels": torch.full((2, 3), -1, dtype=torch.int16)},
            "got -1 to -1",
        ),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    good = {"labels": torch.zeros(2, 3, dtype=torch.uint8), "names": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        Segmentation(**{**good, **change})


def test_is_frozen():
    with pytest.raises(AttributeError):
        example().names = ("other",)  # pyright: ignore[reportAttributeAccessIssue]


def test_segments_like_hugging_face():
    labels = torch.tensor([[0, 0, 3], [3, 1, 3]], dtype=torch.uint8)
    scores = torch.tensor([[0.5, 1.0, 0.25], [0.5, 0.125, 0.75]])
    segments = Segmentation(labels, ("a", "b", "c", "background"), scores).segments
    assert [s["label"] for s in segments] == ["a", "b", "background"]
    assert [s["score"] for s in segments] == [0.75, 0.125, 0.5]
    assert [s["mask"].mode for s in segments] == ["L"] * 3
    assert [s["mask"].size for s in segments] == [(3, 2)] * 3
    assert np.asarray(segments[2]["mask"]).tolist() == [[0, 0, 255], [255, 0, 255]]
    assert (
        np.sum([s["mask"] for s in segments], axis=0, dtype=int).tolist() == [[255] * 3] * 2
    )  # every pixel is in one mask
    assert [s["score"] for s in Segmentation(labels, ("a", "b", "c", "d")).segments] == [None] * 3


@pytest.mark.parametrize(("count", "size"), [(1, (1, 1)), (5, (37, 23)), (300, (40, 50))])
def test_coco_round_trip(count, size):
    coco = pytest.importorskip("pycocotools.mask", reason="needs the extra 'formats'")
    result = example(count, size)
    annotations = result.to_coco(image_id=7)
    annotations = json.loads(json.dumps(annotations))
    labels = np.full(size, -1)
    for annotation in annotations:
        mask = coco.decode(annotation["segmentation"]).astype(bool)
        assert (labels[mask] == -1).all()
        labels[mask] = annotation["category_id"] - 1
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert annotation["bbox"] == box
        assert annotation["area"] == mask.sum()
        assert annotation["image_id"] == 7
    assert np.array_equal(labels, result.labels.numpy())
    assert [a["id"] for a in annotations] == list(range(1, len(annotations) + 1))


def test_coco_without_pycocotools(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastzs\[formats\]'"):
        example().to_coco()


def test_mask_of_a_name():
    result = example(3, background=True)
    assert torch.equal(result.mask("class 1"), result.labels == 1)
    assert result.mask("background").dtype == torch.bool
    with pytest.raises(ValueError, match=r"got 'clas 1'; nearest are 'class 1'"):
        result.mask("clas 1")


def test_overlay_blends_and_leaves_the_background(tmp_path):
    labels = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]], dtype=torch.uint8).repeat_interleave(8, 0)
    result = Segmentation(labels, ("a", "b", "background"), image=grey((16, 4)))
    image = result.overlay(tmp_path / "overlay.png", opacity=0.5)
    pixels = np.asarray(image)[:16, :4]
    assert pixels[0, 0].tolist() == [114, 50, 50]  # half of grey 100, half of (128, 0, 0)
    assert pixels[0, 3].tolist() == [50, 114, 50]
    assert (pixels[8:] == 100).all()
    assert np.asarray(image)[16:].size > 0
    with Image.open(tmp_path / "overlay.png") as written:
        assert np.array_equal(np.asarray(written), np.asarray(image))


@pytest.mark.parametrize("name", ["overlay.jpg", "overlay.PNG", "overlay.webp", "overlay.bmp"])
def test_overlay_formats(tmp_path, name):
    result = example(image=grey())
    image = result.overlay(tmp_path / name)
    with Image.open(tmp_path / name) as written:
        assert written.size == image.size


def test_overlay_legend_names_only_what_occurs():
    labels = torch.zeros(40, 200, dtype=torch.uint8)
    names = tuple(f"class {i}" for i in range(200))
    picture = grey((40, 200), 255)
    one = Segmentation(labels, names, image=picture).overlay(opacity=0)
    assert one.height < 80
    labels[0] = torch.arange(200, dtype=torch.uint8)
    assert Segmentation(labels, names, image=picture).overlay(opacity=0).height > 500
    # Each entry's square has the colour of its label.
    colours = {tuple(c) for c in np.asarray(one)[40:].reshape(-1, 3).tolist()}
    assert tuple(label_colours(200, None)[0].tolist()) in colours
    assert tuple(label_colours(200, None)[1].tolist()) not in colours


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (700, 900)])
def test_overlay_of_any_size_and_any_names(size):
    names = ("a", "two\nlines", "x" * 500, "狗 🐕", "")
    labels = torch.arange(size[0] * size[1]).remainder(5).to(torch.uint8).view(size)
    image = Segmentation(labels, names, image=grey(size)).overlay()
    assert image.width >= size[1]
    assert image.width < max(size[1], 1000)
    assert image.height > size[0]


def test_overlay_over_255_names():
    assert example(300, image=grey()).overlay().mode == "RGB"


def test_overlay_on_another_picture():
    result = example(2)
    with pytest.raises(ValueError, match="has no image; pass"):
        result.overlay()
    assert result.overlay(image=np.zeros((6, 9, 3), np.uint8)).width >= 9
    with pytest.raises(ValueError, match="image: expected 9 x 6 pixels like the labels, got 6 x 9"):
        result.overlay(image=np.zeros((9, 6, 3), np.uint8))


def test_overlay_refuses(tmp_path):
    result = example(image=grey())
    for name in ("overlay.xyz", "overlay"):
        with pytest.raises(ValueError, match="expected the suffix of an image format"):
            result.overlay(tmp_path / name)
    for opacity in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="opacity"):
            result.overlay(opacity=opacity)
    assert os.listdir(tmp_path) == []


def test_draw_overlay_does_not_change_its_inputs():
    picture, labels = np.full((3, 2, 5), 255, np.uint8), np.zeros((2, 5), np.uint8)
    draw_overlay(picture, labels, ("a",), None, 1.0)
    assert picture.min() == 255


def test_large_pictures_in_pieces(monkeypatch):
    result = example(5, (50, 41), background=True, image=torch.randint(256, (3, 50, 41), dtype=torch.uint8))
    whole = np.asarray(result.overlay())
    names = [segment["label"] for segment in result.segments]
    for piece in (1, 100, 2049, 2050):
        monkeypatch.setattr("fastzs.overlay.PIECE", piece)
        assert np.array_equal(np.asarray(result.overlay()), whole)
        assert [segment["label"] for segment in result.segments] == names


class FullDisk:
    """A file that takes a few bytes and then finds the disk full."""

    def __init__(self, stream, room):
        self.stream, self.room = stream, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.stream.write(data)

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *problem):
        self.stream.close()


@pytest.mark.parametrize("room", [0, 60])
@pytest.mark.parametrize("old", [None, b"what was there before"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, room, old):
    result = example(3, (60, 60), image=grey((60, 60)))
    targets = {"labels.png": result.save, "overlay.jpg": result.overlay}
    for name in targets if old else ():
        (tmp_path / name).write_bytes(old)
    full = lambda *a: FullDisk(open(*a), room)  # noqa: E731, SIM115
    monkeypatch.setattr("fastzs.files.open", full, raising=False)
    for name, write in targets.items():
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == sorted(targets if old else ())
    assert all((tmp_path / name).read_bytes() == old for name in os.listdir(tmp_path))


def test_no_folder_and_no_right_to_write(tmp_path):
    with pytest.raises(FileNotFoundError):
        example().save(tmp_path / "missing" / "labels.png")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        example().save(tmp_path / "file" / "labels.png")


def test_a_really_full_disk(tmp_path):
    """Once with a real file system of 64 KiB, where a private mount is allowed."""
    if not shutil.which("unshare") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root for a private mount")
    script = (
        "import torch, sys, os\n"
        "from fastzs.result import Segmentation\n"
        "labels = torch.randint(0, 200, (800, 800), dtype=torch.uint8)\n"
        "try:\n"
        "    Segmentation(labels, tuple(map(str, range(200)))).save(sys.argv[1] + '/labels.png')\n"
        "except OSError as error:\n"
        "    print(error.errno, os.listdir(sys.argv[1]))\n"
    )
    command = 'mount -t tmpfs -o size=64k none "$0" || exit 77; exec "$1" -c "$2" "$0"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", command, str(tmp_path), sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("a private mount is not allowed here")
    assert done.stdout.strip() == "28 []", done.stderr


def test_a_missing_folder_is_told_by_the_name_that_was_given(tmp_path):
    path = tmp_path / "missing" / "a.bin"
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(path, b"x")
    assert str(caught.value) == f"[Errno 2] No such file or directory: '{path}'"


def test_a_tilde_is_the_home_folder_in_saving_and_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    labels = torch.zeros(2, 3, dtype=torch.uint8)
    probabilities = torch.full((1, 2, 3), 0.5)
    result = Segmentation(labels, ("road",), scores=torch.zeros(2, 3), probabilities=probabilities)
    result.save("~/a.png")
    result.save_scores("~/b.png")
    result.save_probabilities("~/c.npz")
    result.overlay("~/d.png", image=torch.zeros(3, 2, 3, dtype=torch.uint8))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.npz", "d.png"]
    assert Segmentation.load("~/a.png").names == ("road",)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"~nobody-here/e\.png: there is no home folder that ~nobody-here could"):
        result.save("~nobody-here/e.png")
