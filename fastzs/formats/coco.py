"""COCO's instances: run-length masks of the classes of every picture in one JSON file.

The class ``i`` is the category ``i + 1``, since COCO counts from 1; so do the ids of images and annotations. Pixels of
no class belong to no annotation.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.needed import needed
from fastzs.runs import COCO_HEAD

HEAD = COCO_HEAD.decode()


def annotations(ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """One annotation for each class that occurs, without its own id and its image's.

    Args:
        ids: integers [H, W], 0 for pixels of no class and ``i + 1`` for the class ``i``.

    Raises:
        ModuleNotFoundError: pycocotools is not installed.
    """
    coco = needed("pycocotools.mask", "pycocotools", "COCO masks")
    by_column = np.ascontiguousarray(ids.T)  # the order in which COCO counts its runs
    for i in np.unique(ids).tolist():
        if i == 0:
            continue
        runs: Any = coco.encode((by_column == i).view(np.uint8).T)
        yield {
            "category_id": i,
            "segmentation": {"size": list(ids.shape), "counts": runs["counts"].decode("ascii")},
            "area": int(coco.area(runs)),
            "bbox": coco.toBbox(runs).tolist(),
            "iscrowd": 0,
        }


def categories(classes: Iterable[str]) -> list[dict[str, Any]]:
    return [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``coco.json``."""
    output.write("coco.json", _text(maps, classes))


def _text(maps: Iterable[LabelMap], classes: tuple[str, ...]) -> Iterator[str]:
    yield f'{HEAD}, "categories": {json.dumps(categories(classes))}, "annotations": ['
    images: list[dict[str, Any]] = []
    count = 0
    for number, one in enumerate(maps, start=1):
        ids = one.read()
        images.append({"id": number, "file_name": one.picture, "height": ids.shape[0], "width": ids.shape[1]})
        for item in annotations(ids):
            yield (", " if count else "") + json.dumps({"id": (count := count + 1), "image_id": number, **item})
    yield f'], "images": {json.dumps(images)}}}\n'
