"""The files that are written for one image: its label map, and what is asked for beside it."""

import contextlib
import errno
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastzs.errors import FastzsError
from fastzs.files import write_atomically
from fastzs.pictures import ImageError
from fastzs.result import Segmentation
from fastzs.trace import traced

# What can be written beside a label map, and how its name ends.
EXTRAS = {
    "overlay": "_overlay.jpg",
    "coco": "_coco.json",
    "scores": "_scores.png",
    "probabilities": "_probabilities.npz",
}
FULL = {errno.ENOSPC, errno.EDQUOT}


class OutputError(FastzsError):
    """A result cannot be written; the message names the file and the reason."""


@traced("predict.save")
def write_result(result: Segmentation, picture: Path, target: Path, also: Collection[str]) -> None:
    """Write ``TARGET.png`` and the files of :data:`EXTRAS` that ``also`` asks for: all of them or none.

    Raises:
        ImageError: a file of this image cannot be written, though others in its folder can.
        OutputError: none can be written there.
    """
    path, begun = Path(f"{target}.png"), False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path)
        begun = True
        for extra in (extra for extra in EXTRAS if extra in also):
            path = Path(f"{target}{EXTRAS[extra]}")
            if extra == "overlay":
                result.overlay(path)
            elif extra == "coco":
                write_atomically(path, json.dumps(coco_dataset(result, picture)).encode())
            elif extra == "scores":
                result.save_scores(path)
            else:
                result.save_probabilities(path)
    except BaseException as error:
        for ending in (".png", *EXTRAS.values()) if begun else ():
            with contextlib.suppress(OSError):
                Path(f"{target}{ending}").unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno is None:  # from an encoder, about this image
            raise
        if error.errno in FULL or not _writable(target.parent):
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        raise ImageError(f"{picture}: cannot write {path}: {error.strerror}") from error


def _writable(folder: Path) -> bool:
    """Whether another file can be written there, so that a failure was about that one's name or size."""
    try:
        with tempfile.TemporaryFile(dir=folder) as stream:  # no name, so it is in nobody's way
            stream.write(b"0" * 4096)
    except OSError:
        return False
    return True


def coco_dataset(result: Segmentation, picture: Path, image_id: int = 1) -> dict[str, Any]:
    """A COCO data set of one image, as ``pycocotools.coco.COCO`` reads it; class ``i`` is category ``i + 1``."""
    height, width = result.labels.shape
    return {
        "images": [{"id": image_id, "file_name": str(picture), "height": height, "width": width}],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(result.names) if i != result.background],
        "annotations": result.to_coco(image_id=image_id),
    }
