"""YOLO's segments: a text file for each picture with one polygon on a line, and ``data.yaml`` with the names.

A line is the number of the class, from 0, and the polygon's points as shares of the picture's width and height. A class
in several pieces, or with holes (see :mod:`fastzs.formats.polygons`), has several lines, which YOLO takes for several
objects: the format knows nothing else. The pictures belong into ``images/`` beside ``labels/``.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import yaml

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.formats.polygons import polygons

# Added to each point, in pixels: some readers round, others cut off, and both shall come to the pixel that was meant.
INSIDE = 0.25


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``data.yaml`` and ``labels/NAME.txt``."""
    for one in maps:
        file = f"labels/{one.stem}.txt"
        if output.lacks(file, one):
            output.write(file, "".join(_lines(one.read())))
    names = dict(enumerate(classes))
    about = {"path": ".", "train": "images", "val": "images", "nc": len(names), "names": names}
    output.write("data.yaml", yaml.safe_dump(about, sort_keys=False, allow_unicode=True))


def _lines(ids: np.ndarray) -> Iterator[str]:
    size = np.array([ids.shape[1], ids.shape[0]])
    for i in np.unique(ids).tolist():
        for points in polygons(ids == i) if i else ():
            shares = (points + INSIDE) / size
            yield f"{i - 1} {' '.join(f'{value:.8g}' for value in shares.reshape(-1))}\n"
