"""Segment many images into one folder: unique names, a manifest to resume from, and a record of the run."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastzs.files import file_digest, file_state, replacing, write_atomically
from fastzs.outputs import EXTRAS, OutputError
from fastzs.pictures import is_result
from fastzs.pipeline import Attempt, Stages, Task, flow

MANIFEST = "manifest{}.jsonl"
RECORD = "run{}.json"
COCO = "coco.json"
COCO_HEAD = b'{"info": {"description": "label maps of fastzs"}'
LONGEST = 255 - max(map(len, EXTRAS.values()))  # bytes of a name, as most file systems have it, less the ending


@dataclass
class Outcome:
    """How a run went.

    Attributes:
        found: images asked for; of several processes, those of this one.
        skipped: of these, done by an earlier run with the same settings.
        done: segmented and written.
        failed: path of each image that did not come out, and why.
    """

    found: int
    skipped: int = 0
    done: int = 0
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every image came out, now or before."""
        return self.skipped + self.done == self.found


class Manifest:
    """What is done in an output folder: one JSON line for each image, that of the last run counts.

    A line says which file it was (path, size, time of change, SHA-256), under which settings it was segmented, and what
    was written. A line cut short by a crash is ignored, so that its image is done again. Of several processes each
    writes a file of its own, since not every file system lets them add to one, and reads all. Two images never have
    one name: where a damaged folder says so, the later line counts and the other image is done again.
    """

    def __init__(self, folder: Path, rank: int = 0):
        self.folder, self.rank = folder, rank
        self.lines: dict[str, dict[str, Any]] = {}
        fields = ("state", "digest", "settings", "name", "files", "run")
        entries = []
        for path in sorted(folder.glob(MANIFEST.format("*"))):
            try:
                lines = path.read_bytes().splitlines()
            except OSError as error:
                raise OutputError(f"cannot read {path}: {error.strerror}") from error
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                    entry = json.loads(line)
                    if _is_line(entry):
                        entries.append((entry["run"], entry["picture"], {key: entry[key] for key in fields}))
        owners: dict[str, str] = {}
        # The files of several processes are in no order of time, but the numbers of the runs are.
        for _, picture, entry in sorted(entries, key=lambda item: item[0]):
            self._set(picture, entry, owners)
        self.run = 1 + max((line["run"] for line in self.lines.values()), default=0)

    def _set(self, picture: str, entry: dict[str, Any], owners: dict[str, str]) -> None:
        before = owners.get(entry["name"].casefold())
        if before is not None and before != picture:
            self.lines.pop(before, None)
        owners[entry["name"].casefold()] = picture
        self.lines[picture] = entry

    def has(self, picture: Path, settings: str, endings: Iterable[str]) -> bool:
        """Whether the files with these endings were written for this image, unchanged since, and are there."""
        line = self.lines.get(os.path.abspath(picture))
        if line is None or line["settings"] != settings or line["state"] != file_state(picture):
            return False
        wanted = [line["name"] + ending for ending in endings]
        return all(file in line["files"] and (self.folder / file).is_file() for file in wanted)

    def add(self, attempt: Attempt, settings: str, name: str, files: list[str]) -> None:
        """Record an image as done.

        Raises:
            OutputError: the manifest cannot be written.
        """
        entry = {"state": attempt.state, "digest": attempt.digest, "settings": settings, "name": name, "files": files}
        self._write({os.path.abspath(attempt.picture): entry})

    def void(self, pictures: Iterable[Path]) -> None:
        """Record that images are about to be done again, so that a crash leaves no line that speaks of other files.

        Raises:
            OutputError: the manifest cannot be written.
        """
        places = map(os.path.abspath, pictures)
        self._write({place: self.lines[place] | {"settings": ""} for place in places if place in self.lines})

    def _write(self, entries: dict[str, dict[str, Any]]) -> None:
        if not entries:
            return
        entries = {place: entry | {"run": self.run} for place, entry in entries.items()}
        path = self.folder / of_rank(MANIFEST, self.rank)
        try:
            with open(path, "a+b") as stream:
                # A crash may have left half a line.
                if stream.seek(0, os.SEEK_END) and stream.seek(-1, os.SEEK_END) and stream.read() != b"\n":
                    stream.write(b"\n")
                for place, entry in entries.items():
                    stream.write(json.dumps({"picture": place, **entry}).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        self.lines |= entries

    def follow(self, pictures: Iterable[Path]) -> None:
        """Recognise images whose folder was moved or mounted elsewhere since an earlier run.

        An image that is not in the manifest is the one of a line whose file is gone, if it has the same file name and
        the same content. From each such pair it follows which folder became which, and all the images below them
        are the same ones, even those that were edited after the move.
        """
        new = [os.path.abspath(picture) for picture in pictures]
        unknown = [place for place in new if place not in self.lines]
        if not unknown or not self.lines:
            return
        known: dict[str, list[str]] = {}
        for place in self.lines.keys() - set(new):
            known.setdefault(os.path.basename(place), []).append(place)
        moves: dict[tuple[str, str], None] = {}
        for place in unknown:
            if any(old in self.lines for old in _before(place, moves)):
                continue
            for before in known.get(os.path.basename(place), ()):
                if not os.path.lexists(before) and _is_same(Path(place), self.lines[before]):
                    moves[_roots(before, place)] = None
                    break
        for place in unknown:
            for old in _before(place, moves):
                if old in self.lines and not os.path.lexists(old):
                    self.lines[place] = self.lines.pop(old)
                    break

    def names(self, pictures: Iterable[Path]) -> dict[Path, str]:
        """A name in the output folder for each image, without ending, no two the same.

        An image keeps the name it has in the manifest. Others are named by their path below the folder that
        all of them share; where that is taken (``a.jpg`` beside ``a.png``, or a file that is no result), ``-2``, ``-3``
        ... is added. Names too long for a file system, with the endings, are cut and end in a hash.
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
            stem = _short(os.path.splitext(os.path.relpath(place, shared))[0])
            name, number = stem, 1
            while name.casefold() in taken or self._is_foreign(f"{name}.png"):
                number += 1
                name = f"{stem}-{number}"
            taken.add(name.casefold())
            names[picture] = name
        return names

    def _is_foreign(self, file: str) -> bool:
        """Whether a file that no run has written stands there, such as somebody's photograph."""
        path = self.folder / file
        return os.path.lexists(path) and not is_result(path) and not (path.is_file() and path.stat().st_size == 0)


def _is_line(entry: dict[str, Any]) -> bool:
    """Whether a line of a manifest is as :meth:`Manifest.add` writes it, and its files lie in the folder."""
    texts = (entry["picture"], entry["settings"], entry["name"], entry["digest"], *entry["files"])
    inside = all(".." not in Path(text).parts and not os.path.isabs(text) for text in (entry["name"], *entry["files"]))
    return all(isinstance(text, str) for text in texts) and inside and isinstance(entry["run"], int)


def of_rank(name: str, rank: int) -> str:
    """The file of one process: ``run.json`` of the first, then ``run-1.json``, ``run-2.json`` ..."""
    return name.format(f"-{rank}" if rank else "")


def settings_hash(settings: dict[str, Any]) -> str:
    """Identifies settings that decide what a label map looks like; results under other ones are done again."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_record(folder: Path, record: dict[str, Any], share: tuple[int, int] = (0, 1)) -> None:
    """Write ``run.json``, or that of another process; the first removes those of more processes in an earlier run.

    Raises:
        OutputError: it cannot be written.
    """
    rank, world = share
    path = folder / of_rank(RECORD, rank)
    kept = {of_rank(RECORD, other) for other in range(world)}
    try:
        write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
        for other in folder.glob(RECORD.format("-*")) if rank == 0 else ():
            if other.name not in kept and other.stem.removeprefix("run-").isdigit():
                other.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


Work = Callable[[list[Task]], Iterator[Attempt]]


def segment_pictures(
    pictures: list[Path],
    stages: Stages,
    folder: Path,
    settings: str,
    *,
    also: Collection[str] = (),
    start: Callable[[Outcome], None] = lambda outcome: None,
    step: Callable[[Path, str | None], None] = lambda picture, problem: None,
    outcome: Outcome | None = None,
    share: tuple[int, int] = (0, 1),
    through: Callable[[Work, list[Task]], Iterable[Attempt]] = lambda work, tasks: work(tasks),
) -> Outcome:
    """Segment the images that are not done yet, and write ``NAME.png`` and the files that ``also`` asks for.

    Args:
        pictures: files, the same for all processes.
        stages: read and label them.
        folder: an existing output folder, see :func:`fastzs.locks.hold`.
        settings: hash of everything that decides the results, see :func:`settings_hash`.
        also: what to write beside the label map, of :data:`EXTRAS`; ``"coco"`` also writes ``coco.json`` for all the
            images of these settings together.
        start: called once, as soon as the images that are already done are known.
        step: called after each image, with what went wrong or None.
        outcome: kept up to date on the way, so that an interrupted caller has it.
        share: this process's number and how many there are; each takes every so many-th image.
        through: calls a function with the images that are to be done, or with some of them at a time, and gives what
            comes of them in any order, such as :meth:`fastzs.ray_engine.Actors.map`; ``stages`` is part of that
            function.

    Raises:
        OutputError: a file cannot be written; the manifest holds the images that are done. Any problem of an image is
            counted, wherever in the order it stands, and the rest is done.
    """
    rank, world = share
    mine = pictures[rank::world]
    outcome = Outcome(0) if outcome is None else outcome
    outcome.found = len(mine)
    endings = [".png", *(EXTRAS[extra] for extra in EXTRAS if extra in also)]
    manifest = Manifest(folder, rank)
    manifest.follow(pictures)
    todo = [picture for picture in mine if not manifest.has(picture, settings, endings)]
    outcome.skipped = len(mine) - len(todo)
    # of all images, so that no two processes take one name
    names = manifest.names(pictures) if todo else {}
    start(outcome)
    manifest.void(todo)

    def task(picture: Path) -> Task:
        name, line = names[picture], manifest.lines.get(os.path.abspath(picture))
        wanted = {name + ending for ending in endings}
        # An overlay of other settings would be taken for one of these.
        stale = [folder / file for file in (line["files"] if line else ()) if file not in wanted]
        return Task(picture, folder / name, stale)

    for attempt in through(partial(flow, stages, tuple(also)), [task(picture) for picture in todo]):
        picture = attempt.picture
        if attempt.ends is not None:
            raise attempt.ends
        if attempt.problem is None:
            name = names[picture]
            manifest.add(attempt, settings, name, [name + ending for ending in endings])
            outcome.done += 1
        else:
            outcome.failed[str(picture)] = attempt.problem
        step(picture, attempt.problem)
    if "coco" in also:
        _join_coco(folder, settings)
    elif outcome.done:
        _remove_coco(folder / COCO)
    return outcome


def _remove_coco(path: Path) -> None:
    """Remove the ``coco.json`` of an earlier run, which does not hold what this one has made."""
    try:
        with path.open("rb") as stream:
            ours = stream.read(len(COCO_HEAD)) == COCO_HEAD
        if ours:
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"cannot remove {path}, which is of an earlier run: {error.strerror}") from error


def _join_coco(folder: Path, settings: str) -> None:
    """``coco.json``: the data sets of all the images of these settings in one."""
    joined: list[str] | None = None
    # Another process that ends at the same time may have missed the last images of this one, or the other way round.
    while joined != (now := _coco_parts(folder, settings)):
        joined = now
        try:
            with replacing(folder / COCO) as stream:
                stream.write(COCO_HEAD + b', "images": [')
                categories: list[Any] = []
                for number, file in enumerate(joined, start=1):
                    one = json.loads((folder / file).read_bytes())
                    categories = one["categories"]
                    stream.write((", " * (number > 1) + json.dumps(one["images"][0] | {"id": number})).encode())
                stream.write(f'], "categories": {json.dumps(categories)}, "annotations": ['.encode())
                count = 0
                for number, file in enumerate(joined, start=1):
                    for item in json.loads((folder / file).read_bytes())["annotations"]:
                        count += 1
                        item |= {"id": count, "image_id": number}
                        stream.write((", " * (count > 1) + json.dumps(item)).encode())
                stream.write(b"]}\n")
        except OSError as error:
            raise OutputError(f"cannot write {folder / COCO}: {error.strerror}") from error


def _coco_parts(folder: Path, settings: str) -> list[str]:
    lines = Manifest(folder).lines.values()
    files = (line["name"] + EXTRAS["coco"] for line in lines if line["settings"] == settings)
    return sorted(file for file in files if (folder / file).is_file())


def _is_same(picture: Path, line: dict[str, Any]) -> bool:
    """Whether an image is the one of a line: the same size, and the same time of change or content."""
    state = file_state(picture)
    if state is None or line["state"] is None or state[0] != line["state"][0]:
        return False
    try:
        return state == line["state"] or file_digest(picture) == line["digest"]
    except OSError:
        return False


def _roots(before: str, after: str) -> tuple[str, str]:
    """The folders, of two paths that end alike, from which on they differ."""
    while os.path.basename(before) == os.path.basename(after) and os.path.dirname(before) != before:
        if os.path.dirname(after) == after:
            break
        before, after = os.path.dirname(before), os.path.dirname(after)
    return before, after


def _before(place: str, moves: Iterable[tuple[str, str]]) -> list[str]:
    """Where an image may have been before its folder moved."""
    folders = ((os.path.join(before, ""), os.path.join(after, "")) for before, after in moves)
    return [before + place[len(after) :] for before, after in folders if place.startswith(after)]


def _short(stem: str) -> str:
    """``stem`` with file and folder names that fit into a file system's, with what comes behind them."""
    parts = []
    for part in stem.split(os.sep):
        data = os.fsencode(part)
        if len(data) > LONGEST:
            mark = f"~{hashlib.sha256(data).hexdigest()[:12]}"
            part = data[: LONGEST - len(mark) - 8].decode("utf-8", "ignore") + mark  # 8 for "-2" and the like
        parts.append(part)
    return os.sep.join(parts)
