"""The CUDA sources compile for A100, H100 and B200, and no kernel spills registers. Needs nvcc, no GPU."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100)
home = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["cuda_home"]()
pytestmark = pytest.mark.skipif(home is None, reason="no CUDA toolkit")


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(ROOT.glob("csrc/*.cu")), ids=lambda path: path.name)
def test_compiles_without_spilling(source, tmp_path):
    include = Path(torch.__file__).parent / "include"
    command = [f"{home}/bin/nvcc", "-std=c++17", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{include}", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "o")]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) >= len(ARCHITECTURES)
    assert set(spills) == {("0", "0")}
    assert max(registers) <= 96  # a block of 128 threads: five fit an SM
