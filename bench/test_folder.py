"""A folder of 64 images of 683 x 512 to label maps on disk: stages at once against one image after the other.

    pytest bench/test_folder.py --benchmark-only -s -m "full and not gpu"   # some ten minutes

"one thread" reads, labels and writes each image before the next. "the model alone" labels images that lie in memory and
writes nothing, one after the other: the rate that a folder can come near where cores are left for files, and pass by as
much as batches across images gain. "fastzs segment" is the command without its start: the stages of
:mod:`fastzs.pipeline`, and a manifest. Published sizes with random weights, JPEG files. Every rival must give the same
labels, all of them.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastzs.commands.segment import Job
from fastzs.result import Segmentation
from fastzs.runs import segment_pictures

from . import systems
from .machine import scratch_folder, why_no_bf16
from .rivals import Contest, Rival, compete, share_of_labels
from .test_systems import Loaded

COUNT, JUDGED = 64, 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RIVALS = ("one thread", "the model alone", "fastzs segment")
CASES = [
    pytest.param(system, dtype, rival, marks=pytest.mark.full)
    for system in ("maskclip", "clip_rc")
    for dtype in DTYPES
    for rival in RIVALS
]


class Stages(Job):
    """The command's own, with a model that is there."""

    def __init__(self, loaded: Loaded):
        super().__init__({}, loaded.names, "none", None)
        self.segmenter = loaded.segmenter


class Folder:
    """Image files and a place for results, removed with this object."""

    def __init__(self, system: str, dtype: torch.dtype):
        self.place = scratch_folder(self)
        self.files, self.stages = [], Stages(Loaded(system, "cpu", dtype=dtype))
        for i in range(COUNT):
            path = Path(self.place, f"{i:02}.jpg")
            pixels = systems.picture().roll(16 * i, 2).permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(path, quality=90)
            self.files.append(path)
        self.read = [self.stages.read(path) for path in self.files]
        self.runs = 0

    def target(self) -> Path:
        self.runs += 1
        path = Path(self.place, f"out{self.runs}")
        path.mkdir()
        return path

    def one_thread(self, count: int) -> torch.Tensor:
        target, kept = self.target(), []
        for path in self.files[:count]:
            (result,) = self.stages.label([self.stages.read(path)])
            result.save(target / f"{path.stem}.png")
            kept.append(result.labels)
        return torch.stack(kept)

    def model_alone(self, count: int) -> torch.Tensor:
        return torch.stack([result.labels for view in self.read[:count] for result in self.stages.label([view])])

    def segment(self, count: int) -> torch.Tensor:
        target = self.target()
        segment_pictures(self.files[:count], self.stages, target, "bench")
        return torch.stack([Segmentation.load(target / f"{path.stem}.png").labels for path in self.files[:count]])


WAYS = dict(zip(RIVALS, (Folder.one_thread, Folder.model_alone, Folder.segment), strict=True))


def contest(system: str, dtype: str) -> Contest:
    @functools.cache
    def folder() -> Folder:
        return Folder(system, DTYPES[dtype])

    def rival(way: Any) -> Rival:
        return Rival(
            lambda count: way(folder(), COUNT if count.item() else JUDGED),
            answer=lambda count: way(folder(), JUDGED),
            bound=0.0,
            products=DTYPES[dtype],
            unavailable=why_no_bf16("cpu") if dtype == "bf16" else None,
            prepare=folder,
            once=True,
        )

    parameters, multiply_adds = systems.costs(system)
    size = f"{systems.SIZE[1]} x {systems.SIZE[0]}"
    return Contest(
        f"{COUNT} images of {size} to files, {system}, {systems.CLASSES} classes, {dtype}",
        "cpu",
        lambda seed, dtype: (torch.tensor(1),),
        {name: rival(way) for name, way in WAYS.items()},
        lambda count: folder().one_thread(JUDGED),
        share_of_labels,
        nbytes=round(DTYPES[dtype].itemsize * parameters),
        operations=round(2 * multiply_adds * COUNT),
        pictures=COUNT,
        info={
            "op": "a folder of images",
            "system": system,
            "classes": systems.CLASSES,
            "headline": (system, dtype) == ("maskclip", "fp32"),
        },
        seconds=120,
        fresh=True,
    )


@pytest.mark.parametrize(("system", "dtype", "rival"), CASES)
def test_cpu(benchmark, system, dtype, rival):
    row = compete(benchmark, rival, contest, system, dtype)
    print(f"\n{row['group']}, {rival}: {row['pictures per second']:.2f} images per second, {row['faster']:.2f}x")
