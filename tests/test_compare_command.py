"""``fastzs compare``: what it counts, and that it runs."""

import pytest
import torch
from PIL import Image

from fastzs.cli import main
from fastzs.commands.compare import report
from fastzs.data import shapes
from fastzs.metrics import ConfusionMatrix

NAMES = ["red disc", "blue star", "paper"]


def test_report_counts_what_changed():
    matrix = ConfusionMatrix(3)
    matrix.add(torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, 2, 1, 1, 2, 0]))
    text = report(matrix, NAMES, "int8", "float32", 1)
    assert "int8 against float32, 1 images, 8 pixels" in text
    assert "labels that agree: 62.500 %" in text
    mean = 100 * (2 / 5 + 2 / 3 + 1 / 3) / 3
    assert f"mean IoU between the two: {mean:.2f} %" in text
    assert "red disc: 50.00 % changed, most to blue star; IoU 40.0 %" in text
    assert "paper: 50.00 % changed, most to red disc; IoU 33.3 %" in text
    assert "blue star" not in text.split("most to blue star", 1)[1]


def test_a_precision_agrees_with_itself(tmp_path, capsys):
    for i, image in enumerate(shapes.draw(2, (64, 64)).images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    arguments = ["compare", "--precision", "fp32", "fp32", str(tmp_path), "--classes", ",".join(NAMES)]
    assert main([*arguments, "--weights", "shapes", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "float32 against float32, 2 images, 8,192 pixels" in out
    assert "labels that agree: 100.000 %" in out
    assert "changed" not in out


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_another_precision_is_compared(precision, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastzs.devices.why_int8_is_slow", lambda: None)  # computed alike where it does not pay
    Image.fromarray(shapes.draw(1, (64, 64)).images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    arguments = ["compare", str(tmp_path), "--precision", precision, "fp32", "--classes", ",".join(NAMES)]
    assert main([*arguments, "--weights", "shapes", "--device", "cpu"]) == 0
    assert {"bf16": "bfloat16", "int8": "int8"}[precision] + " against float32" in capsys.readouterr().out


def test_no_names_are_refused(capsys):
    assert main(["compare", "a.png", "--classes", " , "]) == 2
    assert "--classes has no names in it" in capsys.readouterr().err
