"""What ``fastzs segment`` does with videos."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from fastzs.commands.segment import Job
    from fastzs.locks import Hold
    from fastzs.runs import Outcome
    from fastzs.video.run import Wanted


def add_options(options: ArgumentParser) -> None:
    add = options.add_argument
    add("--overlay-only", action="store_true", help="of videos: write the overlay, and no label map of each frame")
    add("--frame-step", type=int, default=1, help="of videos: every so many-th frame")
    add(
        "--smooth",
        type=float,
        default=0.0,
        help="of videos: weight, from 0 to below 1, of the class maps of the frames before; 0 does not smooth",
    )


def found(config: Namespace, output: Path) -> tuple[list[Path], list[Path]]:
    """The images and the videos that the paths stand for.

    Raises:
        ImageError: a path matches nothing, or none is given.
        ValueError: an option that videos do not have.
    """
    from fastzs.pictures import find_pictures, is_web_address
    from fastzs.video.clip import SUFFIXES

    def is_clip(path: str) -> bool:
        return Path(path).suffix.lower() in SUFFIXES and not is_web_address(path) and os.path.isfile(expanded(path))

    def expanded(path: str) -> Path:
        return Path(os.path.expanduser(path))

    clips = sorted({os.path.abspath(expanded(path)): expanded(path) for path in config.paths if is_clip(path)}.values())
    others = [path for path in config.paths if not is_clip(path)]
    pictures = find_pictures(others, skip=output) if others or not clips else []
    if clips:
        wanted(config)
        if config.engine != "plain":
            raise ValueError(f"{clips[0]}: videos are segmented by --engine plain, whose processes torchrun can start")
        if config.coco:
            raise ValueError(f"{clips[0]}: --coco is for images; fastzs convert makes COCO of a video's label maps")
    elif config.overlay_only or config.smooth or config.frame_step != 1:
        raise ValueError("--overlay-only, --frame-step and --smooth are for videos, and none is given")
    return pictures, clips


def wanted(config: Namespace) -> "Wanted":
    """What is made of a video.

    Raises:
        ValueError: options that do not fit.
    """
    from fastzs.video.clip import MAX_PIXELS
    from fastzs.video.run import Wanted

    return Wanted(
        config.frame_step,
        config.smooth,
        not config.overlay_only,
        config.overlay or config.overlay_only,
        tuple(extra for extra in ("scores", "probabilities") if config[extra]),
        MAX_PIXELS if config.max_pixels is None else config.max_pixels,
    )


def segment(
    config: Namespace,
    clips: list[Path],
    job: "Job",
    folder: Path,
    settings: str,
    share: tuple[int, int],
    held: "Hold",
    outcome: "Outcome",
    pictures: list[Path],
) -> None:
    """Segment videos with a progress bar for each; see :func:`fastzs.video.run.segment_clips`."""
    from contextlib import ExitStack

    from fastzs.progress import ProgressBar
    from fastzs.video.run import segment_clips

    with ExitStack() as bars:
        bar: ProgressBar

        def begin(clip: Path) -> None:
            nonlocal bar
            bars.close()
            bar = bars.enter_context(ProgressBar(clip.name, "frame", shown=share[0] == 0))

        def start(total: int | None, done: int) -> None:
            bar.start(total)
            bar.advance(done)

        def step(problem: str | None) -> None:
            held.check()
            if problem is not None:
                bar.say(f"failed: {problem}")
            bar.advance()

        begin(clips[0])
        segment_clips(
            clips,
            folder,
            settings,
            job,
            wanted(config),
            begin=begin,
            start=start,
            step=step,
            tell=lambda sentence: bar.say(f"failed: {sentence}"),
            outcome=outcome,
            share=share,
            pictures=pictures,
        )
