"""The comparison of the CPU backend with the reference notices when the C++ code is broken on purpose."""

import pytest
import torch

from fastzs.kernels.refine.common import Options, side_by_side, window_axis
from fastzs.kernels.refine.reference import refine_reference

from .mutants import NEEDS_COMPILER, compile_variants
from .test_refine import allowed, random_case

pytestmark = NEEDS_COMPILER

MUTATIONS = {
    "nothing": [],
    "sigma divides by n": [("(1.0f / (values - 1.0f))", "(1.0f / values)")],
    "the centre does not count in sigma": [("values = 9.0f *", "values = 8.0f *")],
    "the mean is not taken away": [("squares - sum * sum", "squares - 0.0f * sum")],
    "one channel counts": [("k == 0 ? a : M::load(out + n * GROUP) + a", "a")],
    "borders are mirrored": [("return i < 0 ? 0 : i < n", "return i < 0 ? (-i < n ? -i : 0) : i < n")],
    "the right end is not padded": [("row[i] = right;", ";")],
    "far columns are not cut": [("return dilation < job.w ? dilation : job.w - 1;", "return dilation % job.w;")],
    "the second vector has the first one's weights": [("= M::load(w1 + n * GROUP)", "= M::load(w0 + n * GROUP)")],
    "an iteration is missing": [
        ("for (int64_t i = 0; i < iterations; ++i)", "for (int64_t i = 1; i < iterations; ++i)")
    ],
    "ties go up": [("const auto better = score > best;", "const auto better = score >= best;")],
    "the sum is not rescaled": [("total = better ? total * e + 1.0f", "total = better ? total + 1.0f")],
    "a chunk starts one class late": [
        ("job.first = chunk * job.classes / chunks;", "job.first = chunk * job.classes / chunks + (chunk > 0);")
    ],
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    return compile_variants(tmp_path_factory.mktemp("mutants"), "refine.cpp", list(MUTATIONS.values()), (), "-O0")


def agrees(ops) -> bool:
    """Whether maps, probabilities, and the labels of equal scores, are those of the reference."""
    for output, dilations in (((30, 41), (8, 16)), ((7, 4), (2, 9))):
        logits, windows, image = random_case((24, 32), 16, 12, (4, 3), output, classes=6, dtype=torch.float32)
        logits[:, 5] = logits[:, 2]
        options = Options((24, 32), dilations, 3, 40.0, True)
        want = refine_reference(logits.double(), windows.tolist(), image.double(), options)
        tops, lefts = ([*dict.fromkeys(windows[:, side].tolist())] for side in (0, 1))
        rows, cols = (
            window_axis(starts, 16, nodes, picture, out)
            for starts, nodes, picture, out in zip((tops, lefts), (4, 3), (24, 32), output, strict=True)
        )
        labels, scores = torch.empty(output, dtype=torch.int32), torch.empty(output)
        probabilities, maps = torch.empty(output), torch.empty(6, *output)
        tables = [t for axis in (rows, cols) for t in (axis.index.int().contiguous(), axis.weight.float().contiguous())]
        nodes = side_by_side(logits, windows.tolist(), tops, lefts).contiguous()
        ops.refine_cpu(nodes, *tables, image, dilations, 3, 40.0, labels, scores, probabilities, maps)
        bound = allowed(dilations, 3, 1.0)
        if not (maps - want.maps).abs().max() <= bound:
            return False
        if not (probabilities - want.probabilities).abs().max() <= 80 * bound:
            return False
        if not torch.equal(labels.long(), maps.argmax(0)) or not torch.equal(scores, maps.amax(0)):
            return False
    return True


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, mutants):
    assert agrees(mutants[number]) == (number == 0)
