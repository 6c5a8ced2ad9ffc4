"""One process of several: torchrun's variables, the process group, and sums over it."""

import os

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this process; 0 if it is the only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def started() -> tuple[int, int]:
    """This process's number and how many ``torchrun`` started, for work that needs no process group.

    Raises:
        ValueError: the variables of ``torchrun`` contradict each other, or only some of them are set.
    """
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if rank is None and (world is None or world == 1):
        return 0, 1
    if rank is None or world is None or not 0 <= rank < world:
        raise ValueError(
            f"RANK={os.environ.get('RANK', '')} and WORLD_SIZE={os.environ.get('WORLD_SIZE', '')} in the environment "
            "do not go together; start the command with torchrun, or unset both"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if world > 1 and missing:
        raise ValueError(
            f"the environment says that this is process {rank} of {world} (RANK, WORLD_SIZE), so most of the "
            f"work would be left to the others, but torchrun would also have set {' and '.join(missing)}; "
            "start the command with torchrun, or unset RANK and WORLD_SIZE"
        )
    return rank, world


def _number(name: str) -> int | None:
    """A variable of ``torchrun``; an empty one counts as none."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"the environment variable {name} is {text!r}; expected a number; unset it")
    return int(text)


def own_device(name: str) -> str:
    """``cuda:N`` for the N-th process of ``torchrun`` on a machine, where ``name`` leaves the GPU open."""
    if started()[1] > 1 and (name == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return f"cuda:{_number('LOCAL_RANK') or 0}"
    return name


def join(device: torch.device) -> torch.device:
    """Join the process group of ``torchrun``, if it started this process: nccl on GPUs, gloo on CPUs.

    Returns:
        This process's device: its own GPU, where ``device`` is any.
    """
    if started()[1] == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", _number("LOCAL_RANK") or 0)
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
