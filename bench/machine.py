"""The machine a benchmark ran on, and the memory it took there."""

import ctypes
import platform
import resource
import sys
from pathlib import Path

import torch


def describe(device: str) -> dict:
    """Device, threads and versions, for a benchmark's ``extra_info``."""
    info = {"torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        return {**info, "device": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {**info, "device": cpu, "threads": torch.get_num_threads()}


def peak_megabytes(run, device: str) -> float:
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
        Path("/proc/self/clear_refs").write_text("5")  # restarts the count of the peak
    before = _resident_peak()
    run()
    return (_resident_peak() - before) / 1e6


def _resident_peak() -> float:
    if Path("/proc/self/status").exists():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
