"""Which device and which precision a model runs in."""

from typing import Literal

import torch

from fastzs.kernels.packed_linear.compiled import why_int8_is_slow

Precision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The torch device for a name; "auto" takes CUDA, then Apple's GPU, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype for a name; "auto" takes bf16 where the device multiplies it natively, else fp32.

    With "int8" it is that of everything but the products in int8, and the same as with "auto".

    Raises:
        ValueError: unknown name; "int8" where it cannot run or would be slow.
    """
    if name == "int8":
        why = f"it runs on CPUs only, got {device}" if device.type != "cpu" else why_int8_is_slow()
        if why:
            raise ValueError(f"precision int8 cannot be used: {why}; use auto, fp32 or bf16")
        name = "auto"
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"precision must be auto, {', '.join(DTYPES)} or int8, got {name!r}")
    return torch.bfloat16 if native_bf16(device) else torch.float32


def native_bf16(device: torch.device) -> bool:
    """Whether ``device`` has bf16 matrix instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        can = torch.cpu.get_capabilities()
        return bool(can.get("avx512_bf16") or can.get("amx_bf16") or can.get("bf16"))
    return False
