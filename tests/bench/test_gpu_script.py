"""``bench/gpu.sh`` without a GPU: every stage in a small form, what is done is not done again, and a page comes out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_stages
from bench.gpu_report import gpu_report, proposals
from tests.processes import environment

ROOT = Path(__file__).parents[2]
KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
@pytest.mark.skipif(sys.platform != "linux", reason="for machines with NVIDIA GPUs")
def test_dry_run(tmp_path):
    pytest.importorskip("triton")
    stand_in = tmp_path / "python"  # all but the build, which the installation under test has done
    stand_in.write_text(
        f'#!/bin/sh\n[ "$2" = pip ] && exit 0\n[ "$1" = setup.py ] && exit 0\nexec {sys.executable} "$@"\n'
    )
    stand_in.chmod(0o755)
    folder = tmp_path / "out"
    command = ["bash", str(ROOT / "bench/gpu.sh"), str(folder)]
    done = subprocess.run(
        command, env=environment(PYTHON=str(stand_in), OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dry run: no CUDA device" in done.stdout
    ended = gpu_stages.finished(folder)
    names = [stage.name for stage in gpu_stages.stages(folder, dry=True)]
    assert list(ended) == names
    assert {name: how for name, how in ended.items() if how != "done" and not how.startswith("skipped")} == {}
    assert not (folder / "rows.jsonl").exists()  # nothing was measured
    # what a stage was to leave behind: one that does nothing ends well, too
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert (folder / "tiles.jsonl").exists()
    assert "launches compiled for sm_90" in (folder / "compile.log").read_text()
    assert " PASSED" in (folder / "correct-mask_loss.log").read_text()
    assert "Ops (what impl='auto' takes" in (folder / "log.txt").read_text()
    page = (folder / "gpu.md").read_text()
    assert all(f"| {name} | " in page for name in names)
    assert "times of the interpreter, which say nothing" in page


def test_every_triton_backend_has_a_stage_of_its_own():
    """And a test that a GPU runs."""
    assert {path.parent.name for path in ROOT.glob("kernels/*/triton.py")} <= set(gpu_stages.ORDER)
    for op in gpu_stages.ORDER:
        files = list(ROOT.glob(f"tests/kernels/test_{op}_gpu.py")) or [ROOT / f"tests/kernels/test_{op}_triton.py"]
        assert "pytest.mark.gpu" in files[0].read_text(), op


def test_every_kernel_is_compiled_beforehand():
    pytest.importorskip("triton")
    from bench import warm_cache
    from bench.aot import launched_for

    with launched_for(90, compiled=False) as launches:
        for call, arguments in warm_cache.jobs():
            call(*arguments)
    kernels = {name for path in ROOT.glob("kernels/*/*.py") for name in KERNEL.findall(path.read_text())}
    assert {launch.kernel for launch in launches} == kernels
    assert len(kernels) > 12


def stage(name, code, budget=20):
    return gpu_stages.Stage(name, budget, [sys.executable, "-u", "-c", code])


def test_goes_on_where_it_was_cut_short(tmp_path, monkeypatch, capsys):
    """A stage that hangs is ended at its budget, one that fails is run again, one that is done is not."""
    mark = "open('{0}', 'a').write('x')".format
    monkeypatch.setattr(gpu_stages.torch.cuda, "is_available", lambda: False)
    plan = [
        stage("good", mark(tmp_path / "good")),
        stage("bad", mark(tmp_path / "bad") + "; raise SystemExit(3)"),
        stage("slow", "import time; time.sleep(60)", budget=1),
        gpu_stages.Stage("absent", 5, ["no-such-program"], needs="no-such-program"),
    ]
    monkeypatch.setattr(gpu_stages, "stages", lambda folder, dry: iter(plan))
    for _ in range(2):
        assert gpu_stages.main([str(tmp_path)]) == 1
    assert gpu_stages.finished(tmp_path) == {
        "good": "done",
        "bad": "failed (3)",
        "slow": "out of time",
        "absent": "skipped: no-such-program is not there",
    }
    assert (tmp_path / "good").read_text() == "x"
    assert (tmp_path / "bad").read_text() == "xx"
    assert gpu_stages.main([str(tmp_path), "--again", "--total", "0"]) == 0
    assert set(gpu_stages.finished(tmp_path).values()) == {"out of time", "skipped: no-such-program is not there"}


def test_the_page_of_a_run_that_was_cut_short(tmp_path):
    (tmp_path / "stages.jsonl").write_text('{"stage": "correct-a", "ended": "out of time", "seconds": 45.0}\n')
    (tmp_path / "correct-a.log").write_text(
        "tests/kernels/test_a.py::test_x[1] PASSED [ 50%]\ntests/kernels/test_a.py::test_y FAILED [100%]\ntests/kern"
    )
    page = gpu_report(tmp_path)
    assert "| correct-a | out of time | 45.0 | 1 | 1 |" in page
    assert "- `tests/kernels/test_a.py::test_y`" in page
    with pytest.raises(ValueError, match="holds no stages"):
        gpu_report(tmp_path / "elsewhere")


def test_tiles_that_are_faster_are_proposed(tmp_path):
    def row(tile, seconds, kernel="fwd"):
        entry = {"kernel": kernel, "entry": "2 bytes, 64 wide", "arch": 90, "own": [128, 64, 8, 2], "dry": False}
        return entry | {"tile": tile, "seconds": seconds}

    measured = [row([128, 64, 8, 2], 3e-5), row([128, 128, 8, 2], 2e-5), row([128, 64, 8, 2], 3e-5, "bwd_q")]
    assert proposals(measured) == {("fwd", "2 bytes, 64 wide", 90): ([128, 128, 8, 2], pytest.approx(1.5))}
    (tmp_path / "stages.jsonl").write_text('{"stage": "tiles", "ended": "done", "seconds": 9.0}\n')
    (tmp_path / "tiles.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in measured) + '{"cut')
    assert '"sm_90": [128, 128, 8, 2]`, 1.50 times as fast' in gpu_report(tmp_path)
