import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from bench.baselines.label_map import published_scores, slide_windows, smooth_logits
from fastzs.kernels.dispatch import choose
from fastzs.kernels.label_map import api, compiled, reference, tables
from fastzs.kernels.label_map.api import label_map
from fastzs.kernels.label_map.options import Options

GOLDENS = Path(__file__).parents[1] / "goldens"

CASES = [  # image, crop, stride, map, output: one reason each
    ((64, 64), 64, 48, (4, 4), None),  # one window, no second step
    ((96, 160), 64, 48, (4, 4), (120, 200)),  # overlaps both ways, the last windows shifted, larger output
    ((70, 101), 48, 31, (5, 3), (33, 47)),  # odd everything, smaller output
    ((40, 90), 48, 32, (6, 7), (1, 1)),  # image lower than the crop, one pixel out
    ((50, 50), 32, 20, (40, 40), (50, 13)),  # maps finer than the window
    ((37, 41), 16, 16, (1, 1), (80, 90)),  # one node per window
]


def random_case(picture, crop, stride, size, classes=7, dtype=torch.float64):
    windows = slide_windows(picture, crop, stride)
    generator = torch.Generator().manual_seed(sum(picture) + classes)
    return 2 * torch.randn(len(windows), classes, *size, generator=generator, dtype=dtype), windows


@pytest.mark.parametrize("tile_bytes", [reference.TILE_BYTES, 4000])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output"), CASES)
def test_reference_is_published(picture, crop, stride, size, output, activation, tile_bytes, monkeypatch):
    monkeypatch.setattr(reference, "TILE_BYTES", tile_bytes)
    logits, windows = random_case(picture, crop, stride, size)
    want = published_scores(logits, windows, picture, output, activation, seen=[0, 2, 5])
    got = label_map(
        logits,
        windows,
        picture,
        output_size=output,
        activation=activation,
        seen=[0, 2, 5],
        return_scores=True,
        impl="reference",
    )
    value, label = want.max(0)
    assert got.labels.dtype == torch.uint8
    assert torch.equal(got.labels.long(), label)
    torch.testing.assert_close(got.scores, value, rtol=0, atol=1e-12)  # measured 9e-16


def test_golden_whole_inference():
    """MaskCLIP's published whole inference: resize to the input, then to the original size, then argmax."""
    golden = load_file(GOLDENS / "C_maskclip_vit.safetensors")
    logits = golden["out64.image1.refined_kspd"]
    got = label_map(logits, [(0, 0, 96, 80)], (96, 80), output_size=(113, 89), activation="none", return_scores=True)
    assert torch.equal(got.labels, golden["out64.image1.whole_labels"][0])
    want = golden["out64.image1.whole_scores_sub"][0].amax(0)
    assert got.scores is not None
    torch.testing.assert_close(got.scores[::4, ::4], want, rtol=0, atol=1e-12)


# ---- every backend against the fp64 reference ------------------------------------------------------------------

BACKENDS = [
    pytest.param("reference"),
    pytest.param("cpu", marks=pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))),
]
SCORE_ERROR = 1e-6  # from fp32 logits, of the largest score or 1: measured 6.4e-7 (softmax on portable vectors)


def assert_agrees(logits, windows, picture, output, top_k=1, impl="cpu", slack=SCORE_ERROR, **options):
    """Scores within ``slack`` of the fp64 reference's, and labels equal except where scores tie within it.

    Returns how many labels differ.
    """
    options = {"output_size": output, "top_k": top_k, **options}
    got = label_map(logits, windows, picture, return_scores=True, impl=impl, **options)
    want = label_map(logits.double(), windows, picture, return_scores=True, impl="reference", **options)
    assert got.labels.dtype == want.labels.dtype
    assert got.labels.shape == want.labels.shape
    assert got.scores is not None
    assert want.scores is not None
    assert got.scores.dtype == torch.float32
    size = max(1.0, want.scores.abs().max().item())
    error = (got.scores.double() - want.scores).abs().max().item()
    assert error <= slack * size, (error, size)
    # A label that differs must have the winner's score: ask the reference for all scores of these pixels.
    every = label_map(logits.double(), windows, picture, return_scores=True, impl="reference",
                      **{**options, "top_k": logits.shape[1]})  # fmt: skip
    assert every.scores is not None
    shape = (-1, *want.scores.shape[-2:])
    order = every.labels.view(shape).long().argsort(0)
    scores = every.scores.view(shape).gather(0, order)  # [C, H', W'], by class
    of_label = scores.gather(0, got.labels.view(shape).long())
    gap = (of_label - want.scores.view(shape)).abs().max().item()
    assert gap <= 2 * slack * size, gap
    return int((got.labels != want.labels).sum())


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "none"])
@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output"), CASES)
def test_backend(picture, crop, stride, size, output, activation, impl):
    for classes, top_k in ((1, 1), (7, 3), (40, 1), (40, 9)):
        logits, windows = random_case(picture, crop, stride, size, classes, torch.float32)
        seen = range(0, classes, 3)
        assert_agrees(logits, windows, picture, output, top_k, impl, activation=activation, seen=seen)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits(dtype, impl):
    logits, windows = random_case((96, 160), 64, 48, (4, 4), 30, torch.float32)
    assert_agrees(logits.to(dtype), windows, (96, 160), (120, 200), impl=impl)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("impl", BACKENDS)
def test_any_shape(impl, data):
    picture = data.draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    crop = data.draw(st.integers(1, 70))
    stride = data.draw(st.integers(max(1, crop // 2), crop))
    size = data.draw(st.tuples(st.integers(1, 12), st.integers(1, 12)))
    output = data.draw(st.none() | st.tuples(st.integers(1, 90), st.integers(1, 90)))
    classes = data.draw(st.sampled_from([1, 2, 16, 17, 33, 260, 1000]))
    activation = data.draw(st.sampled_from(["sigmoid", "softmax", "none"]))
    if len(slide_windows(picture, crop, stride)) * classes > 20000:
        classes = 17
    logits, windows = random_case(picture, crop, stride, size, classes, torch.float32)
    options = {
        "activation": activation,
        "seen": data.draw(st.none() | st.just(range(classes // 2))),
        "calibration": data.draw(st.sampled_from([0.1, 0.0, -0.3, 2.0])),
        "top_k": data.draw(st.integers(1, min(classes, 12))),
    }
    assert_agrees(logits, windows, picture, output, impl=impl, **options)


# ---- leaving classes out is exact ----------------------------------------------------------------------------------


def adversarial_logits(kind: str, windows: int, classes: int, h: int, w: int) -> torch.Tensor:
    """Maps on which a careless comparison of whole blocks goes wrong."""
    generator = torch.Generator().manual_seed(classes)
    noise = torch.randn(windows, classes, h, w, generator=generator)
    if kind == "noise":  # almost no class is below another over a whole block
        return 3 * noise
    if kind == "hair":  # classes apart by a few units in the last place
        return 1 + noise[:, :1] + 1e-6 * noise
    if kind == "spikes":  # each class wins at one node only
        maps = torch.full((windows, classes, h, w), -4.0)
        at = torch.randint(h * w, (windows, classes, 1), generator=generator)
        return maps.flatten(2).scatter(2, at, 4.0).view(maps.shape)
    if kind == "windows":  # what one window wants, the other refuses
        return noise + 6 * torch.linspace(-1, 1, classes)[:, None, None] * (1 - 2 * (torch.arange(windows) % 2)).view(
            -1, 1, 1, 1
        )
    if kind == "saturated":  # sigmoids of 1 in fp32 that differ in the logits
        return 30 + 10 * noise
    if kind == "tiny":  # sigmoids near 0
        return -40 + 10 * noise
    if kind == "ramps":  # crossings inside the blocks
        x = torch.linspace(-1, 1, w) * torch.linspace(-9, 9, classes)[:, None]
        return x[None, :, None].expand(windows, classes, h, w) + 0.2 * noise
    assert kind == "smooth"
    return smooth_logits(windows, classes, h, w)


@pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
@pytest.mark.parametrize("kind", ["noise", "hair", "spikes", "windows", "saturated", "tiny", "ramps", "smooth"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_adversarial(kind, calibrated):
    picture, output = (100, 150), (83, 131)
    windows = slide_windows(picture, 64, 43)
    logits = adversarial_logits(kind, len(windows), 60, 8, 8)
    options = {"seen": range(0, 60, 2), "calibration": 0.2} if calibrated else {}
    for size in (None, output):
        for top_k in (1, 2):
            # scores of 40 sigmas saturate: ties of many classes, their labels by their scores
            assert_agrees(logits, windows, picture, size, top_k, **options)
        assert_agrees(logits, windows, picture, size, activation="none", **options)


@pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_instruction_sets(isa, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", isa)
    picture = (100, 150)
    windows = slide_windows(picture, 64, 43)
    for kind in ("noise", "windows", "smooth"):
        logits = adversarial_logits(kind, len(windows), 60, 8, 8)
        for activation in ("sigmoid", "softmax"):
            # (30, 40): every output column reads two columns that no other reads
            for output in ((83, 131), (30, 40)):
                assert_agrees(logits, windows, picture, output, activation=activation, seen=range(30))


@pytest.mark.parametrize("impl", BACKENDS)
def test_threads_and_repeats_give_the_same_bits(impl):
    logits, windows = random_case((96, 160), 64, 48, (4, 4), 30, torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            results.append(label_map(logits, windows, (96, 160), return_scores=True, impl=impl))
    finally:
        torch.set_num_threads(threads)
    for labels, scores in results[1:]:
        assert torch.equal(labels, results[0].labels)
        assert torch.equal(scores, results[0].scores)


# ---- what is promised at the edges ---------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", BACKENDS)
def test_equal_scores_give_the_lowest_class(impl):
    logits = torch.full((1, 300, 3, 3), 0.7)
    got = label_map(logits, [(0, 0, 20, 20)], (20, 20), output_size=(13, 31), top_k=3, impl=impl)
    assert got.labels.dtype == torch.int16
    assert [got.labels[k].unique().tolist() for k in range(3)] == [[0], [1], [2]]
    logits[:, 200:] = 0.8
    got = label_map(logits, [(0, 0, 20, 20)], (20, 20), impl=impl)
    assert got.labels.unique().tolist() == [200]
    # classes that a better one moves down stay before their equals
    got = label_map(logits, [(0, 0, 20, 20)], (20, 20), top_k=3, impl=impl)
    assert [got.labels[k].unique().tolist() for k in range(3)] == [[200], [201], [202]]
    logits[:, 201:] = 0.7
    got = label_map(logits, [(0, 0, 20, 20)], (20, 20), top_k=3, impl=impl)
    assert [got.labels[k].unique().tolist() for k in range(3)] == [[200], [0], [1]]


@pytest.mark.parametrize("impl", BACKENDS)
def test_threshold_and_background(impl):
    logits = torch.tensor([-2.0, 2.0]).view(1, 1, 1, 2).repeat(1, 2, 1, 1)
    logits[:, 1] -= 1
    args = (logits, [(0, 0, 2, 8)], (2, 8))
    got = label_map(*args, threshold=0.5, impl=impl)
    assert got.scores is None
    assert got.labels.tolist() == [[2, 2, 2, 2, 0, 0, 0, 0]] * 2
    got = label_map(*args, threshold=0.5, top_k=2, impl=impl)
    assert got.labels[1, 0].tolist() == [2] * 5 + [1] * 3  # the second class is above 0.5 only at the end


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize(
    ("classes", "threshold", "dtype"),
    [(255, None, torch.uint8), (254, 0.5, torch.uint8), (255, 0.5, torch.int16), (256, None, torch.int16)],
)
def test_label_dtype(classes, threshold, dtype, impl):
    got = label_map(torch.zeros(1, classes, 1, 1), [(0, 0, 4, 4)], (4, 4), threshold=threshold, impl=impl)
    assert got.labels.dtype == dtype


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad, impl):
    """A class with a bad logit loses where that logit is used, and one warning says so."""
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1] = 1.0
    logits[0, 1, 0, 0] = bad
    with pytest.warns(UserWarning, match="NaN or infinite") as caught:
        got = label_map(logits, [(0, 0, 16, 16)], (16, 16), return_scores=True, impl=impl)
    assert len(caught) == 1
    touched = torch.zeros(16, 16, dtype=torch.bool)
    touched[:6, :6] = True  # the pixels between node (0, 0) and its neighbours
    assert got.labels[touched].unique().tolist() == [0]
    assert got.labels[~touched].unique().tolist() == [1]
    with pytest.warns(UserWarning, match="NaN or infinite"):
        got = label_map(torch.full((1, 3, 2, 2), bad), [(0, 0, 4, 4)], (4, 4), return_scores=True, impl=impl)
    assert got.labels.unique().tolist() == [0]
    assert got.scores is not None
    assert got.scores.unique().tolist() == [-float("inf")]


@pytest.mark.parametrize("impl", BACKENDS)
def test_seen_as_mask_or_indices(impl):
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[[1, 4]] = True
    for seen in ([1, 4], torch.tensor([4, 1]), mask):
        got = label_map(logits, windows, (40, 40), seen=seen, calibration=0.5, return_scores=True, impl=impl)
        want = published_scores(logits, windows, (40, 40), seen=[1, 4], calibration=0.5).max(0)
        torch.testing.assert_close(got.scores, want.values, rtol=0, atol=1e-6)
        assert torch.equal(got.labels.long(), want.indices)


@pytest.mark.parametrize("impl", BACKENDS)
def test_strided_logits(impl):
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    wide = torch.randn(len(windows), 9, 8, 8)
    wide[:, :, ::2, 1::2] = logits
    got = label_map(wide[:, :, ::2, 1::2], windows, (40, 40), impl=impl)
    assert torch.equal(got.labels, label_map(logits, windows, (40, 40), impl=impl).labels)


MEMORY = """
import sys, torch
from bench.machine import peak_megabytes
from fastzs.ops import label_map

windows = [(0, 256 * n, 256, 256) for n in range(4)]
classes, nodes = int(sys.argv[2]), int(sys.argv[3])
logits = torch.nn.functional.interpolate(torch.randn(4, classes, 3, 3), (nodes, nodes), mode="bilinear")

def run():
    label_map(logits, windows, (256, 1024), output_size=(200, 800), impl=sys.argv[1])

run()
print(peak_megabytes(run, "cpu"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("impl", "classes", "nodes", "bound"), [("reference", 300, 8, 100), ("cpu", 300, 8, 10), ("cpu", 847, 32, 10)]
)
def test_large_picture_in_little_memory(impl, classes, nodes, bound):
    """Four windows in a row: a ``[C, H, W]`` map of 300 classes would take 307 MB, another copy of the 847's logits 14.

    In a process of its own: what other tests freed would blur the count.
    """
    if impl == "cpu" and compiled.MISSING is not None:
        pytest.skip(compiled.MISSING)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", MEMORY, impl, str(classes), str(nodes)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert float(done.stdout) < bound


# ---- nothing waits for a GPU --------------------------------------------------------------------------------------

HOT = ["label_map/api.py", "label_map/operator.py", "label_map/triton.py", "label_map/tables.py", "mask_loss/api.py",
       "mask_loss/triton.py", "mask_loss/common.py", "key_smoothing/triton.py", "bridged_attention/triton.py",
       "pixel_text_logits/triton.py", "dense_attention/triton.py"]  # fmt: skip
HOST = {"windows.tolist()", "seen.flatten().tolist()", "empty.nonzero().tolist()", "target[wrong][0].item()"}


def waits(source: str) -> list[str]:
    """Calls that bring a tensor's values to the host, but for tensors that are there already."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    named = [
        c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr in ("tolist", "item", "cpu", "numpy")
    ]
    return [ast.unparse(call) for call in named if ast.unparse(call) not in HOST]


@pytest.mark.parametrize("name", HOT)
def test_no_wait_between_the_model_and_the_labels(name):
    found = waits((Path(__file__).parents[2] / "kernels" / name).read_text())
    assert [call for call in found if "cumsum" not in call] == []  # check_windows, of windows on the host


def test_a_wait_is_seen():
    assert waits("mask = given.tolist()\nlabels.max().item()") == ["given.tolist()", "labels.max().item()"]


def test_tables_and_seen_classes_are_kept(monkeypatch):
    """The second image of a size makes nothing on the host that would have to be copied."""
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    options = Options((40, 40), (40, 40), "sigmoid", None, -math.inf, 1, torch.uint8, False)
    first, again = (tables.tables_of(logits, windows, options) for _ in range(2))
    assert all(a is b for a, b in zip(first, again, strict=True))
    other = tables.tables_of(logits[..., :3], windows, options)
    assert not torch.equal(first.cols_lo, other.cols_lo)
    penalties = [api._penalty(seen, 0.1, 9, logits) for seen in ([1, 4], (1, 4), torch.tensor([1, 4]), range(1, 5, 3))]
    assert all(penalty is penalties[0] for penalty in penalties)
    assert api._penalty([1, 4], 0.2, 9, logits)[4] == 0.2


# ---- other devices -


class Elsewhere:
    """Logits of a device that is not here: all that is known of them is what the host may ask."""

    def __init__(self, logits, device):
        self.logits, self.device, self.dtype, self.shape = logits, torch.device(device), logits.dtype, logits.shape

    def cpu(self):
        return self.logits


@pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
@pytest.mark.parametrize("device", ["mps", "xpu", "cuda"])
def test_a_device_without_a_backend_of_its_own_takes_the_library(device, monkeypatch):
    monkeypatch.delenv("FASTZS_IMPL", raising=False)
    monkeypatch.setattr(api, "why_not_triton", lambda what, device: "Triton is not installed")
    monkeypatch.setattr(compiled, "MISSING_CUDA", "no nvcc when it was built")
    assert choose("label_map", "auto", api.reasons(Elsewhere(torch.zeros(1, 2, 2, 2), device), 1)) == "cpu"
    assert (
        choose("label_map", "auto", api.reasons(Elsewhere(torch.zeros(1, 2, 2, 2).double(), device), 1)) == "reference"
    )


@pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
def test_the_library_copies_logits_from_another_device_and_labels_to_it(monkeypatch):
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    options = Options((40, 40), (40, 40), "sigmoid", torch.ones(9), -math.inf, 1, torch.uint8, True)
    labels, scores = compiled.label_map_cpu(Elsewhere(logits, "meta"), windows, options)
    assert (labels.device.type, scores.device.type) == ("meta", "meta")


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"logits": torch.ones(2, 3, 4)}, ValueError, r"\(2, 3, 4\); expected \[W, C, h, w\]"),
        ({"logits": torch.ones(2, 0, 4, 4)}, ValueError, "none of them 0"),
        ({"logits": torch.ones(2, 3, 4, 4, dtype=torch.int32)}, TypeError, "int32"),
        ({"windows": [(0, 0, 8, 8)]}, ValueError, r"\[2, 4\]"),
        ({"windows": [(0.0, 0.0, 8.0, 8.0)] * 2}, ValueError, "float32"),
        ({"windows": [(0, 0, 8, 8), (0, 4, 8)]}, ValueError, r"label_map: windows .*expected \[2, 4\]"),
        ({"windows": [(0, 0, 8, 8), (0, 4, 8, 6)]}, ValueError, "window 1 is 8 x 6, the first 8 x 8"),
        ({"windows": [(0, 0, 8, 8), (0, 5, 8, 8)]}, ValueError, "window 1 .top 0, left 5.* 8 x 12"),
        ({"windows": [(0, -1, 8, 8), (0, 4, 8, 8)]}, ValueError, "left -1"),
        ({"windows": [(0, 0, 8, 0)] * 2}, ValueError, "width 0"),
        ({"windows": [(0, 0, 8, 5), (0, 7, 8, 5)]}, ValueError, "16 of .* rows 0 to 7, columns 5 to 6"),
        ({"windows": [(0, 0, 4, 12), (3, 0, 4, 12)]}, ValueError, "12 of .* rows 7 to 7, columns 0 to 11"),
        ({"image_size": (8, 0)}, ValueError, r"image_size=\(8, 0\)"),
        ({"image_size": (8,)}, ValueError, "image_size"),
        ({"output_size": (0, 8)}, ValueError, r"output_size=\(0, 8\)"),
        ({"activation": "relu"}, ValueError, "activation='relu'"),
        ({"top_k": 0}, ValueError, "top_k=0"),
        ({"top_k": 4}, ValueError, "top_k=4"),
        ({"calibration": float("nan")}, ValueError, "calibration=nan"),
        ({"threshold": 1.5}, ValueError, "threshold=1.5; expected 0 to 1"),
        ({"threshold": float("nan")}, ValueError, "threshold=nan"),
        ({"threshold": float("inf"), "activation": "none"}, ValueError, "finite"),
        (
            {"logits": torch.ones(2, 40000, 1, 1)},
            ValueError,
            "expected at most 32768 labels, which are int16, got 40000",
        ),
        ({"seen": [0, 3]}, ValueError, "seen names class 3"),
        ({"seen": [-1]}, ValueError, "seen names class -1"),
        ({"seen": torch.ones(4, dtype=torch.bool)}, ValueError, r"\(4,\); expected \(3,\)"),
        ({"impl": "gpu"}, ValueError, "impl='gpu'"),
        ({"impl": "cpu", "logits": torch.ones(2, 3, 4, 4).double()}, RuntimeError, "float64"),
    ],
)
def test_bad_input(change, error, words):
    options = {
        "logits": torch.ones(2, 3, 4, 4),
        "windows": [(0, 0, 8, 8), (0, 4, 8, 8)],
        "image_size": (8, 12),
        **change,
    }
    with pytest.raises(error, match=words):
        label_map(options.pop("logits"), options.pop("windows"), options.pop("image_size"), **options)


# ---- PyTorch's machinery -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"top_k": 2, "return_scores": True, "threshold": 0.3}])
def test_opcheck(options, impl):
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    args = (logits, torch.tensor(windows), [40, 40], [30, 50], "sigmoid", 0.1 * torch.ones(9),
            options.get("threshold"), options.get("top_k", 1), False,
            options.get("return_scores", False), impl)  # fmt: skip
    torch.library.opcheck(torch.ops.fastzs.label_map, args)


@pytest.mark.parametrize("impl", BACKENDS)
def test_compile_and_export(impl):
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)

    class Program(torch.nn.Module):
        def forward(self, logits, windows):
            out = label_map(2 * logits, windows, (40, 40), seen=[0, 1], return_scores=True, impl=impl)
            return out.labels, out.scores

    inputs = (logits, torch.tensor(windows))
    want = Program()(*inputs)
    for program in (torch.compile(Program(), fullgraph=True, backend="aot_eager"),
                    torch.export.export(Program(), inputs).module()):  # fmt: skip
        for a, b in zip(program(*inputs), want, strict=True):
            assert torch.equal(a, b)


def test_no_gradient():
    logits, windows = random_case((40, 40), 32, 32, (4, 4), 9, torch.float32)
    got = label_map(logits.requires_grad_(), windows, (40, 40), return_scores=True)
    assert got.scores is not None
    assert not got.scores.requires_grad
