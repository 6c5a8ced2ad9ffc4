"""refine: its reference against the published order of work and golden tensors, every backend against the reference."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.label_map import published_scores
from bench.baselines.refine import published_refined
from fastzs.kernels.refine import common, compiled
from fastzs.ops import refine
from fastzs.windows import window_grid
from tests.parity.golden import read

GOLDENS = Path(__file__).parents[1] / "goldens"
EPS = torch.finfo(torch.float32).eps

CASES = [  # image, crop, stride, map, output, dilations, iterations: one reason each
    ((64, 64), 64, 48, (4, 4), (64, 64), (8, 16), 10),  # one window, no second step
    ((48, 80), 32, 20, (4, 3), (60, 101), (8, 16), 10),  # overlaps both ways, larger output, as published
    ((35, 51), 24, 15, (5, 3), (17, 24), (1, 3), 3),  # odd everything, smaller output
    ((20, 45), 24, 16, (6, 7), (3, 70), (1, 2, 24), 4),  # lower than the crop; neighbours beyond the image
    ((8, 8), 8, 8, (3, 3), (1, 1), (8, 16), 10),  # one pixel
    ((16, 16), 16, 16, (1, 1), (1, 40), (2,), 5),  # one row, one node
]


def random_case(picture, crop, stride, size, output, classes=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    windows = window_grid(picture, crop, stride)
    logits = 0.2 * torch.randn(len(windows), classes, *size, generator=generator, dtype=dtype)
    coarse = torch.randn(1, 3, output[0] // 6 + 2, output[1] // 6 + 2, generator=generator, dtype=dtype)
    image = F.interpolate(coarse, output, mode="bicubic")[0]
    image[:, : output[0] // 3, : output[1] // 3] = 0.25  # an area of one colour
    return logits, windows, image


def allowed(dilations, iterations, largest):
    """How far fp32 refined logits may be from fp64's: c sqrt(n) eps of the largest, c = 16.

    n products are added in a row: those of all iterations and of the interpolation, at most 64. c covers that a
    neighbour's weight is exp(-a) of an a of up to sqrt(2 (9 |D| - 1)) / 0.1, whose own rounding it multiplies.
    """
    return 16 * (8 * len(dilations) * iterations + 64) ** 0.5 * EPS * largest


def assert_agrees(case, impl, classes=7, scale=40.0, dtype=torch.float32, device="cpu", **options):
    picture, crop, stride, size, output, dilations, iterations = case
    logits, windows, image = random_case(picture, crop, stride, size, output, classes)
    logits, image = logits.to(dtype), image.float()
    on_device = logits.to(device), image.to(device)
    options |= {"windows": windows, "image_size": picture, "scale": scale, "return_maps": True}
    options |= {"dilations": dilations, "iterations": iterations}
    got = type(given := refine(*on_device, impl=impl, **options))(*(part.cpu() for part in given))
    want = refine(logits.double(), image.double(), impl="reference", **options)
    bound = allowed(dilations, iterations, logits.abs().max().item())
    assert got.maps.dtype == got.scores.dtype == got.probabilities.dtype == torch.float32
    torch.testing.assert_close(got.maps.double(), want.maps, rtol=0, atol=bound)
    torch.testing.assert_close(got.scores.double(), want.scores, rtol=0, atol=bound)
    torch.testing.assert_close(got.probabilities.double(), want.probabilities, rtol=0, atol=2 * scale * bound)
    assert torch.equal(got.scores, got.maps.amax(0))
    assert got.labels.dtype == torch.uint8
    assert torch.equal(got.labels.long(), got.maps.argmax(0))
    rivals = want.maps.gather(0, got.labels[None].long())[0]
    assert (want.scores - rivals <= 2 * bound).all()  # another label only where two tie
    assert (got.labels != want.labels).float().mean() < 0.01 or got.labels.numel() == 1


# ---- the reference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("picture", "crop", "stride", "size", "output", "dilations", "iterations"), CASES)
def test_reference_is_published(picture, crop, stride, size, output, dilations, iterations):
    logits, windows, image = random_case(picture, crop, stride, size, output, classes=11)
    want = published_refined(logits, windows.tolist(), picture, image, dilations=dilations, iterations=iterations)
    got = refine(
        logits,
        image,
        windows=windows,
        image_size=picture,
        dilations=dilations,
        iterations=iterations,
        scale=30.0,
        return_maps=True,
    )
    torch.testing.assert_close(got.maps, want, rtol=0, atol=1e-12)
    assert torch.equal(got.labels.long(), want.argmax(0))
    torch.testing.assert_close(got.scores, want.amax(0), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.probabilities, (30.0 * want).softmax(0).amax(0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("image", "output"), [("image0", (50, 45)), ("image1", (70, 95))])
def test_naclip_golden(image, output):
    """Cosines to the model's image, to the original size, refined along the image enlarged: NACLIP's own code."""
    golden = read(GOLDENS / "T_naclip.safetensors")
    picture = golden[f"in.{image}"].double()
    guide = F.interpolate(picture, output, mode="bilinear", align_corners=False)[0]
    logits = golden[f"out64.{image}.logits"]
    for variant, method in (("default", "pamr"), ("nopamr", "none")):
        got = refine(
            logits, guide, image_size=picture.shape[2:], method=method, scale=40.0, return_maps=True, impl="reference"
        )
        checks = golden.checks(f"out64.{image}.{variant}.scores", got.maps[None])
        assert all(check.ok for check in checks)
        assert torch.equal(
            golden["in.query_idx"][got.labels.long()], golden[f"out64.{image}.{variant}.labels"][0].long()
        )


@pytest.mark.parametrize(("image", "output"), [("image0", (50, 45)), ("image1", (70, 95))])
def test_pearl_golden(image, output):
    golden = read(GOLDENS / "T_pearl.safetensors")
    picture = golden[f"in.{image}"].double()
    guide = F.interpolate(picture, output, mode="bilinear", align_corners=False)[0]
    got = refine(
        golden[f"out64.{image}.logits"].double(),
        guide,
        image_size=picture.shape[2:],
        method="laplacian",
        text=golden["in.text"],
        cells=golden.config["variants"]["default"]["grid"],
        return_maps=True,
    )
    (check,) = golden.checks(f"out64.{image}.default.scores", got.maps[None])
    assert check.error < 1e-6  # logits, text and scores are stored in fp32
    want = golden[f"out64.{image}.default.labels"][0]
    assert torch.equal(golden["in.query_idx"][got.labels.long()], want.long())


# ---- every backend against the fp64 reference ----------------------------------------------------------------------

NEEDS_LIBRARY = pytest.mark.skipif(compiled.MISSING is not None, reason=str(compiled.MISSING))
BACKENDS = ["reference", pytest.param("cpu", marks=NEEDS_LIBRARY)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", BACKENDS)
def test_agrees(case, impl):
    assert_agrees(case, impl)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 21])
@pytest.mark.parametrize("impl", BACKENDS)
def test_any_number_of_classes(classes, impl):
    assert_agrees(CASES[2], impl, classes=classes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", BACKENDS)
def test_low_precision_logits(dtype, impl):
    assert_agrees(CASES[1], impl, dtype=dtype)


@NEEDS_LIBRARY
def test_bright_pictures_lose_no_digits():
    """Deviations far smaller than the values: summed as they are, squares would cancel."""
    case = CASES[1]
    logits, windows, image = random_case(*case[:5])
    image = (200 + 0.01 * image).float()
    options = {"windows": windows, "image_size": case[0], "return_maps": True}
    got = refine(logits.float(), image, impl="cpu", **options)
    want = refine(logits.float().double(), image.double(), impl="reference", **options)
    bound = allowed((8, 16), 10, logits.abs().max().item())
    torch.testing.assert_close(got.maps.double(), want.maps, rtol=0, atol=bound)


@NEEDS_LIBRARY
def test_threads_change_nothing():
    logits, windows, image = random_case(*CASES[1][:5], classes=9, dtype=torch.float32)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            answers.append(
                refine(logits, image, windows=windows, image_size=(48, 80), scale=40.0, return_maps=True, impl="cpu")
            )
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


ISA = """
import torch
from tests.kernels.test_refine import CASES, assert_agrees
for case in CASES:
    assert_agrees(case, "cpu", classes=6)
"""


@pytest.mark.slow
@NEEDS_LIBRARY
@pytest.mark.parametrize("level", ["portable", "avx2", "avx512"])
def test_instruction_sets(level, monkeypatch):
    monkeypatch.setenv("FASTZS_CPU_ISA", level)
    subprocess.run([sys.executable, "-c", ISA], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("impl", BACKENDS)
def test_methods_share_interpolation_and_labels(impl):
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    options = {"windows": windows, "image_size": (48, 80), "scale": 40.0, "return_maps": True, "impl": impl}
    plain = refine(logits, image, method="none", **options)
    want = published_scores(logits.double(), windows.tolist(), (48, 80), image.shape[1:], activation="none")
    torch.testing.assert_close(plain.maps.double(), want, rtol=0, atol=allowed((), 0, 1.0))
    text = torch.randn(7, 16, generator=torch.Generator().manual_seed(3))
    got = refine(logits, image, method="laplacian", text=text, cells=30, **options)
    want = refine(
        logits.double(), image.double(), method="laplacian", text=text, cells=30, **options | {"impl": "reference"}
    )
    torch.testing.assert_close(got.maps.double(), want.maps, rtol=0, atol=allowed((), 0, 1.0))
    assert (got.maps - plain.maps).abs().max() > 0.05


@pytest.mark.parametrize("impl", BACKENDS)
def test_classes_that_cannot_win_are_left_out_and_nothing_changes(impl, monkeypatch):
    """Labels and scores of images with many hopeless classes; what is compared is counted."""
    logits, windows, image = random_case(*CASES[1][:5], classes=60, dtype=torch.float32)
    logits[:, ::3] -= 2.0
    logits[:, 31] = logits[:, 7] = logits[:, 7] + 0.2  # the first of two equal ones wins
    options = {"windows": windows, "image_size": (48, 80), "impl": impl}
    calls = []
    kept = common.possible_winners
    monkeypatch.setattr(
        "fastzs.kernels.refine.operator.possible_winners", lambda nodes: calls.append(kept(nodes)) or calls[-1]
    )
    few = refine(logits, image, **options)
    every = refine(logits, image, return_maps=True, **options)
    (winners,) = calls
    assert 2 <= winners.sum() <= 40
    assert torch.equal(few.labels, every.labels)
    torch.testing.assert_close(few.scores, every.scores, rtol=0, atol=allowed((8, 16), 10, 1.0))
    assert (few.labels == 7).any()
    assert not (few.labels == 31).any()


def test_a_class_above_another_at_most_nodes_only_does_not_leave_it_out():
    nodes = torch.zeros(2, 4, 5)
    nodes[1] -= 1.0
    assert common.possible_winners(nodes).tolist() == [True, False]
    nodes[1, 3, 4] = 0.1
    assert common.possible_winners(nodes).tolist() == [True, True]


def test_windows_may_reach_beyond_the_picture():
    logits, _, image = random_case((20, 30), 10, 10, (2, 2), (20, 30), dtype=torch.float64)
    windows = [[-4, -2, 28, 36]]
    got = refine(logits[:1], image, windows=windows, method="none", return_maps=True)
    want = F.interpolate(logits[:1], (28, 36), mode="bilinear", align_corners=False)[0][:, 4:24, 2:32]
    torch.testing.assert_close(got.maps, want, rtol=0, atol=1e-12)
    fast = refine(logits[:1].float(), image.float(), windows=windows, method="none", return_maps=True)
    torch.testing.assert_close(fast.maps.double(), want, rtol=0, atol=1e-6)


@NEEDS_LIBRARY
def test_order_of_windows_does_not_matter():
    """To the bit, for the compiled code sums a pixel's windows in one order."""
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
    options = {"image_size": (48, 80), "impl": "cpu"}
    a, b = (refine(logits[o], image, windows=windows[o], **options) for o in (slice(None), order))
    assert torch.equal(a.scores, b.scores)


# ---- what is not right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_class_that_is_not_finite_loses(bad, impl):
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    options = {"windows": windows, "image_size": (48, 80), "scale": 40.0, "return_maps": True, "impl": impl}
    others = [0, 1, 2, 4, 5, 6]
    want = refine(logits[:, others], image, **options)
    logits[0, 3, 0, 0] = bad
    with pytest.warns(UserWarning, match="NaN or infinite"):
        got = refine(logits, image, **options)
    assert torch.equal(got.labels.long(), torch.tensor(others)[want.labels.long()])
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(got.probabilities, want.probabilities)
    assert torch.equal(got.maps[others], want.maps)
    assert got.maps[3].isnan().all()
    with pytest.warns(UserWarning, match="NaN or infinite"):
        got = refine(logits[:, 3:4], image, **options)
    assert got.labels.unique().tolist() == [0]
    assert got.scores.isneginf().all()


def test_many_classes_have_wide_labels():
    logits = torch.zeros(1, 300, 2, 2)
    logits[:, 299] = 1.0
    got = refine(logits, torch.zeros(3, 5, 6))
    assert got.labels.dtype == torch.int16
    assert got.labels.unique().tolist() == [299]


IMAGE, LOGITS = torch.zeros(3, 6, 8), torch.zeros(1, 4, 2, 2)
WRONG = [
    ({"logits": torch.zeros(4, 2, 2)}, ValueError, "logits"),
    ({"logits": torch.zeros(1, 0, 2, 2)}, ValueError, "logits"),
    ({"logits": LOGITS.long()}, TypeError, "int64"),
    ({"image": torch.zeros(1, 3, 6, 8)}, ValueError, r"\[3, H, W\]"),
    ({"image": torch.zeros(1, 6, 8)}, ValueError, r"\[3, H, W\]"),
    ({"image": IMAGE.byte()}, TypeError, "uint8"),
    ({"image": IMAGE + torch.nan}, ValueError, "NaN"),
    ({"method": "crf"}, ValueError, "crf"),
    ({"dilations": ()}, ValueError, "dilations"),
    ({"dilations": (8, 0)}, ValueError, "dilations"),
    ({"iterations": -1}, ValueError, "iterations"),
    ({"method": "none", "iterations": 3}, ValueError, "iterations"),
    ({"scale": 0.0}, ValueError, "scale"),
    ({"cells": 0}, ValueError, "cells"),
    ({"method": "laplacian"}, ValueError, "text="),
    ({"method": "laplacian", "text": torch.zeros(3, 5)}, ValueError, r"\[4, D\]"),
    ({"image_size": (0, 5)}, ValueError, "image_size"),
    ({"windows": [[0, 0, 6, 8], [0, 0, 6, 8]]}, ValueError, "windows"),
    ({"windows": [[0.0, 0.0, 6.0, 8.0]]}, ValueError, "windows"),
    ({"windows": [[0, 0, 5, 8]]}, ValueError, "cover the image"),
    ({"windows": [[0, 1, 6, 8]]}, ValueError, "cover the image"),
    ({"logits": LOGITS.expand(2, 4, 2, 2), "windows": [[0, 0, 3, 8], [3, 0, 4, 8]]}, ValueError, "one size"),
    ({"logits": LOGITS.expand(2, 4, 2, 2), "windows": [[0, 0, 5, 8], [0, 0, 5, 8]]}, ValueError, "each once"),
    ({"logits": LOGITS.expand(2, 4, 2, 2), "windows": [[0, 0, 2, 8], [4, 0, 2, 8]]}, ValueError, "cover the image"),
    ({"impl": "cuda"}, RuntimeError, "no such backend"),
    ({"logits": LOGITS.double(), "impl": "cpu"}, RuntimeError, "float64"),
    ({"dilations": range(1, 18), "impl": "cpu"}, RuntimeError, "17 dilations"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_bad_input(options, error, message):
    arguments = {"logits": LOGITS, "image": IMAGE} | options
    with pytest.raises(error, match=message):
        refine(arguments.pop("logits"), arguments.pop("image"), **arguments)


def test_traced_programs_have_it():
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)

    class Model(torch.nn.Module):
        def forward(self, logits, image):
            return refine(logits, image, windows=windows, image_size=(48, 80), scale=40.0, return_maps=True)

    program = torch.export.export(Model(), (logits, image), strict=False)
    want = Model()(logits, image)
    assert all(torch.equal(a, b) for a, b in zip(program.module()(logits, image), want, strict=True))


MEMORY = """
import resource, torch
from fastzs.ops import refine
from fastzs.windows import window_grid
windows = window_grid((336, 448), 224, 112)
logits, image = torch.rand(6, 171, 14, 14), torch.rand(3, 375, 500)
refine(logits[:, :2], image[:, :32, :32], windows=windows, image_size=(336, 448), scale=40.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refine(logits, image, windows=windows, image_size=(336, 448), scale=40.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@NEEDS_LIBRARY
def test_little_memory():
    """At 500 x 375 with 171 names, in MB: neither [C, H, W] (128) nor [C, 16, H, W] (2,052)."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert float(done.stdout) < 30
