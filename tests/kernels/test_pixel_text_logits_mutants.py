"""The comparison of the C++ pixel_text_logits with the definition notices when the code is broken on purpose."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastzs.kernels.pixel_text_logits.operator import MISSING
from fastzs.kernels.pixel_text_logits.reference import pixel_text_logits_reference

from .test_pixel_text_logits import inputs

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING["cpu"] is not None, reason=str(MISSING["cpu"])),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

# Each with what it must break: the values, the gradient, or nothing.
MUTATIONS = {
    "nothing": ("", "", ""),
    "the norm is dropped": ("V::store(factor + x, squares);", "V::store(factor + x, V::splat(1));", "values"),
    "a long sum keeps its last part": ("first == 0 ? sums[r][0] : V::load(to) + sums[r][0]", "sums[r][0]", "values"),
    "every image is the first": ("const int64_t start = image * map.image;", "const int64_t start = 0;", "values"),
    "the feature's direction stays in": ("along[k] / norm / norm", "0.0f", "gradient"),
    "the gradient's scale is dropped": ("factor[k] = job.scale / (tiny", "factor[k] = 1.0f / (tiny", "gradient"),
}  # fmt: skip


@pytest.fixture(scope="module")
def operators(tmp_path_factory):
    """All mutants in one source, for the headers' sake, each in a namespace and with operators of its own."""
    folder = tmp_path_factory.mktemp("mutants")
    source = (CSRC / "pixel_text_logits.cpp").read_text()
    includes = "".join(line for line in source.splitlines(keepends=True) if line.startswith("#include"))
    body = "".join(line for line in source.splitlines(keepends=True) if not line.startswith("#include"))
    text = includes
    for number, (right, wrong, _) in enumerate(MUTATIONS.values()):
        assert not right or body.count(right) == 1, right
        mutant = body.replace(right, wrong) if right else body
        mutant = mutant.replace("namespace fastzs {", f"namespace mutant{number} {{\nusing namespace fastzs;")
        mutant = mutant.replace("&fastzs::", f"&mutant{number}::")
        mutant = mutant.replace("(fastzs, m)", f"(fastzs_logits_mutant{number}, m)")
        text += mutant.replace("(fastzs, CPU, m)", f"(fastzs_logits_mutant{number}, CPU, m)")
    (folder / "mutants.cpp").write_text(text)
    torch_folder = Path(torch.__file__).parent
    command = ["g++", "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [f"-I{torch_folder}/include", f"-I{CSRC}", str(folder / "mutants.cpp"), f"-L{torch_folder}/lib"]
    subprocess.run([*command, "-ltorch_cpu", "-o", str(folder / "mutants.so")], check=True)
    torch.ops.load_library(str(folder / "mutants.so"))
    return [getattr(torch.ops, f"fastzs_logits_mutant{number}") for number in range(len(MUTATIONS))]


@pytest.mark.parametrize("number", range(len(MUTATIONS)), ids=MUTATIONS)
def test_only_the_unbroken_code_agrees(number, operators):
    features, text = inputs(B=2, D=300, C=14, h=5, w=14)
    weight = torch.randn(2, 14, 5, 14, generator=torch.Generator().manual_seed(1))
    exact = features.double().requires_grad_()
    wanted = pixel_text_logits_reference(exact, text.double(), 3.0)
    (grad_wanted,) = torch.autograd.grad(wanted, exact, weight.double())
    values = operators[number].pixel_text_logits(features, text, 3.0).double()
    grad = operators[number].pixel_text_logits_backward(weight, features, text, 3.0).double()
    breaks = list(MUTATIONS.values())[number][2]
    assert torch.allclose(values, wanted, rtol=1e-4, atol=1e-5) == (breaks != "values")
    if breaks != "values":  # what breaks the values may break both
        assert torch.allclose(grad, grad_wanted, rtol=1e-3, atol=1e-6) == (breaks != "gradient")
