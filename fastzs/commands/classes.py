"""The classes that are named on the command line."""

import os
from pathlib import Path


def given_classes(classes: str | list[str] | None, classes_file: str | None) -> list[str | dict[str, list[str]]]:
    """The classes of the command line, as :class:`fastzs.Vocabulary` takes them."""
    if (classes is None) == (classes_file is None):
        given = "both are given" if classes is not None else "neither is given"
        raise ValueError(f"name the classes with --classes or with --classes-file; {given}")
    if classes_file is not None:
        from fastzs.yaml_files import read_classes

        return read_classes(Path(os.path.expanduser(classes_file)))
    if isinstance(classes, str):
        classes = classes.split(",") if classes.strip() else []
    if not classes:
        raise ValueError("--classes has no names in it; name at least one class")
    return list(classes)
