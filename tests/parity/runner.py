"""Finds the runner of a case and compares a file with it."""

from collections.abc import Callable, Iterator
from pathlib import Path

from tests.parity import (
    deop,
    generative,
    losses,
    lseg,
    maskclip,
    maskclip_plus,
    metrics,
    pamr,
    projection,
    prompt_tuned,
    szn,
    text,
    training_free,
)
from tests.parity.golden import Check, Golden, read

FAMILIES = (
    deop,
    generative,
    losses,
    lseg,
    maskclip,
    maskclip_plus,
    metrics,
    pamr,
    projection,
    prompt_tuned,
    szn,
    text,
    training_free,
)
RUNNERS: dict[str, Callable[[Golden], Iterator[Check]]] = {
    prefix: runner for family in FAMILIES for prefix, runner in family.RUNNERS.items()
}


class NoRunner(LookupError):
    """A case that nothing here computes."""


def files(paths: list[str]) -> list[Path]:
    """The golden files that ``paths`` (files and folders) stand for.

    Raises:
        FileNotFoundError: a path does not exist or a folder holds no golden file.
    """
    found = []
    for path in map(Path, paths):
        here = sorted(path.glob("**/*.safetensors")) if path.is_dir() else [path] if path.exists() else []
        if not here:
            raise FileNotFoundError(f"{path}: no golden file there")
        found += here
    return found


def checks(path: Path) -> Iterator[tuple[Golden, Check]]:
    """All comparisons with one file; what no runner compares comes as a check that fails.

    Raises:
        NoRunner: no runner knows the case.
    """
    golden = read(path)
    known = [prefix for prefix in RUNNERS if golden.case.startswith(prefix)]
    if not known:
        raise NoRunner(f"case {golden.case!r} has no runner; there are: {', '.join(sorted(RUNNERS))}")
    compared = set()
    for check in RUNNERS[max(known, key=len)](golden):
        compared.add(check.tensor)
        yield golden, check
    for name in sorted(golden.tensors.keys() - compared):
        if not any(part in ("w", "in", "mid", "mid64") for part in name.split(".")[:2]):
            yield golden, Check(name, "none", float("nan"), 0.0)
