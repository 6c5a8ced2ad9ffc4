import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs.pictures import PictureError, find_pictures, read_picture
from fastzs.result import Segmentation
from fastzs.runs import (
    Manifest,
    Outcome,
    OutputError,
    prepare_folder,
    segment_pictures,
    settings_hash,
    write_record,
)


def fake(path):
    """Labels by brightness; what a real segmenter does, without a model."""
    picture = read_picture(path)
    return Segmentation((picture.float().mean(0) > 127).to(torch.uint8), ("dark", "bright"), picture=picture)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("in/a.png", "in/b.jpg", "in/sub/a.png", "in/sub/deep/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "out").mkdir()
    return tmp_path


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def run(root, settings="s", segment=fake, **more):
    return segment_pictures(find_pictures([root / "in"]), segment, root / "out", settings, **more)


def test_writes_everything_and_names_by_folder(pictures):
    outcome = run(pictures, overlay=True, coco=True)
    assert outcome == Outcome(found=4, done=4)
    assert outcome.complete
    stems = ["a", "b", "sub/a", "sub/deep/a"]
    endings = [".png", "_coco.json", "_overlay.jpg"]
    assert tree(pictures / "out") == sorted([*(s + e for s in stems for e in endings), "manifest.jsonl"])
    for stem, source in zip(stems, find_pictures([pictures / "in"]), strict=True):
        result = Segmentation.load(pictures / "out" / f"{stem}.png")
        assert torch.equal(result.labels, fake(source).labels)
        assert result.names == ("dark", "bright")


def test_coco_file_is_a_data_set(pictures, capsys):
    pytest.importorskip("pycocotools", reason="needs the extra 'export'")
    from pycocotools.coco import COCO

    run(pictures, coco=True)
    data = COCO(pictures / "out" / "sub" / "a_coco.json")
    labels = Segmentation.load(pictures / "out" / "sub" / "a.png").labels.numpy()
    rebuilt = np.full(labels.shape, 9)
    for annotation in data.loadAnns(data.getAnnIds(imgIds=[1])):
        rebuilt[data.annToMask(annotation).astype(bool)] = annotation["category_id"]
    assert np.array_equal(rebuilt, labels)
    assert [c["name"] for c in data.loadCats(data.getCatIds())] == ["dark", "bright"]


def test_second_run_does_nothing(pictures):
    run(pictures)
    before = {path: (pictures / "out" / path).stat().st_mtime_ns for path in tree(pictures / "out")}

    def never(path):
        raise AssertionError(path)

    assert run(pictures, segment=never) == Outcome(found=4, skipped=4)
    assert before == {path: (pictures / "out" / path).stat().st_mtime_ns for path in tree(pictures / "out")}


@pytest.mark.parametrize("change", ["picture", "settings", "result gone", "overlay", "half a line", "no manifest"])
def test_what_changed_is_done_again(pictures, change):
    run(pictures)
    more: dict[str, Any] = {}
    again = ["a.png"]
    if change == "picture":
        Image.new("RGB", (9, 9), "white").save(pictures / "in" / "a.png")
    elif change == "settings":
        more, again = {"settings": "other"}, ["a.png", "b.png", "sub/a.png", "sub/deep/a.png"]
    elif change == "result gone":
        (pictures / "out" / "a.png").unlink()
    elif change == "overlay":
        more, again = {"overlay": True}, ["a.png", "b.png", "sub/a.png", "sub/deep/a.png"]
    elif change == "half a line":
        manifest = pictures / "out" / "manifest.jsonl"
        manifest.write_bytes(manifest.read_bytes()[:-9])  # the last picture's
        again = ["sub/deep/a.png"]
    else:
        (pictures / "out" / "manifest.jsonl").unlink()
        again = ["a.png", "b.png", "sub/a.png", "sub/deep/a.png"]
    seen = []

    def watch(path):
        seen.append(path.relative_to(pictures / "in").with_suffix(".png").as_posix())
        return fake(path)

    outcome = run(pictures, segment=watch, **more)
    assert seen == again
    assert outcome == Outcome(found=4, skipped=4 - len(again), done=len(again))
    assert run(pictures, **more) == Outcome(found=4, skipped=4)
    labels = Segmentation.load(pictures / "out" / "a.png").labels
    assert torch.equal(labels, fake(pictures / "in" / "a.png").labels)


def test_results_may_come_in_any_order(pictures):
    run(pictures)
    (pictures / "out").rename(pictures / "in order")
    (pictures / "out").mkdir()
    (pictures / "in" / "words.png").write_text("no picture")
    told = []

    def backwards(work, items):
        return map(work, reversed(items))

    outcome = run(pictures, through=backwards, step=lambda picture, problem: told.append(picture.name))
    assert (outcome.done, told[0]) == (4, "words.png")
    for name in tree(pictures / "in order"):
        ours, theirs = ((pictures / folder / name).read_bytes() for folder in ("out", "in order"))
        assert sorted(ours.splitlines()) == sorted(theirs.splitlines())


def test_going_on_after_an_interrupt(pictures):
    def interrupted(path):
        if path.name == "b.jpg":
            raise KeyboardInterrupt
        return fake(path)

    outcome = Outcome(4)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, segment=interrupted, outcome=outcome)
    assert outcome == Outcome(found=4, done=1)
    assert tree(pictures / "out") == ["a.png", "manifest.jsonl"]
    assert run(pictures) == Outcome(found=4, skipped=1, done=3)


def test_same_stem_in_one_folder_and_across_runs(pictures):
    Image.new("RGB", (4, 4)).save(pictures / "in" / "a.bmp")
    Image.new("RGB", (4, 4)).save(pictures / "in" / "A.gif")
    run(pictures)
    # In the order of their paths: A.gif, a.bmp, a.png.
    assert {"A.png", "a-2.png", "a-3.png"} <= set(tree(pictures / "out"))
    # A later run with other pictures keeps away from what is there, and finds its own again.
    other = pictures / "elsewhere" / "a.png"
    other.parent.mkdir()
    Image.new("RGB", (3, 2)).save(other)
    for skipped in (0, 1):
        outcome = segment_pictures([other], fake, pictures / "out", "s")
        assert (outcome.skipped, outcome.done) == (skipped, 1 - skipped)
    assert Segmentation.load(pictures / "out" / "a-4.png").labels.shape == (2, 3)
    assert run(pictures) == Outcome(found=6, skipped=6)
    # Names that differ in case only are the same file on some file systems.
    Image.new("RGB", (4, 4)).save(pictures / "in" / "B.gif")
    run(pictures)
    assert "B-2.png" in tree(pictures / "out")
    # Done again under other settings, each goes where it was.
    count = len(tree(pictures / "out"))
    run(pictures, settings="other")
    assert len(tree(pictures / "out")) == count


def test_broken_pictures_are_named_and_the_rest_is_done(pictures):
    (pictures / "in" / "b.jpg").write_bytes((pictures / "in" / "b.jpg").read_bytes()[:200])
    (pictures / "in" / "words.png").write_text("no picture")
    told = []
    outcome = run(pictures, step=lambda picture, problem: told.append((picture.name, problem)))
    assert (outcome.done, len(outcome.failed), outcome.complete) == (3, 2, False)
    for name in ("b.jpg", "words.png"):
        path = str(pictures / "in" / name)
        assert outcome.failed[path].startswith(path)
        assert (name, outcome.failed[path]) in told
    assert ("a.png", None) in told
    assert "b.png" not in tree(pictures / "out")
    again = run(pictures)
    assert (again.skipped, again.done, len(again.failed)) == (3, 0, 2)


def test_a_picture_the_model_cannot_take_is_counted(pictures):
    def narrow(path):
        if path.name == "b.jpg":
            raise RuntimeError("out of memory\nmore lines")
        return fake(path)

    outcome = run(pictures, segment=narrow)
    assert outcome.done == 3
    assert list(outcome.failed.values()) == [f"{pictures / 'in' / 'b.jpg'}: RuntimeError: out of memory"]


def test_settings_that_do_not_fit_end_the_run(pictures):
    def wrong(path):
        raise ValueError("no such background")

    with pytest.raises(ValueError, match="no such background"):
        run(pictures, segment=wrong)
    assert tree(pictures / "out") == []

    def later(path):
        if path.name == "b.jpg":
            raise ValueError("this one is odd")
        return fake(path)

    assert run(pictures, segment=later).done == 3


def test_full_disk_ends_the_run_and_names_the_file(pictures, monkeypatch):
    count = iter(range(100))

    def fsync(stream):
        if next(count) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OutputError, match=r"cannot write .*sub.a\.png: No space left on device"):
        run(pictures)
    assert tree(pictures / "out") == ["a.png", "b.png", "manifest.jsonl"]
    monkeypatch.undo()
    assert run(pictures) == Outcome(found=4, skipped=2, done=2)


def test_full_disk_for_the_manifest(pictures):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (pictures / "out" / "manifest.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"cannot write .*manifest\.jsonl: No space left on device"):
        Manifest.add(_manifest_at(pictures / "out"), pictures / "in" / "a.png", [1, 2], "s", "a", ["a.png"])


def _manifest_at(folder):
    manifest = Manifest.__new__(Manifest)  # reading /dev/full would not end
    manifest.folder, manifest.rank, manifest.lines = folder, 0, {}
    return manifest


def test_an_overlay_too_wide_for_jpeg_is_the_pictures_problem(pictures):
    Image.new("RGB", (65600, 1)).save(pictures / "in" / "b.jpg", format="PNG")
    outcome = run(pictures, overlay=True)
    assert outcome.done == 3
    assert list(outcome.failed) == [str(pictures / "in" / "b.jpg")]


def test_prepare_folder(tmp_path):
    prepare_folder(tmp_path / "new" / "deep")
    assert os.listdir(tmp_path / "new" / "deep") == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*file"):
        prepare_folder(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot write to the output folder .*Not a directory"):
        prepare_folder(tmp_path / "file" / "below")
    if os.path.isdir("/proc/self"):
        with pytest.raises(OutputError, match="cannot write to the output folder /proc"):
            prepare_folder(Path("/proc/fastzs"))


def test_manifest_survives_rubbish(tmp_path):
    (tmp_path / "manifest.jsonl").write_bytes(b'\xff\xfe\n{}\n[1]\n3\n{"picture": "/x"}\nnull\n')
    assert Manifest(tmp_path).lines == {}


def test_settings_hash():
    assert settings_hash({"a": 1, "b": [2]}) == settings_hash({"b": [2], "a": 1})
    assert settings_hash({"a": 1}) != settings_hash({"a": 2})


def test_record(tmp_path):
    write_record(tmp_path, {"names": ["狗"], "path": "odd\udcff"})
    assert json.loads((tmp_path / "run.json").read_text())["names"] == ["狗"]
    with pytest.raises(OutputError, match=r"cannot write .*run\.json"):
        write_record(tmp_path / "gone", {})


def test_outcome_is_live(pictures):
    counts, outcome = [], Outcome(4)
    run(pictures, step=lambda *_: counts.append(outcome.done), outcome=outcome)
    assert counts == [1, 2, 3, 4]


def test_picture_error_is_a_value_error():
    assert issubclass(PictureError, ValueError)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_processes_share_the_pictures_and_give_the_same_files(pictures, order):
    for name in ("a.jpg", "a.gif", "b.png"):  # each wants the name of another
        Image.new("RGB", (4, 3), "white").save(pictures / "in" / name)
    run(pictures)
    alone = pictures / "alone"
    (pictures / "out").rename(alone)
    (pictures / "out").mkdir()
    outcomes = [run(pictures, share=(rank, 3)) for rank in order]
    assert [outcome.done for outcome in outcomes] == [3 if rank == 0 else 2 for rank in order]
    files = tree(pictures / "out")
    assert {name for name in files if name.endswith("jsonl")} == {
        "manifest.jsonl", "manifest-1.jsonl", "manifest-2.jsonl"
    }  # fmt: skip
    labels = [name for name in tree(alone) if name.endswith(".png")]
    assert [name for name in files if name.endswith(".png")] == labels
    for name in labels:
        assert (pictures / "out" / name).read_bytes() == (alone / name).read_bytes()
    assert run(pictures) == Outcome(found=7, skipped=7)
    assert run(pictures, share=(1, 2)) == Outcome(found=3, skipped=3)
