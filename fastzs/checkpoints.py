"""Checkpoints of a training. Each is written as a whole or not at all, and a failed one leaves earlier ones intact.

    OUTPUT/checkpoints/step_0001000/   model.safetensors, config.json   the model, as save_pretrained writes it
                                       training.pt                      the rest of the state that resuming needs
                                       checkpoint.json                  the step, and a SHA-256 of each file
    OUTPUT/last, OUTPUT/best           links to two of them

A checkpoint is written under another name and renamed when everything is on the disk; only then do the links move.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from fastzs.errors import FastzsError
from fastzs.files import temporary_beside
from fastzs.runs import OutputError

LINKS = ("last", "best")
ADVICE = "it is damaged; remove it, or go on from another checkpoint in a new folder with --start"
_STEP = re.compile(r"step_\d{7,}")


class CheckpointError(FastzsError, ValueError):
    """A checkpoint cannot be read; the message names the file and the remedy."""


def save(
    output: Path,
    step: int,
    write_model: Callable[[Path], object],
    state: dict[str, Any],
    links: Sequence[str],
    keep: Collection[int] = (),
) -> Path:
    """Write the checkpoint of a step, point ``links`` at it, remove the ones that no link and ``keep`` holds.

    Args:
        write_model: writes the model's files into a folder.
        state: tensors, numbers, texts, and lists and dictionaries of them.

    Raises:
        OutputError: it cannot be written, as on a full disk; what was there before still is.
    """
    folder = output / "checkpoints"
    final = folder / name_of(step)
    temporary = temporary_beside(final)
    try:
        temporary.mkdir(parents=True)
        write_model(temporary)
        torch.save(state, temporary / "training.pt")
        about = {"step": step, "sha256": {path.name: _digest(path) for path in sorted(temporary.iterdir())}}
        (temporary / "checkpoint.json").write_text(json.dumps(about, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            _to_disk(path)
        if final.exists():  # a kill came between its renaming and its link
            shutil.rmtree(final)
        os.replace(temporary, final)
        for link in links:
            _point(output / link, Path("checkpoints", final.name))
        _to_disk(folder)
        _to_disk(output)
    except Exception as error:  # the libraries raise kinds of their own when a disk is full
        reason = (isinstance(error, OSError) and error.strerror) or str(error).strip().splitlines()[0]
        raise OutputError(f"cannot write the checkpoint {final}: {reason}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _remove_old(output, keep)
    return final


def name_of(step: int) -> str:
    return f"step_{step:07d}"


def read(folder: Path) -> dict[str, Any]:
    """The ``state`` of a checkpoint, after checking that every file of it is as it was written.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    check_digests(folder)
    try:
        return torch.load(folder / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder}: training.pt cannot be read ({error}); {ADVICE}") from error


def check_digests(folder: Path, names: Collection[str] | None = None) -> dict[str, str]:
    """See that the files of a checkpoint are as they were written, all or some; their SHA-256 by name.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        digests = dict(json.loads((folder / "checkpoint.json").read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: checkpoint.json cannot be read ({error}); {ADVICE}") from error
    for name in digests if names is None else names:
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint {folder}: {name} is missing; {ADVICE}")
        if _digest(path) != digests.get(name):
            raise CheckpointError(f"checkpoint {folder}: {name} is not as it was written; {ADVICE}")
    return digests


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file or folder has reached the disk, where the system can say so."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _point(link: Path, target: Path) -> None:
    temporary = temporary_beside(link)
    temporary.symlink_to(target, target_is_directory=True)
    try:
        os.replace(temporary, link)
    except BaseException:
        temporary.unlink()
        raise


def _remove_old(output: Path, keep: Collection[int]) -> None:
    held = {name_of(step) for step in keep}
    held |= {os.path.basename(os.readlink(output / link)) for link in LINKS if (output / link).is_symlink()}
    for path in (output / "checkpoints").iterdir():
        if _STEP.fullmatch(path.name) and path.name not in held:
            shutil.rmtree(path, ignore_errors=True)
