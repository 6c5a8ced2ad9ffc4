"""The comparison of the CPU backend with the reference notices when the C++ code is broken on purpose."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench.baselines.label_map import slide_windows
from fastzs.kernels.label_map.compiled import MISSING
from fastzs.kernels.label_map.reference import label_map_reference

from .test_label_map import SCORE_ERROR, adversarial_logits

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

MUTATIONS = {
    "nothing": ("", ""),
    "a class behind at one mark is left out": ("lead = d > lead ? d : lead;", "lead = d < lead || m == 0 ? d : lead;"),
    "calibration is not compared": ("beaten = beaten & (of_rival <= M::load(s.penalty + j));", ";"),
    "a line is kept too long": ("if (lo == lines.lo) return;", "if (lines.lo >= 0) return;"),
    "windows add up": ("M::store(s.share + i, 1.0f / M::load(s.share + i));", ";"),
    "a window reaches too far": ("if (!whole_rows) x =", "if (false) x ="),
    "the second step picks one column": ("high = M::pick(mixed, s.high_x + i);", "high = low;"),
    "ties go up": ("const auto better = x > most;", "const auto better = x >= most;"),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Each mutant as a library of its own, defining its own operator."""
    folder = tmp_path_factory.mktemp("mutants")
    source = (CSRC / "label_map.cpp").read_text()
    for header in ("cpu.h", "simd.h", "label_map.h"):
        source = source.replace(f'"{header}"', f'"{CSRC}/{header}"')
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O0", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    for number, (right, wrong) in enumerate(MUTATIONS.values()):
        assert not right or source.count(right) == 1, right
        text = source.replace(right, wrong) if right else source
        text = text.replace("(fastzs, m)", f"(fastzs_label_mutant{number}, m)")
        text = text.replace("(fastzs, CPU, m)", f"(fastzs_label_mutant{number}, CPU, m)")
        (folder / f"{number}.cpp").write_text(text)
        library = folder / f"{number}.so"
        inputs = [f"-I{torch_folder}/include", str(folder / f"{number}.cpp"), f"-L{torch_folder}/lib", "-ltorch_cpu"]
        subprocess.run([*command, *inputs, "-o", str(library)], check=True)
        torch.ops.load_library(str(library))
    return [getattr(torch.ops, f"fastzs_label_mutant{number}").label_map_cpu for number in range(len(MUTATIONS))]


def agrees(op) -> bool:
    """Whether winning scores, and the labels of equal scores, are those of the reference."""
    picture, output = (100, 150), (83, 131)
    windows = slide_windows(picture, 64, 43)
    penalty = 0.2 * (torch.arange(60) % 2)
    for kind in ("noise", "smooth", "equal"):
        kept = "smooth" if kind == "equal" else kind
        logits = adversarial_logits(kept, len(windows), 60, 8, 8)
        if kind == "equal":
            logits[:, 2::2] = logits[:, :2].mean(1, keepdim=True)
        labels, scores = torch.empty(1, *output, dtype=torch.uint8), torch.empty(1, *output)
        op(logits, torch.tensor(windows), *picture, False, 0, penalty, -math.inf, 0, labels, scores)
        arguments = (windows, picture, output, "sigmoid", penalty.double(), None, 0, 1, "two-stage", torch.uint8, True)
        wanted, best = label_map_reference(logits.double(), *arguments)
        assert best is not None
        if not (scores - best).abs().max() <= SCORE_ERROR:
            return False
        if kind == "equal" and not torch.equal(labels, wanted):
            return False
    return True


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, libraries):
    assert agrees(libraries[number]) == (number == 0)
