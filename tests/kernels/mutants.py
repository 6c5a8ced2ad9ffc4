"""C++ sources with a change here and there, compiled beside the extension, for tests that must notice the change."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
NEEDS_COMPILER = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]
_NUMBERS = itertools.count()

Change = tuple[str, str]  # what stands in the file, what shall stand there


def compile_variants(
    folder: Path,
    sources: str | Sequence[str],
    variants: Sequence[Sequence[Change]],
    everywhere: Sequence[Change] = (),
    optimisation: str = "-O1",
    translate: Callable[[str], str] = str,
    include: Path | None = None,
) -> list:
    """Compile variants of files of ``csrc`` and load them.

    All are one library from one file, so that torch's headers are read once; each has a C++ namespace of its own.

    Args:
        folder: for what is written, empty.
        sources: the files of an op, which become one text together with our headers.
        variants: of each, what is changed; every text must stand in the files exactly once.
        everywhere: changes of all variants; every text must stand in the files at least once.
        translate: applied to the whole text before it is compiled.
        include: a folder of headers that come before all others.

    Returns:
        The variants' operators, each a namespace as ``torch.ops.fastzs`` is.
    """
    system: dict[str, None] = {}
    seen: set[str] = set()
    text = "\n".join(_expanded(name, system, seen) for name in ([sources] if isinstance(sources, str) else sources))
    for right, wrong in everywhere:
        assert right in text, right
        text = text.replace(right, wrong)
    names = [f"fastzs_variant{next(_NUMBERS)}" for _ in variants]
    whole = "\n".join(system)
    for name, changes in zip(names, variants, strict=True):
        changed = text
        for right, wrong in changes:
            assert changed.count(right) == 1, right
            changed = changed.replace(right, wrong)
        whole += re.sub(r"\bfastzs\b", name, changed)
    source, library = folder / "variants.cpp", folder / "variants.so"
    source.write_text(translate(whole))
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", optimisation, "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{include}"] if include else []
    command += [f"-I{torch_folder}/include", str(source), f"-L{torch_folder}/lib", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    return [getattr(torch.ops, name) for name in names]


def _expanded(name: str, system: dict[str, None], seen: set[str]) -> str:
    """The text of a file with our headers where they are included first; other headers are added to ``system``."""
    if name in seen:
        return ""
    seen.add(name)
    lines = []
    for line in (CSRC / name).read_text().splitlines():
        ours = re.match(r'#include "(.+)"', line)
        if ours:
            lines.append(_expanded(ours[1], system, seen))
        elif line.startswith("#include"):
            system[line] = None
        elif line != "#pragma once":
            lines.append(line)
    return "\n".join(lines) + "\n"
