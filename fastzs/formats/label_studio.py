"""Label Studio: predictions as brush masks in one file of tasks, and the labelling interface that they fit.

A brush mask is a run-length code of the picture's pixels with four channels each, in the layout of the JavaScript
package rle-pack: 32 bits with the number of values, 5 with their width less 1, four times 4 with the widths of the
lengths less 1; then blocks of one bit (1 for a run), two bits (which of the four widths), the length less 1, the value.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output
from fastzs.overlay import voc_colours

LENGTH, VALUE = 16, 8  # bits; all four widths are the same, so that every block has as many bits
HEAD_BITS, BLOCK_BITS = 32 + 5 + 4 * 4, 1 + 2 + LENGTH + VALUE


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``tasks.json`` and ``labels.xml``."""
    output.write("tasks.json", _text(maps, classes))
    view = ElementTree.Element("View")
    ElementTree.SubElement(view, "Image", name="image", value="$image")
    labels = ElementTree.SubElement(view, "BrushLabels", name="brush", toName="image")
    for name, (red, green, blue) in zip(classes, voc_colours(len(classes) + 1)[1:].tolist(), strict=True):
        ElementTree.SubElement(labels, "Label", value=name, background=f"#{red:02x}{green:02x}{blue:02x}")
    ElementTree.indent(view)
    output.write("labels.xml", ElementTree.tostring(view, encoding="unicode") + "\n")


def _text(maps: Iterable[LabelMap], classes: tuple[str, ...]) -> Iterator[str]:
    yield "["
    for number, one in enumerate(maps):
        ids = one.read()
        height, width = ids.shape
        results = [
            {
                "id": f"class-{i}",
                "type": "brushlabels",
                "from_name": "brush",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {"format": "rle", "rle": brush(ids == i), "brushlabels": [classes[i - 1]]},
            }
            for i in np.unique(ids).tolist()
            if i
        ]
        task: dict[str, Any] = {
            "data": {"image": f"/data/local-files/?d={quote(one.picture)}"},
            "predictions": [{"model_version": "fastzs", "result": results}],
        }
        yield (",\n" if number else "") + json.dumps(task)
    yield "]\n"


def brush(mask: np.ndarray) -> list[int]:
    """The code of a mask bool [H, W] as a list of bytes: 255 in all four channels where it is True, 0 elsewhere."""
    flat = mask.reshape(-1)
    starts = np.flatnonzero(np.diff(flat, prepend=~flat[:1]))
    lengths = 4 * np.diff(starts, append=len(flat))
    longest = 1 << LENGTH
    pieces = -(-lengths // longest)  # of each run
    values = np.repeat(flat[starts], pieces).astype(np.uint32) * 255
    sizes = np.full(len(values), longest, np.uint32)
    sizes[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * longest
    blocks = (1 << (BLOCK_BITS - 1)) | (sizes - 1) << VALUE | values
    head = _bits(np.array([4 * len(flat)]), 32), _bits(np.array([VALUE - 1]), 5), _bits(np.full(4, LENGTH - 1), 4)
    return np.packbits(np.concatenate([*head, _bits(blocks, BLOCK_BITS)])).tolist()


def _bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """The lowest bits of numbers below 2 ** 32, the highest of them first, one number after the other."""
    every = np.unpackbits(numbers.astype(">u4").view(np.uint8)).reshape(-1, 32)
    return every[:, 32 - width :].reshape(-1)
