"""A clip of 24 frames of 682 x 512 to label maps on disk: ``fastzs segment`` against the model alone.

    pytest bench/test_video.py --benchmark-only -s -m full

"the model alone" labels frames that lie in memory, in the batches that the command makes, and writes nothing. "fastzs
segment" is the command without its start: frames are decoded ahead, and label maps, times and counts are written
behind. MaskCLIP, ViT-B/16, random weights, 20 classes; H.264. Both must give the same labels. Wanted: at least 95 % of
the model's own rate.
"""

import functools
import importlib.util
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastzs.result import Segmentation
from fastzs.video.clip import Clip
from fastzs.video.reel import Reel, video_frame
from fastzs.video.run import Wanted, segment_clips

from . import systems
from .machine import scratch_folder, why_no_bf16
from .rivals import Contest, Rival, compete, share_of_labels
from .test_folder import DTYPES, Stages
from .test_systems import Loaded

COUNT, JUDGED, SIZE = 24, 4, (512, 682)  # H.264 takes even sides
RIVALS = ("the model alone", "fastzs segment")


class Footage:
    """Clips of ``COUNT`` and of ``JUDGED`` frames and a place for results, removed with this object."""

    def __init__(self, dtype: torch.dtype):
        self.place = scratch_folder(self)
        self.stages = Stages(Loaded("maskclip", "cpu", dtype=dtype))
        self.clips = {count: self._write(count) for count in (COUNT, JUDGED)}
        self.frames = {count: self._read(path) for count, path in self.clips.items()}
        self.runs = 0

    def _write(self, count: int) -> Path:
        path = self.place / f"{count}.nut"
        reel = Reel(path, Fraction(1, 25), Fraction(25))
        for i in range(count):
            pixels = systems.picture()[..., : SIZE[1]].roll(8 * i, 2).permute(1, 2, 0).numpy()
            reel.add(video_frame(Image.fromarray(pixels)), i)
        reel.close()
        return path

    def _read(self, path: Path) -> list[Any]:
        with Clip(path) as clip:
            return [self.stages.frame(frame.image) for frame in clip.frames()]

    def alone(self, count: int) -> torch.Tensor:
        return torch.stack([result.labels for result in self.stages.label(self.frames[count])])

    def segment(self, count: int) -> torch.Tensor:
        self.runs += 1
        target = self.place / f"out{self.runs}"
        target.mkdir()
        outcome = segment_clips([self.clips[count]], target, "bench", self.stages, Wanted())
        if not outcome.complete:
            raise RuntimeError(f"frames are missing: {outcome.failed}")
        if count == COUNT:
            return torch.empty(0)
        return torch.stack([Segmentation.load(path).labels for path in sorted(target.rglob("*.png"))])


def contest(dtype: str) -> Contest:
    @functools.cache
    def footage() -> Footage:
        return Footage(DTYPES[dtype])

    why = why_no_bf16("cpu") if dtype == "bf16" else None
    if importlib.util.find_spec("av") is None:
        why = "needs the extra 'video'"

    def rival(way: Any) -> Rival:
        return Rival(
            lambda count: way(footage(), int(count)),
            answer=lambda count: way(footage(), JUDGED),
            bound=0.0,
            products=DTYPES[dtype],
            unavailable=why,
            prepare=lambda: way(footage(), JUDGED),
            once=True,
        )

    parameters, multiply_adds = systems.costs("maskclip")
    return Contest(
        f"{COUNT} frames of {SIZE[1]} x {SIZE[0]} to label maps, maskclip, {systems.CLASSES} classes, {dtype}",
        "cpu",
        lambda seed, dtype: (torch.tensor(COUNT),),
        dict(zip(RIVALS, (rival(Footage.alone), rival(Footage.segment)), strict=True)),
        lambda count: footage().alone(JUDGED),
        share_of_labels,
        nbytes=round(DTYPES[dtype].itemsize * parameters),
        operations=round(2 * multiply_adds * COUNT),
        pictures=COUNT,
        info={"op": "a video", "system": "maskclip", "classes": systems.CLASSES},
        seconds=150,
        fresh=True,
    )


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rival", RIVALS)
def test_cpu(benchmark, dtype, rival):
    row = compete(benchmark, rival, contest, dtype)
    print(f"\n{row['group']}, {rival}: {row['pictures per second']:.2f} frames per second, {row['faster']:.2f}x")
