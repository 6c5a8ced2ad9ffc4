"""kill -9 at random moments: the next runs go on, nothing is lost, the files are those of an undisturbed run."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastzs.files import TEMPORARY
from tests.mischief.runner import QUICK

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="needs kill -9")]


def start(command: list[str], folder: Path) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTZS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def kill_at(process: subprocess.Popen, reached: Callable[[], bool], delay: float) -> bool:
    """End a run and its processes ``delay`` seconds after it has ``reached`` a point; whether it was still at work."""
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(delay)
    at_work = process.poll() is None
    if at_work:
        parent = psutil.Process(process.pid)
        for each in [parent, *parent.children(recursive=True)]:  # torchrun's workers are in sessions of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate()
    return at_work


def finish(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 0, said[-2000:]
    return said


def left(folder: Path) -> list[str]:
    return [
        str(path) for path in folder.rglob(".*") if TEMPORARY.fullmatch(path.name) or path.name.startswith(".running-")
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".png", ".jpg")
    }


ENGINES = {
    "plain": ([sys.executable, "-m", "fastzs"], []),
    "torchrun": (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastzs"],
        [],
    ),
    "ray": ([sys.executable, "-m", "fastzs"], ["--engine", "ray", "--workers", "2"]),
}


@pytest.mark.parametrize(("engine", "kills"), [("plain", 5), ("torchrun", 3), ("ray", 2)])
def test_segment(tmp_path, engine, kills):
    if engine == "ray":
        pytest.importorskip("ray", reason="needs the extra 'ray'")
    chance = random.Random(f"{engine} 1")
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i in range(120):
        pixels = np.random.default_rng(i).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / ("sub" if i % 3 else "") / f"{i:03}.png")

    def segment(out: str, engine: str) -> subprocess.Popen:
        begin, more = ENGINES[engine]
        classes = ["--classes", "red disc,blue ring", "--overlay"]
        line = ["segment", "in", "--output", out, *QUICK, "--short-side", "64", *classes, *more]
        return start([*begin, *line], tmp_path)

    def maps() -> int:
        return len(list((tmp_path / "out").rglob("*.png")))

    killed = 0
    for point in sorted(chance.sample(range(90), kills)):  # by maps, not seconds: processors differ in speed
        point = max(point, maps() + 1)
        killed += kill_at(segment("out", engine), lambda point=point: maps() >= point, chance.uniform(0, 0.02))
    assert killed > kills // 2
    finish(segment("out", engine))
    assert left(tmp_path / "out") == []
    finish(segment("alone", "plain"))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    lines = [line for path in (tmp_path / "out").glob("manifest*") for line in path.read_bytes().splitlines()]
    assert len({json.loads(line)["picture"] for line in lines}) == 120
    assert "120 done before" in finish(segment("out", "plain"))


def test_train(tmp_path):
    chance = random.Random(2)

    def command(out: str) -> list[str]:
        return [sys.executable, "-m", "tests.training", out, "max_steps=60", "save_every=7", "evaluate_every=20"]

    log = tmp_path / "out" / "log.csv"

    def reached(step: int, begun: int) -> bool:
        """Whether the run that began then has logged this step, or any later one."""
        if not log.is_file() or log.stat().st_mtime_ns < begun:
            return False
        last = log.read_text().splitlines()[-1].split(",")[0]
        return last.isdecimal() and int(last) >= step

    killed = 0
    for _ in range(4):
        step, begun = chance.randint(1, 50), time.time_ns()
        run = start(command("out"), tmp_path)
        killed += kill_at(run, lambda step=step, begun=begun: reached(step, begun), chance.uniform(0, 0.1))
    assert killed > 2
    finish(start(command("out"), tmp_path))
    finish(start(command("alone"), tmp_path))
    assert left(tmp_path / "out") == []
    one, other = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("out", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("out", "alone")]
    steps = [[line.split(",")[:3] for line in log] for log in logs]  # without the times
    assert steps[0] == steps[1]
