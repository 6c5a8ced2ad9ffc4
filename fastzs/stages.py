"""Trainings in stages: each goes on from the weights of the one before, with some settings of its own."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastzs.recipe import check_keys

MERGED = ("options", "loss_weights", "transform", "groups")  # a stage changes single entries of these


def staged(settings: Mapping[str, Any], stages: Sequence[Mapping[str, Any]], known: Iterable[str]) -> list[dict]:
    """The whole settings of every stage.

    Args:
        settings: what all stages share.
        stages: what each changes.
        known: settings that a stage may change.

    Raises:
        ValueError: a stage is no mapping, or changes something else (the nearest known is named).
    """
    out = []
    for number, stage in enumerate(stages, start=1):
        if not isinstance(stage, Mapping):
            raise ValueError(f"stages: expected a mapping for stage {number}, got {stage!r}")
        check_keys(stage, known, f"stage {number}")
        changed = {
            key: {**(settings.get(key) or {}), **value} if key in MERGED else value for key, value in stage.items()
        }
        out.append({**settings, **changed})
    return out


def folder(output: Path, number: int) -> Path:
    """Of stage ``number``, counted from 1."""
    return output / f"stage-{number}"


def check_order(output: Path, number: int, finished: bool) -> None:
    """See that no later stage was trained already while this one is not finished.

    Raises:
        ValueError: one was.
    """
    later = folder(output, number + 1) / "last"
    if not finished and later.is_symlink():
        raise ValueError(
            f"{output}: stage {number + 1} has been trained though stage {number} is not finished; remove "
            f"{later.parent} to train it from the finished stage"
        )


def steps_done(output: Path) -> int:
    """Steps of the training in a folder, 0 if there is none."""
    from fastzs import checkpoints

    return checkpoints.read(output / "last")["step"] if (output / "last").is_symlink() else 0


def link(output: Path, number: int) -> None:
    """Make ``output/last`` and ``best`` those of the last stage, for commands that take a checkpoint."""
    for name in ("last", "best"):
        if (folder(output, number) / name).exists():
            (output / name).unlink(missing_ok=True)
            (output / name).symlink_to(Path(f"stage-{number}") / name, target_is_directory=True)
