"""One process of several: torchrun's variables, the process group, and sums over it."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def started() -> tuple[int, int]:
    """This process's number and how many ``torchrun`` started, for work that needs no process group."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: str) -> str:
    """``cuda:N`` for the N-th process of ``torchrun`` on a machine, where ``name`` leaves the GPU open."""
    if started()[1] > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return name


def join(device: torch.device) -> torch.device:
    """Join the process group of ``torchrun``, if it started this process: nccl on GPUs, gloo on CPUs.

    Returns:
        This process's device: its own GPU, where ``device`` is any.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def leave() -> None:
    """Leave the process group that :func:`join` joined."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def total(values: Tensor) -> Tensor:
    """Sum over all processes, in place."""
    if world() > 1:
        dist.all_reduce(values)
    return values
