"""Files that other tools read, made of label maps: one file for each format, and the table of them."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastzs.formats import coco, cvat, label_studio, labelme, npy, panoptic, yolo
from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what ``fastzs convert --format`` calls it.
        files: what it writes, for people.
        reader: what reads it.
        write: writes label maps of the same classes, which are read one at a time, into an output folder.
    """

    name: str
    files: str
    reader: str
    write: Callable[[Iterable[LabelMap], tuple[str, ...], Output], None]


FORMATS = {
    one.name: one
    for one in (
        Format("coco", "coco.json", "pycocotools, supervision, FiftyOne", coco.write),
        Format("panoptic", "panoptic.json, panoptic/NAME.png", "panopticapi", panoptic.write),
        Format("cvat", "labelmap.txt, ImageSets/, SegmentationClass/, SegmentationObject/", "CVAT", cvat.write),
        Format("label-studio", "tasks.json, labels.xml", "Label Studio", label_studio.write),
        Format("labelme", "NAME.json", "labelme, supervision", labelme.write),
        Format("yolo", "data.yaml, labels/NAME.txt", "Ultralytics, supervision", yolo.write),
        Format("npy", "classes.json, NAME.npy", "NumPy, napari", npy.write),
    )
}


def format_of(name: str) -> Format:
    """One format.

    Raises:
        ValueError: there is none of that name (the nearest known are given).
    """
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=2, cutoff=0.4) or list(FORMATS)
        raise ValueError(f"unknown format {name!r}; nearest known: {', '.join(near)}")
    return FORMATS[name]
