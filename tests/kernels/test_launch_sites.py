"""What every launch of a Triton kernel must have, read from the sources: no machine here has two GPUs to find out."""

import ast
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"
FILES = sorted(path for path in KERNELS.rglob("*.py") if "import triton.language" in path.read_text())


def launches(tree: ast.AST, inside: tuple[ast.With, ...] = ()):
    """Every call of the form ``kernel[grid](...)``, with the ``with`` statements around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node, inside
        yield from launches(node, (*inside, node) if isinstance(node, ast.With) else inside)


def dictionaries(source: str) -> list[ast.Dict]:
    """Dictionaries of options, written out in a file."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    return [d for d in found if any(isinstance(key, ast.Constant) and key.value == "num_warps" for key in d.keys)]


def faults(source: str) -> list[str]:
    """What is missing at the launches of a file."""
    found = []
    for call, around in launches(ast.parse(source)):
        guarded = any(
            ast.unparse(item.context_expr).startswith("torch.cuda.device(") for w in around for item in w.items
        )
        given = {word.arg for word in call.keywords}
        if any(word.arg is None for word in call.keywords):  # the rest of the options is a dictionary made elsewhere
            given |= {ast.literal_eval(key) for d in dictionaries(source) for key in d.keys if key is not None}
        for name in ("num_warps", "enable_fp_fusion"):
            if name not in given:
                found.append(f"line {call.lineno}: {name} is left to this version of Triton")
        if not guarded:
            found.append(f"line {call.lineno}: starts on the current GPU, which need not be the tensors'")
    return found


def test_there_are_launches():
    assert sum(1 for path in FILES for _ in launches(ast.parse(path.read_text()))) >= 8


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_launches(path):
    assert faults(path.read_text()) == []


def test_a_launch_without_its_guard_is_seen():
    source = (KERNELS / "pixel_text_logits" / "triton.py").read_text()
    assert faults(source) == []
    guard = "with torch.cuda.device(features.device.index if features.is_cuda else -1):"
    assert guard in source
    (fault,) = faults(source.replace(guard, "if True:"))
    assert "starts on the current GPU" in fault
    (fault,) = faults(source.replace("enable_fp_fusion=True", "num_stages=2"))
    assert "enable_fp_fusion is left" in fault
