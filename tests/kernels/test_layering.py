"""Who may import whom among the files of an op, read from the sources."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
# The switches between backends, and a reference built on another's.
MAY_KNOW_A_REFERENCE = {"api.py", "operator.py", "reference.py", "__init__.py"}
BACKENDS = sorted(p for p in KERNELS.glob("*/*.py") if p.name not in MAY_KNOW_A_REFERENCE)


def imported(source: str) -> set[str]:
    """Every module that a file imports, with what it takes from it: ``a.b.c``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{name.name}" for name in node.names}
    return found


def from_references(source: str) -> set[str]:
    return {name for name in imported(source) if "reference" in name.split(".")}


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_backend_imports_a_reference(path):
    """The reference judges the backends: a fault in what both share would be judged right."""
    assert from_references(path.read_text()) == set()


@pytest.mark.parametrize("line", ["from .reference import f", "from . import reference", "from ..a.reference import g"])
def test_an_import_of_a_reference_is_seen(line):
    assert len(from_references(line)) == 1


def test_operators_are_made_in_one_place():
    """Only ``library.py`` speaks to torch.library: every operator has a fake and says what it lacks."""
    files = [p for p in KERNELS.rglob("*.py") if "torch.library." in p.read_text()]
    assert [p.name for p in files] == ["library.py"]
