"""``fastzs segment``: label every pixel of images."""

import logging
import os
import time
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from fastzs.commands import videos
from fastzs.commands.classes import given_classes
from fastzs.commands.options import add_regions, add_windows
from fastzs.commands.training_free import add_flags, model_options
from fastzs.needed import check_installed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from fastzs.locks import Hold
    from fastzs.ray_engine import Actors
    from fastzs.result import Segmentation
    from fastzs.segmenter import Segmenter
    from fastzs.views import View
    from fastzs.vocabulary import Vocabulary

log = logging.getLogger(__name__)
HELP = "label every pixel of images and videos"


def parser() -> ArgumentParser:
    options = ArgumentParser(
        description="Label every pixel of images with one of the classes. Writes an indexed PNG for each image, "
        "a manifest by which the same command goes on where it stopped, and run.json with all that was used. "
        "Started by torchrun, each process takes a share of the images; --engine ray shares them out among actors. "
        "Of a video, which is named by its file, each frame gets a PNG; docs/video.md has more."
    )
    add = options.add_argument
    add("paths", nargs="*", type=str, help="images, videos, folders of images, globs")
    add("--config", action="config", help="YAML file with any of these options (see --print_config)")
    add("--classes", type=str | list[str] | None, help="names, separated by commas")
    add("--classes-file", type=str | None, help="YAML file with a list of names, or of name: [synonyms]")
    add("--output", type=str, required=True, help="folder for the results")
    add("--overlay", action="store_true", help="also write the labels drawn over the image or video, with a legend")
    videos.add_options(options)
    add("--coco", action="store_true", help="also write COCO run-length masks, of each image and in coco.json of all")
    add("--scores", action="store_true", help="also write each pixel's score as a 16-bit PNG (65535 for 1)")
    add("--probabilities", action="store_true", help="also write the scores of all classes as float16 in .npz: large")
    add("--max-pixels", type=int | None, help="largest image that is read; 178 million if omitted")
    add_model_options(options)
    add_regions(options)
    add("--short-side", type=int | None, help="resize to this shorter side, 0 leaves the size; else the model's own")
    add_windows(options)
    add("--engine", type=Literal["plain", "ray"], default="plain", help="this process, or actors of Ray Data")
    add("--workers", type=int | None, help="Ray's actors, each with its own model; else one for each GPU or CPU core")
    return options


def add_model_options(options: ArgumentParser) -> None:
    """Which model, and how it is asked; see :func:`given_job`."""
    add = options.add_argument
    add(
        "--model",
        type=str | None,
        help="a name that fastzs models lists, or a checkpoint of any of them; naclip if omitted (maskclip for the "
        "built-in weights)",
    )
    add("--backbone", type=str | None, help="CLIP architecture, as open_clip calls it; else the model's own")
    add(
        "--weights",
        type=str | None,
        help="open_clip's name of weights (openai if omitted); 'shapes', the small model that is built in; 'random'; a "
        "file or folder",
    )
    add(
        "--checkpoint",
        type=str | None,
        help="trained model: .pth or safetensors file, folder, hub id (clip_rc, zegclip)",
    )
    add(
        "--seen",
        type=str | list[str] | None,
        help="the checkpoint's training classes, by commas, to calibrate against the others",
    )
    add("--options", type=dict[str, Any], default={}, help="settings of the model, as --options.dense=qq")
    add_flags(options)
    add("--templates", type=str | None, help="named prompt templates, or a file with one on each line ({} the name)")
    add("--background", type=Literal["none", "threshold", "prompt"], default="none", help="pixels of no class")
    add(
        "--threshold",
        type=float | None,
        help="score below which --background threshold says so; the model's own if omitted",
    )
    add("--crop", type=int | tuple[int, int] | None, help="window size, 0 for the whole image; else the model's own")
    add("--stride", type=int | tuple[int, int] | None, help="distance of windows; two thirds of the crop if omitted")
    add("--batch-size", type=int, default=8, help="windows at a time")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--precision", type=Literal["auto", "fp32", "bf16", "fp16", "int8"], default="auto", help="numbers of the model"
    )


@dataclass
class Job:
    """What is done with every image; plain values until the model is needed, so that other processes can have it."""

    load: dict[str, Any]  # arguments of fastzs.load
    vocabulary: "Vocabulary"
    background: Literal["none", "threshold", "prompt"]
    threshold: float | None
    options: dict[str, Any] = field(default_factory=dict)  # of the model, as far as ``load`` has them
    extras: tuple[str, ...] = ()
    max_pixels: int | None = None
    regions: str | None = None  # see fastzs.regions.find

    def read(self, picture: Path) -> "View":
        """One image, in any thread."""
        if self.max_pixels is not None:
            from fastzs.pictures import limit_pixels

            limit_pixels(self.max_pixels)
        return self.segmenter.view(picture, self.regions)

    def frame(self, image: "Tensor") -> "View":
        """A frame of a video, uint8 [3, H, W], in any thread."""
        return self.segmenter.view(image, self.regions)

    def label(self, images: "Iterable[View]", **more: Any) -> "Iterator[Segmentation]":
        """The results of some images, windows of several in one batch.

        Args:
            more: arguments of :meth:`fastzs.Segmenter.answer_views`.
        """
        question = self.segmenter.question(self.vocabulary, **self.asked)
        return (answer.result(question) for answer in self.segmenter.answer_views(images, question, **more))

    @property
    def asked(self) -> dict[str, Any]:
        """How the segmenter is called."""
        scores = {name: True for name in ("scores", "probabilities") if name in self.extras}
        return {"background": self.background, "threshold": self.threshold, **scores}

    @cached_property
    def segmenter(self) -> "Segmenter":
        """Loaded when it is first asked for."""
        import fastzs

        return fastzs.load(**self.load)

    def facts(self) -> dict[str, Any]:
        """What came of the settings in the process that was asked: the loaded model, its device, versions."""
        from fastzs.doctor import describe_device, versions
        from fastzs.identity import identity

        model: Any = self.segmenter.model
        self.segmenter.question(self.vocabulary, **self.asked)  # what does not fit is said before any image
        about = describe_device(self.segmenter.device)
        return {
            "decisive": identity(
                self.segmenter,
                self.vocabulary,
                background=self.background,
                threshold=self.threshold,
                options=self.options,
                regions=self.regions,
            ),
            "weights": model.clip.fingerprint,
            "source": model.clip.source,
            "backbone": model.clip.backbone,
            "precision": self.segmenter.precision,
            "device": {key: about[key] for key in ("device", "name", "details")},
            "versions": versions(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


def given_vocabulary(config: Namespace) -> "Vocabulary":
    """The names that are asked for.

    Raises:
        ValueError: they or the threshold do not fit.
    """
    entries = given_classes(config.classes, config.classes_file)
    if config.threshold is not None and config.background != "threshold":
        raise ValueError(
            f"--threshold {config.threshold} is the score that --background threshold asks for, but --background is "
            f"{config.background}; give --background threshold, or no --threshold"
        )
    if not 0 <= (config.threshold or 0) <= 1:
        raise ValueError(f"--threshold: expected a score from 0 to 1, got {config.threshold}")
    from fastzs.vocabulary import Vocabulary

    return Vocabulary(entries, templates=_templates(config.templates))


def given_job(config: Namespace, vocabulary: "Vocabulary", sizes: dict[str, Any], **more: Any) -> Job:
    """What is to be done, of the options of :func:`add_model_options`.

    Args:
        sizes: arguments of :class:`fastzs.Segmenter` that are not among these options.
        more: of :class:`Job`.

    Raises:
        ValueError: settings that do not fit.
    """
    from fastzs import ranks
    from fastzs.loading import default_model

    options = model_options(config)
    config.model = config.model or default_model(config.weights, config.checkpoint)
    if config.seen is not None:
        seen = config.seen.split(",") if isinstance(config.seen, str) else config.seen
        options["seen"] = [name.strip() for name in seen if name.strip()] or None
        _tell_unknown(options["seen"] or [], vocabulary)
    names = ("model", "backbone", "weights", "checkpoint", "precision", "crop", "stride", "batch_size")
    load = {name: config[name] for name in names} | sizes | {"device": ranks.own_device(config.device)} | options
    return Job(load, vocabulary, config.background, config.threshold, options, **more)


def run(config: Namespace) -> int:
    """Segment; 0 if every image came out, else 1."""
    if config.coco:
        check_installed("pycocotools", "pycocotools", "COCO files (--coco)", "formats")
    if config.max_pixels is not None and config.max_pixels < 1:
        raise ValueError(f"--max-pixels must be at least 1, got {config.max_pixels}")
    vocabulary = given_vocabulary(config)
    # Before the model, so that what is asked for wrongly is said at once.
    from fastzs.files import output_path
    from fastzs.locks import hold
    from fastzs.outputs import EXTRAS
    from fastzs.regions import check_source

    output = output_path(config.output)
    if config.regions is not None:
        check_source(config.regions)
    pictures, clips = videos.found(config, output)
    actors = _actors(config)
    from fastzs import ranks

    extras = tuple(extra for extra in EXTRAS if config[extra])
    sizes = {"short_side": config.short_side, "windows": config.windows}
    job = given_job(config, vocabulary, sizes, extras=extras, max_pixels=config.max_pixels, regions=config.regions)
    with hold(output, "segment") as held, nullcontext() if actors is None else actors:
        return _segment(config, pictures, clips, job, actors, ranks.started(), held)


def _segment(
    config: Namespace,
    pictures: list[Path],
    clips: list[Path],
    job: Job,
    actors: "Actors | None",
    share: tuple[int, int],
    held: "Hold",
) -> int:
    """Segment the images and videos and keep the record."""
    from fastzs.progress import ProgressBar
    from fastzs.runs import Outcome, segment_pictures, settings_hash, write_record

    folder, vocabulary = held.folder, job.vocabulary
    facts = job.facts() if actors is None else actors.run(job.facts)
    settings = settings_hash(facts["decisive"])
    begun = time.monotonic()
    record: dict[str, Any] = {
        "started": _now(),
        "finished": None,
        "ended": None,
        "seconds": None,
        "pictures": None,
        "failed": {},
        "settings": {key: value for key, value in config.as_dict().items() if key != "config"},
        "settings_hash": settings,
        "decisive_settings": facts["decisive"],
        "weights": {"name": facts["source"], "backbone": facts["backbone"], "fingerprint": facts["weights"]},
        "vocabulary": {"hash": vocabulary.hash, "names": list(vocabulary.names)},
        "device": facts["device"],
        "precision": facts["precision"],
        "versions": facts["versions"],
    }
    write_record(folder, record, share)

    def end(how: str) -> None:
        counts = {"found": outcome.found, "done": outcome.done, "done_before": outcome.skipped}
        record["pictures"] = {**counts, "failed": len(outcome.failed)}
        record["failed"] = outcome.failed | of_clips.failed
        if clips:
            done = {"found": of_clips.found, "done": of_clips.done, "done_before": of_clips.skipped}
            record["videos"] = {**done, "failed": len(of_clips.failed)}
        record["ended"] = how
        record["finished"], record["seconds"] = _now(), round(time.monotonic() - begun, 3)
        write_record(folder, record, share)

    outcome, of_clips = Outcome(0), Outcome(0)
    try:
        with ProgressBar("segmenting", "picture", shown=share[0] == 0) as progress:

            def step(picture: Path, problem: str | None) -> None:
                held.check()
                if problem is not None:
                    progress.say(f"failed: {problem}")
                progress.advance()

            def start(outcome: Outcome) -> None:
                if todo := outcome.found - outcome.skipped:
                    progress.start(todo)

            segment_pictures(
                pictures,
                job,
                folder,
                settings,
                also=job.extras,
                start=start,
                step=step,
                outcome=outcome,
                share=share,
                **({} if actors is None else {"through": actors.map}),
            )
        if clips:
            videos.segment(config, clips, job, folder, settings, share, held, of_clips, pictures)
    except BaseException as error:
        # On a full disk not even this can be written, and the first problem is the one to tell.
        with suppress(Exception):
            end("interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
        raise
    complete = outcome.complete and of_clips.complete
    end("complete" if complete else "incomplete")
    of_all = f" (process {share[0]} of {share[1]}, of {len(pictures)} images in all)" if share[1] > 1 else ""
    if pictures:
        print(
            f"{outcome.done} of {outcome.found} images segmented, {outcome.skipped} done before, "
            f"{len(outcome.failed)} failed{of_all}; results in {folder}"
        )
    if clips:
        print(
            f"{of_clips.done} of {of_clips.found} videos segmented, {of_clips.skipped} done before, "
            f"{len(of_clips.failed)} failed or not whole; results in {folder}"
        )
    return 0 if complete else 1


def _actors(config: Namespace) -> "Actors | None":
    """Ray's actors, where they are asked for."""
    if config.engine == "plain":
        if config.workers is not None:
            raise ValueError("--workers is the number of Ray's actors; it needs --engine ray")
        return None
    from fastzs.ray_engine import Actors

    return Actors(config.workers, config.device)


def _tell_unknown(seen: list[str], vocabulary: "Vocabulary") -> None:
    from fastzs.vocabulary import normal_name

    names = {normal_name(name) for name in vocabulary.names}
    if unknown := [name for name in seen if normal_name(name) not in names]:
        log.warning("--seen: not among the names, so without effect: %s", ", ".join(unknown))


def _templates(given: str | None) -> str | list[str] | None:
    if given is None or not Path(os.path.expanduser(given)).exists():
        return given
    from fastzs.files import read_text

    try:
        return [line for line in read_text(os.path.expanduser(given)).splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"templates {given}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"templates {error}") from error


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
