"""The machine a benchmark ran on: what it is, the most it can copy and multiply, and the memory a call takes there."""

import ctypes
import functools
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastzs.devices import native_bf16
from fastzs.kernels.packed_linear.compiled import MISSING
from fastzs.kernels.packed_linear.weights import STEPS, pack_weight
from fastzs.ops import packed_linear

VERSIONS = ("triton", "xformers", "openvino", "onnxruntime")
PRELOADED = [
    "pytest",
    "torch",
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "fastzs.ops",
    "fastzs.models",
    "fastzs.segmenter",
]
FRESH_PROCESS_SECONDS = 900
CLEAR_PEAK = "5"  # see proc(5) on clear_refs
SCRATCH = "FASTZS_BENCH_SCRATCH"  # variable of a fresh process: where it may leave files


def describe(device: str) -> dict[str, Any]:
    """Device, threads, clocks where they can be read, and versions, for a benchmark's ``extra_info``."""
    info: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    for package in VERSIONS:
        try:
            info[package] = version(package)
        except PackageNotFoundError:
            continue
    if device == "cuda":
        return {**info, "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "clocks": _gpu_clocks()}
    fields = _cpu_fields()
    info |= {"device": fields.get("model name") or platform.processor() or platform.machine()}
    if "cpu MHz" in fields:
        info["clocks"] = f"{float(fields['cpu MHz']):.0f} MHz"
    if hasattr(os, "getloadavg"):
        info["load"] = round(os.getloadavg()[0], 1)
    return {**info, "threads": torch.get_num_threads()}


def _cpu_fields() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def commit() -> str:
    """Of the package that is measured; empty outside a repository."""
    asked = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def _gpu_clocks() -> str:
    command = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not readable"


def why_no_bf16(device: str) -> str | None:
    """None if ``device`` has instructions that multiply bf16, else that it has none."""
    return None if native_bf16(torch.device(device)) else "this processor has no bf16 instructions"


LARGE = 2**31  # bytes that no cache holds


RATES: dict[tuple, float] = {}  # the best of what was measured


def _best(measure: Callable[..., float]) -> Callable[..., float]:
    """Measures once, and once more where ``again=True``: a machine that was busy meanwhile did less than it can."""

    @functools.wraps(measure)
    def best(*args: Any, again: bool = False) -> float:
        key = (measure.__name__, *args)
        if again or key not in RATES:
            RATES[key] = max(measure(*args), RATES.get(key, 0.0))
        return RATES[key]

    return best


@_best
def copy_bandwidth(device: str, most: int = LARGE) -> float:
    """Bytes per second, read and written, that the machine's best copy moves.

    Args:
        most: of bytes that are read and written; few of them may stay in a cache.
    """
    large = LARGE // 2 if device == "cuda" else LARGE // 8
    size = min(large, max(4, most // 2))
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _fastest(lambda: target.copy_(source), device)
    return rate if size == large else max(rate, copy_bandwidth(device))


@_best
def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """Operations per second (a multiplication and an addition are two) of the machine's best matrix product.

    On CPUs the best of PyTorch's, which is MKL's in fp32 and may leave half of the machine unused, oneDNN's with packed
    weights and this package's; with int8 PyTorch's of bytes and this package's.
    """
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    if device == "cuda":
        out = torch.empty_like(a)
        return 2 * n**3 / _fastest(lambda: torch.mm(a, b, out=out), device)
    return 2 * n**3 / min(_fastest(product, device) for product in _products(a, b))


def _products(a: torch.Tensor, b: torch.Tensor) -> list[Callable[[], object]]:
    """Ways to multiply two square matrices of a dtype on the CPU; those of fp16 may be computed in fp32."""
    if a.dtype == torch.float16:
        return [functools.partial(torch.mm, a, b), *_products(a.float(), b.float())]
    products: list[Callable[[], object]] = [
        functools.partial(torch.ops.aten._int_mm if a.dtype == torch.int8 else torch.mm, a, b)
    ]
    if a.dtype in (torch.float32, torch.bfloat16) and torch.backends.mkldnn.is_available():
        weight = torch.ops.mkldnn._reorder_linear_weight(b)
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], None))
    if a.dtype in STEPS and MISSING is None:
        packed, rows = pack_weight(b.float(), None, a.dtype), a.float() if a.dtype == torch.int8 else a
        products.append(functools.partial(packed_linear, rows, packed, impl="cpu"))
    return products


def _fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of some calls: a ceiling is what the machine can do, not what it does on average."""
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def synchronize(device: str) -> None:
    """Wait for what was asked of ``device``."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_megabytes(run: Callable[[], object], device: str) -> float:
    """The most memory that ``run()`` held beyond what was held before it, in MB (10^6 bytes).

    On a GPU the allocator's count; on Linux CPUs the process's resident memory, which the kernel tracks.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
        Path("/proc/self/clear_refs").write_text(CLEAR_PEAK)
    before = resident_peak()
    run()
    return (resident_peak() - before) / 1e6


def total_memory() -> float:
    """Bytes of memory of the machine; 8 GB where the system does not say."""
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8e9


def resident_peak() -> float:
    if Path("/proc/self/status").exists():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """``function(*args)`` in a process that has computed nothing before; None where it fails or takes too long.

    The processes are forked from one that has torch imported and nothing run, so each starts in a moment.
    """
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        process = context.Process(target=_send, args=(theirs, scratch, function, args), daemon=True)
        process.start()
        theirs.close()
        try:
            return ours.recv() if ours.poll(FRESH_PROCESS_SECONDS) else None
        except EOFError:
            return None
        finally:
            process.kill()
            process.join()


def _send(pipe, scratch: str, function: Callable, args: tuple) -> None:
    os.environ[SCRATCH] = scratch
    pipe.send(function(*args))


def scratch_folder(owner: object) -> Path:
    """A new folder that is removed with ``owner``, and in a fresh process, which is killed, by who started it."""
    place = tempfile.mkdtemp(dir=os.environ.get(SCRATCH))
    weakref.finalize(owner, shutil.rmtree, place)  # TemporaryDirectory warns where nobody cleans it up
    return Path(place)
