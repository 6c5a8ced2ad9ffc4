import csv
import os
import re
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fastzs.cli import main
from fastzs.data.shapes import draw
from fastzs.result import Segmentation
from fastzs.runs import Outcome, OutputError
from fastzs.video import run as video
from fastzs.video.clip import Clip
from fastzs.video.run import Wanted, segment_clips
from tests.video.clips import write_clip

av = pytest.importorskip("av", reason="needs the extra 'video'")


class Stages:
    """Labels by brightness, through the smoothing where there is one; remembers the levels of the frames labelled."""

    def __init__(self, fails=lambda level: False):
        self.fails, self.levels = fails, []

    def frame(self, image):
        return SimpleNamespace(pixels=image, nbytes=image.nbytes)

    def label(self, images, through=lambda parts: parts):
        for image in images:
            level = image.pixels.float().mean()
            if self.fails(level):
                raise RuntimeError("too bright")
            self.levels.append(round(level.item()))
            (map_,) = through([image.pixels.float().mean(0)[None, None] / 256])
            labels = (map_[0, 0] * 100).to(torch.uint8)
            yield Segmentation(labels, tuple(map(str, range(100))), image=image.pixels)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    write_clip(tmp_path / "a.mp4", 23, level=lambda i: 10 * i, key=4)
    return tmp_path


def run(root, stages=None, clip="a.mp4", settings="s", **more):
    """``step`` is that of frames; ``told`` is called after each."""
    calls = {"step": more.pop("told")} if "told" in more else {}
    calls |= {name: more.pop(name) for name in ("tell",) if name in more}
    return segment_clips([root / clip], root / "out", settings, stages or Stages(), Wanted(**more), **calls)


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(Path(root).rglob("*")) if p.is_file()}


def times(path):
    with Clip(path) as clip:
        return [frame.place.pts * clip.time_base for frame in clip.frames()]


def test_label_maps_times_and_an_overlay(folder):
    assert run(folder, overlay=True, step=2) == Outcome(found=1, done=1)
    rows = list(csv.DictReader((folder / "out" / "a" / "frames.csv").read_text().splitlines()))
    exact = times(folder / "a.mp4")[::2]
    assert [Fraction(row["time_base"]) * int(row["pts"]) for row in rows] == exact
    assert [float(row["seconds"]) for row in rows] == pytest.approx([float(time) for time in exact], abs=1e-9)
    for row in rows:
        labels = Segmentation.load(folder / "out" / "a" / f"{int(row['frame']):08d}.png").labels
        assert abs(labels.float().mean() - int(row["frame"]) * 10 / 2.56) < 2
    assert len(list((folder / "out" / "a").glob("*.png"))) == len(rows) == 12
    assert times(folder / "out" / "a_overlay.mp4") == exact
    with Clip(folder / "out" / "a_overlay.mp4") as clip:
        assert clip.size[0] >= 64 and clip.size[1] > 48  # noqa: PT018
    assert not (folder / "out" / "a" / "parts").exists()
    stages = Stages()
    assert run(folder, stages, overlay=True, step=2) == Outcome(found=1, skipped=1)
    assert stages.levels == []


@pytest.mark.parametrize("shift", [0, -6000])
def test_an_overlay_begins_when_the_video_does_or_at_0(folder, monkeypatch, shift):
    write_clip(folder / "b.nut", 4, times=lambda i: 1000 + 3600 * i)  # a container that keeps any first time
    frames = Clip.frames

    def earlier(self, *given):
        for frame in frames(self, *given):
            yield frame._replace(place=frame.place._replace(pts=frame.place.pts + shift))

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "frames", earlier)
        exact = times(folder / "b.nut")
        assert run(folder, clip="b.nut", overlay=True, labels=False).done == 1
    assert exact[0] == Fraction(1000 + shift, 90000)
    assert times(folder / "out" / "b_overlay.mp4") == [time - min(0, exact[0]) for time in exact]


def test_the_overlay_alone(folder):
    assert run(folder, overlay=True, labels=False).done == 1
    assert sorted(files(folder / "out")) == ["a/frames.csv", "a/video.json", "a_overlay.mp4", "manifest.jsonl"]
    assert run(folder, overlay=True).done == 1
    assert len(list((folder / "out" / "a").glob("*.png"))) == 23
    assert run(folder, labels=True).skipped == 1


@pytest.mark.parametrize("smooth", [0.0, 0.8])
def test_a_killed_run_goes_on_and_gives_the_same_files(folder, monkeypatch, smooth):
    monkeypatch.setattr(video, "FRAMES_OF_A_PART", 5)
    whole = Stages()
    run(folder, whole, overlay=True, smooth=smooth)
    expected = files(folder / "out")
    (folder / "out").rename(folder / "whole")
    (folder / "out").mkdir()
    for kill in (3, 12, 4):
        count = 0

        def told(problem, kill=kill):
            nonlocal count
            count += 1
            if count == kill:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(folder, overlay=True, smooth=smooth, told=told)
        assert not (folder / "out" / "a_overlay.mp4").exists()
    rest = Stages()
    assert run(folder, rest, overlay=True, smooth=smooth).done == 1
    assert rest.levels == whole.levels[10:]  # two parts of five were whole
    found = files(folder / "out")
    assert found.keys() == expected.keys()
    for name in expected.keys() - {"manifest.jsonl"}:
        assert found[name] == expected[name], name


def test_parts_of_another_file_do_not_count(folder, monkeypatch):
    monkeypatch.setattr(video, "FRAMES_OF_A_PART", 5)

    def told(problem):
        if len(list((folder / "out" / "a").glob("*.png"))) > 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, told=told)
    write_clip(folder / "a.mp4", 23, level=lambda i: 200 - 5 * i)
    stages = Stages()
    assert run(folder, stages).done == 1
    assert len(stages.levels) == 23


def test_smoothing_lags(folder):
    run(folder, smooth=0.9)
    last = Segmentation.load(folder / "out" / "a" / "00000022.png").labels.float().mean()
    assert last < 60  # of 85 without


def test_other_settings_do_it_again_and_leave_nothing_behind(folder):
    run(folder, overlay=True)
    stages = Stages()
    assert run(folder, stages, settings="other", step=4).done == 1
    assert len(stages.levels) == 6
    names = sorted(files(folder / "out"))
    assert [name for name in names if name.endswith("png")] == [f"a/{i:08d}.png" for i in range(0, 23, 4)]
    assert "a_overlay.mp4" not in names
    assert run(folder, settings="other", step=4, smooth=0.5).done == 1


def test_a_truncated_video_gives_what_there_is_and_a_count(folder):
    path = folder / "b.mp4"
    write_clip(path, options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    for _ in range(2):
        told = []
        outcome = run(folder, clip="b.mp4", overlay=True, tell=told.append)
        assert not outcome.complete
        (sentence,) = outcome.failed.values()
        done = len(list((folder / "out" / "b").glob("*.png")))
        assert sentence.startswith(f"{path}: {done} frames done; ")
        damaged, missing = map(int, re.search(r"(\d+) damaged, (\d+) missing", sentence).groups())
        assert done + damaged + missing == 40
        assert missing > 10
        assert told == [sentence]
        assert len(times(folder / "out" / "b_overlay.mp4")) == done > 15


def test_frames_that_the_model_fails_at_are_counted(folder):
    outcome = run(folder, Stages(lambda level: 95 < level < 105))
    assert list(outcome.failed.values()) == [
        f"{folder / 'a.mp4'}: 22 frames done; 1 that the model failed at",
    ]
    assert not (folder / "out" / "a" / "00000010.png").exists()
    last = run(folder, Stages(lambda level: level > 215), settings="last")
    assert "22 frames done; 1 that the model failed at" in last.failed[str(folder / "a.mp4")]
    outcome = run(folder, Stages(lambda level: True), settings="other")
    assert list(outcome.failed.values()) == [f"{folder / 'a.mp4'}: RuntimeError: too bright"]


def test_a_video_without_frames_and_broken_ones_do_not_end_the_others(folder):
    write_clip(folder / "none.mkv", 0)
    write_clip(folder / "none.avi", 0)
    (folder / "words.mp4").write_text("words")
    clips = [folder / name for name in ("none.mkv", "none.avi", "words.mp4", "a.mp4")]
    outcome = segment_clips(clips, folder / "out", "s", Stages(), Wanted())
    assert (outcome.done, len(outcome.failed)) == (1, 3)
    assert outcome.failed[str(clips[0])] == f"{clips[0]}: ends before its first frame"
    assert outcome.failed[str(clips[1])] == f"{clips[1]}: has no frame that can be decoded"


def test_what_exists_already_is_not_overwritten(folder):
    (folder / "out" / "a").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "out" / "a" / "00000000.png")
    (sentence,) = run(folder).failed.values()
    assert (
        sentence
        == f"{folder / 'a.mp4'}: {folder / 'out' / 'a'} exists and is of no run of fastzs; give another --output"
    )
    (folder / "out" / "a").rename(folder / "photos")
    (folder / "out" / "a_overlay.mp4").write_text("mine")
    (sentence,) = run(folder, overlay=True).failed.values()
    assert "a_overlay.mp4 exists and is of no run" in sentence


def test_a_full_disk_ends_the_run(folder, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("fastzs.video.parts.write_atomically", full)
    with pytest.raises(OutputError, match=r"cannot write .*parts.000000\.json: No space left"):
        run(folder, overlay=True)
    monkeypatch.undo()
    assert run(folder, overlay=True).done == 1


def test_a_problem_of_reading_is_not_taken_for_the_end(folder, monkeypatch):
    frames = Clip.frames

    def broken(self, step, after):
        for frame in frames(self, step, after):
            if frame.place.index == 7:
                raise MemoryError("no more")
            yield frame

    monkeypatch.setattr(Clip, "frames", broken)
    (sentence,) = run(folder).failed.values()
    assert "MemoryError" in sentence
    assert not (folder / "out" / "a" / "frames.csv").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"step": 0}, "--frame-step: expected at least 1, got 0"),
        ({"smooth": 1.0}, "from 0 to below 1, got 1.0"),
        ({"labels": False}, "neither label maps nor an overlay"),
        ({"labels": False, "overlay": True, "also": ("scores",)}, "scores stand beside label maps"),
    ],
)
def test_settings_that_will_not_do(options, match):
    with pytest.raises(ValueError, match=match):
        Wanted(**options)


def test_the_command(tmp_path, capsys):
    """The built-in model: without smoothing frames are labelled as images are."""
    import fastzs

    names = ["disc", "star", "square"]
    scenes = draw(3, (64, 64), seed=5).images
    path, out = tmp_path / "scenes.mp4", tmp_path / "out"
    write_clip(path, 3, size=(64, 64), image=lambda i: scenes[i].permute(1, 2, 0).numpy())
    command = ["segment", str(path), "--weights", "shapes", "--classes", ",".join(names), "--output", str(out)]
    assert main([*command, "--overlay"]) == 0
    assert "1 of 1 videos segmented, 0 done before" in capsys.readouterr().out
    segmenter = fastzs.load(weights="shapes")
    with Clip(path) as clip:
        for frame in clip.frames():
            labels = Segmentation.load(out / "scenes" / f"{frame.place.index:08d}.png").labels
            assert torch.equal(labels, segmenter(frame.image, names).labels)
    assert main([*command, "--overlay"]) == 0
    assert "0 of 1 videos segmented, 1 done before" in capsys.readouterr().out
    assert main([*command, "--smooth", "0.5", "--overlay-only"]) == 0
    assert sorted(files(out)) == [
        "manifest.jsonl",
        "run.json",
        "scenes/frames.csv",
        "scenes/video.json",
        "scenes_overlay.mp4",
    ]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["a.mp4", "--engine", "ray"], "segmented by --engine plain"),
        (["a.mp4", "--coco"], "--coco is for images"),
        (["a.mp4", "--smooth", "2"], "from 0 to below 1, got 2"),
        (["photo.png", "--smooth", "0.5"], "are for videos, and none is given"),
    ],
)
def test_arguments_that_will_not_do(folder, monkeypatch, capsys, arguments, match):
    monkeypatch.chdir(folder)
    Image.new("RGB", (4, 4)).save("photo.png")
    assert main(["segment", *arguments, "--classes", "disc,star", "--output", "out"]) == 2
    assert match in capsys.readouterr().err


def test_without_pyav(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (sentence,) = run(folder).failed.values()
    assert sentence == f"{folder / 'a.mp4'}: videos need PyAV, which is not installed: pip install 'fastzs[video]'"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(tmp_path):
    """10,000 frames would take 184 MB if they were kept, and their label maps 61 MB."""

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    (tmp_path / "out").mkdir()
    write_clip(tmp_path / "a.mp4", 10_000, size=(64, 96), level=lambda i: i % 200, key=250)
    sizes = []
    outcome = run(tmp_path, overlay=True, labels=False, smooth=0.5, told=lambda problem: sizes.append(resident()))
    assert outcome.done == 1
    assert len(sizes) == 10_000
    assert max(sizes) - sizes[1000] < 40
