"""C++ sources with a change here and there, compiled beside the extension, for tests that must notice the change."""

import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
NEEDS_COMPILER = [pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")]
_NUMBERS = itertools.count()

Change = tuple[str, str]  # what stands in the file, what shall stand there


def compile_variants(
    folder: Path,
    source: str,
    variants: Sequence[Sequence[Change]],
    everywhere: Sequence[Change] = (),
    optimisation: str = "-O1",
) -> list:
    """Compile variants of a file of ``csrc`` and load them.

    All are one library from one file, so that torch's headers are read once; each has a C++ namespace of its own.

    Args:
        folder: for what is written, empty.
        variants: of each, what is changed; every text must stand in the file exactly once.
        everywhere: changes of headers and all variants; every text must stand in one of these files at least.

    Returns:
        The variants' operators, each a namespace as ``torch.ops.fastzs`` is.
    """
    files = {path.name: path.read_text() for path in (*CSRC.glob("*.h"), CSRC / source)}
    for right, wrong in everywhere:
        assert any(right in text for text in files.values()), right
        files = {name: text.replace(right, wrong) for name, text in files.items()}
    includes, opening, body = files[source].partition("\nnamespace ")
    names = [f"fastzs_variant{next(_NUMBERS)}" for _ in variants]
    whole = includes
    for name, changes in zip(names, variants, strict=True):
        text = opening + body
        own = [("\nnamespace {\n", f"\nnamespace {name} {{ namespace {{\n"), ("\n}  // namespace\n", "\n}}\n")]
        for right, wrong in (*own, *changes):
            assert text.count(right) == 1, right
            text = text.replace(right, wrong)
        text = re.sub(r"&(fastzs::(\w+::)*)", rf"&\1{name}::", text)
        whole += text.replace("(fastzs, ", f"({name}, ")
    for name, text in (files | {source: whole}).items():
        (folder / name).write_text(text)
    torch_folder, library = Path(torch.__file__).parent, folder / "variants.so"
    command = ["g++", "-std=c++17", optimisation, "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{torch_folder}/include", str(folder / source), f"-L{torch_folder}/lib", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True)
    torch.ops.load_library(str(library))
    return [getattr(torch.ops, name) for name in names]
