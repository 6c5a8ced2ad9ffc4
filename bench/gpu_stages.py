"""What ``bash bench/gpu.sh`` runs, stage by stage, each with a budget of seconds; it goes on where it was cut short.

    python -m bench.gpu_stages out/gpu            # what is left to do
    python -m bench.gpu_stages out/gpu --again    # everything anew

Correctness comes first, op by op, then the tiles, then the bench file by file, then profiles: what a later stage tells
is worth nothing where an earlier one failed. Every stage writes to FOLDER as it goes, FOLDER/stages.jsonl says how each
ended, and ``python -m bench gpu-report FOLDER`` makes a page of it, of a part too.

Without a GPU it is a dry run: every stage is started in a small form, Triton's kernels in the interpreter.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
TOTAL = 500  # seconds for all stages together; the build has had its own before
ORDER = (
    "mask_loss", "pixel_text_logits", "label_map", "bridged_attention", "dense_attention", "key_smoothing", "refine",
    "proxy_attention",
)  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One step, in a process of its own."""

    name: str
    budget: int  # seconds at the most
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    needs: str = ""  # a program without which the stage is skipped


def stages(folder: Path, dry: bool) -> Iterator[Stage]:
    """All stages in their order. A budget is some times what the stage is expected to take on 16 cores."""
    python, device = [sys.executable, "-u"], "cpu" if dry else "cuda"
    major, minor = (9, 0) if dry else torch.cuda.get_device_capability()
    # pytest-timeout, whose setting pyproject.toml has, may be missing
    quiet = ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    pytest = [*python, "-m", "pytest", "-v", "-rfE", *quiet]
    interpreted = {"TRITON_INTERPRET": "1"} if dry else {}
    few = ["--dry"] if dry else []
    test_budget = 150 if dry else 45  # the interpreter is slow

    # Fills TRITON_CACHE_DIR on all cores, so that no test waits for a compiler.
    yield Stage("compile", 90, [*python, "-m", "bench.warm_cache", str(10 * major + minor), *few])
    for op in ORDER:
        files = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(f"tests/kernels/test_{op}_gpu.py"))
        if dry or not files:
            files = [f"tests/kernels/test_{op}_triton.py"]
        which = ["-m", "slow or not slow", "-k", DRY_TESTS, "--maxfail=3"] if dry else ["-m", "gpu"]
        yield Stage(f"correct-{op}", test_budget, [*pytest, *which, *files], interpreted)
    which = ["-m", "slow or not slow", "-k", "mask_loss-triton-0"] if dry else ["-m", "gpu"]
    yield Stage(
        "correct-gradients", test_budget, [*pytest, *which, "tests/kernels/test_gradient_cases.py"], interpreted
    )
    file = "tests/test_transfers.py" if dry else "tests/test_transfers_gpu.py"
    yield Stage("correct-transfers", test_budget, [*pytest, *([] if dry else ["-m", "gpu"]), file])
    sanitized = [*pytest, "-x", "-m", "gpu", "-k", "label_dtypes", "tests/kernels/test_mask_loss_gpu.py"]
    yield Stage("sanitizer", 45, ["compute-sanitizer", "--error-exitcode", "9", *sanitized], needs="compute-sanitizer")
    timed = [*python, "-m", "bench.tiles", "--measure", str(folder / "tiles.jsonl"), *few]
    yield Stage("tiles", max(60, test_budget), timed, interpreted)
    rows = {"FASTZS_BENCH_ROWS": str(folder / "rows.jsonl")}
    benches = [path for path in sorted(ROOT.glob("bench/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    files = [str(path.relative_to(ROOT)) for path in benches]
    if dry:
        yield Stage("bench", test_budget, [*pytest, "--collect-only", "-q", "-m", "gpu", *files], rows)
    else:
        for path, file in zip(benches, files, strict=True):
            yield Stage(f"bench-{path.stem.removeprefix('test_')}", 45, [*pytest, "-m", "gpu", file], rows)
    call = ["-m", "fastzs", "profile", "maskclip", "--device", device]
    small = ["--size", "64", "--warmup", "1", "--iterations", "1"] if dry else ["--warmup", "10"]
    trace = ["--torch-profiler", str(folder / "trace.json")]
    yield Stage("profile-torch", test_budget, [*python, *call, *small, *trace])
    nsys = ["nsys", "profile", "-t", "cuda,nvtx", "-s", "none", "--capture-range=cudaProfilerApi"]
    nsys += ["--capture-range-end=stop", "-f", "true", "-o", str(folder / "maskclip")]
    yield Stage("profile-nsys", 45, [*nsys, *python, *call, *small], {"FASTZS_NVTX": "1"}, needs="nsys")


# A quick one of each file, for the dry run.
DRY_TESTS = (
    "labels_out_of_range or nan_stays or low_precision_logits or twice_the_same or gradients_go or number_stays"
    " or equal_scores or always_sees_itself"
)


def run(stage: Stage, limit: float, log: Path) -> tuple[str, float]:
    """Run a stage for at most ``limit`` seconds; how it ended ("done", "failed (code)", "out of time"), and seconds."""
    begun = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **stage.environment}
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return "out of time", time.monotonic() - begun
    return ("done" if code == 0 else f"failed ({code})"), time.monotonic() - begun


def finished(folder: Path) -> dict[str, str]:
    """How each stage of earlier runs ended."""
    path = folder / "stages.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["stage"]: entry["ended"] for entry in map(json.loads, lines)}


def main(arguments: list[str] | None = None) -> int:
    """Run what is left; 1 if a stage failed, 0 if all that were run are done."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_stages", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--again", action="store_true", help="run what is done, too")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for all stages together")
    given = parser.parse_args(arguments)
    folder, dry = given.folder, not torch.cuda.is_available()
    folder.mkdir(parents=True, exist_ok=True)
    if given.again:
        (folder / "stages.jsonl").unlink(missing_ok=True)
    if dry:
        print("dry run: no CUDA device, so every stage runs in a small form and nothing is measured", flush=True)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    before, begun, failed = finished(folder), time.monotonic(), 0
    for stage in stages(folder.absolute(), dry):
        if before.get(stage.name) == "done":
            continue
        left = given.total - (time.monotonic() - begun)
        if stage.needs and shutil.which(stage.needs) is None:
            ended, seconds = f"skipped: {stage.needs} is not there", 0.0
        elif left < 5:
            ended, seconds = "out of time", 0.0
        else:
            ended, seconds = run(stage, min(stage.budget, left), folder / f"{stage.name}.log")
        failed += ended.startswith("failed")
        with (folder / "stages.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage.name, "ended": ended, "seconds": round(seconds, 1)}) + "\n")
        print(f"{stage.name:<28}{seconds:6.1f} s  {ended}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
