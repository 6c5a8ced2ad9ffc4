"""Which systems can be exported, and with what: the table of docs/export.md, found by exporting each of them."""

from pathlib import Path

import pytest

from fastzs.export.graphs import ExportError, Whole, foreign_ops, odd, program, references, sample
from fastzs.registry import systems
from tests.export.systems import tiny

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
SIZE = (64, 64)


def row(name):
    """What the page says of a system: text vectors, sides of the images."""
    lines = [line.split("|")[1:-1] for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    found = {cells[0].strip().strip("`"): [cell.strip() for cell in cells[1:]] for cells in lines}
    return found[name]


def found(name):
    model = tiny(name).requires_grad_(False)
    if reason := model.why_not_exported():
        return [f"none: {reason}", ""]

    def works(rows, sides):
        """Whether its program gives what it gives, for other sizes and other numbers of names, too."""
        whole, (image, text) = Whole(model), sample(model, odd(SIZE) if sides else SIZE)
        try:
            made = program(whole, (image, text), [sides, rows], name)
        except ExportError:
            return False
        assert foreign_ops(made) == []
        for size in ((101, 67), SIZE) if sides else (SIZE,):
            inputs = sample(model, size, len(text) + 2 if rows else len(text))
            with references():
                got, right = made.module(check_guards=False)(*inputs), whole(*inputs)
            if got.shape != right.shape or (got - right).abs().max() > 1e-5 * right.abs().max():
                return False
        return True

    ways = [(rows, sides) for sides in ({2, 3}, set()) for rows in ({0}, set())]
    rows, sides = next(way for way in ways if works(*way))  # the last, nothing that varies, has to work
    return ["any number" if rows else "as in training", "any" if sides else "fixed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", systems())
def test_the_page_says_what_can_be_exported(name):
    assert row(name) == found(name)


def test_every_system_is_on_the_page():
    for name in systems():
        row(name)
