"""COCO's panoptic format: a PNG of segment ids for each picture, and one JSON file that says what they are.

A segment is everything of one class in a picture, its id is the category's, ``i + 1`` for the class ``i``; 0 is no
segment. In the PNG an id is red + 256 green + 65536 blue.
"""

import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from fastzs.formats import coco
from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.overlay import voc_colours


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``panoptic.json`` and ``panoptic/NAME.png``."""
    output.write("panoptic.json", _text(maps, classes, output))


def _text(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> Iterator[str]:
    colours = voc_colours(len(classes) + 1).tolist()
    kinds = [one | {"isthing": 0, "color": colours[one["id"]]} for one in coco.categories(classes)]
    yield f'{coco.HEAD}, "categories": {json.dumps(kinds)}, "annotations": ['
    images: list[dict[str, Any]] = []
    for number, one in enumerate(maps, start=1):
        ids = one.read()
        file = f"{one.stem}.png"
        if output.lacks(f"panoptic/{file}", one):
            output.write(f"panoptic/{file}", _picture(ids))
        images.append({"id": number, "file_name": one.picture, "height": ids.shape[0], "width": ids.shape[1]})
        segments = [_segment(ids == i, i) for i in np.unique(ids).tolist() if i]
        item = {"image_id": number, "file_name": file, "segments_info": segments}
        yield (", " if number > 1 else "") + json.dumps(item)
    yield f'], "images": {json.dumps(images)}}}\n'


def _picture(ids: np.ndarray) -> bytes:
    colours = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], axis=-1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).save(buffer, "PNG")
    return buffer.getvalue()


def _segment(mask: np.ndarray, category: int) -> dict[str, Any]:
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    return {"id": category, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
