"""Tiles of the attention kernels by GPU architecture: ``tiles.json``, chosen from machine code, none of them timed.

An entry is ``[rows, keys, warps, stages]``. ``python -m bench.tiles`` shows what a candidate takes of a GPU;
tests/kernels/test_machine_code.py compiles every entry as it is launched and lets none spill a register.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

WIDTHS = (64, 128)  # of heads: an entry is for all up to it


class Tile(NamedTuple):
    """What one program of a kernel works on at a time, and how."""

    rows: int
    keys: int
    warps: int
    stages: int  # of keys that are loaded ahead, and the one at work


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    """Kernel -> "bytes of a number, widest head" -> "sm_90" or "any" -> an entry."""
    return json.loads((Path(__file__).parent / "tiles.json").read_text())["tiles"]


@functools.cache
def tile(kernel: str, itemsize: int, width: int, arch: int) -> Tile:
    """The tile of a kernel for numbers of ``itemsize`` bytes and heads ``width`` wide on ``sm_<arch>``."""
    widest = next(limit for limit in WIDTHS if width <= limit)
    entries = table()[kernel][f"{itemsize} bytes, {widest} wide"]
    return Tile(*entries.get(f"sm_{arch}", entries["any"]))
