"""The Triton backend of refine: its arithmetic in Triton's interpreter, its machine code for three GPUs."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastzs.ops import refine

from .interpreter import INTERPRETED, interpreted, run_interpreted
from .test_refine import assert_agrees, random_case

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


@pytest.mark.skipif(INTERPRETED, reason="needs another machine")
def test_reasons():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        refine(torch.zeros(1, 2, 2, 2), torch.zeros(3, 4, 4), impl="triton")


# Measured with Triton 3.9: 26 to 48; slack for other versions. With 80 six blocks of 128 threads fit an SM.
REGISTERS = 80
KERNELS = ["weights", "maps", "step", "take"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name, arch):
    from fastzs.kernels.refine import triton

    from .aot import resources

    kernel = getattr(triton, f"refine_{name}_kernel")
    names = kernel.arg_names
    signature = {name: "*fp32" if name.endswith("_ptr") else "i32" for name in names}
    signature |= {name: "*i32" for name in names if name.startswith(("labels", "dilations", "row_index", "col_index"))}
    constants = {"PIXELS": triton.PIXELS, "CLASSES": triton.CLASSES, "PROBABILITY": True, "LAST": True}
    constants = {name: value for name, value in constants.items() if name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    if "scale" in names:
        signature["scale"] = "fp32"
    aligned = [name for name in names if name.endswith("_ptr")]
    seen = resources(kernel, signature, constants, arch, triton.WARPS, aligned=aligned)
    assert seen.local_accesses == 0, seen
    assert seen.atomics == 0
    assert seen.shared <= 8192, seen
    assert seen.registers <= REGISTERS, seen


MUTATIONS = {
    "the centre is a neighbour": ("place += place > 3", "place += 0"),
    "borders are not kept": ("tl.maximum(y + (place // 3 - 1) * d, 0)", "tl.abs(y + (place // 3 - 1) * d)"),
    "sigma divides by n": ("/ (values - 1.0)", "/ values"),
    "the centre does not count in sigma": ("/ 8 * 9.0", "* 1.0"),
    "ties go up": ("better = score > best", "better = score >= best"),
    "a chunk forgets the one before": ("seen = inside & (first > 0)", "seen = inside & (first < 0)"),
    "rows and columns are swapped": ("weights_ptr + n * pixels + at, mask", "weights_ptr + n + at, mask"),
}


def every_check():
    test_agrees(((9, 13), 8, 5, (3, 2), (5, 6), (1, 4), 1))
    test_labels_alone_and_equal_scores()


@interpreted
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
    monkeypatch.setattr(triton, "refine_triton", broken.refine_triton)
    with pytest.raises(AssertionError):
        every_check()
