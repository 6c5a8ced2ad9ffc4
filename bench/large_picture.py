"""Peak memory of ``fastzs segment`` on a large picture with many names, above what the model itself takes.

    python -m bench.large_picture                 # 4096 x 4096 pixels, 1000 names; minutes on a CPU
    python -m bench.large_picture 1024 1000       # any side, any number of names up to 1024

Runs the command line in fresh processes, once on a picture of 1 x 1, whose peak is the interpreter, the libraries and
the model, and once on noise of the side asked for. Linux and macOS.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from fastzs.clip.weights import SHAPES
from fastzs.data.shapes import COLOURS, GROUNDS, PATTERNS, name_of
from fastzs.data.shapes import SHAPES as KINDS

# Asks for the peak of its own memory: what the system counts for a child begins with its parent's.
CHILD = """
import sys
from bench.machine import _resident_peak
from fastzs.cli import main

code = main(sys.argv[1:])
print(_resident_peak())
sys.exit(code)
"""


def names(count: int) -> list[str]:
    """Distinct names of the words that the shapes weights know: "striped red ring on wood"."""
    known = set(json.loads((SHAPES / "words.json").read_text(encoding="utf-8"))["words"])
    objects = [name_of(*entry) for entry in itertools.product(PATTERNS, COLOURS, KINDS)]
    found = [f"{thing} on {ground}" for thing, ground in itertools.product(objects, GROUNDS)][:count]
    assert len(set(found)) == count, f"there are only {len(set(found))} names"
    assert {word for name in found for word in name.split()} <= known
    return found


def segment(folder: Path, side: int, classes: list[str]) -> tuple[float, float]:
    """Peak resident megabytes (10^6 bytes) and seconds of the command on a picture of noise."""
    picture = folder / f"{side}.png"
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    del pixels
    options = ["--weights", "shapes", "--classes", ",".join(classes), "--output", str(folder / f"out{side}")]
    began = time.monotonic()
    command = [sys.executable, "-c", CHILD, "segment", str(picture), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1]) / 1e6, time.monotonic() - began


def main(side: int = 4096, count: int = 1000) -> None:
    """Print both peaks and their difference."""
    with tempfile.TemporaryDirectory() as folder:
        least, _ = segment(Path(folder), 1, names(count))
        peak, seconds = segment(Path(folder), side, names(count))
    print(
        f"{side} x {side}, {count} names: peak {peak:.0f} MB, {peak - least:.0f} MB above a picture of 1 x 1 "
        f"({least:.0f} MB); {seconds:.0f} s"
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
