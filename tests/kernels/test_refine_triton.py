"""The Triton backend of refine: its arithmetic in Triton's interpreter."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastzs.ops import refine

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_refine import allowed, assert_agrees, random_case

pytest.importorskip("triton")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
def test_in_the_interpreter():
    run_interpreted(__file__)


CASES = [  # image, crop, stride, map, output, dilations, iterations
    ((12, 20), 8, 6, (3, 2), (11, 12), (8, 16), 2),  # overlaps both ways, neighbours beyond the image
    ((9, 13), 8, 5, (3, 2), (7, 9), (1, 3), 1),
    ((8, 8), 8, 8, (1, 1), (1, 1), (2,), 2),
    ((8, 8), 8, 8, (3, 3), (9, 4), (2,), 0),
]


@interpreted
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees(case):
    assert_agrees(case, "triton")


@interpreted
def test_several_chunks_of_classes(monkeypatch):
    monkeypatch.setattr("fastzs.kernels.refine.triton.CHUNK", 5)
    assert_agrees(CASES[1], "triton", classes=13)


@interpreted
def test_labels_alone_and_equal_scores():
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    logits[:, 5] = logits[:, 2] = logits[:, 2] + 0.3
    few, every = (
        refine(
            logits,
            image,
            windows=windows,
            image_size=(9, 13),
            impl="triton",
            return_maps=maps,
            iterations=1,
            dilations=(1,),
        )
        for maps in (False, True)
    )
    assert torch.equal(few.labels, every.labels)
    assert (few.labels == 2).any()
    assert not (few.labels == 5).any()


NOT_FINITE = pytest.mark.filterwarnings("ignore:refine. logits has NaN", "ignore::RuntimeWarning")


@interpreted
@NOT_FINITE  # the second are the interpreter's
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_a_class_that_is_not_finite_loses(bad, monkeypatch):
    """Which one that is only the GPU knows."""
    monkeypatch.setattr("fastzs.kernels.refine.triton.CHUNK", 3)
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    options = {"windows": windows, "image_size": (9, 13), "impl": "triton", "iterations": 1, "dilations": (1,)}
    others = [0, 1, 2, 4, 5, 6]
    want = refine(logits[:, others], image, scale=40.0, return_maps=True, **options)
    logits[0, 3, 0, 0] = bad
    got = refine(logits, image, scale=40.0, return_maps=True, **options)
    assert torch.equal(got.labels.long(), torch.tensor(others)[want.labels.long()])
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(got.probabilities, want.probabilities)
    assert torch.equal(got.maps[others], want.maps)
    assert got.maps[3].isnan().all()
    assert torch.equal(refine(logits, image, **options).labels, got.labels)
    none = refine(logits[:, 3:4], image, scale=40.0, **options)
    assert none.labels.unique().tolist() == [0]
    assert none.scores.isneginf().all()
    assert none.probabilities.isnan().all()


@interpreted
def test_classes_that_cannot_win_come_last_and_nothing_changes(monkeypatch):
    from fastzs.kernels.refine import unread

    counts, of = [], unread.possible_winners
    monkeypatch.setattr(unread, "possible_winners", lambda nodes: counts.append(of(nodes)) or counts[-1])
    monkeypatch.setattr("fastzs.kernels.refine.triton.CHUNK", 4)
    logits, windows, image = random_case(*CASES[1][:5], classes=14, dtype=torch.float32)
    logits[:, ::3] -= 2.0
    options = {"windows": windows, "image_size": (9, 13), "iterations": 1, "dilations": (1,)}
    few, every = (refine(logits, image, impl=impl, **options) for impl in ("triton", "reference"))
    assert 2 <= counts[0].sum() <= 9
    assert torch.equal(few.labels, every.labels)
    torch.testing.assert_close(few.scores, every.scores, rtol=0, atol=allowed((1,), 1, 2.0))


@interpreted
@NOT_FINITE
def test_laplacian():
    """Classes that take no part are 0 in the equations, so that the others' solution is theirs alone."""
    logits, windows, image = random_case(*CASES[1][:5], dtype=torch.float32)
    logits[0, 3, 0, 0] = torch.nan
    text = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    options = {"windows": windows, "image_size": (9, 13), "method": "laplacian", "text": text, "cells": 4}
    got, want = (refine(logits, image, return_maps=True, impl=impl, **options) for impl in ("triton", "reference"))
    torch.testing.assert_close(got.maps, want.maps, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(got.labels, want.labels)


@pytest.mark.skipif(INTERPRETED, reason="needs another machine")
def test_reasons():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        refine(torch.zeros(1, 2, 2, 2), torch.zeros(3, 4, 4), impl="triton")


MUTATIONS = {
    "the centre is a neighbour": ("place += place > 3", "place += 0"),
    "borders are not kept": ("tl.maximum(y + (place // 3 - 1) * d, 0)", "tl.abs(y + (place // 3 - 1) * d)"),
    "sigma divides by n": ("/ (values - 1.0)", "/ values"),
    "the centre does not count in sigma": ("/ 8 * 9.0", "* 1.0"),
    "ties go up": ("better = score > best", "better = score >= best"),
    "a chunk forgets the one before": ("seen = inside & (first > 0)", "seen = inside & (first < 0)"),
    "absent classes take part": ("range(tl.minimum(count - first, classes))", "range(classes)"),
    "the count is of each chunk": ("range(tl.minimum(count - first, classes))", "range(tl.minimum(count, classes))"),
    "rows and columns are swapped": ("weights_ptr + n * pixels + at, mask", "weights_ptr + n + at, mask"),
}


def every_check(monkeypatch):
    test_agrees(((9, 13), 8, 5, (3, 2), (5, 6), (1, 4), 1))
    test_labels_alone_and_equal_scores()
    test_a_class_that_is_not_finite_loses(torch.nan, monkeypatch)


@interpreted
@NOT_FINITE
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_kernel_is_noticed(name, tmp_path, monkeypatch):
    from fastzs.kernels.refine import triton

    right, wrong = MUTATIONS[name]
    source = Path(triton.__file__).read_text()
    assert right in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong).replace("from .", "from fastzs.kernels.refine."))
    spec = importlib.util.spec_from_file_location("broken_refine", path)
    assert spec is not None
    assert spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(broken, "CHUNK", 3)
    monkeypatch.setattr("fastzs.kernels.refine.unread.refine_triton", broken.refine_triton)
    with pytest.raises(AssertionError):
        every_check(monkeypatch)
