"""Segment videos: frames through the same stages as images, results in parts that a killed run goes on from."""

import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from PIL import Image
from torch import Tensor

from fastzs.files import file_digest, file_state, write_atomically
from fastzs.outputs import OutputError, write_result
from fastzs.overlay import legend, tint
from fastzs.pipeline import Attempt, Read, ahead, problem_text, staged
from fastzs.result import Segmentation
from fastzs.runs import Manifest, Outcome, settings_hash
from fastzs.smoothing import Smoothing
from fastzs.video.clip import MAX_PIXELS, Clip, Frame, Place, VideoError
from fastzs.video.parts import FOLDER, FRAMES, OVERLAY, Parts
from fastzs.video.reel import PART, Reel, video_frame, why_no_overlay

if TYPE_CHECKING:
    from av import VideoFrame

SUMMARY = "video.json"
FRAMES_OF_A_PART = 100  # what a kill costs at most
OPACITY = 0.55


@dataclass(frozen=True)
class Wanted:
    """What is made of a video.

    Attributes:
        step: every so many-th frame.
        smooth: weight of what was before, see :class:`fastzs.smoothing.Smoothing`; 0: none.
        labels: write a label map of each frame.
        overlay: write a video of the labels drawn over the frames.
        also: what to write beside each label map: "scores", "probabilities".
        max_pixels: of a frame.

    Raises:
        ValueError: a number is out of range, or nothing is to be written.
    """

    step: int = 1
    smooth: float = 0.0
    labels: bool = True
    overlay: bool = False
    also: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"--frame-step: expected at least 1, got {self.step}")
        Smoothing(self.smooth)
        if not self.labels and not self.overlay:
            raise ValueError("of a video neither label maps nor an overlay are asked for, so nothing would be written")
        if not self.labels and self.also:
            raise ValueError(f"{' and '.join(self.also)} stand beside label maps; ask for those, too")

    def key(self, settings: str) -> str:
        """Identifies what decides the results of a frame, and that label maps are there."""
        return settings_hash({"settings": settings, "step": self.step, "smooth": self.smooth, "labels": self.labels})

    @property
    def endings(self) -> list[str]:
        """Of the files that are there when a video is done, after its name."""
        return [f"/{FRAMES}", f"/{SUMMARY}", *([OVERLAY] if self.overlay else [])]


class Stages(Protocol):
    """What is done with frames."""

    def frame(self, image: Tensor) -> Read:
        """A frame uint8 [3, H, W] as the model sees it, in any thread."""
        ...

    def label(self, images: Iterable[Any], **more: Any) -> Iterator[Segmentation]:
        """The results of some frames in their order; ``through`` is as of :meth:`fastzs.Segmenter.answer_views`."""
        ...


class Shot(NamedTuple):
    """How one frame went."""

    clip: Path
    place: Place
    problem: str | None = None
    ends: OutputError | None = None
    drawn: "VideoFrame | None" = None
    state: Tensor | None = None  # of the smoothing after this frame

    def failed(self, error: Exception) -> "Shot":
        return self._replace(problem=problem_text(self.clip, error))


class Labelled(NamedTuple):
    """The result of a frame."""

    result: Segmentation
    state: Tensor | None
    canvas: Image.Image | None  # with the legend, to be drawn on a copy of it

    @property
    def nbytes(self) -> int:
        return self.result.nbytes


class Counts(NamedTuple):
    """What came of a video: frames done, frames the model failed at, damaged packets and frames, missing frames."""

    done: int
    failed: int
    damaged: int
    missing: int

    @property
    def whole(self) -> bool:
        return not (self.failed or self.damaged or self.missing)

    def sentence(self, clip: Path) -> str:
        told = {"that the model failed at": self.failed, "damaged": self.damaged, "missing": self.missing}
        lost = ", ".join(f"{number} {what}" for what, number in told.items() if number)
        return f"{clip}: {self.done} frames done; {lost}"


def _segment_clip(
    path: Path,
    target: Path,
    settings: str,
    stages: Stages,
    wanted: Wanted,
    start: Callable[[int | None, int], None],
    step: Callable[[str | None], None],
) -> Counts:
    """Segment one video; the parts stay, so that whoever records it as done may still be killed.

    Raises:
        VideoError: it cannot be read, or no frame of it came out.
        OutputError: something cannot be written.
    """
    also = sorted(wanted.also)
    key = settings_hash({"of": wanted.key(settings), "overlay": wanted.overlay, "also": also, "file": file_state(path)})
    with Clip(path, wanted.max_pixels) as clip:
        if wanted.overlay and (reason := why_no_overlay()):
            raise VideoError(f"{path}: the overlay cannot be written: {reason}")
        parts = Parts(target, key)
        parts.begin()
        start(None if clip.count is None else -(-clip.count // wanted.step), parts.done)
        last = _do(clip, parts, target, stages, wanted, step)
        if not parts.done:
            raise VideoError(last or f"{path}: has no frame that can be decoded")
        parts.join(clip.time_base, Path(f"{target}{OVERLAY}") if wanted.overlay else None)
        counts = Counts(parts.done, parts.failed, clip.damaged, clip.missing())
    summary = {"video": str(path), "time_base": str(clip.time_base), "frame_step": wanted.step, **counts._asdict()}
    _write(target / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    return counts


def _do(
    clip: Clip, parts: Parts, target: Path, stages: Stages, wanted: Wanted, step: Callable[[str | None], None]
) -> str | None:
    """Do the frames behind the parts; the last problem."""
    smoothing = Smoothing(wanted.smooth, parts.state) if wanted.smooth else None
    canvas: Image.Image | None = None

    def read(frame: Frame) -> tuple[Any, Shot]:
        shot = Shot(clip.path, frame.place)
        try:
            return stages.frame(frame.image), shot
        except Exception as error:
            return None, shot.failed(error)

    def label(images: Iterable[Any]) -> Iterator[Labelled]:
        nonlocal canvas
        through = {} if smoothing is None else {"through": smoothing}
        for result in stages.label(images, **through):
            if canvas is None and wanted.overlay:
                canvas = _canvas(result)
            yield Labelled(result, None if smoothing is None else smoothing.state, canvas)

    problems: list[Exception] = []

    def frames() -> Generator[Frame]:
        """Frames until one cannot be read for a reason that is told afterwards; here the model would be blamed."""
        try:
            with closing(ahead(clip.frames(wanted.step, parts.read_to))) as read_ahead:
                yield from read_ahead
        except Exception as error:
            problems.append(error)

    reel: Reel | None = None
    done: list[Place] = []
    failures: list[int] = []  # those without a result come early
    last: str | None = None

    def close(shot: Shot) -> None:
        nonlocal done, failures, reel
        if reel is not None:
            reel.close()
        before = [index for index in failures if index < shot.place.index]
        parts.add(done, len(before), shot.state)
        done, failures, reel = [], [index for index in failures if index > shot.place.index], None

    shot: Any = None
    try:
        # Both are closed before the clip, which a thread of theirs reads.
        with (
            closing(frames()) as source,
            closing(staged(read, label, partial(_write_frame, target, wanted), source)) as shots,
        ):
            for attempt in shots:
                if attempt.ends is not None:
                    raise attempt.ends
                step(attempt.problem)
                if attempt.problem is not None:
                    last = attempt.problem
                    failures.append(attempt.place.index)
                    continue
                shot = attempt
                done.append(shot.place)
                if wanted.overlay:
                    begin = done[0].pts if parts.first is None else parts.first
                    reel = reel or Reel(parts.file(PART), clip.time_base, clip.rate or Fraction(25))
                    reel.add(shot.drawn, shot.place.pts - min(0, begin))
                if len(done) == FRAMES_OF_A_PART:
                    close(shot)
        if problems:
            raise problems[0]
        if done:
            close(shot)
        parts.failed += len(failures)
    finally:
        if reel is not None:
            reel.discard()
    return last


def _write_frame(target: Path, wanted: Wanted, labelled: Labelled, shot: Shot) -> Shot:
    try:
        if wanted.labels:
            write_result(labelled.result, shot.clip, target / f"{shot.place.index:08d}", wanted.also)
        drawn = None if labelled.canvas is None else video_frame(_drawn(labelled.result, labelled.canvas))
        return shot._replace(drawn=drawn, state=labelled.state)
    except OutputError as error:
        return shot._replace(problem=str(error), ends=OutputError(str(error)))
    except Exception as error:
        return shot.failed(error)


def _canvas(result: Segmentation) -> Image.Image:
    """Of even sides, with a legend of all names, since all frames have one size."""
    size = (result.labels.shape[0], result.labels.shape[1])
    plain = legend(result.names, range(len(result.names)), result.background, size)
    canvas = Image.new("RGB", (plain.width + plain.width % 2, plain.height + plain.height % 2), "white")
    canvas.paste(plain)
    return canvas


def _drawn(result: Segmentation, canvas: Image.Image) -> Image.Image:
    assert result.image is not None
    drawn = canvas.copy()
    pixels, labels = result.image.cpu().numpy(), result.labels.numpy()
    tint(drawn, pixels, labels, len(result.names), result.background, OPACITY)
    return drawn


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def segment_clips(
    clips: list[Path],
    folder: Path,
    settings: str,
    stages: Stages,
    wanted: Wanted,
    *,
    begin: Callable[[Path], None] = lambda clip: None,
    start: Callable[[int | None, int], None] = lambda total, done: None,
    step: Callable[[str | None], None] = lambda problem: None,
    tell: Callable[[str], None] = lambda sentence: None,
    outcome: Outcome | None = None,
    share: tuple[int, int] = (0, 1),
    pictures: Sequence[Path] = (),
) -> Outcome:
    """Segment the videos that are not done yet, each in parts, so that the next run goes on where one was killed.

    A video gives ``NAME/00000000.png`` and so on, numbered like its frames, ``NAME/frames.csv`` with their times,
    ``NAME/video.json`` with counts, and ``NAME_overlay.mp4``. What is damaged or missing in its file is counted and
    makes it a failed one, though the rest is there.

    Args:
        clips: video files, the same for all processes.
        folder: an existing output folder, see :func:`fastzs.locks.hold`.
        settings: hash of everything that decides the labels of an image.
        stages: read and label frames.
        wanted: what is made.
        begin: called with each video before it is read.
        start: called with the number of frames to do, if that is known, and of those that are done.
        step: called after each frame with what went wrong or None.
        tell: called with a sentence about each video that did not come out whole.
        outcome, share: as of :func:`fastzs.runs.segment_pictures`.
        pictures: images of the same run, whose names in the folder come first.

    Raises:
        OutputError: something cannot be written. Any problem of a video is counted, and the others are done.
    """
    rank, world = share
    mine = clips[rank::world]
    outcome = Outcome(0) if outcome is None else outcome
    outcome.found = len(mine)
    manifest = Manifest(folder, rank)
    manifest.follow(clips)
    key = wanted.key(settings)
    names = manifest.names([*pictures, *clips])
    for clip in mine:
        name = names[clip]
        before = manifest.has(clip, key, wanted.endings)
        try:
            if before:
                counts = _counts(folder / name / SUMMARY)
            else:
                begin(clip)
                manifest.void([clip])
                _check_free(clip, folder / name, manifest)
                attempt = Attempt(clip, file_state(clip))
                counts = _segment_clip(clip, folder / name, settings, stages, wanted, start, step)
                attempt = attempt._replace(digest=file_digest(clip))
                manifest.add(attempt, key, name, [name + ending for ending in wanted.endings])
            Parts.remove(folder / name)
            if not counts.whole:
                raise VideoError(counts.sentence(clip))
        except OutputError:
            raise
        except Exception as error:
            outcome.failed[str(clip)] = problem_text(clip, error)
            tell(outcome.failed[str(clip)])
        else:
            outcome.skipped += before
            outcome.done += not before
    return outcome


def _check_free(clip: Path, target: Path, manifest: Manifest) -> None:
    """See that nothing of somebody else's stands where the results go."""
    if any(Path(line["name"]) == target.relative_to(manifest.folder) for line in manifest.lines.values()):
        return
    if target.exists() and not (target / FOLDER).is_dir():
        raise VideoError(f"{clip}: {target} exists and is of no run of fastzs; give another --output")
    overlay = Path(f"{target}{OVERLAY}")
    if overlay.exists() and not target.exists():
        raise VideoError(f"{clip}: {overlay} exists and is of no run of fastzs; give another --output")


def _counts(path: Path) -> Counts:
    summary = json.loads(path.read_bytes())
    return Counts(*(int(summary[name]) for name in Counts._fields))
