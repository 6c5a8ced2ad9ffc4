"""The comparison of the CPU backend with the reference notices when the C++ code is broken on purpose."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastzs.kernels.mask_loss.compiled import MISSING
from fastzs.kernels.mask_loss.reference import mask_sums_reference

from .test_mask_loss_backends import case

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING["cpu"] is not None, reason=str(MISSING["cpu"])),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

MUTATIONS = {
    "nothing": ("", ""),
    "ignored pixels are of their class": ("if (value == ignore_index) {", "if (false) {"),
    "ignored pixels are kept": ("code = SKIPPED", "code = NO_CLASS"),
    "two corners are swapped": ("row[j] += V::sum(all) - to_upper;", "row[j] += to_upper;"),
    "the padding is counted": ("if (x + LANES > a.W) {", "if (false) {"),
    "the last row of pixels goes nowhere": ("if (i == h - 1) contract", "if (false) contract"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Each mutant as a library of its own, defining its own operator."""
    folder = tmp_path_factory.mktemp("mutants")
    source = (CSRC / "mask_loss.cpp").read_text().replace('"cpu.h"', f'"{CSRC}/cpu.h"')
    source = source.replace('"simd.h"', f'"{CSRC}/simd.h"')
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for number, (right, wrong) in enumerate(MUTATIONS.values()):
        assert not right or source.count(right) == 1, right
        text = source.replace(right, wrong) if right else source
        text = text.replace("(fastzs, m)", f"(fastzs_mutant{number}, m)")
        text = text.replace("(fastzs, CPU, m)", f"(fastzs_mutant{number}, CPU, m)")
        (folder / f"{number}.cpp").write_text(text)
        library = folder / f"{number}.so"
        inputs = [f"-I{torch_folder}/include", str(folder / f"{number}.cpp"), f"-L{torch_folder}/lib", "-ltorch_cpu"]
        subprocess.run([*command, *inputs, "-o", str(library)], check=True)
        torch.ops.load_library(str(library))
    return [getattr(torch.ops, f"fastzs_mutant{number}").mask_sums for number in range(len(MUTATIONS))]


def agrees(op) -> bool:
    """Whether sums and gradients are those of the reference."""
    logits, target = case(C=4, h=3, w=5, H=23, W=39, ignored=0.3)
    target[target == 255] = 2  # a label that is also a class
    for skip in (False, True):
        sums, nodes = op(logits, target, 0.25, 2.0, 2, skip, True)
        exact = logits.double().requires_grad_()
        wanted = mask_sums_reference(exact, target, 0.25, 2.0, 2, skip)
        if not torch.allclose(sums.double(), wanted, rtol=1e-5, atol=1e-5):
            return False
        for field in range(3):
            (grad,) = torch.autograd.grad(wanted[..., field].sum(), exact, retain_graph=True)
            if not torch.allclose(nodes[:, :, field].double(), grad, rtol=1e-4, atol=1e-5):
                return False
    return True


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, libraries):
    assert agrees(libraries[number]) == (number == 0)
