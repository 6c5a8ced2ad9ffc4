"""Old names of settings, wherever somebody may still have them."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from fastzs.cli import main
from fastzs.models import ZegFormer
from fastzs.ops import label_map, refine
from fastzs.pictures import ImageError, PictureError
from fastzs.renamed import current, current_flags
from fastzs.result import Segmentation
from tests.models.test_two_stage import model
from tests.test_train import SEEN, TEXT, Scenes, flipped, small
from tests.training import recipe, settings


def test_a_configuration_file(tmp_path):
    file = tmp_path / "own.yaml"
    old = {"batch": 4, "iterations": 7, "losses": {"focal": 3}, "stages": [{"iterations": 2, "losses": {"dice": 1}}]}
    file.write_text(yaml.safe_dump(old | {"options": {"share": 0.5}, "model": "zegformer"}))
    config = settings("--config", str(file))
    assert (config["batch_size"], config["max_steps"], config["loss_weights"]) == (4, 7, {"focal": 3})
    assert config["stages"] == [{"max_steps": 2, "loss_weights": {"dice": 1}}]
    assert config["options"] == {"ensemble_weight": 0.5}


def test_a_command_line():
    config = settings("--batch", "4", "--iterations=7", "--losses.focal", "3", "--setting", "supervised")
    assert (config["batch_size"], config["max_steps"], config["loss_weights"]) == (4, 7, {"focal": 3})
    kept = ["--iterations", "3", "--batched", "--options.batch=1"]
    assert current_flags(kept, {"iterations"}) == kept  # of fastzs profile


def test_both_names(tmp_path, capsys):
    file = tmp_path / "own.yaml"
    file.write_text("batch: 3\nbatch_size: 4\n")
    assert main(["train", "--config", str(file), "--output", str(tmp_path / "run")]) == 2
    assert "'batch' is the old name of 'batch_size', and both are given; leave out 'batch'" in capsys.readouterr().err


def test_what_a_command_has_stays():
    assert current({"iterations": 3, "batch": 2}, known=["iterations"]) == {"iterations": 3, "batch_size": 2}


def test_a_run_goes_on(tmp_path):
    """The settings of its checkpoint are compared with the present ones."""
    from fastzs import checkpoints
    from fastzs.train import train

    def go():
        plan = recipe(max_steps=4, save_every=2, keep=[2])
        return train(small(), Scenes(), flipped, TEXT, plan, tmp_path, seen=SEEN, loss_weights={"dice": 2.0})

    go()
    folder = (tmp_path / "last").resolve()
    state = checkpoints.read(folder)
    names = {"batch_size": "batch", "max_steps": "iterations", "loss_weights": "losses"}
    state["settings"] = {names.get(key, key): value for key, value in state["settings"].items()}
    torch.save(state, folder / "training.pt")
    record = json.loads((folder / "checkpoint.json").read_text())
    record["sha256"]["training.pt"] = checkpoints._digest(folder / "training.pt")
    (folder / "checkpoint.json").write_text(json.dumps(record))
    assert go().step == 4


def test_a_saved_model(tmp_path):
    model(ZegFormer, ensemble_weight=0.7).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["share"] = config.pop("ensemble_weight")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert ZegFormer.from_pretrained(tmp_path).ensemble_weight == 0.7


def test_calls():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    result = Segmentation(torch.zeros(4, 6, dtype=torch.uint8), ("a",), picture=image)
    assert result.image is result.picture is image
    assert replace(result, image=image + 1).picture.sum() == image.numel()
    assert list(result.overlay(picture=image).getdata()) == list(result.overlay(image=image).getdata())
    logits, windows = torch.rand(1, 2, 2, 3), [(0, 0, 4, 6)]
    assert torch.equal(
        label_map(logits, windows, picture_size=(4, 6)).labels, label_map(logits, windows, (4, 6)).labels
    )
    assert refine(logits, image / 255, picture_size=(4, 6)).labels.shape == (4, 6)
    with pytest.raises(TypeError, match="'picture_size' is the old name of 'image_size', and both are given"):
        label_map(logits, windows, (4, 6), image_size=(4, 6), picture_size=(4, 6))
    assert PictureError is ImageError
