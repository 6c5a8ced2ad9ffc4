"""The Triton backend of label_map: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastzs.kernels.label_map.api import label_map

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_label_map import adversarial_logits, assert_agrees, random_case

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


CASES = [  # image, crop, stride, map, output, activation
    ((8, 12), 8, 5, (3, 2), None, "sigmoid"),  # overlap, no second step
    ((8, 12), 8, 5, (3, 2), None, "softmax"),
    ((10, 9), 6, 4, (3, 2), (3, 67), "sigmoid"),  # overlaps both ways, wider than a tile
    ((10, 9), 6, 4, (3, 2), (3, 7), "none"),
    ((10, 9), 6, 4, (3, 2), (3, 7), "softmax"),
    ((9, 9), 9, 9, (1, 1), (1, 1), "sigmoid"),
    ((30, 20), 16, 11, (5, 16), (4, 5), "sigmoid"),  # smaller output
]


@interpreted
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output", "activation"), CASES)
def test_agrees(picture, crop, stride, size, output, activation):
    logits, windows = random_case(picture, crop, stride, size, 19, torch.float32)
    options = {"activation": activation, "seen": [0, 3, 17], "calibration": 0.3}
    assert_agrees(logits, windows, picture, output, 1, "triton", **options)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype):
    logits, windows = random_case((12, 20), 8, 6, (3, 2), 5, torch.float32)
    assert_agrees(logits.to(dtype), windows, (12, 20), (7, 9), impl="triton")


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, about NaN
def test_labels():
    logits = torch.zeros(1, 40, 2, 2)
    assert label_map(logits, [(0, 0, 4, 4)], (4, 4), impl="triton").labels.unique().tolist() == [0]
    logits[:, [20, 33]] = 1.0
    assert label_map(logits, [(0, 0, 4, 4)], (4, 4), impl="triton").labels.unique().tolist() == [20]
    got = label_map(logits, [(0, 0, 4, 4)], (4, 4), threshold=0.8, impl="triton")
    assert got.labels.unique().tolist() == [40]
    for bad in (float("nan"), float("inf")):
        for activation in ("sigmoid", "softmax"):
            logits[0, 20, 0, 0] = bad
            labels = []
            for impl in ("triton", "reference"):
                with pytest.warns(UserWarning, match="NaN or infinite"):
                    got = label_map(logits, [(0, 0, 4, 4)], (4, 4), activation=activation, impl=impl)
                labels.append(got.labels)
            assert torch.equal(*labels)


@interpreted
def test_many_windows():
    picture = (20, 30)
    windows = [(0, left, 20, 10) for left in range(0, 21, 4)]
    assert_agrees(adversarial_logits("windows", len(windows), 7, 3, 3), windows, picture, (10, 40), impl="triton")


@pytest.mark.skipif(INTERPRETED, reason="needs another machine")
def test_reasons():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        label_map(torch.zeros(1, 2, 2, 2), [(0, 0, 4, 4)], (4, 4), impl="triton")


MUTATIONS = {
    "ties go up": ("tl.min(tl.where(mixed == top[None, :], c[:, None], classes), 0)", "tl.max(c, 0)"),
    "windows add up": ("total / tl.maximum(visits, 1.0)[None, :]", "total"),
    "corners are swapped": ("(tap % 2) * out_w", "(1 - tap % 2) * out_w"),
    "calibration is dropped": ("mixed -= tl.load(penalty_ptr", "mixed -= 0 * tl.load(penalty_ptr"),
    "a column is dropped": ("(u < tl.load(windows_ptr + window * 4 + 3))", "(u < 4)"),
}


@interpreted
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.label_map import triton

    right, wrong = MUTATIONS[name]
    source = Path(triton.__file__).read_text()
    assert right in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong).replace("from .", "from fastzs.kernels.label_map."))
    spec = importlib.util.spec_from_file_location("broken_label_map", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(triton, "label_map_triton", broken.label_map_triton)
    with pytest.raises((AssertionError, RuntimeError)):  # RuntimeError: a label that is no class
        test_agrees((10, 9), 6, 4, (3, 2), (3, 7), "sigmoid")
