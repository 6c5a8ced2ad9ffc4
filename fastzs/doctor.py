"""Versions, devices, the built extension, and which backend each op takes and why, on this machine."""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastzs import __version__, ops
from fastzs.cache import cache_folder
from fastzs.devices import choose_device, choose_precision
from fastzs.kernels import extension
from fastzs.kernels.dispatch import watch
from fastzs.kernels.packed_linear.weights import pack_weight

PACKAGES = (
    "torch", "torchvision", "triton", "open_clip_torch", "xformers", "nvtx", "numpy", "pillow", "safetensors",
    "huggingface_hub", "jsonargparse", "rich", "pycocotools", "ray",
)  # fmt: skip
VARIABLES = ("FASTZS_IMPL", "FASTZS_BUILD", "FASTZS_NVTX", "FASTZS_CACHE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
# The entries of torch.cpu.get_capabilities that decide which code runs.
FEATURES = (
    "avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "bf16", "sve", "sve2",
)  # fmt: skip


def report() -> dict[str, Any]:
    """Everything that ``fastzs doctor`` prints, as plain data.

    Returns:
        ``versions`` (name to version, None where a package is missing), ``system``, ``environment`` (the variables
        that matter, where set), ``cache`` (folder), ``devices`` (see :func:`devices`), ``device`` (what "auto"
        takes), ``extension`` (``built``: what the build said of each part; ``problem``: why the library is not
        used, or None), ``ops`` (see :func:`op_choices`).
    """
    auto = choose_device("auto")
    return {
        "versions": versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "cache": str(cache_folder()),
        "devices": devices(),
        "device": str(auto),
        "extension": {"built": extension.build_report(), "problem": extension.why_not_loaded()},
        "ops": op_choices(auto),
    }


def versions() -> dict[str, str | None]:
    """Versions of fastzs, Python and the packages it works with; None for a package that is not installed."""
    found: dict[str, str | None] = {"fastzs": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def devices() -> list[dict[str, Any]]:
    """Each usable device: ``device``, ``name``, ``details``, what ``precision`` "auto" means on it, and ``why``."""
    names = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        names.append("mps")
    return [describe_device(torch.device(name)) for name in names]


def describe_device(device: torch.device) -> dict[str, Any]:
    """One entry of :func:`devices`."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name = about.name
        details = f"compute capability {about.major}.{about.minor}, {about.total_memory / 2**30:.0f} GiB"
        why = f"compute capability {'8.0 and up have' if about.major >= 8 else 'below 8.0 has no'} bf16 products"
    elif device.type == "cpu":
        can = [feature for feature in FEATURES if torch.cpu.get_capabilities().get(feature)]
        name = _cpu_name()
        details = f"{torch.get_num_threads()} threads; {', '.join(can) or 'no vector extensions known'}"
        native = [feature for feature in can if feature in ("avx512_bf16", "amx_bf16", "bf16")]
        why = f"it has {native[0]}" if native else "it has no bf16 instructions (avx512_bf16, amx_bf16, Arm's bf16)"
    else:
        name, details, why = platform.machine(), "Apple GPU", "only CUDA and CPU devices are known to gain from bf16"
    dtype = str(choose_precision("auto", device)).removeprefix("torch.")
    return {
        "device": str(device),
        "name": name,
        "details": details,
        "precision": {"float32": "fp32", "bfloat16": "bf16"}[dtype],
        "why": why,
    }


def op_choices(device: torch.device) -> list[dict[str, Any]]:
    """For each op what "auto" takes on ``device``.

    Returns:
        For each op: ``op``, ``call`` (the typical call that was made), ``backend`` (what computed it, or None),
        ``others`` (each other backend of the op and why it was not taken) and ``problem`` (why the call failed).
    """
    choices = []
    for op, (call, make) in CALLS.items():
        with watch() as seen:
            problem = None
            try:
                make(device)
            except Exception as error:  # a broken backend is a finding, not the end of the report
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
        mine = [choice for choice in seen if choice.op == op]
        backend = mine[0].backend if mine else None
        others = {}
        for name, reason in mine[0].reasons.items() if mine else ():
            if name != backend:
                others[name] = reason or "works too, but comes later"
        choices.append({"op": op, "call": call, "backend": backend, "others": others, "problem": problem})
    return choices


def text(found: dict[str, Any]) -> str:
    """:func:`report` for people."""
    lines = [f"fastzs {found['versions']['fastzs']}, Python {found['versions']['python']}, {found['system']}"]
    lines += ["", "Packages"]
    for name, version in found["versions"].items():
        if name not in ("fastzs", "python"):
            lines.append(f"  {name:<17}{version or 'not installed'}")
    lines += ["", f"Devices (auto: {found['device']})"]
    for device in found["devices"]:
        lines.append(f"  {device['device']:<17}{device['name']}; {device['details']}")
        lines.append(f"  {'':<17}precision auto = {device['precision']}: {device['why']}")
    lines += ["", "Extension (C++ and CUDA)"]
    for part in ("cpu", "cuda"):
        lines.append(f"  {part:<17}{found['extension']['built'].get(part, 'not built')}")
    lines.append(f"  {'in use':<17}{found['extension']['problem'] or 'yes'}")
    lines += ["", f"Ops (what impl='auto' takes on {found['device']})"]
    for op in found["ops"]:
        lines.append(f"  {op['op']:<22}{op['backend'] or 'nothing':<13}[{op['call']}]")
        lines += [f"  {'':<22}not {name}: {why}" for name, why in op["others"].items()]
        if op["problem"]:
            lines.append(f"  {'':<22}FAILED: {op['problem']}")
    lines += ["", "Environment"]
    lines += [f"  {name}={value}" for name, value in found["environment"].items()]
    lines.append(f"  text embeddings are kept in {found['cache']}")
    return "\n".join(lines)


@functools.cache
def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _pixel_text_logits(device: torch.device):
    return ops.pixel_text_logits(torch.randn(1, 512, 32, 32, device=device), torch.randn(20, 512, device=device))


def _label_map(device: torch.device):
    logits = torch.randn(2, 20, 32, 32, device=device)
    return ops.label_map(logits, [(0, 0, 512, 512), (0, 171, 512, 512)], (512, 683))


def _mask_loss(device: torch.device):
    logits = torch.randn(1, 20, 32, 32, device=device)
    return ops.mask_loss(logits, torch.randint(20, (1, 512, 512), device=device))


def _key_smoothing(device: torch.device):
    return ops.key_smoothing(torch.randn(1, 1024, 768, device=device), torch.rand(1, 20, 1024, device=device))


def _dense_attention(device: torch.device):
    q, k, v = torch.randn(3, 1, 12, 257, 64, device=device)
    return ops.dense_attention(q, k, v, "kk+gaussian", (16, 16))


def _dropout_attention(device: torch.device):
    q, k, v = torch.randn(3, 1, 8, 256, 64, device=device)
    return ops.dropout_attention(q, k, v, 0.1)


def _dropout(device: torch.device):
    return ops.dropout(torch.randn(1, 1024, 2048, device=device), 0.1, relu=True)


def _packed_linear(device: torch.device):
    first = pack_weight(torch.randn(768, 768), None, torch.float32)
    first = first._replace(panels=first.panels.to(device), columns=first.columns.to(device))
    return ops.packed_linear(torch.randn(1024, 768, device=device), first)


def _bridged_attention(device: torch.device):
    q, k, v = torch.randn(3, 1, 12, 273, 64, device=device)
    return ops.bridged_attention(q, k, v, ops.TokenLayout(1, (16, 16), (4, 4)))


def _refine(device: torch.device):
    logits, image = torch.randn(1, 20, 16, 16, device=device), torch.rand(3, 128, 128, device=device)
    return ops.refine(logits, image)


# A typical call of each op, small enough that the whole report takes a moment.
CALLS: dict[str, tuple[str, Callable[[torch.device], object]]] = {
    "label_map": ("2 windows, 20 classes, fp32 32 x 32 to 512 x 683", _label_map),
    "pixel_text_logits": ("fp32 features 512 x 32 x 32, 20 classes", _pixel_text_logits),
    "key_smoothing": ("1024 fp32 keys of width 768, 20 classes", _key_smoothing),
    "dense_attention": ("kk+gaussian, 12 heads, 16 x 16 patches, fp32", _dense_attention),
    "bridged_attention": ("12 heads, 16 x 16 patches, 4 x 4 bridge tokens, fp32", _bridged_attention),
    "dropout_attention": ("8 heads, 256 queries and keys, fp32", _dropout_attention),
    "dropout": ("after a relu, fp32 1024 x 2048", _dropout),
    "refine": ("20 classes, fp32 16 x 16 to 128 x 128, 10 iterations", _refine),
    "packed_linear": ("fp32, 1024 rows, 768 to 768", _packed_linear),
    "mask_loss": ("fp32 logits 20 x 32 x 32, target 512 x 512", _mask_loss),
}
