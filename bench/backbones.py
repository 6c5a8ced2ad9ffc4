"""``python -m bench.backbones`` writes the tables of docs/backbones.md: a dozen backbones with their cost, and all.

``python -m bench.backbones --seconds`` first measures the seconds of the dozen on this machine's CPU, for
bench/results/backbones.json. Without it those that were measured last stay.
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastzs
from fastzs.clip import load, packed
from fastzs.clip.backbones import Backbone, multiply_adds
from fastzs.clip.conv import ConvTower
from fastzs.devices import choose_precision

from .machine import describe

PAGE = Path(__file__).parents[1] / "docs" / "backbones.md"
MEASURED = Path(__file__).parent / "results" / "backbones.json"
SOME = (
    "MobileCLIP2-S0",
    "MobileCLIP2-S2",
    "ViT-B-32",
    "ViT-B-16",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "EVA02-B-16",
    "PE-Core-B-16",
    "convnext_base_w",
    "ViTamin-B",
    "ViT-L-14",
    "ViT-SO400M-16-SigLIP2-512",
)
SIDE = 512
CALLS = 3


def measure() -> None:
    """Write to ``MEASURED`` the seconds of each tower's features, packed and in the precision of ``fastzs.load``."""
    dtype = choose_precision("auto", torch.device("cpu"))
    found: dict[str, Any] = {**describe("cpu"), "dtype": str(dtype).removeprefix("torch."), "seconds": {}}
    for name in SOME:
        found["seconds"][name] = seconds(name, dtype)
        print(f"{name}: {found['seconds'][name]:.3f} s", flush=True)
    MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


@torch.inference_mode()
def seconds(name: str, dtype: torch.dtype) -> float:
    """The median of ``CALLS`` calls after one that is not counted."""
    tower = load(name, "random").vision().to(dtype)
    packed.pack(tower)
    kind = "identity" if isinstance(tower, ConvTower) else "qk"
    images = torch.randn(1, 3, SIDE, SIDE, dtype=dtype)
    times = []
    for _ in range(1 + CALLS):
        start = time.perf_counter()
        tower.dense(*tower.trunk(images), kind)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def costs(backbones: dict[str, Backbone]) -> list[str]:
    """Rows of the table with costs."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    rows = [
        f"Seconds: one image of {SIDE} x {SIDE} pixels through the vision tower in {measured['dtype']}, packed, by "
        f"`python -m bench.backbones --seconds` on {measured['device']}, {measured['threads']} threads, "
        f"torch {measured['torch']}.",
        "",
        "| backbone | patch | parameters, vision + text (millions) | multiply-adds (billions) | seconds |",
        "|---|---|---|---|---|",
    ]
    for name in SOME:
        one = backbones[name]
        text = "" if one.text_parameters is None else f" + {one.text_parameters / 1e6:.0f}"
        count = multiply_adds(name, SIDE) / 1e9
        sizes = f"{one.patch} | {one.vision_parameters / 1e6:.0f}{text}"
        taken = f"{measured['seconds'][name]:.2g}" if name in measured["seconds"] else "unmeasured"
        rows.append(f"| {name} | {sizes} | {count:.0f} | {taken} |")
    return rows


def everything(backbones: dict[str, Backbone]) -> list[str]:
    """Rows of the table of all with pretrained weights."""
    rows = ["| backbone | image | patch | width | text | parameters, vision (millions) | weights |", "|---" * 7 + "|"]
    for one in backbones.values():
        if one.tags:
            tags = ", ".join(f"{tag} ({one.licences[tag]})" if tag in one.licences else tag for tag in one.tags)
            sizes = f"{one.image_size} | {one.patch} | {one.width} | {one.text}"
            rows.append(f"| {one.name} | {sizes} | {one.vision_parameters / 1e6:.0f} | {tags} |")
    return rows


def renewed(page: str) -> str:
    """The page with its tables as they are now."""
    backbones = {one.name: one for one in fastzs.list_backbones()}
    for name, rows in (("costs", costs(backbones)), ("all", everything(backbones))):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = page.split(begin)
        page = before + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1]
    return page


if __name__ == "__main__":
    if "--seconds" in sys.argv[1:]:
        measure()
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
