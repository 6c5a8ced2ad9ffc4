"""csrc/label_map_cuda.cu on the host, over the cases of test_label_map.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.baselines.label_map import slide_windows
from fastzs.kernels.label_map import api
from fastzs.kernels.label_map.api import label_map

from ..test_label_map import CASES, adversarial_logits, assert_agrees, random_case
from .mutations import MUTATIONS

SOURCE = "label_map_cuda.cu"
KINDS = ["noise", "hair", "spikes", "windows", "saturated", "tiny", "ramps", "smooth"]


@pytest.fixture(scope="module", autouse=True)
def on_tensors_of_the_cpu(variants):
    """``impl="cuda"`` takes tensors of the CPU and runs the source on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "why_not_cuda", lambda logits, top_k: None)
        patch.setattr(torch.ops.fastzs, "label_map_cuda", variants(SOURCE)["nothing"], raising=False)
        yield


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output"), CASES)
def test_agrees(picture, crop, stride, size, output, activation):
    for classes, top_k in ((1, 1), (7, 3), (40, 1), (40, 8)):
        logits, windows = random_case(picture, crop, stride, size, classes, torch.float32)
        seen = range(0, classes, 3)
        assert_agrees(logits, windows, picture, output, top_k, "cuda", activation=activation, seen=seen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype):
    logits, windows = random_case((96, 160), 64, 48, (4, 4), 30, torch.float32)
    for activation in ("sigmoid", "softmax"):
        assert_agrees(logits.to(dtype), windows, (96, 160), (60, 70), impl="cuda", activation=activation)


@pytest.mark.parametrize("kind", KINDS)
def test_adversarial(kind):
    windows = slide_windows((50, 75), 32, 21)
    logits = adversarial_logits(kind, len(windows), 60, 8, 8)
    for output in (None, (41, 66)):
        assert_agrees(logits, windows, (50, 75), output, impl="cuda", seen=range(0, 60, 2), calibration=0.2)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_any_shape(data):
    picture = data.draw(st.tuples(st.integers(1, 50), st.integers(1, 50)))
    crop = data.draw(st.integers(1, 50))
    stride = data.draw(st.integers(max(1, crop // 2), crop))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    output = data.draw(st.none() | st.tuples(st.integers(1, 60), st.integers(1, 60)))
    classes = data.draw(st.sampled_from([1, 2, 16, 17, 33, 260]))
    if len(slide_windows(picture, crop, stride)) * classes > 5000:
        classes = 17
    logits, windows = random_case(picture, crop, stride, size, classes, torch.float32)
    options = {
        "activation": data.draw(st.sampled_from(["sigmoid", "softmax", "none"])),
        "seen": data.draw(st.none() | st.just(range(classes // 2))),
        "calibration": data.draw(st.sampled_from([0.1, 0.0, -0.3, 2.0])),
        "top_k": data.draw(st.integers(1, min(classes, 8))),
    }
    assert_agrees(logits, windows, picture, output, impl="cuda", **options)


@pytest.mark.filterwarnings("ignore:label_map. logits has NaN")
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_labels_of_what_is_not_finite(activation):
    logits = torch.zeros(1, 300, 2, 3)
    logits[:, [20, 33]] = 1.0
    for bad in (torch.nan, torch.inf, -torch.inf):
        for nodes in ((0, 20, 0, 0), (0,)):
            logits[nodes] = bad
            for more in ({}, {"threshold": 0.5}, {"top_k": 3}):
                options = {"activation": activation, **more}
                got, wanted = (
                    label_map(logits, [(0, 0, 6, 7)], (6, 7), impl=impl, **options) for impl in ("cuda", "reference")
                )
                assert got.labels.dtype == torch.int16
                assert torch.equal(got.labels, wanted.labels)
            logits[:] = 0
            logits[:, [20, 33]] = 1.0


@pytest.mark.filterwarnings("ignore:label_map. logits has NaN")
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
def test_what_is_not_finite_hides_no_mark(activation):
    """A class that is NaN at one node line wins beside it, where no mark sees it."""
    logits = torch.zeros(1, 30, 2, 3)
    logits[:, 20] = torch.tensor([-5.0, 5.0, torch.nan])
    labels = [
        label_map(logits, [(0, 0, 8, 16)], (8, 16), activation=activation, impl=i).labels for i in ("cuda", "reference")
    ]
    assert torch.equal(*labels)
    assert labels[0].unique().tolist() == [0, 20]


def logits_read(variants, classes: int, every: bool, capfd) -> int:
    """By the kernel for an image of 171 x 128 in two windows, whose smooth maps have a node every 16 pixels."""
    picture, windows = (128, 171), [(0, 0, 128, 128), (0, 43, 128, 128)]
    logits = adversarial_logits("smooth", 2, classes, 8, 8)
    with pytest.MonkeyPatch.context() as patch:
        operator = variants(SOURCE)["same: every logit is counted" if every else "same: logits are counted"]
        patch.setattr(torch.ops.fastzs, "label_map_cuda", operator)
        assert_agrees(logits, windows, picture, (100, 134), impl="cuda")
    return int(capfd.readouterr().err.split()[0])


@pytest.mark.parametrize(("classes", "times"), [(20, 3), (171, 7), (847, 11)])
def test_few_classes_are_evaluated(classes, times, variants, capfd):
    before, after = (logits_read(variants, classes, every, capfd) for every in (True, False))
    print(f"{classes} classes: {before / 13400:.0f} logits a pixel, after leaving out {after / 13400:.0f}")
    assert after < before / times


def test_ranks_past_the_last_are_refused(variants):
    with pytest.raises(RuntimeError, match="takes top_k up to 8"):
        label_map(torch.zeros(1, 9, 2, 2), [(0, 0, 4, 4)], (4, 4), top_k=9, impl="cuda")


def agrees() -> bool:
    """Whether the operator at hand passes tests that the source as it is passes."""
    picture, output = (31, 45), (26, 38)
    windows = slide_windows(picture, 20, 13)
    try:
        for kind, activation, size in (
            ("windows", "sigmoid", (5, 6)),
            ("windows", "sigmoid", (2, 3)),
            ("saturated", "sigmoid", (2, 3)),
            ("noise", "softmax", (5, 6)),
            ("spikes", "none", (2, 3)),
            ("ramps", "sigmoid", (2, 3)),
        ):
            logits = adversarial_logits(kind, len(windows), 13, *size)
            options = {"activation": activation, "seen": range(0, 13, 2), "calibration": 0.2, "impl": "cuda"}
            assert_agrees(logits, windows, picture, output, **options)
            assert_agrees(logits, windows, picture, None, 3, **options)
        test_labels_of_what_is_not_finite("sigmoid")
        test_what_is_not_finite_hides_no_mark("sigmoid")
        flat = torch.ones(1, 5, 2, 2)
        assert (label_map(flat, [(0, 0, 4, 4)], (4, 4), impl="cuda").labels == 0).all()  # of equal ones the lower
    except (AssertionError, RuntimeError):
        return False
    return True


@pytest.mark.filterwarnings("ignore:label_map. logits has NaN")
@pytest.mark.parametrize("name", MUTATIONS[SOURCE])
def test_only_the_unbroken_code_agrees(name, variants, monkeypatch):
    monkeypatch.setattr(torch.ops.fastzs, "label_map_cuda", variants(SOURCE)[name])
    assert agrees() == (name == "nothing" or name.startswith("same:"))
