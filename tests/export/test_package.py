"""What is refused, and what the checks of an export would find."""

import json
import os

import pytest
import torch

import fastzs
from fastzs.cli import main
from fastzs.clip import WeightsError
from fastzs.export import package
from fastzs.export.check import bound, judge
from fastzs.export.graphs import ExportError, Labels, foreign_ops, program, references, sample
from fastzs.models import NACLIP, MaskCLIP, ResCLIP
from fastzs.ops import label_map
from tests.tiny import VISION, tiny_clip


@pytest.fixture(scope="module")
def model():
    return MaskCLIP(tiny_clip()).eval()


def test_a_program_of_plain_operators(model):
    """Labels of any image and any number of names, without an operator of this package."""
    whole = Labels(model, [])
    made = program(whole, sample(model, (37, 35)), [{2, 3}, {0}], "MaskCLIP")
    assert foreign_ops(made) == []
    images, text = sample(model, (40, 56), 9)
    got = made.module(check_guards=False)(images, text)
    logits = model(images, text)
    wanted = label_map(logits, [[0, 0, 40, 56]], (40, 56), activation="softmax").labels
    assert (got[0] == wanted).double().mean() > 0.999


def test_calibration_is_part_of_the_labels(model):
    images, text = sample(model, (40, 40))
    model.calibration = 0.3
    try:
        got = Labels(model, [0, 2])(images, text)[0]
        wanted = label_map(
            model(images, text), [[0, 0, 40, 40]], (40, 40), activation="softmax", seen=[0, 2], calibration=0.3
        ).labels
    finally:
        model.calibration = 0.0
    assert (got == wanted).double().mean() > 0.999
    assert not torch.equal(got, Labels(model, [])(images, text)[0])


def test_references_are_taken_meanwhile_only(monkeypatch):
    monkeypatch.setenv("FASTZS_IMPL", "auto")
    with references():
        assert os.environ["FASTZS_IMPL"] == "reference"
    assert os.environ["FASTZS_IMPL"] == "auto"


def test_errors_and_wrong_labels_are_found():
    right = torch.rand(1, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert judge(right.float(), right, 1e-6, "x")["labels"] == 1
    with pytest.raises(ExportError, match=r"off by .* at most 1.0e-06 allowed"):
        judge(right.float() * 1.001, right, 1e-6, "x")
    with pytest.raises(ExportError, match="got \\[1, 4, 6, 5\\]"):
        judge(right.float()[..., :5], right, 1e-6, "x")
    labels = right.argmax(1)
    right[0, :, 0, 0] = torch.tensor([3.0, 2.0, 1.0, 0.0])
    labels[0, 0, 0] = 3
    with pytest.raises(ExportError, match="1 labels differ"):
        judge(labels, right, 1e-6, "x")
    right[0, :, 0, 0] = 1  # all equally good
    assert judge(labels, right, 1e-6, "x")["ties"] == 1


def test_the_bound_grows_with_depth_and_length():
    def layers(count, width):
        return torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(count)))

    assert bound(layers(4, 16)) == pytest.approx(2 * bound(layers(2, 16)))
    assert bound(layers(2, 64)) == pytest.approx(2 * bound(layers(2, 16)))


def test_what_cannot_be_exported(tmp_path, capsys):
    def refused(*arguments):
        assert main(["export", *arguments, "--output", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    shapes = ["maskclip", "--weights", "shapes"]
    assert "--int8 needs --format onnx or openvino" in refused(*shapes, "--format", "torch", "--int8")
    assert "--size: expected positive numbers" in refused(*shapes, "--size", "-1")
    assert "ResCLIP cannot be exported: between its two passes" in refused("resclip", "--weights", "shapes")
    assert "ZegFormer cannot be exported: which proposals" in refused("zegformer")
    resclip = ResCLIP(tiny_clip({**VISION, "layers": 11}))
    with pytest.raises(ExportError, match="ResCLIP cannot be exported: between its two passes"):
        package.export(resclip, tmp_path / "out", "onnx", size=(32, 32))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo.jpg").write_text("mine")
    assert "expected a new or empty folder" in refused(*shapes)
    assert (tmp_path / "out" / "photo.jpg").read_text() == "mine"


def test_a_dynamic_size_that_positions_do_not_have_is_explained(tmp_path):
    model = NACLIP(tiny_clip()).eval()
    with pytest.raises(ExportError, match=r"NACLIP cannot be exported: positions='offset' are resized .* or one size"):
        package.export(model, tmp_path / "out", "onnx", size=(32, 32), dynamic=True)


def test_nothing_is_left_of_an_export_that_fails(model, tmp_path, monkeypatch):
    def wrong(*arguments):
        raise ExportError("its logits are off")

    monkeypatch.setattr(package, "_checks", wrong)
    with pytest.raises(ExportError, match="its logits are off"):
        package.export(model, tmp_path / "out", "torch", size=(32, 32))
    assert list(tmp_path.iterdir()) == []


def test_exported_folders_that_cannot_be_loaded(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(WeightsError, match="an exported model is its whole folder"):
        fastzs.load(tmp_path / "model.onnx")
    for content, message in (
        ("[", "is no metadata of an exported model"),
        (json.dumps({"version": 99}), "expected version 1, got 99"),
        (json.dumps({"version": 1}), "is no metadata of an exported model"),
    ):
        (tmp_path / "metadata.json").write_text(content)
        with pytest.raises(WeightsError, match=message):
            fastzs.load(tmp_path)
    for options, message in (
        ({"device": "meta"}, "run on the CPU here"),
        ({"precision": "bf16"}, "chosen when it was exported"),
        ({"weights": "openai"}, "leave weights out"),
    ):
        with pytest.raises(ValueError, match=message):
            fastzs.load(tmp_path, **options)
