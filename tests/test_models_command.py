"""``fastzs models`` lists what ``fastzs.load`` knows."""

from fastzs.cli import main
from fastzs.commands.models import SYSTEMS
from fastzs.segmenter import MODELS


def test_lists_all_systems(capsys):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    for system in SYSTEMS:
        assert f"{system.name}: {system.paper}" in printed
        assert system.trained in printed
        assert system.checkpoints in printed


def test_no_system_is_forgotten():
    assert sorted(system.name for system in SYSTEMS) == sorted(MODELS)
