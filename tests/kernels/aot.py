"""Compile Triton kernels for GPUs that are not there, and read what they take of one from the machine code."""

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have, per architecture


@dataclass
class Resources:
    registers: int
    shared: int  # bytes
    local_accesses: int  # loads and stores of spilled registers
    atomics: int
    matrix_products: int  # instructions of the tensor cores


def resources(kernel, signature: dict, constants: dict, arch: int, num_warps: int, aligned=()) -> Resources:
    """Compile ``kernel`` for ``sm_<arch>``.

    Args:
        signature: argument name -> Triton type; constants are typed "constexpr".
        constants: argument name -> value.
        aligned: names of the arguments divisible by 16, which Triton specialises on.
    """
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": num_warps})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([tool("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True)
        code = subprocess.run([tool("nvdisasm"), "-c", cubin], capture_output=True, text=True)
    usage.check_returncode()
    code.check_returncode()
    return Resources(
        registers=int(re.findall(r"REG:(\d+)", usage.stdout)[-1]),
        shared=compiled.metadata.shared,
        local_accesses=len(re.findall(r"\b(?:LDL|STL)\b", code.stdout)),
        atomics=len(re.findall(r"\b(?:ATOM|ATOMG|ATOMS|RED|REDG)\b", code.stdout)),
        matrix_products=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", code.stdout)),
    )


def tool(name: str) -> str:
    """A CUDA binary tool: the one Triton brings, or the one on PATH."""
    found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    path = str(found) if found.exists() else shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is neither in Triton's package nor on PATH")
    return path
