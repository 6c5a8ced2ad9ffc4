"""Trainings in stages: settings, one command for all of them, going on, and stages out of order."""

from pathlib import Path

import pytest
import yaml

import fastzs.commands.train
from fastzs import checkpoints
from fastzs.cli import main
from fastzs.commands.train import PRESETS
from fastzs.stages import staged
from tests.test_train_command import NAMES, folder  # noqa: F401 - a fixture

TINY = """
    --model cagnet --protocol {folder}/tiny.yaml --images {folder}/images --masks {folder}/masks --weights shapes
    --options.resnet [1,1,1,1] --options.width 4 --options.frozen false --options.crop 32 --options.features 8
    --options.context 4 --options.generator [8] --options.generator_dropout [0.0] --options.hidden 8
    --transform.scale [1,1] --precision fp32 --max-steps 2 --batch-size 2 --warmup 0 --workers 0
"""
STAGES = ["--stages", "[{}, {max_steps: 3, options: {stage: mixed}}]"]


def test_a_stage_changes_single_entries():
    shared = {"lr": 1, "options": {"a": 1, "b": 2}, "loss_weights": None}
    first, second = staged(
        shared, [{}, {"lr": 2, "options": {"b": 3}, "loss_weights": {"c": 1}}], ["lr", "options", "loss_weights"]
    )
    assert first == shared
    assert second == {"lr": 2, "options": {"a": 1, "b": 3}, "loss_weights": {"c": 1}}
    with pytest.raises(ValueError, match="stage 1: there is no setting 'rl'; did you mean lr"):
        staged(shared, [{"rl": 2}], ["lr"])
    with pytest.raises(ValueError, match="expected a mapping for stage 2"):
        staged(shared, [{}, "mixed"], ["lr"])


@pytest.mark.slow
def test_one_command_runs_all_stages_and_goes_on(folder, monkeypatch, capsys):  # noqa: F811
    command = ["train", *TINY.format(folder=folder).split(), *STAGES, "--output", str(folder / "run")]
    assert main(command) == 0, capsys.readouterr().err
    first, second = (checkpoints.read(folder / "run" / f"stage-{i}" / "last") for i in (1, 2))
    assert (first["step"], second["step"]) == (2, 3)
    assert first["settings"]["about"]["start"] is None
    assert second["settings"]["about"]["start"] == str(folder / "run" / "stage-1" / "last")
    assert (folder / "run" / "last").resolve() == (folder / "run" / "stage-2" / "last").resolve()
    assert NAMES

    monkeypatch.setattr(fastzs.commands.train, "_train", lambda *_: pytest.fail("a finished stage was trained again"))
    assert main(command) == 0


@pytest.mark.slow
def test_stages_out_of_order(folder, capsys):  # noqa: F811
    output = folder / "run"
    (output / "stage-2" / "checkpoints").mkdir(parents=True)
    (output / "stage-2" / "last").symlink_to(Path("checkpoints"))
    command = ["train", *TINY.format(folder=folder).split(), *STAGES, "--output", str(output)]
    assert main(command) != 0
    assert "stage 2 has been trained though stage 1 is not finished" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(PRESETS.glob("shapes/*/*.yaml")), ids=lambda path: f"{path.parent.name}")
def test_stages_of_presets_change_what_there_is(path):
    preset = yaml.safe_load(path.read_text())
    known = [*fastzs.commands.train.MODEL_SETTINGS, *fastzs.commands.train.Recipe.__dataclass_fields__]
    for stage in staged(preset, preset.get("stages", []), known):
        numbers = {key: stage[key] for key in stage.keys() & fastzs.commands.train.Recipe.__dataclass_fields__.keys()}
        fastzs.commands.train.Recipe(**numbers)
