"""Many pictures into one folder: names that do not collide, a manifest to go on from, a record of the run."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from fastzs.files import write_atomically
from fastzs.pictures import PictureError
from fastzs.result import Segmentation
from fastzs.trace import traced

MANIFEST = "manifest{}.jsonl"
RECORD = "run{}.json"


class OutputError(Exception):
    """Results that cannot be written; the message names the file and the reason."""


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        found: pictures asked for; of several processes, those of this one.
        skipped: of these, done by an earlier run with the same settings.
        done: segmented and written.
        failed: path of each picture that did not come out, and why.
    """

    found: int
    skipped: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every picture came out, now or before."""
        return self.skipped + self.done == self.found


class Attempt(NamedTuple):
    """How one picture went, as plain values, since it may come from another process.

    Attributes:
        picture: its path.
        state: its size and time of change, from before it was read; None if it was not there.
        problem: why it did not come out, or None.
        ends: what ends the run: an OutputError at once, a ValueError (settings that do not fit) if no picture came out.
    """

    picture: Path
    state: list[int] | None
    problem: str | None = None
    ends: OutputError | ValueError | None = None


class Manifest:
    """What is done in an output folder: one JSON line for each picture, the last one of a picture counts.

    A line says which file it was (path, size, time of change), under which settings it was segmented, and what
    was written. A line cut short by a crash is ignored, so that its picture is done again. Of several processes each
    writes a file of its own, since not every file system lets them add to one, and reads all.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        self.lines: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob(MANIFEST.format("*"))):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self.lines[entry["picture"]] = {key: entry[key] for key in ("state", "settings", "name", "files")}
                except (ValueError, KeyError, TypeError):
                    continue

    def has(self, picture: Path, settings: str, endings: Iterable[str]) -> bool:
        """Whether the files with these endings were written for this picture, unchanged since, and are there."""
        line = self.lines.get(os.path.abspath(picture))
        if line is None or line["settings"] != settings or line["state"] != _state(picture):
            return False
        wanted = [line["name"] + ending for ending in endings]
        return all(file in line["files"] and (self.folder / file).is_file() for file in wanted)

    def add(self, picture: Path, state: list[int] | None, settings: str, name: str, files: list[str]) -> None:
        """Record a picture as done.

        Raises:
            OutputError: the manifest cannot be written.
        """
        entry = {"state": state, "settings": settings, "name": name, "files": files}
        key = os.path.abspath(picture)
        path = self.folder / of_rank(MANIFEST, self.rank)
        try:
            with open(path, "a+b") as stream:
                # A crash may have left half a line.
                if stream.seek(0, os.SEEK_END) and stream.seek(-1, os.SEEK_END) and stream.read() != b"\n":
                    stream.write(b"\n")
                stream.write(json.dumps({"picture": key, **entry}).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        self.lines[key] = entry

    def names(self, pictures: Iterable[Path]) -> dict[Path, str]:
        """A name in the output folder for each picture, without ending, no two the same.

        A picture keeps the name it has in the manifest. Others are named by their path below the folder that
        all of them share; where that is taken (``a.jpg`` beside ``a.png``), ``-2``, ``-3`` ... is added.
        """
        pictures = list(pictures)
        places = {picture: os.path.abspath(picture) for picture in pictures}
        shared = os.path.commonpath([os.path.dirname(place) for place in places.values()])
        # Case is ignored, because some file systems ignore it.
        taken = {line["name"].casefold() for line in self.lines.values()}
        names = {}
        for picture, place in places.items():
            if place in self.lines:
                names[picture] = self.lines[place]["name"]
                continue
            stem = os.path.splitext(os.path.relpath(place, shared))[0]
            name, number = stem, 1
            while name.casefold() in taken:
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
            names[picture] = name
        return names


def of_rank(name: str, rank: int) -> str:
    """The file of one process: ``run.json`` of the first, then ``run-1.json``, ``run-2.json`` ..."""
    return name.format(f"-{rank}" if rank else "")


def prepare_folder(folder: Path) -> None:
    """Make the output folder and see that files can be made in it.

    Raises:
        OutputError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to the output folder {folder}: {error.strerror}") from error


def settings_hash(settings: dict[str, Any]) -> str:
    """Identifies settings that decide what a label map looks like; results under other ones are done again."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_record(folder: Path, record: dict[str, Any], rank: int = 0) -> None:
    """Write ``run.json``, or that of another process.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / of_rank(RECORD, rank)
    try:
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def segment_pictures(
    pictures: list[Path],
    segment: Callable[[Path], Segmentation],
    folder: Path,
    settings: str,
    *,
    overlay: bool = False,
    coco: bool = False,
    start: Callable[[Outcome], None] = lambda outcome: None,
    step: Callable[[Path, str | None], None] = lambda picture, problem: None,
    outcome: Outcome | None = None,
    share: tuple[int, int] = (0, 1),
    through: Callable[[Callable[[tuple[Path, Path]], Attempt], list[tuple[Path, Path]]], Iterable[Attempt]] = map,
) -> Outcome:
    """Segment what is not done yet, and write ``NAME.png`` and on request ``NAME_overlay.jpg``, ``NAME_coco.json``.

    Args:
        pictures: files, the same for all processes.
        segment: gives the result for one of them.
        folder: an existing output folder.
        settings: hash of everything that decides the results, see :func:`settings_hash`.
        overlay, coco: what to write beside the label map.
        start: called once, when it is known what is done already.
        step: called after each picture, with what went wrong or None.
        outcome: kept up to date on the way, so that an interrupted caller has it.
        share: this process's number and how many there are; each takes every so many-th picture.
        through: what calls a function for each item and gives the results in any order, such as ``map`` or
            :meth:`fastzs.ray_engine.Actors.map`; ``segment`` is part of that function.

    Raises:
        OutputError: a file cannot be written; what is done so far is in the manifest.
        ValueError: from ``segment``, before any picture came out: the settings do not fit. Any other problem of
            a picture is counted, and the rest is done.
    """
    rank, world = share
    mine = pictures[rank::world]
    outcome = Outcome(0) if outcome is None else outcome
    outcome.found = len(mine)
    endings = [".png", *["_overlay.jpg"] * overlay, *["_coco.json"] * coco]
    manifest = Manifest(folder, rank)
    todo = [picture for picture in mine if not manifest.has(picture, settings, endings)]
    outcome.skipped = len(mine) - len(todo)
    # of all pictures, so that no two processes take one name
    names = manifest.names(pictures) if todo else {}
    start(outcome)
    work = partial(_attempt, segment, overlay, coco)
    for picture, state, problem, ends in through(work, [(picture, folder / names[picture]) for picture in todo]):
        if isinstance(ends, OutputError) or (ends is not None and not outcome.done):
            raise ends
        if problem is None:
            manifest.add(picture, state, settings, names[picture], [names[picture] + ending for ending in endings])
            outcome.done += 1
        else:
            outcome.failed[str(picture)] = problem
        step(picture, problem)
    return outcome


def _attempt(
    segment: Callable[[Path], Segmentation], overlay: bool, coco: bool, picture_and_target: tuple[Path, Path]
) -> Attempt:
    """Segment a picture and write its files, named by a path without ending."""
    picture, target = picture_and_target
    state = _state(picture)
    try:
        _write_result(segment(picture), picture, target, overlay, coco)
    except OutputError as error:
        return Attempt(picture, state, str(error), OutputError(str(error)))
    except PictureError as error:
        return Attempt(picture, state, str(error))
    except Exception as error:  # its traceback would hold on to the model's tensors
        ends = ValueError(str(error)) if isinstance(error, ValueError) else None
        return Attempt(picture, state, f"{picture}: {_sentence(error)}", ends)
    return Attempt(picture, state)


@traced("predict.save")
def _write_result(result: Segmentation, picture: Path, target: Path, overlay: bool, coco: bool) -> None:
    path = Path(f"{target}.png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
        if overlay:
            path = Path(f"{target}_overlay.jpg")
            result.overlay(path)
        if coco:
            path = Path(f"{target}_coco.json")
            write_atomically(path, json.dumps(coco_dataset(result, picture)).encode())
    except OSError as error:
        if error.errno is None:  # from an encoder, about this picture, not from the file system
            raise
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def coco_dataset(result: Segmentation, picture: Path) -> dict[str, Any]:
    """A COCO data set of one picture, as ``pycocotools.coco.COCO`` reads it."""
    height, width = result.labels.shape
    return {
        "images": [{"id": 1, "file_name": str(picture), "height": height, "width": width}],
        "categories": [{"id": i, "name": name} for i, name in enumerate(result.names)],
        "annotations": result.to_coco(image_id=1),
    }


def _state(picture: Path) -> list[int] | None:
    """Size and time of change, which tell a picture from another one put in its place; None if it is gone."""
    try:
        status = picture.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _sentence(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
