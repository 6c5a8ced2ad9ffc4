"""Label maps in a folder, as the formats of other tools see them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from fastzs.data.masks import SUFFIXES
from fastzs.data.protocols import ignore_label
from fastzs.pictures import is_result, visible_files
from fastzs.result import read_labels, read_names
from fastzs.runs import Manifest


@dataclass(frozen=True)
class LabelMap:
    """A label map in a file, and the picture that it is of.

    Attributes:
        path: of the label map.
        picture: of the picture, below the folder of pictures, with "/" between folders.
        names: of all labels in their order, the background among them.
    """

    path: Path
    picture: str
    names: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The picture's path without its suffix, by which tools find a picture's files."""
        return str(PurePosixPath(self.picture).with_suffix(""))

    def read(self) -> np.ndarray:
        """int32 [H, W]: 0 for pixels of no class (background, ignored), ``i + 1`` for the class ``i``.

        Raises:
            ValueError: the file cannot be read, is damaged, or has labels beyond the names.
        """
        try:
            names, values = read_labels(self.path)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if values.ndim != 2:
            raise ValueError(f"{self.path}: expected labels, indexed or grey, got a mask in colours")
        count = len(self.names)
        ids = values.astype(np.int32) + 1
        if names is None:  # a mask of a data set, in which some pixels may be ignored
            ids[values == ignore_label(count)] = 0
        if ids.max() > count:
            raise ValueError(f"{self.path}: expected labels 0 to {count - 1} for {count} names, got {ids.max() - 1}")
        if self.names[-1] == "background":
            ids[ids == count] = 0
        return ids


def classes_of(names: Sequence[str]) -> tuple[str, ...]:
    """The names without the background, which is the last where there is one."""
    return tuple(names[:-1] if names[-1] == "background" else names)


def find_label_maps(folder: Path, names: Sequence[str] | None, pictures: Path | None) -> list[LabelMap]:
    """The label maps below a folder, by the paths of their pictures.

    Args:
        folder: what ``fastzs segment`` wrote; or, with ``names``, a folder of masks whose values are labels.
        names: of the labels; those that stand in the files if omitted.
        pictures: the folder of the pictures; if omitted, the folder that all of them share according to the manifest
            in ``folder``. Of a label map whose picture is not known its own path stands for it.

    Raises:
        ValueError: there are no label maps; their names are missing or differ between files; a file cannot be read; a
            picture lies outside of ``pictures``.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of label maps, got {'a file' if folder.exists() else 'nothing'}")
    stored = {path: _stored(path) for path in _masks(folder)}
    found = [path for path, own in stored.items() if names is not None or own is not None]
    if not found:
        why = ": no mask in it holds the names of its labels; give them with --classes" if stored else ""
        raise ValueError(f"{folder}: no label maps in it{why}")
    first: dict[tuple[str, ...], Path] = {}
    for path, own in stored.items():
        if own is not None:
            first.setdefault(own, path)
    if len(first) > 1:
        (one, here), (other, there) = list(first.items())[:2]
        raise ValueError(
            f"{here} has the names {_short(one)}, but {there} has {_short(other)}; expected label maps of the same "
            "names, so convert them one vocabulary at a time"
        )
    known = next(iter(first), None)
    if names is not None and known is not None and len(names) != len(known):
        raise ValueError(f"--classes: expected {len(known)} names, as {first[known]} has, got {len(names)}")
    chosen = tuple(names or known or ())
    places = _pictures(folder)
    parents = [os.path.dirname(place) for place in places.values()]
    root = os.path.abspath(pictures) if pictures is not None else os.path.commonpath(parents) if parents else None
    maps = [LabelMap(path, _picture(path, folder, places, root), chosen) for path in found]
    return sorted(maps, key=lambda one: one.picture)


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)})" if len(names) > 4 else "")


def _masks(folder: Path) -> Iterator[Path]:
    """Files that may be label maps: no overlays, no maps of scores."""
    for path in sorted(visible_files(folder)):
        if path.is_dir():
            raise ValueError(f"{path}: this folder cannot be read")
        if path.suffix.lower() in SUFFIXES and (_stored(path) is not None or not is_result(path)):
            yield path


def _stored(path: Path) -> tuple[str, ...] | None:
    try:
        return read_names(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error


def _pictures(folder: Path) -> dict[str, str]:
    """Of each label map that the folder's manifest knows, by its path below the folder, the path of its picture."""
    lines = Manifest(folder).lines
    return {f"{line['name']}.png": picture for picture, line in lines.items()}


def _picture(path: Path, folder: Path, places: dict[str, str], root: str | None) -> str:
    own = path.relative_to(folder).as_posix()
    if own not in places or root is None:
        return own
    place = Path(os.path.relpath(places[own], root))
    if place.parts[0] == os.pardir:
        raise ValueError(f"{path} is of the picture {places[own]}, which lies outside of the folder of pictures {root}")
    return place.as_posix()
