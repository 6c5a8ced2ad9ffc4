"""CVAT's "Segmentation mask 1.1": coloured PNGs, and ``labelmap.txt`` with the colour of each class.

CVAT imports a zip file of what is in the folder. The colours are PASCAL VOC's, black is the background. All pixels of
one class in a picture are one object.
"""

import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.overlay import voc_colours


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``labelmap.txt``, ``ImageSets/Segmentation/default.txt``, ``SegmentationClass/`` and ``SegmentationObject/``.

    Raises:
        ValueError: ``labelmap.txt``, whose lines are parted by colons, cannot hold a name.
    """
    for name in ("background", *classes):
        if ":" in name or len(name.splitlines()) != 1 or name != name.strip() or name.startswith("#"):
            raise ValueError(
                f"the name {name!r} cannot stand in CVAT's labelmap.txt: expected one line without colons, spaces at "
                "its ends or a # in front; give other names with --classes"
            )
    if "background" in classes:
        raise ValueError("CVAT has a class 'background' of its own; give other names with --classes")
    colours = voc_colours(len(classes) + 1)
    lines = [f"{name}:{','.join(map(str, colours[i]))}::\n" for i, name in enumerate(("background", *classes))]
    stems = []
    for one in maps:
        stems.append(one.stem)
        files = [f"{folder}/{one.stem}.png" for folder in ("SegmentationClass", "SegmentationObject")]
        if any([output.lacks(file, one) for file in files]):
            picture = _picture(colours[one.read()])
            for file in files:
                output.write(file, picture)
    output.write("ImageSets/Segmentation/default.txt", "".join(f"{stem}\n" for stem in stems))
    output.write("labelmap.txt", "".join(["# label:color_rgb:parts:actions\n", *lines]))


def _picture(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
