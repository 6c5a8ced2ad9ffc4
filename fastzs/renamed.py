"""Names of version 0.1 that still work: in command lines, configuration files, runs, saved models and calls."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
SETTINGS = {"batch": "batch_size", "iterations": "max_steps", "losses": "loss_weights"}
OPTIONS = {"share": "ensemble_weight"}  # of models


def old_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator of a function that takes arguments by their old names, too: ``picture="image"``.

    The function raises a TypeError if it is given an argument by both names.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old, new in names.items():
                if old in kwargs:
                    if new in kwargs:
                        raise TypeError(f"{old!r} is the old name of {new!r}, and both are given; leave out {old!r}")
                    kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def current(settings: Mapping[str, Any], known: Collection[str] = ()) -> dict[str, Any]:
    """Settings of a command or a training under their present names, with the stages and model options in them.

    Args:
        known: names that stay as they are, whatever they once meant.

    Raises:
        ValueError: a setting has both its old and its new name.
    """
    found = _renamed(settings, {old: new for old, new in SETTINGS.items() if old not in known})
    if isinstance(stages := found.get("stages"), list):
        found["stages"] = [current(stage) if isinstance(stage, Mapping) else stage for stage in stages]
    if isinstance(options := found.get("options"), Mapping):
        found["options"] = current_options(options)
    return found


def current_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a model under their present names.

    Raises:
        ValueError: an option has both its old and its new name.
    """
    return _renamed(options, OPTIONS)


def current_flags(arguments: list[str], known: Collection[str]) -> list[str]:
    """Arguments of a command line: ``--batch 8`` becomes ``--batch-size 8``, ``--losses.focal=1`` likewise.

    Args:
        known: names of the command's settings.
    """
    found = []
    for argument in arguments:
        for old, new in SETTINGS.items():
            if old not in known and argument.split("=")[0].split(".")[0] == f"--{old}":
                argument = f"--{new.replace('_', '-')}{argument.removeprefix(f'--{old}')}"
        found.append(argument)
    return found


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    for old, new in names.items():
        if old in given and new in given:
            raise ValueError(f"{old!r} is the old name of {new!r}, and both are given; leave out {old!r}")
    return {names.get(key, key): value for key, value in given.items()}
