"""``bench/gpu.sh`` without a GPU: it collects, says why nothing is measured, and succeeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.skipif(sys.platform != "linux", reason="for machines with NVIDIA GPUs")
def test_dry_run(tmp_path):
    stand_in = tmp_path / "python"  # all but the build, which the installation under test has done
    stand_in.write_text(
        f'#!/bin/sh\n[ "$2" = pip ] && exit 0\n[ "$1" = setup.py ] && exit 0\nexec {sys.executable} "$@"\n'
    )
    stand_in.chmod(0o755)
    # options for this run of pytest are not for the one inside
    environment = {**os.environ, "PYTHON": str(stand_in), "PYTEST_ADDOPTS": ""}
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: no CUDA device, so nothing was run and nothing was measured" in done.stdout
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "tests/kernels/test_mask_loss_gpu.py: " in log
    assert "bench/test_mask_loss.py: " in log
    assert not (tmp_path / "out" / "rows.jsonl").exists()
