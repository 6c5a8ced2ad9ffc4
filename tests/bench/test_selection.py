"""What of the bench runs by default."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import environment

ROOT = Path(__file__).parents[2]
OPS = ("mask_loss", "pixel_text_logits", "attention", "key_smoothing", "label_map", "proxy_attention")


# one process, since reading the bench's files takes most of the time
COLLECT = """
import sys, pytest
for options in ([], ["-m", "quick"], ["-m", "full or not full"]):
    print("---")
    assert pytest.main(["bench", "--collect-only", "-q", "-o", "addopts=", *options]) == 0
"""


@pytest.mark.slow
def test_what_is_left_out_and_what_is_quick():
    done = subprocess.run(
        [sys.executable, "-c", COLLECT], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = done.stdout.split("---\n")[1:]
    default, quick, everything = ({line for line in part.splitlines() if "::test_cpu" in line} for part in parts)
    assert quick < default < everything
    for name in (*OPS, "models", "train_step"):
        assert any(f"test_{name}.py::test_cpu" in line for line in quick), name
    for name in ("systems", "tower"):
        assert any(f"test_{name}.py::test_cpu" in line for line in default), name
    for batch, classes, sides in ((16, 847, "40, 640"), (8, 156, "32, 512"), (2, 15, "40, 640")):
        shape = f"({batch}, {classes}, {sides})-fastzs]"
        assert any(f"test_mask_loss.py::test_cpu[{shape}" in line for line in everything), shape


@pytest.mark.slow
def test_naming_what_is_left_out_runs_it():
    named = "bench/test_label_map.py::test_cpu[847-(512, 683)-noise-fastzs]"
    command = [sys.executable, "-m", "pytest", named, "--collect-only", "-q", "-o", "addopts="]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert named in done.stdout.splitlines(), done.stdout
