"""The comparison of the CPU backend with the reference notices when the C++ code is broken on purpose."""

import math

import pytest
import torch

from bench.baselines.label_map import slide_windows
from fastzs.kernels.label_map.options import Options
from fastzs.kernels.label_map.reference import label_map_reference

from .mutants import NEEDS_COMPILER, compile_variants
from .test_label_map import SCORE_ERROR, adversarial_logits

pytestmark = NEEDS_COMPILER

MUTATIONS = {
    "nothing": [],
    "a class behind at one mark is left out": [
        ("lead = d > lead ? d : lead;", "lead = d < lead || m == 0 ? d : lead;")
    ],
    "calibration is not compared": [("beaten = beaten & (of_rival <= M::load(s.penalty + j));", ";")],
    "a line is kept too long": [("if (lo == lines.lo) return;", "if (lines.lo >= 0) return;")],
    "windows add up": [("M::store(s.share + i, 1.0f / M::load(s.share + i));", ";")],
    "a window reaches too far": [("if (!whole_rows) x =", "if (false) x =")],
    "the second step picks one column": [("high = M::pick(mixed, s.high_x + i);", "high = low;")],
    "ties go up": [("const auto better = x > most;", "const auto better = x >= most;")],
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    return compile_variants(tmp_path_factory.mktemp("mutants"), "label_map.cpp", list(MUTATIONS.values()), (), "-O0")


def agrees(ops) -> bool:
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
        ops.label_map_cpu(logits, torch.tensor(windows), *picture, 0, penalty, -math.inf, labels, scores)
        options = Options(picture, output, "sigmoid", penalty.double(), -math.inf, 1, torch.uint8, True)
        wanted, best = label_map_reference(logits.double(), windows, options)
        assert best is not None
        if not (scores - best).abs().max() <= SCORE_ERROR:
            return False
        if kind == "equal" and not torch.equal(labels, wanted):
            return False
    return True


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    assert agrees(mutants[number]) == (number == 0)
