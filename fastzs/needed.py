"""Packages of extras: imported where they are needed, missed in one sentence."""

import importlib
import importlib.util
from typing import Any

from fastzs.errors import FastzsError


class MissingPackage(FastzsError, ModuleNotFoundError):
    """A package of an extra is not installed; the message says how to install it."""


def check_installed(module: str, package: str, what: str, extra: str) -> None:
    """See that a package is there, before any work begins and without the time that importing it takes.

    Args:
        module: its name.
        package: what pip calls it.
        what: what needs it, in the plural, for the message.
        extra: of this package, which has it.

    Raises:
        MissingPackage: it is not installed.
    """
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise MissingPackage(f"{what} need {package}, which is not installed: pip install 'fastzs[{extra}]'")


def needed(module: str, package: str, what: str, extra: str = "formats") -> Any:
    """Import a module; arguments and errors are those of :func:`check_installed`."""
    check_installed(module, package, what, extra)
    return importlib.import_module(module)
