"""Results of other settings are never taken for those that are asked for: every input of the key is flipped once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastzs import identity
from fastzs.cli import main
from fastzs.clip.weights import SHAPES
from fastzs.models import ZegCLIP
from fastzs.result import Segmentation
from tests.training import SIZES

NAMES = "red disc,blue ring,green star"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two images, weights of CLIP as a folder, and a trained model that reads its text from them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTZS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "in").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i}.png")
    shutil.copytree(SHAPES, tmp_path / "clip")
    wide = json.loads((tmp_path / "clip" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
    train(0, wide).save_pretrained(tmp_path / "model")
    return tmp_path


def train(seed, wide):
    torch.manual_seed(seed)
    return ZegCLIP(weights="shapes", sizes=SIZES | {"output_dim": wide}, prompts=2, crop=32)


def segment(trained: bool, *more: str) -> None:
    model = ["--model", "zegclip", "--checkpoint", "model"] if trained else ["--weights", "clip"]
    quick = ["--precision", "fp32", "--device", "cpu", "--short-side", "32"]
    classes = [] if any(item.startswith("--classes") for item in more) else ["--classes", NAMES]
    assert main(["segment", "in", "--output", "out", *model, *quick, *classes, *more]) == 0


def done_before(capsys) -> int:
    return int(capsys.readouterr().out.rsplit(" done before", 1)[0].rsplit(" ", 1)[1])


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def more_training(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(path).items()}, path)


def other_weights(folder: Path) -> None:
    path = next((folder / "clip").glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(path).items()}, path)


def config(key: str, value: object):
    def change(content: dict) -> None:
        content.setdefault("preprocess_cfg", {})[key] = value

    return lambda folder: edit_json(folder / "clip" / "open_clip_config.json", change)


def quick_gelu(folder: Path) -> None:
    def change(content: dict) -> None:
        content["model_cfg"]["quick_gelu"] = not content["model_cfg"].get("quick_gelu", False)

    edit_json(folder / "clip" / "open_clip_config.json", change)


def settings(key: str, value: object):
    return lambda folder: edit_json(folder / "model" / "config.json", lambda content: content.update({key: value}))


def numerics(folder: Path) -> None:
    identity.NUMERICS += 1


@pytest.mark.parametrize(
    ("trained", "change"),
    [
        (True, more_training),
        (True, settings("calibration", 0.7)),
        (True, settings("seen", ["red disc"])),
        (True, ["--options.calibration", "0.3"]),
        (True, ["--seen", "red disc,blue ring"]),
        (False, other_weights),
        (False, config("mean", [0.1, 0.2, 0.3])),
        (False, config("std", [0.1, 0.2, 0.3])),
        (False, quick_gelu),
        (False, ["--classes", "red disc,blue ring"]),
        (False, ["--classes", "blue ring,red disc,green star"]),
        (False, ["--templates", "t.txt"]),
        (False, ["--precision", "bf16"]),
        (False, ["--short-side", "40"]),
        (False, ["--crop", "24"]),
        (False, ["--crop", "24", "--stride", "8"]),
        (False, ["--background", "prompt"]),
        (False, ["--background", "threshold"]),
        (False, ["--background", "threshold", "--threshold", "0.9"]),
        (False, ["--options.dense", "qq"]),
        (False, numerics),
    ],
)
def test_each_input_of_a_label_map_is_in_its_key(place, capsys, monkeypatch, trained, change):
    monkeypatch.setattr(identity, "NUMERICS", 1)
    (place / "t.txt").write_text("a {}\n")
    segment(trained)
    segment(trained)
    assert done_before(capsys) == 2
    more = change if isinstance(change, list) else []
    if not more:
        change(place)
    segment(trained, *more)
    assert done_before(capsys) == 0
    segment(trained, *more)
    assert done_before(capsys) == 2


def test_results_are_those_of_a_folder_of_their_own(place):
    """A run into a folder with results of another checkpoint gives what a run into an empty one gives."""
    segment(True)
    shutil.rmtree(place / "model")
    wide = json.loads((place / "clip" / "open_clip_config.json").read_text())["model_cfg"]["embed_dim"]
    train(1, wide).save_pretrained(place / "model")
    segment(True)
    (place / "out").rename(place / "used")
    segment(True)
    for i in range(2):
        used, new = (Segmentation.load(place / folder / f"{i}.png").labels for folder in ("used", "out"))
        assert torch.equal(used, new)


def test_the_weights_own_words_for_the_background_are_in_the_key(place, capsys):
    for words, before in ((["paper"], 0), (["paper"], 2), (["wood", "gravel"], 0)):
        edit_json(place / "clip" / "words.json", lambda content, words=words: content.update(background=words))
        segment(False, "--background", "prompt")
        assert done_before(capsys) == before


def test_text_vectors_of_other_weights_are_not_served(place):
    """Not in memory and not from the disk."""
    from fastzs import Vocabulary
    from fastzs.clip import load

    vocabulary = Vocabulary(NAMES.split(","))
    before = vocabulary.embed(load(weights="clip"))
    quick_gelu(place)
    after = vocabulary.embed(load(weights="clip"))
    own = load(weights="clip").text().encode([f"{name}" for name in NAMES.split(",")])
    assert not torch.equal(before, after)
    assert own.shape == after.shape


def test_plain_values():
    value = {"a": (1, {2.5}), 3: [None, True, Path("x")]}
    assert identity.plain(value) == {"a": [1, [2.5]], "3": [None, True, "x"]}
    json.dumps(identity.plain(value))
