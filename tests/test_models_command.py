"""``fastzs models`` lists what ``fastzs.load`` knows."""

import fnmatch

import pytest

import fastzs
from fastzs.cli import main
from fastzs.registry import systems
from tests.tables import PAGES, ROOT, renewed


def test_lists_all_systems(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for system in systems().values():
        assert f"{system.name}: {system.paper}" in printed
        assert system.trained in printed
        assert system.checkpoints in printed


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_registry(page):
    """``python -m tests.tables`` writes them anew."""
    assert (ROOT / page).read_text(encoding="utf-8") == renewed(page)


def test_names_by_pattern():
    assert fastzs.list_models() == list(systems())
    assert fastzs.list_models("zs*") == [name for name in systems() if fnmatch.fnmatch(name, "zs*")]
    assert fastzs.list_models("nothing") == []


def test_public_names_are_shown():
    assert set(fastzs.__all__) <= set(dir(fastzs))
    for name in fastzs.__all__:
        assert getattr(fastzs, name) is not None
