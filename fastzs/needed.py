"""Packages of extras, imported where they are needed."""

import importlib
from typing import Any

from fastzs.errors import FastzsError


class MissingPackage(FastzsError, ModuleNotFoundError):
    """A package of an extra is not installed; the message says how to install it."""


def needed(module: str, package: str, what: str, extra: str = "formats") -> Any:
    """Import a module.

    Args:
        module: its name.
        package: what pip calls it.
        what: what needs it, in the plural, for the message.
        extra: of this package, which has it.

    Raises:
        MissingPackage: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{what} need {package}, which is not installed: pip install 'fastzs[{extra}]'") from error
