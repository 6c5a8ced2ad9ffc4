"""labelme: one JSON file of polygons for each picture, to be put beside it.

The pieces of a class (see :mod:`fastzs.formats.polygons`) have one group number, which is the class's.
"""

import json
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.formats.polygons import polygons

VERSION = "5.0.0"  # of labelme, the oldest whose files look like this


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``NAME.json`` for each picture."""
    for one in maps:
        file = f"{one.stem}.json"
        if not output.lacks(file, one):
            continue
        ids = one.read()
        shapes = [_shape(points, i, classes) for i in np.unique(ids).tolist() if i for points in polygons(ids == i)]
        about = {
            "version": VERSION,
            "flags": {},
            "shapes": shapes,
            "imagePath": PurePosixPath(one.picture).name,
            "imageData": None,
            "imageHeight": ids.shape[0],
            "imageWidth": ids.shape[1],
        }
        output.write(file, json.dumps(about) + "\n")


def _shape(points: np.ndarray, group: int, classes: tuple[str, ...]) -> dict[str, Any]:
    about = {"label": classes[group - 1], "points": points.astype(float).tolist(), "group_id": group}
    return about | {"description": "", "shape_type": "polygon", "flags": {}}
