"""``fastzs train`` on drawn shapes: settings, what it writes, what it refuses."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file

import fastzs
from fastzs.cli import main
from fastzs.data import shapes
from tests.training import settings

TINY = """
    --protocol {folder}/tiny.yaml --images {folder}/images --masks {folder}/masks --test-images {folder}/images
    --test-masks {folder}/masks --weights shapes --options.crop 32 --options.prompts 2 --options.bridge [2,2]
    --options.imagenet_normalization false --transform.scale [1,1] --precision fp32
    --max-steps 2 --batch-size 2 --warmup 0 --workers 0
"""
NAMES = ["red disc", "blue ring", "green star", *shapes.GROUNDS]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    scenes = shapes.draw(4, (32, 40), radius=(5, 12), pairs=NAMES[:3])
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    for i, (image, labels) in enumerate(zip(scenes.images, scenes.labels(NAMES), strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(labels.numpy()).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"classes": NAMES, "unseen": ["green star"]}))
    return tmp_path


def command(folder, *more: str) -> list[str]:
    return ["train", *(part.format(folder=folder) for part in TINY.split()), "--output", str(folder / "out"), *more]


def refused(capsys, arguments) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_trains_evaluates_and_goes_on(folder, capsys):
    assert main(command(folder)) == 0
    out = folder / "out"
    assert "2 of 2 steps done; tiny: pAcc" in capsys.readouterr().out
    with (out / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2"]
    with (out / "evaluation.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert {"pAcc", "mIoU", "seen", "unseen", "hIoU"} <= row.keys()
    segmenter = fastzs.load("clip_rc", checkpoint=out / "last")
    assert segmenter.model.seen == [name for name in NAMES if name != "green star"]
    picture = folder / "images" / "0.png"
    assert segmenter(picture, NAMES).labels.shape == (32, 40)
    # the settings in full are a config of the same training, which is done
    config = ["train", "--config", str(out / "config.yaml"), "--output", str(out)]
    assert main(config) == 0
    assert "2 of 2 steps done" in capsys.readouterr().out
    assert "there lr=2e-05, now lr=0.1" in refused(capsys, [*config, "--lr", "0.1"])


@pytest.mark.parametrize("setting", ["transductive", "transductive-honest", "supervised"])
def test_settings(folder, setting):
    assert main(command(folder)) == 0
    more = ("--setting", setting, "--start", str(folder / "out" / "last"))
    second = command(folder, *more)
    second[second.index("--output") + 1] = str(folder / "second")
    assert main(second) == 0
    # scores of seen classes are lowered after inductive training only
    assert fastzs.load("clip_rc", checkpoint=folder / "second" / "last").model.seen is None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers where Linux lists them")
def test_a_killed_worker_is_started_again_and_ends_with_the_same_weights(folder):
    more = ("--max-steps", "24", "--save-every", "4", "--log-every", "1")

    def start(output: str) -> subprocess.Popen:
        elastic = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
        train = [*command(folder, *more), "--output", str(folder / output)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", *elastic, "-m", "fastzs", *train], env=environment, stderr=subprocess.PIPE, text=True
        )

    process, log = start("killed"), folder / "killed" / "log.csv"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not log.exists() or len(log.read_bytes().splitlines()) < 8):
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "exitcode: -9" in said
    process = start("whole")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, other = (load_file(folder / name / "last" / "model.safetensors") for name in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)
    with log.open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(i) for i in range(1, 25)]


def test_command_line_wins_over_file_and_file_over_preset(folder):
    own = folder / "own.yaml"
    own.write_text("lr: 0.5\nseed: 3\n")
    config = settings("--preset", "voc/zegclip/inductive", "--seed", "4", "--config", str(own))
    assert (config["lr"], config["seed"], config["model"], config["warmup"]) == (0.5, 4, "zegclip", 1500)
    own.write_text("preset: voc/zegclip/inductive\nlr: 0.5\n")
    config = settings("--config", str(own))
    assert (config["lr"], config["model"], config["warmup"]) == (0.5, "zegclip", 1500)


class TestRefuses:
    def test_unknown_key(self, folder, capsys):
        (folder / "own.yaml").write_text("max_stps: 5\n")
        said = refused(capsys, command(folder, "--config", str(folder / "own.yaml")))
        assert "own.yaml: there is no setting 'max_stps'; did you mean max_steps" in said

    @pytest.mark.parametrize("what", ["options", "loss-weights", "transform"])
    def test_unknown_part_of_a_setting(self, folder, capsys, what):
        wrong, right = {
            "options": ("promts", "prompts"),
            "loss-weights": ("focl", "focal"),
            "transform": ("flp", "flip"),
        }[what]
        said = refused(capsys, command(folder, f"--{what}.{wrong}", "1"))
        where = "clip_rc" if what == "options" else f"--{what}"
        assert f"{where}: there is no setting '{wrong}'; did you mean {right}" in said

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ("--options.crop=0", "ClipRC: crop: expected at least 8 pixels, got 0"),
            ("--transform.short_side=0", "short_side: expected at least 1 pixel, got 0"),
        ],
    )
    def test_sides_without_a_pixel(self, folder, capsys, option, message):
        assert message in refused(capsys, command(folder, option))

    def test_unknown_preset(self, folder, capsys):
        said = refused(capsys, command(folder, "--preset", "voc/clip_rc/inductiv"))
        assert "unknown preset 'voc/clip_rc/inductiv'; nearest known: voc/clip_rc/inductive" in said

    def test_class_list_of_another_length(self, folder, capsys):
        (folder / "names.yaml").write_text(yaml.safe_dump(NAMES[:-1]))
        said = refused(capsys, command(folder, "--classes-file", str(folder / "names.yaml")))
        assert "names.yaml has 6 classes, but protocol tiny has 7" in said

    def test_mask_with_a_label_outside_the_list(self, folder, capsys):
        Image.fromarray(np.full((32, 40), 7, np.uint8)).save(folder / "masks" / "2.png")
        assert main(command(folder)) == 2
        said = capsys.readouterr().err
        assert "2.png: expected labels from 0 to 6, or 255 for ignored, got 7" in said

    def test_empty_data_set(self, folder, capsys):
        for path in [*(folder / "images").iterdir(), *(folder / "masks").iterdir()]:
            path.unlink()
        assert "no images" in refused(capsys, command(folder))

    def test_zero_shot_setting_without_unseen_classes(self, folder, capsys):
        (folder / "tiny.yaml").write_text(yaml.safe_dump({"classes": NAMES}))
        assert "has no unseen classes, so --setting inductive means nothing" in refused(capsys, command(folder))

    def test_model_without_training(self, folder, capsys):
        said = refused(capsys, command(folder, "--model", "maskclip"))
        assert "no model 'maskclip' to train; there are cagnet, clip_rc" in said

    def test_corrupt_checkpoint(self, folder, capsys):
        assert main(command(folder)) == 0
        path = folder / "out" / "last" / "training.pt"
        path.write_bytes(path.read_bytes()[:-9])
        capsys.readouterr()
        assert "training.pt is not as it was written" in refused(capsys, command(folder))


def test_a_label_file_without_own_masks_is_refused(tmp_path, capsys):
    arguments = ["--preset", "shapes/zegclip/inductive", "--max-steps", "1", "--output", str(tmp_path / "run")]
    labels = tmp_path / "labels.yaml"
    labels.write_text("7: paper\n")
    assert main(["train", *arguments, "--label-file", str(labels)]) == 2
    assert "--label-file is for own masks, with --images and --masks" in capsys.readouterr().err
