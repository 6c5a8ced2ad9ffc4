"""NumPy files, which napari opens as layers of labels: int32 [H, W], 0 for no class, ``i + 1`` for the class ``i``."""

import io
import json
from collections.abc import Iterable

import numpy as np

from fastzs.formats.label_maps import LabelMap
from fastzs.formats.output import Output


def write(maps: Iterable[LabelMap], classes: tuple[str, ...], output: Output) -> None:
    """``NAME.npy`` for each picture, and ``classes.json`` with the name of each number."""
    for one in maps:
        if output.lacks(f"{one.stem}.npy", one):
            buffer = io.BytesIO()
            np.save(buffer, one.read(), allow_pickle=False)
            output.write(f"{one.stem}.npy", buffer.getvalue())
    output.write("classes.json", json.dumps(dict(enumerate(classes, start=1)), indent=2, ensure_ascii=False) + "\n")
