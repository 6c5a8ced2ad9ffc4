"""Triton's kernels compiled as they are launched, for GPUs that are not here, and what their machine code takes.

    with launched_for(90) as launches:
        bridged_attention.triton.forward(...)  # tensors of the CPU: nothing is started
    print(launches[0].resources())

What is compiled is what would run: the launcher's own options, its own arguments, and Triton's own specialisation on
them (integers that are 1 or multiples of 16, aligned pointers). It lands in ``TRITON_CACHE_DIR``, so a GPU of that
architecture need not compile it again.
"""

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 86, 89, 90, 100, 120)  # A100; RTX 30; RTX 40 and L40; H100 and H200; B200; RTX 50
# Bytes of shared memory that a block may have.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Blackwell's tensor memory is taken, waited for and given back with marks in shared memory; there are no other atomics.
MARKS = {100: 16}


@dataclass(frozen=True)
class Resources:
    """Of one compiled kernel."""

    registers: int  # of a thread
    shared: int  # bytes of a block
    local_accesses: int  # loads and stores of spilled registers
    atomics: int
    matrix_products: int  # instructions of the tensor cores


@dataclass(frozen=True)
class Launch:
    """One launch that was asked for, and what was compiled for it."""

    function: JITFunction
    arguments: dict[str, Any]  # by name, the options too
    compiled: Any

    @property
    def kernel(self) -> str:
        return self.function.fn.__name__

    @property
    def parameters(self) -> list[str]:
        """The names of the kernel's arguments that are not known when it is compiled."""
        return [parameter.name for parameter in self.function.params if not parameter.is_constexpr]

    def again(self, changes: dict[str, Any]) -> None:
        """The same launch, with some arguments changed."""
        self.function.run(grid=(1,), warmup=True, **self.arguments | changes)

    def resources(self) -> Resources:
        """Read from the machine code, with the tools that come with Triton."""
        return _resources(self.compiled.asm["cubin"], self.compiled.metadata.shared)


class _Absent:
    """In place of a driver: a GPU of an architecture, on which nothing can be started."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return 1000 + self.arch  # kernels are kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def launched_for(arch: int, compiled: bool = True) -> Iterator[list[Launch]]:
    """Meanwhile launches are compiled for ``sm_<arch>`` (unless told otherwise) and collected, not started.

    Triton's interpreter must be off. The tensors may be of the CPU.
    """
    launches: list[Launch] = []
    run, before = JITFunction.run, driver._active

    @functools.wraps(run)
    def compile_only(self, *arguments, grid, warmup, **options):
        made = run(self, *arguments, grid=grid, warmup=True, **options) if compiled else None
        named = dict(zip(self.arg_names, arguments, strict=False)) | options
        launches.append(Launch(self, named, made))
        return made

    driver.set_active(_Absent(arch))  # pyright: ignore[reportArgumentType]  all of a driver that compiling asks for
    JITFunction.run = compile_only
    try:
        yield launches
    finally:
        JITFunction.run = run
        driver._active = before


@functools.cache
def _resources(cubin: bytes, shared: int) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True)
        code = subprocess.run([_tool("nvdisasm"), "-c", path], capture_output=True, text=True)
    usage.check_returncode()
    code.check_returncode()
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage.stdout)[-1]),
        shared=shared,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        atomics=len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\b", code.stdout)),
        matrix_products=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code.stdout)),
    )


def _tool(name: str) -> str:
    """A CUDA binary tool: the one Triton brings, or the one on PATH."""
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(found) if found.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on PATH")
    return path
