"""How the cost grows: with classes, picture size, windows at a time, pictures and processes. About five minutes.

    python -m bench.scaling --output scaling.json
    python -m bench.scaling_page scaling.json       # docs/scaling.md

MaskCLIP throughout: a ViT-B/16 with random weights (the work is the same), and where that would take too long the small
CLIP that the package carries ("shapes"). Pictures of noise, text vectors given, so that no text tower runs. The points
of a table take turns, round by round; one whose call takes over :data:`LONG` seconds is called once. Then the command
line, in processes of its own. The file is written again after every part, so that a run cut short keeps what it has.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from fastzs.data.shapes import draw
from fastzs.devices import choose_precision
from fastzs.loading import load
from fastzs.runs import Attempt, Manifest
from fastzs.segmenter import Segmenter
from fastzs.vocabulary import Vocabulary
from fastzs.windows import window_grid

from .machine import commit, describe, peak_megabytes
from .timing import timed

LONG = 4.0
ROUNDS = 3
CLASSES = 20
NAMES = ("disc", "ring", "star", "moon", "heart", "cross")  # that the command line is asked for


@dataclass(frozen=True)
class Plan:
    """What is measured; pictures are squares, given by their side in pixels."""

    backbone: str = "ViT-B-16"
    classes: Sequence[int] = (1, 20, 150, 500, 1000, 2000)
    side: int = 512  # of the picture with so many classes
    whole: Sequence[int] = (128, 256, 512, 1024)
    windows: Sequence[int] = (1024, 2048)  # in windows of 512
    small: Sequence[int] = (128, 512, 1024, 2048, 4096)  # by the small CLIP, in its own windows of 128
    batches: Sequence[int] = (1, 4, 16)  # windows of 224 at a time
    batch_side: int = 896  # the picture that has 16 of them
    counts: Sequence[int] = (25, 100, 400)  # pictures of 128 by the small CLIP
    pictures: int = 16  # of ``side``, shared out among processes
    lines: int = 100_000  # of a manifest


Point = tuple[dict[str, Any], Callable[[], object]]


def measure(plan: Plan, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All parts; ``keep`` gets what is there after each."""
    precision = str(choose_precision("auto", torch.device("cpu"))).removeprefix("torch.")
    found: dict[str, Any] = {"about": describe("cpu") | {"precision": precision, "commit": commit()}}
    begun = time.monotonic()
    for name, part in (
        ("classes", partial(classes, plan)),
        ("sizes", partial(sizes, plan)),
        ("batches", partial(batches, plan)),
        ("counts", partial(counts, plan)),
        ("processes", partial(processes, plan)),
        ("manifest", partial(manifest, plan.lines)),
    ):
        found[name] = part()
        found["about"]["minutes"] = round((time.monotonic() - begun) / 60, 1)
        keep(found)
    return found


def noise(side: int) -> torch.Tensor:
    """uint8 [3, side, side]."""
    return torch.randint(256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


def vocabulary(count: int, model: Any) -> Vocabulary:
    """So many classes with drawn text vectors."""
    vectors = torch.randn(count, model.clip.embed_dim, generator=torch.Generator().manual_seed(1))
    return Vocabulary([f"class {i}" for i in range(count)], embeddings=F.normalize(vectors, dim=1))


def vit(plan: Plan) -> Any:
    torch.manual_seed(0)
    return load("maskclip", backbone=plan.backbone, weights="random", device="cpu").model


def point(
    model: Any, side: int, count: int = CLASSES, crop: int = 0, stride: int | None = None, batch: int = 8
) -> Point:
    """One picture to labels, in its own size: whole or in windows."""
    segmenter = Segmenter(model, short_side=0, crop=crop, stride=stride, batch_size=batch)
    windows = len(window_grid((side, side), crop, segmenter.stride)) if crop and segmenter.stride else 1
    facts = {"side": side, "classes": count, "windows": windows, "batch": batch}
    return facts, partial(segmenter, noise(side), vocabulary(count, model))


def in_turns(points: Sequence[Point]) -> list[dict[str, Any]]:
    """The points with the seconds of their rounds, those of all cores together, and the last call's peak of memory."""
    rows = [{**facts, "seconds": [], "processor seconds": [], "peak MB": 0.0} for facts, _ in points]
    for _ in range(1 + ROUNDS):
        for row, (_, run) in zip(rows, points, strict=True):
            if row["seconds"] and row["seconds"][0] > LONG:
                continue
            taken: dict[str, float] = {}

            def call(run=run, taken=taken) -> None:
                taken.update(timed(run, [()], 1))

            row["peak MB"] = round(peak_megabytes(call, "cpu"), 1)
            for kind, seconds in taken.items():
                row[kind].append(round(seconds, 5))
    for row in rows:  # the first call warms up
        for kind in ("seconds", "processor seconds"):
            row[kind] = row[kind][1:] or row[kind]
    return rows


def classes(plan: Plan) -> list[dict[str, Any]]:
    model = vit(plan)
    return in_turns([point(model, plan.side, count) for count in plan.classes])


def sizes(plan: Plan) -> list[dict[str, Any]]:
    large, small = vit(plan), load("maskclip", weights="shapes", device="cpu").model
    points = [("ViT-B/16, whole", point(large, side)) for side in plan.whole]
    points += [("ViT-B/16, windows of 512", point(large, side, crop=512)) for side in plan.windows]
    points += [("shapes, windows of 128", point(small, side, crop=128, stride=96)) for side in plan.small]
    return in_turns([({"how": how, **facts}, run) for how, (facts, run) in points])


def batches(plan: Plan) -> list[dict[str, Any]]:
    model = vit(plan)
    return in_turns([point(model, plan.batch_side, crop=224, stride=224, batch=batch) for batch in plan.batches])


def counts(plan: Plan) -> list[dict[str, Any]]:
    """The whole command, from its start to its end, on more and more pictures."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in plan.counts:
            pictures = draw_pictures(Path(folder, f"in{count}"), count, 128)
            options = ["--weights", "shapes"]
            rows.append({"pictures": count, **command(pictures, Path(folder, f"out{count}"), options, 1)})
    return rows


def processes(plan: Plan) -> list[dict[str, Any]]:
    """The same pictures by one process with all cores, and by two that have half of them each."""
    options = [
        "--backbone",
        plan.backbone,
        "--weights",
        "random",
        "--templates",
        "single",
        "--short-side",
        str(plan.side),
    ]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ways: list[tuple[str, list[str], list[str], int]] = [("one process", [], [], 1), ("torchrun, two", torchrun, [], 2)]
    if all(importlib.util.find_spec(name) for name in ("ray", "pyarrow", "pandas")):
        ways.append(("Ray Data, two actors", [], ["--engine", "ray", "--workers", "2"], 2))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw_pictures(Path(folder, "in"), plan.pictures, plan.side)
        for way, launcher, more, count in ways:
            output = Path(folder, way)
            facts = {"how": way, "processes": count, "pictures": plan.pictures, "classes": len(NAMES)}
            rows.append(facts | command(pictures, output, [*options, *more], count, launcher))
    return rows


def draw_pictures(folder: Path, count: int, side: int) -> Path:
    folder.mkdir()
    for i, image in enumerate(draw(count, (side, side)).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return folder


def command(
    pictures: Path, output: Path, options: list[str], processes: int, launcher: list[str] | None = None
) -> dict[str, Any]:
    """Seconds of ``fastzs segment``, start included, and its pictures per second over the middle half of its results.

    By then all processes are at work, and none is done.
    """
    threads = max(1, torch.get_num_threads() // processes)
    segment = ["-m", "fastzs", "segment", str(pictures), "--classes", ",".join(NAMES), "--device", "cpu", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "FASTZS_CACHE": str(output.parent / "cache")}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *(launcher or []), *segment, "--output", str(output)],
        env=environment,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"fastzs segment failed: {done.stderr}")
    written = sorted(path.stat().st_mtime for path in output.glob("*.png"))
    first, last = len(written) // 4, 3 * len(written) // 4
    rate = (last - first) / (written[last] - written[first])
    return {"threads": threads, "seconds": round(seconds, 2), "pictures/s": round(rate, 4)}


def manifest(lines: int) -> dict[str, Any]:
    """What a process holds and reads to go on in a folder where so many pictures are done."""
    with tempfile.TemporaryDirectory() as folder:
        writer, path = Manifest(Path(folder)), Path(folder, "manifest.jsonl")
        done = Attempt(Path("/pictures/part-0001/000000000.jpg"), [10**6, 10**18], digest="ab" * 32)
        writer.add(done, "c" * 16, "000000000", ["000000000.png"])
        line = path.read_text()
        with path.open("w") as stream:
            stream.writelines(line.replace("000000000", f"{i:09d}") for i in range(lines))
        size, taken, kept = path.stat().st_size, [], []

        def read() -> None:
            begun = time.perf_counter()
            kept.append(Manifest(Path(folder)))
            taken.append(time.perf_counter() - begun)

        megabytes = peak_megabytes(read, "cpu")
        assert len(kept[0].lines) == lines
    return {"lines": lines, "bytes": size, "seconds": round(taken[0], 3), "peak MB": round(megabytes, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("scaling.json"), help="what is measured, as JSON")
    output = parser.parse_args().output
    measure(Plan(), lambda found: output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8") and None)


if __name__ == "__main__":
    main()
