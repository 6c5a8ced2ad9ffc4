import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastzs.files import write_atomically
from fastzs.outputs import write_result
from fastzs.pictures import ImageError, find_pictures, read_picture
from fastzs.result import Segmentation
from fastzs.runs import (
    Attempt,
    Manifest,
    Outcome,
    OutputError,
    segment_pictures,
    settings_hash,
    write_record,
)


def fake(path):
    """Labels by brightness; what a real segmenter does, without a model."""
    picture = read_picture(path)
    return Segmentation((picture.float().mean(0) > 127).to(torch.uint8), ("dark", "bright"), image=picture)


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


class Stages:
    """Everything in the first stage, by one function of a path."""

    def __init__(self, segment=fake):
        self.segment = segment

    def read(self, picture):
        return SimpleNamespace(result=self.segment(picture), nbytes=1)

    def label(self, images):
        return (image.result for image in images)


def run(root, settings="s", segment=fake, **more):
    return segment_pictures(find_pictures([root / "in"]), Stages(segment), root / "out", settings, **more)


def test_writes_everything_and_names_by_folder(pictures):
    outcome = run(pictures, also=["overlay", "coco"])
    assert outcome == Outcome(found=4, done=4)
    assert outcome.complete
    stems = ["a", "b", "sub/a", "sub/deep/a"]
    endings = [".png", "_coco.json", "_overlay.jpg"]
    assert tree(pictures / "out") == sorted([*(s + e for s in stems for e in endings), "manifest.jsonl", "coco.json"])
    for stem, source in zip(stems, find_pictures([pictures / "in"]), strict=True):
        result = Segmentation.load(pictures / "out" / f"{stem}.png")
        assert torch.equal(result.labels, fake(source).labels)
        assert result.names == ("dark", "bright")


def test_coco_file_is_a_data_set(pictures, capsys):
    pytest.importorskip("pycocotools", reason="needs the extra 'export'")
    from pycocotools.coco import COCO

    run(pictures, also=["coco"])
    data = COCO(pictures / "out" / "sub" / "a_coco.json")
    labels = Segmentation.load(pictures / "out" / "sub" / "a.png").labels.numpy()
    rebuilt = np.full(labels.shape, 9)
    for annotation in data.loadAnns(data.getAnnIds(imgIds=[1])):
        rebuilt[data.annToMask(annotation).astype(bool)] = annotation["category_id"] - 1
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
        more, again = {"also": ["overlay"]}, ["a.png", "b.png", "sub/a.png", "sub/deep/a.png"]
    elif change == "half a line":
        manifest = pictures / "out" / "manifest.jsonl"
        manifest.write_bytes(manifest.read_bytes()[:-9])  # the last image's
        again = ["sub/deep/a.png"]
    else:
        (pictures / "out" / "manifest.jsonl").unlink()
        again = ["a.png", "b.png", "sub/a.png", "sub/deep/a.png"]
    seen = []

    def watch(path):
        seen.append(path.relative_to(pictures / "in").with_suffix(".png").as_posix())
        return fake(path)

    outcome = run(pictures, segment=watch, **more)
    assert sorted(seen) == again
    assert outcome == Outcome(found=4, skipped=4 - len(again), done=len(again))
    assert run(pictures, **more) == Outcome(found=4, skipped=4)
    labels = Segmentation.load(pictures / "out" / "a.png").labels
    assert torch.equal(labels, fake(pictures / "in" / "a.png").labels)


def test_results_may_come_in_any_order(pictures):
    run(pictures)
    (pictures / "out").rename(pictures / "in order")
    (pictures / "out").mkdir()
    (pictures / "in" / "words.png").write_text("no image")
    told = []

    def backwards(work, items):
        return work(items[::-1])

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
    # A later run with other images keeps away from what is there, and finds its own again.
    other = pictures / "elsewhere" / "a.png"
    other.parent.mkdir()
    Image.new("RGB", (3, 2)).save(other)
    for skipped in (0, 1):
        outcome = segment_pictures([other], Stages(), pictures / "out", "s")
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
    (pictures / "in" / "words.png").write_text("no image")
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


@pytest.mark.parametrize("odd", ["a.png", "b.jpg"])
def test_the_order_does_not_decide_what_a_problem_ends(pictures, odd):
    """The first image's problem is no more than another's, also when the run goes on."""

    def narrow(path):
        if path.name == odd and path.parent.name == "in":
            raise ValueError("this one is odd")
        return fake(path)

    for skipped, done in ((0, 3), (3, 0)):
        outcome = run(pictures, segment=narrow)
        assert (outcome.skipped, outcome.done) == (skipped, done)
        assert outcome.failed == {str(pictures / "in" / odd): f"{pictures / 'in' / odd}: ValueError: this one is odd"}


def test_full_disk_ends_the_run_and_names_the_file(pictures, monkeypatch):
    def full(path, data):
        if path.parent.name == "sub":
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, data)

    monkeypatch.setattr("fastzs.result.write_atomically", lambda path, data: full(Path(path), data))
    with pytest.raises(OutputError, match=r"cannot write .*sub.a\.png: No space left on device"):
        run(pictures)
    assert not (pictures / "out" / "sub" / "a.png").exists()
    monkeypatch.undo()
    assert run(pictures) == Outcome(found=4, skipped=2, done=2)


def test_full_disk_for_the_manifest(pictures):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (pictures / "out" / "manifest.jsonl").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"cannot write .*manifest\.jsonl: No space left on device"):
        Manifest.add(_manifest_at(pictures / "out"), Attempt(pictures / "in" / "a.png", [1, 2]), "s", "a", ["a.png"])


def _manifest_at(folder):
    manifest = Manifest.__new__(Manifest)  # reading /dev/full would not end
    manifest.folder, manifest.rank, manifest.lines, manifest.run = folder, 0, {}, 1
    return manifest


def test_an_overlay_too_wide_for_jpeg_is_the_pictures_problem(pictures):
    Image.new("RGB", (65600, 1)).save(pictures / "in" / "b.jpg", format="PNG")
    outcome = run(pictures, also=["overlay"])
    assert outcome.done == 3
    assert list(outcome.failed) == [str(pictures / "in" / "b.jpg")]


def test_manifest_survives_rubbish(tmp_path):
    (tmp_path / "manifest.jsonl").write_bytes(b'\xff\xfe\n{}\n[1]\n3\n{"image": "/x"}\nnull\n')
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
    assert issubclass(ImageError, ValueError)


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


def names_in(folder):
    return [name for name in tree(folder) if not name.startswith("manifest")]


@pytest.mark.parametrize("how", ["renamed", "copied", "edited", "above"])
def test_a_moved_folder_is_recognised(pictures, how):
    run(pictures)
    before = names_in(pictures / "out")
    if how == "above":
        os.mkdir(pictures / "up")
        (pictures / "in").rename(pictures / "up" / "in")
        root = pictures / "up"
    else:
        (pictures / "in").rename(pictures / "photos")
        root = pictures
    moved = pictures / "photos"
    if how == "copied":
        for path in moved.rglob("*.*"):
            os.utime(path, (1, 1))
    elif how == "edited":
        Image.new("RGB", (9, 9), "white").save(moved / "a.png")
    found = find_pictures([root / "in" if how == "above" else moved])
    outcome = segment_pictures(found, Stages(), pictures / "out", "s")
    skipped = {"renamed": 4, "above": 4, "copied": 0, "edited": 3}[how]
    assert (outcome.skipped, outcome.done) == (skipped, 4 - skipped)
    assert names_in(pictures / "out") == before
    assert segment_pictures(found, Stages(), pictures / "out", "other").done == 4
    assert names_in(pictures / "out") == before


def test_other_pictures_of_the_same_names_are_no_moved_ones(pictures):
    run(pictures)
    other = pictures / "other" / "a.png"
    other.parent.mkdir()
    Image.new("RGB", (5, 5), "white").save(other)
    kept = (pictures / "out" / "a.png").read_bytes()
    (pictures / "in").rename(pictures / "away")
    segment_pictures([other], Stages(), pictures / "out", "s")
    assert (pictures / "out" / "a.png").read_bytes() == kept
    # The folder comes back, and all have their names still.
    (pictures / "away").rename(pictures / "in")
    assert run(pictures) == Outcome(found=4, skipped=4)


def test_two_pictures_never_share_a_file(pictures):
    """Also where an older manifest says so, as two runs at once could leave it, or a folder that came back."""
    run(pictures)
    (pictures / "in").rename(pictures / "moved")
    moved = find_pictures([pictures / "moved"])
    segment_pictures(moved, Stages(), pictures / "out", "t")
    for path in moved:
        target = pictures / "in" / path.relative_to(pictures / "moved")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 3), "white").save(target)
    both = [*find_pictures([pictures / "in"]), *moved]
    names = Manifest(pictures / "out").names(both)
    assert len({name.casefold() for name in names.values()}) == 8
    assert segment_pictures(both, Stages(), pictures / "out", "t").done == 4


def test_the_last_run_counts_in_whichever_file_its_lines_are(pictures):
    """Settings of a run on several processes, of a single one, and the first again."""
    for rank in (0, 1):
        run(pictures, settings="s", share=(rank, 2))
    run(pictures, settings="t")
    for rank in (0, 1):
        assert run(pictures, settings="s", share=(rank, 2)).done == 2
    assert run(pictures, settings="s") == Outcome(found=4, skipped=4)
    assert run(pictures, settings="t").done == 4


@pytest.mark.parametrize("batch", [1, 4])
def test_a_crash_between_the_files_and_the_manifest(pictures, batch):
    """Label maps of new settings beside lines of the old ones are not taken for those."""
    run(pictures, settings="old", also=["overlay"])

    def crash(work, items):
        for start in range(0, len(items), batch):
            attempts = list(work(items[start : start + batch]))
            if start + batch >= len(items):
                raise KeyboardInterrupt
            yield from attempts

    with pytest.raises(KeyboardInterrupt):
        run(pictures, settings="new", through=crash)
    assert run(pictures, settings="old", also=["overlay"]) == Outcome(found=4, done=4)


def test_overlays_and_coco_of_other_settings_go(pictures):
    pytest.importorskip("pycocotools", reason="needs the extra 'export'")
    run(pictures, also=["overlay", "coco"])
    assert len(tree(pictures / "out")) == 4 * 3 + 2
    run(pictures, settings="other")
    assert tree(pictures / "out") == ["a.png", "b.png", "manifest.jsonl", "sub/a.png", "sub/deep/a.png"]
    (pictures / "out" / "coco.json").write_text('{"images": []}')  # somebody's own
    run(pictures, settings="third")
    assert (pictures / "out" / "coco.json").exists()


def test_one_coco_file_for_all(pictures):
    pytest.importorskip("pycocotools", reason="needs the extra 'export'")
    from pycocotools.coco import COCO

    (pictures / "in" / "words.png").write_text("no image")
    for rank in (1, 0):
        run(pictures, also=["coco"], share=(rank, 2))
    data = COCO(pictures / "out" / "coco.json")
    assert sorted(data.getImgIds()) == [1, 2, 3, 4]
    assert sorted(data.getCatIds()) == [1, 2]
    assert sorted(data.getAnnIds()) == list(range(1, len(data.getAnnIds()) + 1))
    for image in data.loadImgs(data.getImgIds()):
        labels = fake(Path(image["file_name"])).labels.numpy()
        rebuilt = np.zeros(labels.shape, int)
        for annotation in data.loadAnns(data.getAnnIds(imgIds=[image["id"]])):
            rebuilt[data.annToMask(annotation).astype(bool)] = annotation["category_id"]
        assert np.array_equal(rebuilt, labels + 1)
    Image.new("RGB", (4, 4)).save(pictures / "in" / "c.png")
    run(pictures, also=["coco"])
    assert len(COCO(pictures / "out" / "coco.json").getImgIds()) == 5


def test_names_too_long_for_the_endings(pictures):
    for stem in ("n" * 245, "n" * 244 + "m", "ж" * 120):
        Image.new("RGB", (4, 4), "white").save(pictures / "in" / f"{stem}.png")
    outcome = run(pictures, also=["overlay"])
    assert (outcome.done, outcome.failed) == (7, {})
    assert len(names_in(pictures / "out")) == 14
    assert run(pictures, also=["overlay"]) == Outcome(found=7, skipped=7)


def test_a_file_that_cannot_be_written_is_one_pictures_problem(pictures):
    """What stands in the way of one image does not end the others, and leaves nothing half done."""
    (pictures / "out" / "b_overlay.jpg").mkdir()
    outcome = run(pictures, also=["overlay"])
    assert outcome.done == 3
    said = outcome.failed[str(pictures / "in" / "b.jpg")]
    assert said.startswith(str(pictures / "in" / "b.jpg"))
    assert "Is a directory" in said
    assert not (pictures / "out" / "b.png").exists()


def test_photographs_in_the_output_folder_are_not_overwritten(pictures):
    photograph = pictures / "out" / "b.png"
    Image.new("RGB", (4, 4), "red").save(photograph)
    before = photograph.read_bytes()
    run(pictures)
    assert photograph.read_bytes() == before
    assert (pictures / "out" / "b-2.png").exists()


def test_records_of_more_processes_go(tmp_path):
    for rank in range(3):
        write_record(tmp_path, {}, (rank, 3))
    (tmp_path / "run-notes.json").touch()
    write_record(tmp_path, {}, (0, 2))
    assert tree(tmp_path) == ["run-1.json", "run-notes.json", "run.json"]


def test_whether_a_folder_can_be_written_costs_nobody_a_file(tmp_path):
    (tmp_path / "a.png").mkdir()  # in the way of the label map
    (tmp_path / "probe").write_text("somebody's")
    with pytest.raises(ImageError, match=r"cannot write .*a\.png"):
        write_result(Segmentation(torch.zeros(4, 4, dtype=torch.uint8), ("cat",)), Path("a.jpg"), tmp_path / "a", ())
    assert (tmp_path / "probe").read_text() == "somebody's"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "probe"]
